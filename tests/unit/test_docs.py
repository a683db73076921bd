"""What the documentation says of files: the generated picture is up to date, and every file that is named exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "exact_megatron"
PYTHON_FILES = [
    path for folder in ("exact_megatron", "docs", "examples", "tests") for path in sorted((ROOT / folder).rglob("*.py"))
]
NAMED = re.compile(r"(?<![\w/.*<>{}$-])(?:\./)?([\w./-]*[\w-]+\.py)\b(?!/)")
# Other projects' files: by their folders, and by their names.
UPSTREAM_FOLDERS = (
    "apex/",
    "attention/dot_product_attention/",
    "dist_checkpointing/",
    "fusions/",
    "llm/gpt/",
    "megatron/",
    "models/common/",
    "nemo/",
    "pytorch/",
    "scripts/training/",
    "strategies/",
    "tensor_parallel/",
    "tools/",
    "transformer_engine/",
    "utils/config_utils.py",
    "utils/omegaconf_utils.py",
)
UPSTREAM = {
    "auto_bridge.py",
    "fused_linear_cross_entropy.py",
    "fused_softmax.py",
    "gpt_layer_specs.py",
    "arguments.py",
    "layernorm_linear.py",
    "megatron_gpt_model.py",
    "megatron_gpt_pretraining.py",
    "optimizer.py",
    "package_info.py",
    "preprocess_data.py",
    "pretrain.py",
    "pretrain_gpt.py",
    "run_recipe.py",
    "schedules.py",
    "theoretical_memory_usage.py",
    "training.py",
    "training/arguments.py",
}
EXAMPLES = {"folder/file.py"}  # stand for a file of the user's


def named(text: str) -> set[str]:
    """The *.py files of this project that a text names."""
    found = {match for match in NAMED.findall(text) if not match.startswith(UPSTREAM_FOLDERS)}
    return found - UPSTREAM - EXAMPLES


def missing_in_page(text: str) -> list[str]:
    """Files that a page of docs/ names and that are not there.

    A name is a path from the root of the repository or of the package, or the end of one file's path and of no other's."""
    return sorted(
        name
        for name in named(text)
        if not any((root / name).is_file() for root in (ROOT, PACKAGE))
        and sum(f"/{path.relative_to(ROOT)}".endswith(f"/{name}") for path in PYTHON_FILES) != 1
    )


def missing_in_module(text: str, folder: Path) -> list[str]:
    """The same for a module of the package; a name is a neighbour, or a path from the root of package or repository."""
    return sorted(name for name in named(text) if not any((root / name).is_file() for root in (folder, PACKAGE, ROOT)))


@pytest.mark.parametrize("page", [page.name for page in sorted((ROOT / "docs").glob("*.md"))])
def test_files_that_docs_name_exist(page: str) -> None:
    assert missing_in_page((ROOT / "docs" / page).read_text()) == []


def test_files_that_docstrings_and_comments_name_exist() -> None:
    missing = {
        str(path.relative_to(ROOT)): found
        for path in sorted(PACKAGE.rglob("*.py"))
        if (found := missing_in_module(path.read_text(), path.parent))
    }
    assert missing == {}


def test_missing_files_are_found() -> None:
    text = "`loss.py`, training/config.py, tests/unit/test_docs.py, test_docs.py, nowhere.py, `training/nowhere.py`, "
    assert missing_in_page(text + "report.py") == [
        "nowhere.py",
        "report.py",
        "training/nowhere.py",
    ]
    assert missing_in_module("flops.py, loss.py, memory.py.", PACKAGE / "planning") == []
    assert missing_in_module("memory.py: planning/memory.py (pretrain_gpt.py)", PACKAGE) == ["memory.py"]


def test_architecture_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None and spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    page = drawing.PAGE.read_text()
    assert drawing.drawn(page) == page, "run `python docs/draw_architecture.py`"
    with pytest.raises(ValueError, match="once each"):
        drawing.drawn(page.replace(drawing.END, ""))
