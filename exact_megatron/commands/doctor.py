"""`exact-megatron doctor`: what is installed, which hosts can be hooked, and what a run would do."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..allocation import WeightTable
from ..blend import stored_order
from ..config import ExactConfig, ExactError
from ..exposure import ExposureCensus
from ..integrations.megatron_lm_arguments import plan_masking, read_arguments, refusals, training_data
from ..integrations.nemo_arguments import check_version
from ..integrations.script import parse
from ..packing import read_index
from ..utils import extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--config", metavar="FILE", action="append", help="YAML of the native runner; given again, later wins"
    )
    parser.add_argument(
        "line",
        nargs=argparse.REMAINDER,
        metavar="key=value ... | [settings] SCRIPT ARGUMENTS",
        help="overrides of --config, or a command line as given to `exact-megatron launch`",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if the run would be refused."""
    rest = list(args.line)
    if "--json" in rest:  # REMAINDER takes what follows the first positional
        rest.remove("--json")
        args.json = True
    report: dict[str, Any] = {"versions": versions(), "hosts": {}}
    script = next((a for a in rest if a.endswith(".py")), None)
    report["hosts"] = hosts(Path(script) if script else _checkout())
    if script:
        report["run"] = megatron_lm_run(rest)
    elif args.config or rest:
        report["run"] = native_run(args.config, rest)
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
    te = found["transformer-engine"]
    if te[:1].isdigit() and not gpu:
        found["transformer-engine"] = f"{te}, without a GPU not used: exact-megatron train takes torch's Adam and norms"
    found["FP8"] = fp8_recipes(torch.cuda.get_device_capability() if gpu else None, te)
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
    return Path(where) / "pretrain_gpt.py" if where else None


def _checkout_of_environment() -> Path:
    return Path(os.environ.get("MEGATRON_LM", "."))


def hosts(script: Path | None) -> dict[str, str]:
    """Host to "hookable" and how, or why not. Reads a script of Megatron-LM and its checkout without importing them."""
    core = _version("megatron-core")
    found = {"native": "hookable: exact-megatron train" if core[:1].isdigit() else "no: needs megatron-core"}
    found["Megatron-LM"] = (
        megatron_lm(script) if script else "not looked at: name its pretrain_gpt.py, or set MEGATRON_LM"
    )
    bridge, nemo = _version("megatron-bridge"), _version("nemo-toolkit")
    found["Megatron-Bridge"] = (
        f"hookable: {bridge}, exact_megatron.integrations.bridge (tested on 0.3.1 and 0.6.2)"
        if bridge[:1].isdigit()
        else bridge
    )
    found["NeMo"] = nemo_toolkit(nemo) if nemo[:1].isdigit() else nemo
    return found


def nemo_toolkit(version: str) -> str:
    """Which of NeMo's language models of this version can be hooked, or why none."""
    yaml = _problems(lambda: check_version(version))
    recipes = _problems(lambda: check_version(version, recipes=True))
    kinds = ["YAML (Hydra plugin)"] * (not yaml) + ["recipes (exact_megatron.integrations.nemo_recipes)"] * (
        not recipes
    )
    return f"hookable: {version}, {' and '.join(kinds)}" if kinds else f"no: {yaml[0]}"


