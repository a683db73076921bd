"""What is installed here, and which hosts can be hooked. Imports torch where it is installed, and nothing heavier."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

from ...integrations.hooks import functions_of, takes_loss
from ...integrations.megatron_lm_arguments import LEAST_CORE, MASKING_CORE, USES
from ...integrations.nemo_arguments import check_version
from .looks import problems
from .megatron_line import calls_upstream, other_kinds


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
    return {name: version_of(name) for name in names} | {"apex": apex()}


def version_of(name: str) -> str:
    """Version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def apex() -> str:
    """Which apex is installed: NVIDIA's, or the web toolkit that has the name on PyPI."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    if importlib.util.find_spec("apex.multi_tensor_apply") or importlib.util.find_spec("apex.transformer"):
        return f"NVIDIA's, {version_of('apex')}"
    return f"{version_of('apex')}, the unrelated package of that name on PyPI: uninstall it, NVIDIA's comes from source"


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


def hosts(script: Path | None) -> dict[str, str]:
    """Host to "hookable" and how, or why not. Reads a script of Megatron-LM and its checkout without importing them."""
    core = version_of("megatron-core")
    found = {"native": "hookable: exact-megatron train" if core[:1].isdigit() else "no: needs megatron-core"}
    found["Megatron-LM"] = (
        megatron_lm(script) if script else "not looked at: name its pretrain_gpt.py, or set MEGATRON_LM"
    )
    bridge, nemo = version_of("megatron-bridge"), version_of("nemo-toolkit")
    found["Megatron-Bridge"] = (
        f"hookable: {bridge}, exact_megatron.integrations.bridge (tested on 0.3.1 and 0.6.2)"
        if bridge[:1].isdigit()
        else bridge
    )
    found["NeMo"] = nemo_toolkit(nemo) if nemo[:1].isdigit() else nemo
    return found


def nemo_toolkit(version: str) -> str:
    """Which of NeMo's language models of this version can be hooked, or why none."""
    yaml = problems(lambda: check_version(version))
    recipes = problems(lambda: check_version(version, recipes=True))
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
    if version and version < LEAST_CORE:
        least = ".".join(map(str, LEAST_CORE))
        return f"no: core {label}, its loss_func reduces what it reports; {least} or later is needed"
    try:
        source = script.read_text()
        functions = functions_of(source)
    except SyntaxError as error:
        return f"no: {script}, line {error.lineno}: {error.msg}"
    elsewhere, hooks = calls_upstream(source)
    missing = [
        f"{name} uses no {used}"
        for name, used in USES.items()
        if not ("hook" in hooks and used == "loss_func")
        and (name not in functions or used not in functions[name].co_names)
    ]
    loss = functions.get("loss_func")
    if "hook" not in hooks and (loss is None or not takes_loss(loss.co_varnames[: loss.co_argcount])):
        missing.append("loss_func does not take (loss_mask, output_tensor, ...)")
    missing += [elsewhere] if elsewhere else []
    data = other_kinds(source)[1]
    missing += [f"its samples are those of {data}, not of GPTDataset"] if data else []
    if missing:
        return f"no: core {label}, {'; '.join(missing)} (docs/hosts.md, Forks)"
    masks = version is None or version >= MASKING_CORE
    masking = "masks documents" if masks else "without DocumentAttention (core < 0.16)"
    return f"hookable: core {label}, exact-megatron launch, {masking}"


def checkout_core(checkout: Path) -> tuple[int, int] | None:
    """Version of the megatron-core in a checkout, read from its package_info.py."""
    info = checkout / "megatron" / "core" / "package_info.py"
    text = info.read_text() if info.is_file() else ""
    major, minor = (re.search(rf"^{name} = (\d+)", text, re.M) for name in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else None
