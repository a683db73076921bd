"""Errors of the file system name their file."""

import errno
import json
import os

import pytest

from exact_megatron.cli import main
from exact_megatron.exposure import ExposureCensus
from exact_megatron.training import run_lock
from exact_megatron.training.metrics_log import RunLog, _truncated
from exact_megatron.utils.files import read_json, write_json, write_text, writing
from exact_megatron.utils.tokenizer import data_identity, folder_identity


def test_a_full_disk_names_the_log():
    """/dev/full answers every write with ENOSPC; what is left in the buffer is written again when the log is closed."""
    log = object.__new__(RunLog)
    log.metrics = log.validations = open("/dev/full", "a")
    log.board = None
    for write in (lambda: log.validation({"step": 1, "validation_loss": 1.0}), log.close):
        with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '/dev/full'"):
            write()


@pytest.mark.parametrize("kind", [OSError, RuntimeError, BaseException])
def test_errors_that_say_it_in_words_become_errors_of_the_file(kind, tmp_path):
    with pytest.raises(OSError) as found, writing(tmp_path):
        raise kind(*([errno.ENOSPC] if kind is OSError else []), f"IoError: {os.strerror(errno.ENOSPC)}")
    assert found.value.errno == errno.ENOSPC and found.value.filename == str(tmp_path)
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError


def test_a_census_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    census = ExposureCensus.from_document_lengths([40] * 9, 16)
    monkeypatch.setattr(json, "dumps", lambda *args: "x" * (1 << 20))
    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match=f"{tmp_path}/census.json"):
        census.save(tmp_path / "census.json")
    assert not list(tmp_path.iterdir())


def full(*args, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, link = tmp_path / "a.json", tmp_path / "link"
    link.symlink_to(path)
    write_json(link, {"a": 1})
    assert link.is_symlink() and read_json(path) == {"a": 1}
    with pytest.raises(OSError, match=r"\[Errno 28\] .*: '/dev/full'"):
        write_text("/dev/full", "x")
    assert not os.path.isfile("/dev/full")
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_text(path, "x")
    assert sorted(tmp_path.iterdir()) == [path, link] and read_json(path) == {"a": 1}


@pytest.mark.parametrize("command", [[], ["--json", "-"], ["--json", "/dev/full"]])
def test_a_census_without_room_names_where_it_was_written(tmp_path, monkeypatch, capsys, command):
    pytest.importorskip("megatron.core")
    from tests.helpers.tiny import write_documents

    write_documents(tmp_path / "x", [[1] * 40])
    with open("/dev/full", "w") as output, monkeypatch.context() as patch:
        if "/dev/full" not in command:
            patch.setattr("sys.stdout", output)
        assert main(["census", str(tmp_path / "x"), "--seq-length", "16", *command]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        where = "/dev/full" if "/dev/full" in command else "standard output"
        assert len(said) == 1 and said[0].endswith(f"[Errno 28] No space left on device: '{where}'")


def test_a_lock_without_room_names_its_file_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/run/run.lock'"),
        run_lock.only_writer(tmp_path / "run"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_log_of_a_killed_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 4, "x": "\xff')
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=f"'{path}'"):
            _truncated(path, 2)
    assert path.read_bytes().startswith(b"\n".join(lines))  # nothing was lost on the way
    file, last = _truncated(path, 2)
    file.close()
    assert last == 2 and path.read_bytes() == b"\n".join(lines[:2]) + b"\n"
    for bad in (b"\xff", b"[]", b"{}", b'{"step": "1"}', b"", b"{"):
        path.write_bytes(b"\n".join([lines[0], bad, lines[1]]) + b"\n")
        with pytest.raises(ValueError, match=f"{path}, line 2, is no record"):
            _truncated(path, 9)


def test_a_damaged_record_of_a_tokenizer_is_named(tmp_path):
    assert read_json(tmp_path / "none.json") == {} and data_identity(str(tmp_path / "none")).digest is None
    for text in ("{", "[]", "null", "\xff"):
        for name, read in (
            ("x.json", lambda: data_identity(str(tmp_path / "x"))),
            ("tokenizer_identity.json", lambda: folder_identity(tmp_path)),
        ):
            (tmp_path / name).write_text(text, "latin-1")
            with pytest.raises(ValueError, match=f"{tmp_path}/{name}"):
                read()
