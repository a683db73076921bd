"""`exact-megatron doctor`: what is installed, which hosts can be hooked, and what a run would do."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from .allocation import WeightTable
from .config import ExactConfig
from .exposure import ExposureCensus
from .integrations.megatron_lm_plan import plan_masking, refusals
from .integrations.settings import take_settings
from .packing import read_index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--config", metavar="FILE", help="YAML of the native runner")
    parser.add_argument(
        "line",
        nargs=argparse.REMAINDER,
        metavar="key=value ... | [settings] SCRIPT ARGUMENTS",
        help="overrides of --config, or a command line as given to `exact-megatron launch`",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if the run would be refused or no host can run it."""
    rest = list(args.line)
    if "--json" in rest:  # REMAINDER takes what follows the first positional
        rest.remove("--json")
        args.json = True
    report: dict[str, Any] = {"versions": versions(), "hosts": {}}
    script = next((a for a in rest if a.endswith(".py")), None)
    report["hosts"] = hosts(Path(script).parent if script else _checkout())
    if script:
        report["run"] = _guarded(lambda: megatron_lm_run(rest))
    elif args.config or rest:
        report["run"] = _guarded(lambda: native_run(args.config, rest))
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))
    return 1 if report.get("run", {}).get("refused") else 0


def versions() -> dict[str, str]:
    """Name to version, or why there is none. Imports torch where it is installed, and nothing heavier."""
    found = {"python": platform.python_version()}
    try:
        import torch
    except (ImportError, OSError) as error:
        return found | {"torch": f"not importable: {error}"} | _packages()
    found["torch"] = torch.__version__
    found["CUDA"] = torch.version.cuda or "none (a CPU build of torch)"
    gpu = torch.cuda.is_available()
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if gpu else "none"
    found["GPU"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if gpu else "none: runs on the CPU"
    found |= _packages()
    found["FP8"] = fp8_recipes(torch.cuda.get_device_capability() if gpu else None, found["transformer-engine"])
    return found


def _packages() -> dict[str, str]:
    names = ("megatron-core", "transformer-engine", "nemo-toolkit", "megatron-bridge")
    return {name: _version(name) for name in names} | {"apex": apex()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def apex() -> str:
    """Which apex is installed: NVIDIA's, or the web toolkit that has the name on PyPI."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    if importlib.util.find_spec("apex.multi_tensor_apply") or importlib.util.find_spec("apex.transformer"):
        return f"NVIDIA's, {_version('apex')}"
    return f"{_version('apex')}, the unrelated package of that name on PyPI: uninstall it, NVIDIA's comes from source"


def fp8_recipes(capability: tuple[int, int] | None, transformer_engine: str) -> str:
    """FP8 recipes of Megatron-LM (--fp8-recipe) that a GPU of this compute capability runs."""
    if capability is None or capability < (8, 9):
        return "none: needs a GPU of compute capability 8.9 or above"
    if not transformer_engine[:1].isdigit():
        return "none: needs Transformer Engine"
    recipes = ["delayed", "tensorwise"]
    if capability >= (9, 0):
        recipes.append("blockwise")
    if capability >= (10, 0):
        recipes.append("mxfp8")
    return ", ".join(recipes)


def _checkout() -> Path | None:
    where = os.environ.get("MEGATRON_LM")
    return Path(where) if where else None


def hosts(checkout: Path | None) -> dict[str, str]:
    """Host to "hookable" and how, or why not. Reads a checkout of Megatron-LM without importing it."""
    core = _version("megatron-core")
    found = {"native": "hookable: exact-megatron train" if core[:1].isdigit() else "no: needs megatron-core"}
    found["Megatron-LM"] = (
        megatron_lm(checkout) if checkout else "not looked at: name its pretrain_gpt.py, or set MEGATRON_LM"
    )
    for host, package, module in (("NeMo", "nemo-toolkit", "nemo"), ("Megatron-Bridge", "megatron-bridge", "bridge")):
        version = _version(package)
        if not version[:1].isdigit():
            found[host] = "not installed"
        elif importlib.util.find_spec(f"exact_megatron.integrations.{module}") is None:
            found[host] = f"no: {version} is installed, this version of exact_megatron does not hook it"
        else:
            found[host] = f"hookable: {version}, see docs/hosts.md"
    return found


def megatron_lm(checkout: Path) -> str:
    """Whether pretrain_gpt.py of a checkout has what the launcher hooks."""
    script = checkout / "pretrain_gpt.py"
    if not script.is_file():
        return f"no: there is no {script}"
    version = checkout_core(checkout)
    label = ".".join(map(str, version)) if version else "of unknown version"
    if version and version < (0, 13):
        return f"no: core {label}, its loss_func reduces what it reports; 0.13 or later is needed"
    functions = {
        node.name: node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.FunctionDef)
    }
    uses = lambda name, other: (
        name in functions and any(isinstance(node, ast.Name) and node.id == other for node in ast.walk(functions[name]))
    )
    missing = [
        f"{name} uses no {other}"
        for name, other in (
            ("forward_step", "loss_func"),
            ("train_valid_test_datasets_provider", "BlendedMegatronDatasetBuilder"),
        )
        if not uses(name, other)
    ]
    loss = functions.get("loss_func")
    if loss is None or [a.arg for a in loss.args.args[:2]] != ["loss_mask", "output_tensor"]:
        missing.append("loss_func does not take (loss_mask, output_tensor, ...)")
    if missing:
        return f"no: core {label}, {'; '.join(missing)}"
    masking = "masks documents" if version is None or version >= (0, 16) else "without DocumentAttention (core < 0.16)"
    return f"hookable: core {label}, exact-megatron launch, {masking}"


def checkout_core(checkout: Path) -> tuple[int, int] | None:
    """Version of the megatron-core in a checkout, read from its package_info.py."""
    info = checkout / "megatron" / "core" / "package_info.py"
    text = info.read_text() if info.is_file() else ""
    major, minor = (re.search(rf"^{name} = (\d+)", text, re.M) for name in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else None


def _guarded(look: Any) -> dict[str, Any]:
    try:
        return look()
    except (ValueError, FileNotFoundError) as error:
        return {"refused": [str(error)]}


def native_run(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """What `exact-megatron train` would do with this configuration."""
    from .training.config import load_config, parse_blend

    run = load_config(config, overrides)
    data = run.model.data
    given = data.data_prefix
    blend = given.get("train") if isinstance(given, dict) else given
    prefixes = parse_blend(blend if isinstance(blend, list) else [blend])[0] if blend else []
    masking = (
        "masked by DocumentAttention" if data.document_masking else "not masked: documents in a sample see each other"
    )
    return _effect(run.model.exact, data.seq_length, prefixes, masking, data.eod_mask_loss)


def megatron_lm_run(command: list[str]) -> dict[str, Any]:
    """What `exact-megatron launch` would do with this command line: [settings] SCRIPT ARGUMENTS."""
    config, rest = take_settings(command, os.environ)
    script = Path(rest[0])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in (
        ("--seq-length", None), ("--context-parallel-size", 1), ("--tensor-model-parallel-size", 1),
        ("--pipeline-model-parallel-size", 1), ("--micro-batch-size", None), ("--mtp-num-layers", None),
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=default)
    for name in ("--spec", "--data-path", "--train-data-path"):
        parser.add_argument(name, nargs="*")
    for name in ("--logits-load-dir", "--export-kd-teacher-load"):
        parser.add_argument(name)
    parser.add_argument("--transformer-impl", default="transformer_engine")
    for name in ("reset-attention-mask", "eod-mask-loss", "calculate-per-token-loss", "dataloader-inter-document-masking", "sft",
                 "mock-data", "fim-data", "use-legacy-models", "perform-rl-step", "hybrid-context-parallel", "modelopt-enabled",
                 "overlap-moe-expert-parallel-comm"):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true")
    # Megatron-LM's defaults are true.
    parser.add_argument("--no-masked-softmax-fusion", dest="masked_softmax_fusion", action="store_false")
    parser.add_argument(
        "--no-create-attention-mask-in-dataloader", dest="create_attention_mask_in_dataloader", action="store_false"
    )
    parser.add_argument("--dataloader-type")
    parser.add_argument("--eval-micro-batch-size", type=int)
    args, _ = parser.parse_known_args(rest[1:])
    core = checkout_core(script.parent)
    hooked = megatron_lm(script.parent)
    refused = [hooked] if hooked.startswith("no") else []
    if config.enabled:
        refused += refusals(args, config, core)
    try:
        masking = plan_masking(args, config, core)[1] if config.enabled else "the script's own: EXACT is not enabled"
    except ValueError:
        masking = "not masked: documents in a sample would see each other"
    blend = args.train_data_path or args.data_path or []
    prefixes = [entry for entry in blend if not re.fullmatch(r"[\d.eE+-]+", entry)]
    effect = _effect(config, args.seq_length, prefixes, masking, args.eod_mask_loss)
    return effect | {"refused": (refused if config.enabled else []) + effect["refused"]}


def _effect(exact: ExactConfig, seq_length: int | None, prefixes: list[str], masking: str, eod: bool) -> dict[str, Any]:
    """Window, tau and tail share of data in stored order, once; the run itself counts its own stream, blend and epochs."""
    found: dict[str, Any] = {"enabled": exact.enabled, "documents": masking, "refused": []}
    if seq_length is None:
        return found | {"window": None}
    config = exact.validated(seq_length)
    found |= {"window": seq_length, "tau": config.tau, "alpha": config.alpha, "gamma": config.gamma}
    if prefixes:
        parts = [
            ExposureCensus.from_document_lengths(read_index(p).lengths, seq_length, eod_mask_loss=eod) for p in prefixes
        ]
        table = WeightTable.from_census(sum(parts[1:], parts[0]), config)
        found |= {
            "tail_share": table.tail_share,
            "weighted_tail_share": table.weighted_tail_share,
            "data": len(prefixes),
        }
    return found


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    text = [f"{name:<20}{value}" for name, value in report["versions"].items()]
    text += ["", *(f"{name:<20}{value}" for name, value in report["hosts"].items())]
    run = report.get("run")
    if run is None:
        return text
    text.append("")
    if "window" in run:
        text.append(f"{'EXACT':<20}{'enabled' if run['enabled'] else 'off: model.exact.enabled=false'}")
        text.append(f"{'documents':<20}{run['documents']}")
    if run.get("window"):
        text.append(f"{'window, tau':<20}{run['window']}, {run['tau']} (alpha {run['alpha']}, gamma {run['gamma']})")
    if "tail_share" in run:
        share = f"{run['tail_share']:.1%} of the targets, {run['weighted_tail_share']:.1%} of the weight"
        text.append(f"{'tail':<20}{share} ({run['data']} file pairs in stored order, once)")
    text += [f"{'refused':<20}{reason}" for reason in run["refused"]] or [
        f"{'refused':<20}nothing that doctor looks at (the model's own settings are checked when it is built)"
    ]
    return text
