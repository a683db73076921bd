"""Rank script: load converted checkpoints in a layout and write their logits.

argv: a JSON file with jobs {"model": folder of convert, "overrides": [...], "tokens": [[...]], "out": file without ending}; from
the last pipeline stage, OUT.pt has float32 [b, s, padded vocabulary].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from exact_megatron.attention import document_boundaries
    from exact_megatron.training import checkpoint
    from exact_megatron.training.config import load_config
    from exact_megatron.training.model import build_model
    from exact_megatron.training.trainer import init_distributed, shutdown

    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        tokens = torch.tensor(job["tokens"])
        size, length = tokens.shape
        data = ["model.data.data_prefix=[none]", "trainer.accelerator=cpu", f"model.data.seq_length={length}"]
        run = load_config(Path(job["model"], "model.yaml"), [*data, *job["overrides"]])
        device = init_distributed(run)
        model = build_model(run, run.model.override_vocab_size, device)
        path = checkpoint.find_checkpoint(run.restore_from_path)
        positions = checkpoint.refuse_other_model(checkpoint.read_state(path), run, run.model.override_vocab_size)
        assert bool(positions) == job.get("other_positions", False), positions
        checkpoint.load_weights(path, model)
        packed = document_boundaries(torch.arange(0, size * length + 1, length, dtype=torch.int32), length, size)

        def step(iterator, chunk):
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            logits = chunk(tokens, positions, None, packed_seq_params=packed)  # noqa: B023
            return logits, lambda output, non_loss_data=False: gather_from_tensor_model_parallel_region(output)

        with torch.no_grad():
            found = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[None] * len(model) if len(model) > 1 else None,
                model=model if len(model) > 1 else model[0],
                num_microbatches=1,
                seq_length=length,
                micro_batch_size=size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
            torch.save(found[0].float(), job["out"] + ".pt")
        shutdown()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
