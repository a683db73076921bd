"""Rank script: run each job of a JSON file in turn and write the metrics of its steps.

A job is {"name", "overrides": [...], "steps": n, "save": bool, "attention": mode}; results go to OUT/NAME.json from
rank 0. `attention` is the mode that every layer's DocumentAttention must have; None is any.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch

    from exact_megatron.attention import DocumentAttention
    from exact_megatron.training.config import load_config
    from exact_megatron.training.data import build_loader
    from exact_megatron.training.trainer import Trainer, shutdown
    from tests.helpers.groups import share_process_groups

    config, jobs, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(1)
    share_process_groups()
    for job in jobs:
        run = load_config(config, [f"exp_manager.exp_dir={out}/runs/{job['name']}", *job["overrides"]])
        trainer = Trainer(run, progress=False)
        layers = [layer for chunk in trainer.model for layer in chunk.module.decoder.layers]
        cores = [layer.self_attention.core_attention for layer in layers]
        assert cores and all(isinstance(core, DocumentAttention) for core in cores), cores
        modes = {core.mode for core in cores}
        assert job.get("attention") is None or modes == {job["attention"]}, (job, modes)
        consumed = trainer.step * run.model.global_batch_size
        loader = iter(build_loader(run, trainer.train_data, trainer.vocabulary, consumed))
        lines = [trainer.train_step(loader) for _ in range(job["steps"])]
        if job.get("save"):
            trainer.save()
        if trainer.valid_data is not None:
            lines.append(trainer.validate())
        if torch.distributed.get_rank() == 0:
            (out / f"{job['name']}.json").write_text(json.dumps(lines))
        shutdown()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
