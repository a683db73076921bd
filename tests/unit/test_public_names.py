"""Names and signatures that other people's scripts and command lines use: they stay where they are."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest

import exact_megatron
from exact_megatron import ExactConfig, ExposureCensus, WeightTable, effective_context, log2_bucket_edges
from exact_megatron.cli import main

REQUIRED = inspect.Parameter.empty

# Module -> its public names, and the package without which it cannot be imported.
MODULES: dict[str, tuple[list[str], str]] = {
    "exact_megatron": (
        ["ExactConfig", "ExposureCensus", "WeightTable", "effective_context", "log2_bucket_edges", "__version__"],
        "numpy",
    ),
    "exact_megatron.config": (["ExactConfig", "QKTimingConfig", "ExactError"], "numpy"),
    "exact_megatron.attention": (
        ["DocumentAttention", "DocumentBoundaries", "check_supported", "document_boundaries"],
        "megatron.core",
    ),
    "exact_megatron.dataset": (["ExactGPTDataset", "ExactDatasetBuilder", "from_rank_0", "members"], "megatron.core"),
    "exact_megatron.loss": (["ExactLoss", "gpt_loss"], "megatron.core"),
    "exact_megatron.training.config": (
        ["load_config", "config_paths", "parse_blend", "RunConfig", "ModelConfig", "OptimConfig", "RopeScalingConfig"],
        "omegaconf",
    ),
    "exact_megatron.training.trainer": (["Trainer", "init_distributed", "runs_on_cpu", "shutdown"], "megatron.core"),
    "exact_megatron.integrations.megatron_lm": (["MegatronLM", "from_command_line"], "megatron.core"),
    "exact_megatron.integrations.bridge": (["install", "Installation"], "numpy"),
    "exact_megatron.integrations.bridge_launch": (["main"], "numpy"),
    "exact_megatron.integrations.nemo": (["install", "ExactGPTModel"], "nemo"),
    "exact_megatron.integrations.nemo_recipes": (
        ["ExactCallback", "ExactDataset", "ExactLossReduction", "QKTimingCallback"],
        "nemo",
    ),
    "exact_megatron.launch": (["main"], "numpy"),
}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def defined_in(path: str) -> set[str]:
    """Names that a module's source defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(Path(path).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


@pytest.mark.parametrize("module", MODULES)
def test_public_modules_have_their_names(module: str) -> None:
    names, needs = MODULES[module]
    if installed(needs):
        found = importlib.import_module(module)
        missing = [name for name in names if not hasattr(found, name)]
    else:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, f"{module} has no file"
        missing = sorted(set(names) - defined_in(spec.origin))
    assert missing == []


def test_all_is_the_public_api() -> None:
    assert sorted(exact_megatron.__all__) == sorted(
        ["ExactConfig", "ExposureCensus", "WeightTable", "effective_context", "log2_bucket_edges"]
    )


@pytest.mark.parametrize(
    "function, positional, keywords",
    [
        (effective_context, {"cu_seqlens": REQUIRED, "continues": False}, {}),
        (log2_bucket_edges, {"seq_length": REQUIRED}, {}),
        (
            ExposureCensus.from_document_lengths,
            {"lengths": REQUIRED, "seq_length": REQUIRED},
            {"document_index": None, "add_extra_token": True},
        ),
        (ExposureCensus.from_dataset, {"dataset": REQUIRED}, {}),
        (ExposureCensus.from_blend, {"blend": REQUIRED}, {}),
        (ExposureCensus.bucket_counts, {"self": REQUIRED}, {}),
        (ExposureCensus.share_below, {"self": REQUIRED, "context": REQUIRED}, {}),
        (ExposureCensus.__add__, {"self": REQUIRED, "other": REQUIRED}, {}),
        (ExposureCensus.save, {"self": REQUIRED, "path": REQUIRED}, {}),
        (ExposureCensus.load, {"path": REQUIRED}, {}),
        (WeightTable.from_census, {"census": REQUIRED, "config": REQUIRED}, {}),
        (
            WeightTable.from_counts,
            {"counts": REQUIRED, "seq_length": REQUIRED},
            {"alpha": 0.15, "gamma": 0.5, "tau": None, "eps": 1e-8, "normalization": "corpus"},
        ),
        (ExactConfig.validated, {"self": REQUIRED, "seq_length": REQUIRED}, {}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(function, positional: dict, keywords: dict) -> None:
    """The public parameters in their order; others may follow them where they have a default."""
    given = inspect.signature(function).parameters
    first = list(given.values())[: len(positional)]
    assert {p.name: p.default for p in first} == positional
    assert all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in first)
    assert {name: given[name].default for name in keywords} == keywords
    assert all(given[name].kind == inspect.Parameter.KEYWORD_ONLY for name in keywords)
    assert all(p.default is not REQUIRED for p in list(given.values())[len(positional) :])


def test_exact_config_has_its_settings_in_order() -> None:
    settings = {field.name: getattr(ExactConfig(), field.name) for field in dataclasses.fields(ExactConfig)}
    assert list(settings.items())[:8] == [
        ("enabled", False),
        ("alpha", 0.15),
        ("gamma", 0.5),
        ("tau", None),
        ("eps", 1e-8),
        ("normalization", "corpus"),
        ("max_weight", None),
        ("log_buckets", True),
    ]
    assert ExactConfig().validated(4096).tau == 1024


def test_the_objects_have_their_attributes() -> None:
    seq_length = 64
    census = ExposureCensus.from_document_lengths(np.full(20, 100), seq_length)
    table = WeightTable.from_census(census, ExactConfig())
    assert (census.counts.dtype, census.counts.shape) == (np.int64, (seq_length + 1,))
    buckets = len(log2_bucket_edges(seq_length)) - 1
    assert (census.bucket_counts().dtype, census.bucket_counts().shape) == (np.int64, (buckets,))
    assert isinstance(census.share_below(8), float)
    assert (table.bucket_weights.dtype, table.bucket_weights.shape) == (np.float64, (buckets,))
    assert (table.lookup.dtype, table.lookup.shape) == (np.float32, (seq_length + 1,))
    assert isinstance(table.mean, float)
    assert int(table.digest, 16) >= 0
    assert (effective_context(np.array([0, 3, 5])) == [1, 2, 0, 1, 0]).all()
    assert (effective_context(np.array([0, 3, 5]), continues=True) == [1, 2, 0, 1, 2]).all()


@pytest.mark.parametrize(
    "command, options",
    [
        ("prepare", ["--output"]),
        (
            "census",
            [
                "--seq-length",
                "--alpha",
                "--gamma",
                "--tau",
                "--eps",
                "--normalization",
                "--max-weight",
                "--json",
                "--plot",
            ],
        ),
        ("train", ["--config", "--check", "key=value"]),
        ("compare", ["--config", "--base-seq-length", "--base-steps", "key=value"]),
        ("plan", ["--config", "key=value"]),
        ("benchmark", []),
        ("convert", []),
        ("evaluate", []),
        ("launch", ["model.exact.enabled=true"]),
        ("doctor", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_commands_and_their_options(command: str, options: list[str], capsys) -> None:
    try:
        assert main([command, "--help"]) == 0  # launch
    except SystemExit as end:
        assert end.code == 0
    said = capsys.readouterr().out
    assert [option for option in options if option not in said] == []
