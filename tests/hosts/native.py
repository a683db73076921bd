"""One rank of the native runner from the weights of a Megatron-LM checkpoint: native.py CONFIG WEIGHTS STEPS OUT.json"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    import torch
    from megatron.core import dist_checkpointing

    from exact_megatron.training.config import load_config
    from exact_megatron.training.data import build_loader
    from exact_megatron.training.trainer import Trainer

    os.environ["MASTER_PORT"] = "0"  # one rank: any
    config, weights, steps, out = sys.argv[1:]
    torch.set_num_threads(1)
    run = load_config(config, [])
    trainer = Trainer(run, progress=False)
    model = trainer.model[0].module
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, weights)
    model.load_state_dict(state["model"])
    trainer.optimizer.reload_model_params()
    loader = iter(build_loader(run, trainer.train_data, trainer.vocabulary, 0))
    Path(out).write_text(json.dumps([trainer.train_step(loader) for _ in range(int(steps))]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
