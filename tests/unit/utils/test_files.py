"""Errors of the file system name their file."""

import errno
import json
import os

import pytest

from exact_megatron.exposure import ExposureCensus
from exact_megatron.training.metrics_log import RunLog
from exact_megatron.utils.files import writing


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
