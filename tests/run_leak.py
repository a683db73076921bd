"""Rank script: logits and gradients of one document while its neighbours in the sample change.

Writes {"logits": bool, "gradients": bool, "moved": bool} for bitwise equality, and that a change inside is seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch

    from exact_megatron.attention import document_boundaries
    from exact_megatron.training.config import load_config
    from exact_megatron.training.trainer import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(load_config(sys.argv[1]), progress=False)
    model, seq_length = trainer.model[0], trainer.run.model.data.seq_length
    cuts = [0, 5, 6, 30, 47, seq_length]
    start, end = 6, 30
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 90, (1, seq_length), generator=generator)
    positions = torch.arange(seq_length)[None]
    inside = torch.zeros(1, seq_length)
    inside[:, start : end - 1] = 1

    def run(tokens: torch.Tensor, packed: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
        boundaries = document_boundaries(cuts, seq_length) if packed else None
        logits = model(tokens, positions, None, packed_seq_params=boundaries)[:, start:end].detach().clone()
        model.zero_grad_buffer()
        losses = model(tokens, positions, None, labels=tokens.roll(-1, 1), packed_seq_params=boundaries)
        (losses * inside).sum().backward()
        return logits, [p.main_grad.clone() for p in model.parameters()]

    logits, gradients = run(tokens)
    others = tokens.clone()
    others[:, :start] = torch.randint(1, 90, (1, start), generator=generator)
    others[:, end:] = torch.randint(1, 90, (1, seq_length - end), generator=generator)
    other_logits, other_gradients = run(others)
    unmasked, leaking = run(tokens, packed=False)[0], run(others, packed=False)[0]
    result = {
        "logits": torch.equal(logits, other_logits),
        "gradients": all(torch.equal(a, b) for a, b in zip(gradients, other_gradients)),
        "nonzero": all(g.abs().sum() > 0 for g in gradients),
        "unmasked_leaks": not torch.equal(unmasked, leaking),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
