"""Rank script: one step of each job of a JSON file, then what every rank's memory.json says; on one rank also what autograd
saved in a forward pass, and the operations of its matrix products."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch

    from exact_megatron.training.config import load_config
    from exact_megatron.training.data import build_loader
    from exact_megatron.training.memory_record import record_memory
    from exact_megatron.training.trainer import Trainer, shutdown
    from tests.helpers.groups import share_process_groups

    config, jobs, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(1)
    share_process_groups()
    for name, overrides in jobs.items():
        run = load_config(config, [f"exp_manager.exp_dir={out}/{name}", *overrides])
        trainer = Trainer(run, progress=False)
        loader = iter(build_loader(run, trainer.train_data, trainer.vocabulary, 0))
        if name == "fit":
            trainer.fit()
        elif name.startswith("saved"):
            (out / f"{name}.json").write_text(json.dumps(forward(trainer, loader)))
        else:
            trainer.run_dir.mkdir(exist_ok=True)
            trainer.train_step(loader)
            memory = trainer.run_dir / "memory.json"
            record_memory(
                memory, trainer.step, trainer.vocabulary.vocab_size, trainer.model, trainer.optimizer, trainer.device
            )
        shutdown()
    torch.distributed.destroy_process_group()


def forward(trainer, loader) -> dict[str, int]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    parameters = {p.untyped_storage().data_ptr() for p in trainer.model[0].parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too: its address must not be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as flops:
        trainer.forward_step(trainer.loss_func, loader, trainer.model[0])
    products = flops.get_flop_counts()["Global"]
    matrices = sum(
        n for op, n in products.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    )
    return {"bytes": sum(size for size, _ in saved.values()), "matrix_flops": matrices}


if __name__ == "__main__":
    main()
