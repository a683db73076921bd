"""The `exact-megatron` command."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
import warnings
from dataclasses import dataclass

from . import __version__
from .config import ExactError
from .utils import extras
from .utils.files import STDOUT, writing

READER_GONE = 141  # as a shell reports a program that SIGPIPE ended
TRACEBACK = "--traceback"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: where it is, imported only when the command is given: a command needs no other's packages.
        help: one line for `exact-megatron --help`.
        configured: takes --config and key=value.
        add_arguments, run: names of its functions there, (parser) -> None and (arguments) -> exit code.
    """

    module: str
    help: str
    configured: bool = False
    add_arguments: str = "add_arguments"
    run: str = "run"


COMMANDS = {
    "prepare": Command(".prepare.command", "text to Megatron .bin/.idx, with a tokenizer of your own or a given one"),
    "census": Command(
        ".commands.census", "how much context the targets of a data set have, and what EXACT makes of it"
    ),
    "train": Command(".commands.train", "train with the native runner", configured=True),
    "plan": Command(
        ".planning.plan", "layout, memory, tokens and hours of a run, before it is started", configured=True
    ),
    "study": Command(".study.command", "arms x seeds x bases from one YAML, with differences between runs and a page"),
    "compare": Command(
        ".commands.compare", "baseline and EXACT from the same base checkpoint, with a report", configured=True
    ),
    "convert": Command(".convert", "Hugging Face models in and out of the native runner"),
    "benchmark": Command(".benchmark.command", "speed against Megatron's own, in ratios of one run"),
    "evaluate": Command(".evaluation.command", "RULER, NoLiMa, a distance probe, loss by context, and short tasks"),
    "evaluate compare": Command(
        ".evaluation.command",
        "two evaluated models on the same items, with intervals",
        add_arguments="add_compare_arguments",
        run="run_compare",
    ),
    "launch": Command("", "run a training script of Megatron-LM, unchanged, with EXACT hooked in: launch --help"),
    "doctor": Command(".commands.doctor", "what is installed, what can be hooked, and what a run would do"),
    "files": Command(".commands.files", "copy configs, examples, patches and Slurm scripts into a folder of yours"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    A problem with the user's input is one line on stderr and code 2. A reader of the output that leaves early, `| head`, is
    no problem: nothing is said, and the code is 141.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:  # started with >&-
                with writing(STDOUT):
                    sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return READER_GONE
    except OSError as error:
        if error.filename != STDOUT:
            raise
        _discard_output()
        print(f"exact-megatron: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # rich ends the program so
        if isinstance(end.__context__, BrokenPipeError):
            return READER_GONE
        raise


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads; what is still to be written goes nowhere then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    _discard_output()
    return True


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(given: list[str]) -> int:
    given, traceback = _take_traceback(given)
    if given[:1] == ["launch"]:  # the script's arguments, and its errors, are its own
        from .launch import main as launch

        return launch(given[1:], traceback)
    if given[:1] != ["doctor"] and (where := _empty_word(given)):
        print(
            f"exact-megatron: error: argument {where}: the name is empty: is a variable of the shell unset?",
            file=sys.stderr,
        )
        return 2
    if given[:2] == ["evaluate", "compare"]:  # a parser of its own: `evaluate`'s options are about one model
        given = ["evaluate compare", *given[2:]]
    name = next((word for word in given if not word.startswith("-")), "")
    _quiet_warnings()
    try:
        args = _parse(name, given)
        args.traceback = traceback
        return args.run(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ExactError, ImportError) as error:
        if getattr(error, "filename", None) == STDOUT:
            raise  # it is said once, where what is left in the buffer fails again
        said: object = extras.remedy(error) if isinstance(error, ImportError) else error
        if traceback or said is None:
            raise
        print(f"exact-megatron {name}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(name: str, given: list[str]) -> argparse.Namespace:
    """The arguments of a command line; only the command `name` is imported and has its options."""
    parser = argparse.ArgumentParser(prog="exact-megatron", description=__doc__)
    parser.add_argument("--version", action="version", version=f"exact-megatron {__version__}")
    parser.add_argument(
        TRACEBACK, action="store_true", help="show where an error was found; before or after the command"
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for known, command in COMMANDS.items():
        add = parsers.add_parser(known, help=command.help)
        if known != name or not command.module:
            continue
        module = importlib.import_module(command.module, __package__)
        if command.configured:
            _add_run_arguments(add)
        getattr(module, command.add_arguments)(add)
        add.set_defaults(run=getattr(module, command.run))
    if name == "doctor":  # a launcher's line may begin with a flag of its own: doctor --exact-enabled SCRIPT
        args, flags = parser.parse_known_args(given)
        args.line = [*flags, *args.line]
        return args
    return parser.parse_args(given)


def _take_traceback(given: list[str]) -> tuple[list[str], bool]:
    """The command line without --traceback, and whether it was there: before the command, and after it among its own options.

    A script's arguments (launch, doctor) are the script's, and what follows -- is no option.
    """
    scripted = next((word for word in given if word != TRACEBACK), "") in ("launch", "doctor")
    own = len(given)
    if scripted:
        own = next((i for i, word in enumerate(given) if word not in (TRACEBACK, "launch", "doctor")), own)
    elif "--" in given:
        own = given.index("--")
    rest = [word for word in given[:own] if word != TRACEBACK]
    return rest + given[own:], len(rest) < own


def _empty_word(given: list[str]) -> str | None:
    """What a word of a command line without a value belongs to; None: there is none."""
    for number, word in enumerate(given):
        option, equals, value = word.partition("=")
        if equals and option.startswith("--") and not value.strip():
            return option
        if not word.strip():
            before = given[number - 1] if number else ""
            return before if before.startswith("--") else f"{number} of the command line"
    return None


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML, see configs/ (`exact-megatron files` copies it out); given again, the later file wins key by key",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.exact.enabled=true")


def _quiet_warnings() -> None:
    """Upstream's notices (no apex, no Transformer Engine, deprecations), once a rank, would hide our own messages."""
    if not os.environ.get("EXACT_WARNINGS"):
        warnings.filterwarnings("ignore", module=r"(megatron|torch|transformer_engine)\b")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
