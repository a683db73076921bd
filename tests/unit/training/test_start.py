"""How a run starts, decided before there is a model: `train --check` refuses what `train` refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exact_megatron.commands.doctor import native_run
from exact_megatron.training import checkpoint_files, checkpoint_state
from exact_megatron.training.config import load_config
from exact_megatron.training.data_files import Vocabulary, read_vocabulary
from exact_megatron.training.start import find_start
from exact_megatron.utils.tokenizer import Identity
from tests.helpers.tiny import VOCABULARY, config_file, write_data

KINDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
HOLDER = """
import sys
from exact_megatron.training.run_lock import only_writer
with only_writer(sys.argv[1]):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A configuration whose index caches are built, and the digests of its stream."""
    folder = tmp_path_factory.mktemp("start")
    prefix = write_data(folder)
    config = config_file(folder, prefix)
    facts = {"vocab_size": VOCABULARY, "eod_id": 0, "tokenizer": "aa.json", "tokenizer_identity": "aa"}
    Path(f"{prefix}.json").write_text(json.dumps(facts))
    from exact_megatron.loss import ExactLoss, gpt_loss
    from exact_megatron.training.data import build_datasets

    run, loss = load_config(config), ExactLoss(load_config(config).model.exact)
    loss.wrap(gpt_loss)
    return str(config), build_datasets(run, read_vocabulary(run), loss)[1].digests


@pytest.fixture
def runs(data, tmp_path):
    """runs(step, ..., name="run", overrides=[], tokenizer="aa") -> folder with checkpoints that hold everything but tensors."""

    def write(*steps: int, name: str = "run", overrides: tuple[str, ...] = (), tokenizer: str = "aa") -> Path:
        run = load_config(data[0], list(overrides))
        for step in steps:
            path = tmp_path / name / "checkpoints" / f"step_{step:08d}"
            path.mkdir(parents=True)
            identity = Identity(tokenizer, "there")
            state = checkpoint_state.describe(run, step, VOCABULARY, **data[1], tokenizer=identity)
            torch.save({"state": state}, path / "common.pt")
            (path / "metadata.json").write_text(json.dumps({**KINDS, "common_backend_version": 1}))
            (path / ".metadata").write_bytes(b"tensors")
            checkpoint_files.write_checksums(path)
        return tmp_path / name

    return write


def flip_a_bit(run: Path, step: int) -> None:
    file = run / "checkpoints" / f"step_{step:08d}" / "common.pt"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.fixture
def check(data, tmp_path):
    """check(override, ...) -> (what the run would start with, why it would not)"""

    def look(*overrides: str, build: bool = True):
        report = native_run([data[0]], [f"exp_manager.exp_dir={tmp_path}/run", *overrides], build=build)
        return report.get("plan"), "\n".join(report["refused"])

    return look


def test_a_sound_start_is_named(runs, check, tmp_path):
    plan, refused = check()
    assert plan["start"] == "anew" and not refused and "to know" not in plan
    base = runs(4, name="base")
    plan, refused = check(f"restore_from_path={base}", "model.rotary_base=77")
    assert plan["start"] == f"from the weights of {base}/checkpoints/step_00000004" and not refused
    assert "model.rotary_base: 10000.0 there, now 77.0" in plan["to know"]
    run = runs(2, 4)
    plan, refused = check()
    assert plan["start"] == f"resumes from {run}/checkpoints/step_00000004" and not refused
    flip_a_bit(run, 4)
    plan, refused = check()
    assert plan["start"].endswith("step_00000002") and "step_00000004 is damaged" in plan["to know"] and not refused
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.seed=99"], "model.seed: checkpoint 1234, now 99"),
        (["model.exact.alpha=0.25"], "alpha: checkpoint 0.5, now 0.25, weights: checkpoint"),
        (["trainer.max_steps=90"], "trainer.max_steps went from 4 to 90"),
        (["exp_manager.resume_if_exists=false"], "resume_if_exists=false: choose another"),
    ],
)
def test_a_resume_that_train_refuses_is_refused(runs, check, overrides, message):
    runs(4)
    assert message in check(*overrides)[1]


def test_a_resume_of_damaged_checkpoints_or_of_another_tokenizer_is_refused(runs, check):
    run = runs(4, tokenizer="bb")
    assert "has the tokenizer bb (there)" in check()[1] and not check("model.data.accept_other_tokenizer=true")[1]
    flip_a_bit(run, 4)
    assert "common.pt holds other bytes than were written" in check()[1]
    assert "holds other bytes" in check("model.override_vocab_size=3")[1]  # whatever else is wrong


def test_weights_that_train_refuses_are_refused(runs, check):
    base = runs(2, 4, name="base", tokenizer="bb")
    start = f"restore_from_path={base}"
    assert "has the tokenizer bb" in check(start)[1]
    accept = "model.data.accept_other_tokenizer=true"
    assert "model.num_layers: checkpoint 4, now 2" in check(start, accept, "model.num_layers=2")[1]
    assert (
        "model.override_vocab_size: checkpoint 96, now 128" in check(start, accept, "model.override_vocab_size=128")[1]
    )
    flip_a_bit(base, 4)
    assert "step_00000004 is damaged" in (refused := check(start)[1]) and "step_00000002 is whole" in refused
    assert "no checkpoint at /nowhere" in check("restore_from_path=/nowhere")[1]


def test_without_counting_the_stream_the_rest_is_compared(runs, check):
    runs(4)
    assert check("trainer.max_steps=90", build=False)[1] == ""  # another stream, which is not counted
    assert "model.seed" in check("model.seed=99", build=False)[1]


def test_a_folder_that_cannot_be_written_or_is_in_use_is_refused(check, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in check(f"exp_manager.exp_dir={tmp_path}/file/run")[1]
    assert check(f"exp_manager.exp_dir={tmp_path}/new/er/run")[1] == "" and not (tmp_path / "new").exists()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert f"{tmp_path}/run is in use" in check()[1]
        holder.communicate()
    assert not (tmp_path / "run").exists() and check()[1] == ""


def test_the_tokenizer_of_a_model_is_compared_and_goes_on(runs, data, tmp_path):
    def begin(model, own, *overrides):
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        base = runs(1, name="base", tokenizer=model)
        run = load_config(data[0], [f"restore_from_path={base}", f"exp_manager.exp_dir={tmp_path}/run", *overrides])
        start = find_start(run, Vocabulary(VOCABULARY, 0, tokenizers={"x": Identity(own, "x.json")}), {})
        return start.tokenizer.digest, start.remarks

    assert begin("aa", "aa") == ("aa", [])
    with pytest.raises(ValueError, match=r"step_0+1 has the tokenizer aa \(there\), x has bb \(x.json\).*accept_other"):
        begin("aa", "bb")
    digest, said = begin("aa", "bb", "model.data.accept_other_tokenizer=true")
    assert digest == "bb" and "accepted" in said[0]
    assert begin("aa", None) == ("aa", ["tokenizer unknown, not compared: x (x.json)"])
    digest, said = begin(None, "bb")
    assert digest == "bb" and "not compared" in said[0] and "(there)" in said[0]
