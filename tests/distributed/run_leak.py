"""Rank script: logits and gradients of one document while its neighbours in the sample change.

One rank, or several context-parallel ranks that hold parts of the document, with each exchange in turn. Writes a list of
{"logits", "gradients": bitwise the same, "nonzero": there are gradients, "unmasked_leaks": without boundaries the change is seen}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

CUTS = [0, 5, 6, 30, 47, 64]
START, END = 6, 30


def leaks(config: str, overrides: list[str]) -> dict[str, bool]:
    """This rank's findings."""
    import torch
    from megatron.core import parallel_state

    from exact_megatron.attention import document_boundaries
    from exact_megatron.training.config import load_config
    from exact_megatron.training.trainer import Trainer, shutdown

    trainer = Trainer(load_config(config, overrides), progress=False)
    model, seq_length = trainer.model[0], trainer.run.model.data.seq_length
    rank, cp = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    chunks = torch.arange(seq_length).chunk(2 * cp)
    here = torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])
    document = (here >= START) & (here < END)
    supervised = (document & (here < END - 1)).float()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 90, (1, seq_length), generator=generator)

    def run(tokens: torch.Tensor, packed: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
        boundaries = document_boundaries(CUTS, seq_length) if packed else None
        mine, labels, positions = tokens[:, here], tokens.roll(-1, 1)[:, here], here[None]
        logits = model(mine, positions, None, packed_seq_params=boundaries)[:, document].detach().clone()
        model.zero_grad_buffer()
        losses = model(mine, positions, None, labels=labels, packed_seq_params=boundaries)
        (losses * supervised).sum().backward()
        return logits, [p.main_grad.clone() for p in model.parameters()]

    logits, gradients = run(tokens)
    others = tokens.clone()
    others[:, :START] = torch.randint(1, 90, (1, START), generator=generator)
    others[:, END:] = torch.randint(1, 90, (1, seq_length - END), generator=generator)
    other_logits, other_gradients = run(others)
    unmasked, leaking = run(tokens, packed=False)[0], run(others, packed=False)[0]
    shutdown()
    return {
        "logits": document.any().item() and torch.equal(logits, other_logits),
        "gradients": all(torch.equal(a, b) for a, b in zip(gradients, other_gradients)),
        "nonzero": all(bool(g.abs().sum() > 0) for g in gradients),
        "unmasked_leaks": not torch.equal(unmasked, leaking),
    }


def main() -> None:
    import torch

    from tests.helpers.groups import share_process_groups

    torch.set_num_threads(1)
    share_process_groups()
    world = int(os.environ["WORLD_SIZE"])
    parallel = [f"trainer.devices={world}", f"model.context_parallel_size={world}"]
    exchanges = [[]] if world == 1 else [["model.cp_comm_type=a2a"], ["model.cp_comm_type=all_gather"]]
    results: list[dict[str, bool]] = []
    for exchange in exchanges:
        every: list[Any] = [None] * world
        found = leaks(sys.argv[1], [*parallel, *exchange])
        torch.distributed.all_gather_object(every, found)
        results += every
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
