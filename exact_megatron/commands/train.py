"""`exact-megatron train`."""

from __future__ import annotations

import argparse
import contextlib
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check",
        action="store_true",
        help="look at all that a run looks at before its model is built, print what would run, and start nothing; 2 if refused",
    )


def run(args: argparse.Namespace) -> int:
    from ..training.config import load_config
    from ..training.data_files import read_vocabulary
    from ..training.lengths import check_lengths
    from ..training.run_lock import only_writer
    from ..utils.ranks import be_single_rank, is_rank, torchrun

    if args.check:
        return check_train(args)
    run = load_config(args.config, args.overrides)
    if not is_rank():
        read_vocabulary(run)  # a bad input is one message here, and one a rank later
        check_lengths(run)
        if run.trainer.num_nodes > 1:
            raise ValueError(
                f"trainer.num_nodes={run.trainer.num_nodes}: start the ranks with torchrun on every node or with srun, "
                "`torchrun --nnodes ... -m exact_megatron train --config ...`"
            )
        if run.trainer.devices > 1:
            config = [word for file in args.config or [] for word in ("--config", file)]
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // run.trainer.devices)))
            traceback = ["--traceback"] if args.traceback else []
            with only_writer(run.exp_manager.exp_dir):  # the first rank takes it for the run
                pass
            command = torchrun(run.trainer.devices, [*traceback, "train", *config, *args.overrides])
            os.execv(command[0], command)
        be_single_rank()
    first = os.environ["RANK"] == "0"
    with only_writer(run.exp_manager.exp_dir) if first else contextlib.nullcontext():
        import torch

        from ..training.trainer import Trainer

        try:
            Trainer(run).fit()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return 0


def check_train(args: argparse.Namespace) -> int:
    """Print what `train` would run and all reasons why it would not; 0, or 2 with a reason."""
    from .doctor import native_run, run_lines

    report = native_run(args.config, args.overrides, build=True)
    print("\n".join(run_lines(report)))
    return 2 if report["refused"] else 0