def megatron_lm(script: Path) -> str:
    """Whether a script has what the launcher hooks in Megatron-LM's pretrain_gpt.py."""
    if not script.is_file():
        return f"no: there is no {script}"
    version = checkout_core(script.parent)
    label = ".".join(map(str, version)) if version else "of unknown version"
    if version and version < (0, 13):
        return f"no: core {label}, its loss_func reduces what it reports; 0.13 or later is needed"
    functions = {
        node.name: node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.FunctionDef)
    }

    def uses(name: str, other: str) -> bool:
        return name in functions and any(
            isinstance(node, ast.Name) and node.id == other for node in ast.walk(functions[name])
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


def _problems(*looks: Callable[[], Any]) -> list[str]:
    """What each look raises, in words."""
    found = []
    for look in looks:
        try:
            look()
        except ImportError as error:
            found.append(extras.remedy(error) or f"{error}: pip install 'exact-megatron[all]'")
        except (ValueError, OSError, ExactError) as error:
            found.append(str(error))
    return found


def native_run(config: list[str] | None, overrides: list[str], build: bool = False) -> dict[str, Any]:
    """What `exact-megatron train` would do with this configuration on this machine.

    Args:
        build: build the index caches, as the run does, and count its own stream instead of the data in stored order.
    """
    from ..training.config import load_config

    runs: list[Any] = []
    refused = _problems(lambda: runs.append(load_config(config, overrides)))
    if refused:
        return {"refused": refused}
    run = runs[0]
    data = run.model.data
    masking = (
        "masked by DocumentAttention" if data.document_masking else "not masked: documents in a sample see each other"
    )

    def prefixes() -> list[str]:
        from ..training.data_files import data_prefixes

        blends = data_prefixes(run)
        blend = blends.get("train") or blends["all"]
        return blend[0] if blend else []

    def on_this_machine() -> None:
        from ..training import determinism
        from ..training.model import fuses_gradient_accumulation, transformer_config, uses_transformer_engine
        from ..training.trainer import runs_on_cpu

        if not runs_on_cpu(run):
            determinism.check(run)
        uses_transformer_engine(run)
        fuses_gradient_accumulation(run)
        transformer_config(run)

    plan = _plan(run)

    def start() -> None:
        from ..training.start import find_start

        found = find_start(run, vocabularies[0] if vocabularies else None, digests)
        plan["start"] = str(found)
        if found.remarks:
            plan["to know"] = "; ".join(found.remarks)

    def writable() -> None:
        from ..training.run_lock import only_writer

        with only_writer(run.exp_manager.exp_dir):  # as the run does; what it makes, it removes
            pass

    vocabularies: list[Any] = []

    def vocabulary() -> None:
        from ..training.data_files import read_vocabulary

        vocabularies.append(read_vocabulary(run))
        plan["vocabulary"] = f"{vocabularies[0].vocab_size:,} tokens, EOD {vocabularies[0].eod}"

    def stream() -> None:
        from ..loss import ExactLoss, gpt_loss
        from ..training.data import build_datasets

        loss = ExactLoss(run.model.exact)
        loss.wrap(gpt_loss)
        datasets, builder = build_datasets(run, vocabularies[0], loss)
        digests.update(builder.digests)
        sizes = [len(dataset) if dataset is not None else 0 for dataset in datasets[:2]]
        plan["samples"] = f"{sizes[0]:,} for training, {sizes[1]:,} for validation"
        table = builder.table
        if table is not None:
            facts = {"tau": table.config.tau, "alpha": table.config.alpha, "gamma": table.config.gamma}
            counted.update(facts, tail_share=table.tail_share, weighted_tail_share=table.weighted_tail_share)
            weights = [*table.lookup[: min(table.tail[0], 1)], *table.marks]
            plan["weights"] = ", ".join(f"{n}: {w:.4f}" for n, w in zip(table.part_names, weights)) or "all 1"

    def lengths() -> None:
        from ..training.lengths import check_lengths

        check_lengths(run)

    counted: dict[str, Any] = {}
    digests: dict[str, str | None] = {}
    unusable = _problems(vocabulary) or _problems(lengths)
    refused = unusable + (_problems(stream) if build and not unusable else [])
    refused += _problems(start) + _problems(writable)
    if run.trainer.num_nodes == 1:
        refused += _problems(on_this_machine)
    else:
        plan["devices"] = f"not looked at: those of {run.trainer.num_nodes} nodes cannot be seen from here"
    if build:
        found = {"enabled": run.model.exact.enabled, "documents": masking, "window": data.seq_length}
        return {**found, **counted, "plan": plan, "refused": refused}
    return _effect(run.model.exact, data.seq_length, prefixes, masking, data.eod_mask_loss, refused)


def _plan(run: Any) -> dict[str, str]:
    """What a run of the native runner is, in words by name."""
    m, t = run.model, run.trainer
    sizes = ("tensor", m.tensor_model_parallel_size), ("pipeline", m.pipeline_model_parallel_size)
    layout = ", ".join(
        f"{n} {s}" for n, s in (*sizes, ("context", m.context_parallel_size), ("data", run.data_parallel_size))
    )
    return {
        "folder": run.exp_manager.exp_dir,
        "start": "anew",
        "ranks": f"{t.num_nodes} x {t.devices} ({layout}), accelerator {t.accelerator}, precision {t.precision}",
        "steps": f"{t.max_steps:,} of {run.tokens_per_step:,} tokens: {run.num_microbatches} micro-batches of {m.micro_batch_size}",
    }


def megatron_lm_run(command: list[str]) -> dict[str, Any]:
    """What `exact-megatron launch` would do with this command line: [settings] SCRIPT ARGUMENTS."""
    parsed: list[Any] = []
    refused = _problems(lambda: parsed.extend(parse(command, os.environ)))
    refused = refused or _problems(lambda: parsed.append(read_arguments(parsed[2])))
    if refused:
        return {"refused": refused}
    config, script, _, args = parsed
    if not config.enabled:
        return _effect(config, None, list, "the script's own: EXACT is not enabled", False, [])
    core = checkout_core(script.parent) or checkout_core(_checkout_of_environment())
    if core is None:
        return {
            "refused": [
                f"{script} is in no checkout of Megatron-LM, whose version decides: set MEGATRON_LM to one (scripts of "
                "Megatron-Bridge and NeMo are not examined)"
            ]
        }
    hooked = megatron_lm(script)
    if args.seq_length is None:
        refused = ["--seq-length is not on the line: window, tau and data cannot be judged"]
    else:
        refused = []
    refused += ([hooked] if hooked.startswith("no") else []) + refusals(args, config, core)
    masking = "not masked: documents in a sample would see each other"
    with contextlib.suppress(ValueError):  # one of the refusals
        masking = plan_masking(args, config, core)[1]
    return _effect(config, args.seq_length, lambda: training_data(args), masking, args.eod_mask_loss, refused)


def _effect(
    exact: ExactConfig,
    seq_length: int | None,
    prefixes: Callable[[], list[str]],
    masking: str,
    eod: bool,
    refused: list[str],
) -> dict[str, Any]:
    """Window, tau and tail share of data in stored order, once; the run itself counts its own stream, blend and epochs."""
    found: dict[str, Any] = {"enabled": exact.enabled, "documents": masking, "window": seq_length}

    def count() -> None:
        assert seq_length is not None
        config = exact.validated(seq_length)
        found.update(tau=config.tau, alpha=config.alpha, gamma=config.gamma)
        indices = [read_index(prefix) for prefix in prefixes()]
        parts = [
            ExposureCensus.from_document_lengths(
                i.lengths, seq_length, document_index=stored_order(i.lengths, seq_length), eod_mask_loss=eod
            )
            for i in indices
        ]
        if parts:
            table = WeightTable.from_census(sum(parts[1:], parts[0]), config)
            found.update(tail_share=table.tail_share, weighted_tail_share=table.weighted_tail_share, data=len(indices))

    problems = _problems(count) if seq_length is not None else []
    known = {line for reason in refused for line in reason.splitlines()}
    return found | {"refused": refused + [p for p in problems if exact.enabled and p not in known]}


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    text = [f"{name:<20}{value}" for name, value in report["versions"].items()]
    text += ["", *(f"{name:<20}{value}" for name, value in report["hosts"].items())]
    run = report.get("run")
    return text if run is None else [*text, "", *run_lines(run)]


def run_lines(run: dict[str, Any]) -> list[str]:
    """What a run would do, and why it would not, as text."""
    text = [f"{name:<20}{value}" for name, value in run.get("plan", {}).items()]
    if "window" in run:
        text.append(f"{'EXACT':<20}{'enabled' if run['enabled'] else 'off: model.exact.enabled=false'}")
        text.append(f"{'documents':<20}{run['documents']}")
    if run.get("tau"):
        text.append(f"{'window, tau':<20}{run['window']}, {run['tau']} (alpha {run['alpha']}, gamma {run['gamma']})")
    if "tail_share" in run:
        share = f"{run['tail_share']:.1%} of the targets, {run['weighted_tail_share']:.1%} of the weight"
        stream = f"{run['data']} file pairs in stored order, once" if "data" in run else "the run's own stream"
        text.append(f"{'tail':<20}{share} ({stream})")
    reasons = [line for reason in run["refused"] for line in reason.splitlines()]
    text += [f"{'refused':<20}{line}" for line in reasons] or [
        f"{'refused':<20}nothing: EXACT would start this run (layers of --spec and a checkpoint's weights are looked at when loaded)"
    ]
    return text
