"""What Megatron-LM itself would reject of a command line, and how a pasted one starts its script. Standard library only."""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...refusals import Row, is_set

_LAUNCHERS = {"torchrun", "srun", "mpirun", "accelerate", "exact-megatron", "env"}
_MODULES = ("exact_megatron.launch", "launch")  # python -m exact_megatron.launch, exact-megatron launch


@dataclass(frozen=True)
class Line:
    """A command line: how it starts the script, and what the launcher would get.

    Attributes:
        command: [settings] SCRIPT ARGUMENTS.
        environment: variables that are set before the command.
        world: ranks that torchrun would start; None where that is not on the line.
        launched: whether EXACT's launcher starts the script: it is on the line, or only its own arguments were given.
    """

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    world: int | None = None
    launched: bool = True


def pasted(words: list[str]) -> Line:
    """Part a line from a terminal or a job's script, `[settings] [NAME=VALUE ...] [torchrun ...] [settings] SCRIPT ARGUMENTS`."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    before = words[:at]
    names = [word.rpartition("/")[2] for word in before]
    first = next((i for i, name in enumerate(names) if name in _LAUNCHERS or re.fullmatch(r"python[\d.]*", name)), None)
    if first is None:
        first = at
    variables = [word for word in before[:first] if re.match(r"[A-Z_][A-Z0-9_]*=", word)]
    environment = dict(word.split("=", 1) for word in variables)
    given = [word for word in before[:first] if word not in variables and word != "export"]
    launch = next((i for i in range(first, at) if before[i] in _MODULES), None)
    settings = before[launch + 1 :] if launch is not None else []
    return Line(
        command=[*given, *settings, *words[at:]],
        environment=environment,
        world=_world(before[first:launch]),
        launched=launch is not None or first == at or bool(given),
    )


def _world(words: list[str]) -> int | None:
    sizes = {}
    pairs = " ".join(words)
    for name, default in (("nproc-per-node", None), ("nnodes", "1")):
        found = re.search(rf"--{name.replace('-', '[-_]')}[= ](\S+)", pairs)
        size = found[1] if found else default
        if size is None or not size.isdigit():
            return None
        sizes[name] = int(size)
    return sizes["nproc-per-node"] * sizes["nnodes"]


def options(script: Path) -> set[str]:
    """Options that Megatron-LM's parser in the script's checkout may know, and those that the script adds; empty where there is no
    checkout, or where unknown ones are ignored."""
    training = script.parent / "megatron" / "training"
    parser = script.parent / "megatron/training/arguments.py"
    own = script.read_text()
    if not parser.is_file() or re.search(r"ignore_unknown_args\s*=\s*True", own):
        return set()
    files = [*training.rglob("*.py"), *(script.parent / "megatron" / "post_training").rglob("*.py")]
    files += (script.parent / "megatron" / "core").rglob("*.py")
    texts = [own, *(file.read_text() for file in [*script.parent.glob("*.py"), *files])]
    fields = "ArgumentGroupFactory" in parser.read_text()  # options from the fields of dataclasses
    names = {"help"}
    for text in texts:
        names |= set(re.findall(r"""["']--([A-Za-z][\w-]*)["']""", text))
        if fields and re.search(r"^class \w+Config\b", text, re.M):
            names |= {name.replace("_", "-") for name in re.findall(r"^    (\w+)\s*:", text, re.M)}
    return {f"--{prefix}{name}" for name in names for prefix in ("", "no-", "disable-")}


def unknown_options(words: list[str], known: set[str]) -> list[str]:
    """Reasons: options of a line that the parser does not know, with the nearest one."""
    if not known:
        return []
    given = dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--"))
    found = []
    for flag in [flag for flag in given if flag not in known]:
        near = difflib.get_close_matches(flag, known, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        found.append(f"{flag} is no option of this Megatron-LM{hint}")
    return found


def calls_upstream(source: str) -> tuple[str | None, set[str]]:
    """Why the launcher would not hook a script's `pretrain`, or None; and what the script hooks itself: "hook", "from_command_line"."""
    tree = ast.parse(source)
    pretrain, modules, names = None, set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
            if any((alias.asname or alias.name) == "pretrain" for alias in node.names):
                pretrain = node.module or "."
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    exact = any(module.split(".")[0] == "exact_megatron" for module in modules)
    hooks = {"hook", "from_command_line"} & names if exact else set()
    stock = {"megatron.training", "megatron.training.training"}
    if "from_command_line" in hooks or pretrain in stock:
        return None, hooks
    if pretrain is not None:
        return f"its pretrain is that of {pretrain}, not of megatron.training", hooks
    if any(isinstance(node, ast.FunctionDef) and node.name == "pretrain" for node in tree.body):
        return "it has a pretrain of its own, and not that of megatron.training", hooks
    if "pretrain" in names and modules & stock | (modules & {"megatron"}):
        return None, hooks
    return "it calls no pretrain of megatron.training", hooks


def other_kinds(source: str) -> tuple[str | None, str | None]:
    """(a model, a class of data) of megatron.core that a script imports in place of GPTModel and GPTDataset."""
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core.")
        for alias in node.names
    }
    models = sorted(name for name in imported if name.endswith("Model"))
    data = sorted(name for name in imported if name.endswith("Dataset"))
    model = models[0] if models and "GPTModel" not in models else None
    return model, data[0] if data and "GPTDataset" not in data else None


def _needs(flag: str, *others: str) -> Row:
    names = [name.removeprefix("--").replace("-", "_") for name in (flag, *others)]
    return Row(" ".join(names), lambda *values: all(value is None for value in values), f"{flag} is not on the line")


def _divides(whole: str, part: str, unless: str = "") -> Row:
    """Rejects if `whole` is no multiple of the product of the sizes named in `part`."""

    def sizes(values: tuple[Any, ...]) -> tuple[Any, int]:
        product = 1
        for value in values[1 : 1 + len(part.split())]:
            product *= 1 if value is None else value
        return values[0], product

    def rejects(*values: Any) -> bool:
        size, product = sizes(values)
        off = any(is_set(value) for value in values[1 + len(part.split()) :])
        return isinstance(size, int) and not off and (product < 1 or size % product != 0)

    def says(*values: Any) -> str:
        size, product = sizes(values)
        return f"{whole}={size} is no multiple of {' * '.join(part.split())}={product}"

    return Row(f"{whole} {part} {unless}".strip(), rejects, says)


_OTHER_STAGES = """
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers pipeline_model_parallel_layout
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
"""
_STORED = "--use-checkpoint-args"
_PATTERNS = ("--hybrid-layer-pattern", "--hybrid-override-pattern")
# What Megatron-LM's validate_args, TransformerConfig and microbatch calculator assert (megatron/training/arguments.py and others).
ROWS = (
    _needs("--num-layers", "--encoder-num-layers", "--heterogeneous-layers-config-path", *_PATTERNS, _STORED),
    _needs("--hidden-size", _STORED),
    _needs("--num-attention-heads", _STORED),
    _needs("--max-position-embeddings", _STORED),
    _needs("--micro-batch-size"),
    _needs("--train-iters", "--train-samples", "--skip-train"),
    _needs("--lr", "--skip-train"),
    Row(
        "train_iters train_samples",
        lambda steps, samples: bool(steps and samples),
        "--train-iters and --train-samples are both on the line: give one",
    ),
    Row(
        "max_position_embeddings seq_length",
        lambda positions, window: isinstance(positions, int) and isinstance(window, int) and positions < window,
        lambda positions, window: f"max_position_embeddings={positions} is less than seq_length={window}",
    ),
    _divides("hidden_size", "num_attention_heads", "kv_channels"),
    _divides("num_attention_heads", "tensor_model_parallel_size"),
    Row(
        "group_query_attention num_query_groups tensor_model_parallel_size",
        lambda grouped, groups, tp: bool(grouped and groups and tp and groups % tp and tp % groups),
        lambda _, groups, tp: (
            f"num_query_groups={groups} is neither multiple nor divisor of tensor_model_parallel_size={tp}"
        ),
    ),
    Row(
        "group_query_attention num_query_groups num_attention_heads",
        lambda grouped, groups, heads: bool(grouped and groups and heads and heads % groups),
        lambda _, groups, heads: f"num_attention_heads={heads} is no multiple of num_query_groups={groups}",
    ),
    _divides("num_layers", "pipeline_model_parallel_size", _OTHER_STAGES),
    _divides("num_layers", "pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank", _OTHER_STAGES),
    _divides("num_layers", "pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage", _OTHER_STAGES),
    Row(
        "seq_length context_parallel_size",
        lambda window, cp: isinstance(window, int) and (cp or 1) > 1 and window % (2 * cp) != 0,
        lambda window, cp: f"seq_length={window} is no multiple of 2 * context_parallel_size={2 * cp}",
    ),
    Row(
        "seq_length tensor_model_parallel_size context_parallel_size sequence_parallel",
        lambda window, tp, cp, on: bool(on and isinstance(window, int) and window % ((tp or 1) * (cp or 1))),
        lambda window, tp, cp, _: (
            f"seq_length={window} is no multiple of tensor_model_parallel_size * context_parallel_size={(tp or 1) * (cp or 1)}"
        ),
    ),
    _divides("world_size", "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size"),
    _divides("global_batch_size", "micro_batch_size data_parallel_size"),
)
