"""Ends of a run in one process a rank: short data, a stop and a crash in validation, a damaged checkpoint. Writes what happened as JSON.

RANK=.. python run_lifecycle.py CONFIG FOLDER OUT OVERRIDE...
"""

import json
import signal
import sys
from pathlib import Path

import torch

from exact_megatron.blend import whole_samples
from exact_megatron.training.config import load_config
from exact_megatron.training.trainer import Trainer, shutdown
from tests.helpers.groups import share_process_groups

config, folder, out, *overrides = sys.argv[1:]
STEPS, BATCHES = 3, 3
common = [
    f"trainer.max_steps={STEPS}",
    f"trainer.limit_val_batches={BATCHES}",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
    *overrides,
]
found = {}


def train(name, *more, prepare=lambda trainer: None):
    """What fit returned, the checkpoints, and the lines of both logs."""
    trainer = Trainer(load_config(config, [*common, f"exp_manager.exp_dir={folder}/{name}", *more]), progress=False)
    begun = trainer.step
    prepare(trainer)
    try:
        ended = trainer.fit()
    except ZeroDivisionError:
        ended = "crashed"
    torch.distributed.barrier()
    run = Path(folder, name)
    logs = [run / "metrics.jsonl", run / "validation.jsonl"]
    lines = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    found[name] = found.get(name, []) + [
        {
            "begun": begun,
            "ended": ended,
            "checkpoints": sorted(p.name for p in (run / "checkpoints").iterdir()),
            "losses": [line["lm_loss"] for line in lines[0]],
            "validated": {line["step"]: line["validation_loss"] for line in lines[1]},
        }
    ]
    shutdown()
    return trainer


def on_validation_batch(trainer, number, action):
    schedule, batches = trainer.run_schedule, []

    def run_schedule(loader, loss_func, forward_only):
        batches.append(forward_only)
        if sum(batches) == number and forward_only:
            action()
        return schedule(loader, loss_func, forward_only)

    trainer.run_schedule = run_schedule


def crash():
    raise ZeroDivisionError


def stop():
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        signal.raise_signal(signal.SIGTERM)


def watched(trainer):
    """A stop in the second batch; the third must not be computed."""
    on_validation_batch(trainer, 2, stop)
    schedule = trainer.run_schedule
    counted = []

    def count(loader, loss_func, forward_only):
        counted.append(forward_only)
        found["validation batches before the stop"] = sum(counted)
        return schedule(loader, loss_func, forward_only)

    trainer.run_schedule = count


def main():
    share_process_groups()
    trainer = train("straight")
    found["samples"] = [len(trainer.train_data), len(trainer.valid_data)]
    lengths = trainer.train_data.datasets[0].dataset.sequence_lengths
    found["an epoch"] = 2 * whole_samples(int(lengths.sum()), trainer.run.model.data.seq_length)
    train("crashed", prepare=lambda trainer: on_validation_batch(trainer, 1, crash))
    train("crashed")
    train("stopped", prepare=watched)
    train("stopped")
    unsaved = ["exp_manager.checkpoint_callback_params.every_n_train_steps=0", "trainer.val_check_interval=2"]
    train("between", *unsaved, prepare=watched)
    train("between", *unsaved)

    if torch.distributed.get_rank() == 0:
        newest = Path(folder, "straight", "checkpoints", f"step_{STEPS:08d}")
        file = max(newest.glob("*.distcp"), key=lambda f: f.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()
    train("straight")

    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # not in the helper process that writes checkpoints
    main()
