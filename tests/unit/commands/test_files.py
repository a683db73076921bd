"""`exact-megatron files` in a checkout; tests/unit/test_wheel.py has it in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exact_megatron.cli import main
from exact_megatron.commands import files

ROOT = Path(__file__).resolve().parents[3]


def test_all_files_arrive_as_they_are(tmp_path, capsys):
    assert main(["files", "--to", str(tmp_path / "new" / "folder")]) == 0
    copies = {
        path.relative_to(tmp_path / "new" / "folder"): path for path in (tmp_path / "new").rglob("*") if path.is_file()
    }
    assert {file.parts[0] for file in copies} == set(files.FOLDERS)
    assert capsys.readouterr().out.startswith(f"{len(copies)} files in ")
    for file, copy in copies.items():
        assert copy.read_bytes() == (ROOT / file).read_bytes()
        assert os.access(copy, os.X_OK) == os.access(ROOT / file, os.X_OK)
    assert Path("configs/demo.yaml") in copies and not any("__pycache__" in str(file) for file in copies)


def test_files_that_exist_stay(tmp_path, capsys):
    own = tmp_path / "configs" / "demo.yaml"
    own.parent.mkdir()
    own.write_text("mine")
    (tmp_path / "configs" / "mine.yaml").write_text("mine")
    assert main(["files", "--to", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(own) in said and "--overwrite" in said
    assert own.read_text() == "mine" and not (tmp_path / "slurm").exists()
    assert main(["files", "slurm", "--to", str(tmp_path)]) == 0  # none of these exists
    assert main(["files", "--to", str(tmp_path), "--overwrite"]) == 0
    assert own.read_bytes() == (ROOT / "configs" / "demo.yaml").read_bytes()
    assert (tmp_path / "configs" / "mine.yaml").read_text() == "mine"
    assert not list(tmp_path.rglob("*.part"))


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "configs" / "demo.yaml").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "configs" / "cpt.yaml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="cpt.yaml.*demo.yaml"):
        files.copy_files(tmp_path)
    files.copy_files(tmp_path, overwrite=True)
    assert (tmp_path / "elsewhere").read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("line", [["--to", " "], ["--to", "x", "docs"], ["--to", "file"]], ids=str)
def test_what_cannot_be_copied(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["files", *line]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert any(word in said for word in ("is empty", "unknown folder docs", "file"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_nothing_is_written_where_something_is_in_the_way(tmp_path):
    (tmp_path / "slurm").write_text("mine")
    with pytest.raises(NotADirectoryError, match="slurm must be a folder"):
        files.copy_files(tmp_path, overwrite=True)
    (tmp_path / "slurm").unlink()
    (tmp_path / "slurm" / "node.sh").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="node.sh is a folder"):
        files.copy_files(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]


def test_a_package_without_them_says_so(tmp_path, monkeypatch):
    (tmp_path / "examples").mkdir()  # of another package
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "exact_megatron")
    with pytest.raises(FileNotFoundError, match="Install it with pip"):
        files.copy_files(tmp_path / "to")
