"""The sdist and the wheel: built without a network, installed beside numpy alone, and tested from the unpacked sdist."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny import write_documents

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("configs", "examples", "patches", "slurm")
JUNK = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "runs", "build", "dist", "*.egg-info", ".*_cache")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools builds the wheel"),
]


def run(command: list[str], where: Path, code: int = 0) -> str:
    """Standard output and error of a command that does not see this checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """What pip does, by the build backend itself; nothing is written into the checkout."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return out / run([sys.executable, "-W", "ignore", "-c", code, str(out)], source).split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "copy", ignore=JUNK, symlinks=True)
    archive = build("sdist", folder / "copy", folder)
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory) -> Path:
    """`exact-megatron` of an environment with the wheel and numpy."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--no-deps", "--no-index", str(wheel)], folder)
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    for package in ("numpy", "numpy.libs"):
        installed = Path(np.__file__).parents[1] / package
        if installed.is_dir():
            (site / package).symlink_to(installed)
    return folder / "bin" / "exact-megatron"


def files_in(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_the_files_for_users(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = "exact_megatron/project_files/"
    assert {name.removeprefix(inside) for name in names if name.startswith(inside)} == files_in(ROOT)
    assert {name.split("/")[0] for name in names} - {f"{wheel.name.split('-py3')[0]}.dist-info"} == {
        "exact_megatron",
        "hydra_plugins",
    }
    assert "exact_megatron/reporting/comparison.md" in names and "exact_megatron/py.typed" in names


def test_the_commands_of_an_installed_wheel(command, tmp_path):
    assert "census" in run([str(command), "--help"], tmp_path)
    write_documents(tmp_path / "x", np.arange(2000).reshape(20, 100), np.int32)
    assert '"tail_share"' in run([str(command), "census", "x", "--seq-length", "64", "--json", "-"], tmp_path)

    run([str(command), "files", "--to", "mine"], tmp_path)
    assert files_in(tmp_path / "mine") == files_in(ROOT)
    for name in files_in(ROOT):
        assert (tmp_path / "mine" / name).read_bytes() == (ROOT / name).read_bytes()
    assert os.access(tmp_path / "mine" / "slurm" / "node.sh", os.X_OK)
    assert "--overwrite" in run([str(command), "files", "--to", "mine"], tmp_path, code=2)


def test_the_sdist_has_the_repository_and_its_tests_run(sdist):
    missing = {
        str(path.relative_to(ROOT))
        for folder in ("exact_megatron", "tests", "docs", *FOLDERS)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not (sdist / path.relative_to(ROOT)).is_file()
    }
    assert missing == set()
    assert (sdist / "Makefile").is_file() and (sdist / "constraints.txt").is_file()
    said = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"], sdist)
    assert "error" not in said.splitlines()[-1]
    tests = [
        "tests/unit/test_packing.py",
        "tests/unit/test_docs.py",
        "tests/unit/test_imports.py",
        "tests/unit/commands/test_files.py",
    ]
    said = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], sdist)
    assert " passed" in said and "failed" not in said
