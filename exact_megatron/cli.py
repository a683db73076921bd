"""The `exact-megatron` command."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

from . import __version__
from .config import PREFIX, ExactConfig, ExactError


def main(argv: list[str] | None = None) -> int:
    """Run one command; a problem with the user's input is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="exact-megatron", description=__doc__)
    parser.add_argument("--version", action="version", version=f"exact-megatron {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an input error was found")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = commands.add_parser("prepare", help="text to Megatron .bin/.idx, with a tokenizer of your own or a given one")
    from . import prepare

    prepare.add_arguments(add)
    add.set_defaults(run=prepare.run)

    add = commands.add_parser(
        "census", help="how much context the targets of a data set have, and what EXACT makes of it"
    )
    add.add_argument("prefix", nargs="+", help="common prefix of a .bin/.idx pair; several are counted together")
    add.add_argument("--seq-length", type=int, required=True, help="window in tokens")
    defaults = ExactConfig()
    add.add_argument("--alpha", type=float, default=defaults.alpha)
    add.add_argument("--gamma", type=float, default=defaults.gamma)
    add.add_argument(
        "--tau", type=int, default=defaults.tau, help="lower edge of the tail; default: a quarter of the window"
    )
    add.add_argument("--eps", type=float, default=defaults.eps)
    add.add_argument("--normalization", choices=("corpus", "none"), default=defaults.normalization)
    add.add_argument("--max-weight", type=float, default=defaults.max_weight)
    add.add_argument("--eod-mask-loss", action="store_true", help="targets after a document's EOD are not supervised")
    add.add_argument("--json", metavar="FILE", help="write the table as JSON; - is standard output")
    add.add_argument("--plot", metavar="FILE", help="draw where supervision goes, before and after (PNG, SVG or PDF)")
    add.set_defaults(run=run_census)

    add = commands.add_parser("train", help="train with the native runner")
    _add_run_arguments(add)
    add.set_defaults(run=run_train)

    add = commands.add_parser("plan", help="layout, memory, tokens and hours of a run, before it is started")
    _add_run_arguments(add)
    from . import plan

    plan.add_arguments(add)
    add.set_defaults(run=plan.run)

    add = commands.add_parser("compare", help="baseline and EXACT from the same base checkpoint, with a report")
    _add_run_arguments(add)
    add.add_argument(
        "--base-seq-length", type=int, required=True, help="window of the plain pretraining that makes the base"
    )
    add.add_argument(
        "--base-steps", type=int, required=True, help="its optimizer steps; global_batch_size is kept in tokens"
    )
    add.set_defaults(run=run_compare)

    add = commands.add_parser("convert", help="Hugging Face models in and out of the native runner")
    from . import convert

    convert.add_arguments(add)
    add.set_defaults(run=convert.run)

    add = commands.add_parser("benchmark", help="speed against Megatron's own, in ratios of one run")
    from . import benchmark

    benchmark.add_arguments(add)
    add.set_defaults(run=benchmark.run)

    add = commands.add_parser("evaluate", help="RULER, NoLiMa, a distance probe, loss by context, and short tasks")
    from .evaluation import command as evaluation

    evaluation.add_arguments(add)
    add.set_defaults(run=evaluation.run)
    add = commands.add_parser("evaluate compare", help="two evaluated models on the same items, with intervals")
    evaluation.add_compare_arguments(add)
    add.set_defaults(run=evaluation.run_compare)

    commands.add_parser(
        "launch",
        help="run a training script of Megatron-LM, unchanged, with EXACT hooked in: launch --help",
        add_help=False,
    )
    add = commands.add_parser("doctor", help="what is installed, what can be hooked, and what a run would do")
    from . import doctor

    doctor.add_arguments(add)
    add.set_defaults(run=doctor.run)

    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["launch"]:  # the script's arguments, and its errors, are its own
        from .launch import main as launch

        return launch(given[1:])
    if given[:2] == ["evaluate", "compare"]:  # a parser of its own: `evaluate`'s options are about one model
        given = ["evaluate compare", *given[2:]]
    if given[:1] == ["doctor"]:  # a launcher's line may begin with a flag of its own: doctor --exact-enabled SCRIPT
        args, flags = parser.parse_known_args(given)
        args.line = [*flags, *args.line]
    else:
        args = parser.parse_args(given)
    _quiet_warnings()
    try:
        return args.run(args)
    except (ValueError, OSError, ExactError) as error:
        if args.traceback:
            raise
        print(f"exact-megatron {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML, see configs/; given again, the later file wins key by key",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.exact.enabled=true")


def run_census(args: argparse.Namespace) -> int:
    from .allocation import WeightTable
    from .exposure import ExposureCensus
    from .packing import read_index
    from .report import census_json, plot_census, print_census

    config = ExactConfig(
        alpha=args.alpha,
        gamma=args.gamma,
        tau=args.tau,
        eps=args.eps,
        normalization=args.normalization,
        max_weight=args.max_weight,
    ).validated(args.seq_length)
    parts = [
        ExposureCensus.from_document_lengths(
            read_index(prefix).lengths, args.seq_length, eod_mask_loss=args.eod_mask_loss
        )
        for prefix in args.prefix
    ]
    census = sum(parts[1:], parts[0])
    table = WeightTable.from_census(census, config)
    if args.json == "-":
        print(json.dumps(census_json(census, table), indent=1))
        return 0
    print_census(census, table)
    if args.json:
        Path(args.json).write_text(json.dumps(census_json(census, table), indent=1) + "\n")
    if args.plot:
        plot_census(census, table, args.plot)
        print(f"picture: {args.plot}")
    return 0


def run_train(args: argparse.Namespace) -> int:
    from .training.config import load_config
    from .training.launch import be_single_rank, is_rank, torchrun
    from .training.lengths import check_lengths
    from .training.run_lock import only_writer
    from .training.vocabulary import read_vocabulary

    run = load_config(args.config, args.overrides)
    if not is_rank():
        read_vocabulary(run)  # a bad input is one message here, and one a rank later
    check_lengths(run)
    if not is_rank():
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

        from .training.trainer import Trainer

        try:
            Trainer(run).fit()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from .training.compare import compare

    for override in args.overrides:
        if override.lstrip("+").startswith(f"{PREFIX}enabled"):
            raise ValueError("compare sets model.exact.enabled itself: one arm without, one with")
    compare(args.config, args.overrides, args.base_seq_length, args.base_steps)
    return 0


def _quiet_warnings() -> None:
    """Upstream's notices (no apex, no Transformer Engine, deprecations), once a rank, would hide our own messages."""
    if not os.environ.get("EXACT_WARNINGS"):
        warnings.filterwarnings("ignore", module=r"(megatron|torch|transformer_engine)\b")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
