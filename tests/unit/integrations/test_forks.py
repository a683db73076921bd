"""Forks of Megatron-LM on stand-ins: nothing trains without its weights, and the ways out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.pipeline_parallel import schedules

from exact_megatron import ExactConfig
from exact_megatron.config import ExactError, QKTimingConfig
from exact_megatron.dataset import weighted_class
from exact_megatron.integrations import forks, megatron_lm
from exact_megatron.integrations.megatron_lm import MegatronLM
from exact_megatron.integrations.script import run_script
from exact_megatron.utils import failures
from tests.helpers.small_host import SCRIPT, UNMASKED, Host

ON = "model.exact.enabled=true"
OTHER = """
def other(loss_mask, output_tensor, model=None):
    return output_tensor.sum(), loss_mask.sum().int(), {}
"""
PARTIAL = 'partial(loss_func, batch["loss_mask"], model=model)'


@pytest.fixture(autouse=True)
def nothing_marked(monkeypatch):
    monkeypatch.setattr(forks, "MARKED", [])
    monkeypatch.setattr(megatron_lm, "MARKED", forks.MARKED)


def script(returned: str, more: str = "") -> str:
    assert PARTIAL in SCRIPT
    return SCRIPT.replace(PARTIAL, returned).replace("def forward_step", f"{OTHER}{more}\ndef forward_step")


@pytest.mark.parametrize(
    "returned",
    [
        "loss_func and partial(other, batch['loss_mask'])",
        "loss_func and (lambda output: other(batch['loss_mask'], output))",
        "loss_func and partial(partial(other, batch['loss_mask']), model=None)",
    ],
)
def test_a_second_loss_function_takes_no_step(monkeypatch, config, returned):
    host = Host(monkeypatch, config, script=script(returned))
    with pytest.raises(
        ExactError, match=r"forward_step in .*(other|lambda).*megatron_lm.hook \(see docs/hosts.md, Forks\)"
    ):
        host.run(MegatronLM(UNMASKED))
    assert host.steps == []


def test_it_is_refused_in_the_step_and_in_the_validation_that_first_take_it(monkeypatch, config):
    more = (
        "taken = []\ndef both(mask, batch):\n    taken.append(1)\n    return loss_func if len(taken) < 3 else other\n"
    )
    host = Host(
        monkeypatch, config, script=script("partial(both(0, batch) if loss_func else 0, batch['loss_mask'])", more)
    )
    with pytest.raises(ExactError, match="other in "), torch.no_grad():
        host.run(MegatronLM(UNMASKED))
    assert len(host.steps) == 2


@pytest.mark.parametrize(
    "returned",
    [
        "loss_func and (lambda output: loss_func(batch['loss_mask'], output))",
        "partial(partial(loss_func, batch['loss_mask']), model=model)",
    ],
)
def test_closures_and_partials_of_partials_that_run_the_hook_are_weighted(monkeypatch, config, returned):
    stock = Host(monkeypatch, config)
    stock.run(MegatronLM(UNMASKED))
    fork = Host(monkeypatch, config, script=script(returned))
    fork.run(MegatronLM(UNMASKED))
    assert [loss for _, (loss, *_) in fork.steps] == [loss for _, (loss, *_) in stock.steps]


@pytest.mark.parametrize(
    ("returned", "more"),
    [
        (
            "partial(mine, batch['loss_mask'])",
            "from exact_megatron.integrations.megatron_lm import hook\nmine = hook(loss_func)",
        ),
        (
            "lambda output: mine(batch['loss_mask'], output)",
            "from exact_megatron.integrations.megatron_lm import hook\nmine = hook(hook(partial(loss_func, model=None)))",
        ),
    ],
)
def test_a_marked_loss_function_is_the_one_that_is_weighted(monkeypatch, config, returned, more):
    stock = Host(monkeypatch, config)
    stock.run(MegatronLM(UNMASKED))
    fork = Host(monkeypatch, config, script=script(returned, more))
    assert fork.run(MegatronLM(ExactConfig())) == "trained"  # without EXACT it is itself
    fork.steps.clear()
    fork.run(MegatronLM(UNMASKED))
    assert [loss for _, (loss, *_) in fork.steps] == [loss for _, (loss, *_) in stock.steps]
    (marked,) = forks.MARKED
    assert getattr(marked.runs, "exact_loss", None) is None


def test_a_marked_function_of_other_parameters_is_refused(monkeypatch, config):
    forks.hook(lambda output, mask: None)
    with pytest.raises(ExactError, match=r"takes \['output', 'mask'\], not \(loss_mask"):
        Host(monkeypatch, config).run(MegatronLM(UNMASKED))


class Keeps(GPTDataset):
    def __getitem__(self, idx):
        return {**super().__getitem__(idx), "idx": torch.tensor(idx)}


class Reverses(GPTDataset):
    def __getitem__(self, idx):
        sample = super().__getitem__(idx)
        return {**sample, "tokens": sample["tokens"].flip(0)}


class Masks(GPTDataset):
    def __getitem__(self, idx):
        sample = super().__getitem__(idx)
        return {**sample, "loss_mask": sample["loss_mask"] * (torch.arange(32) > 3)}


def test_a_dataset_that_keeps_the_packing_is_weighted(monkeypatch, config):
    stock, fork = Host(monkeypatch, config), Host(monkeypatch, config, cls=Keeps)
    stock.run(MegatronLM(UNMASKED))
    fork.run(MegatronLM(UNMASKED))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(fork.steps, stock.steps))
    assert len(fork.steps) == 4 and fork.steps[0][0].unique().numel() > 1


@pytest.mark.parametrize(
    ("cls", "words"), [(Reverses, "Reverses are others: tokens"), (Masks, "Masks are others: loss_mask")]
)
def test_a_dataset_of_other_samples_is_rejected_by_name(monkeypatch, config, cls, words):
    host = Host(monkeypatch, config, cls=cls)
    with pytest.raises(ValueError, match=words):
        host.run(MegatronLM(UNMASKED))
    assert host.steps == []


def test_subclasses_of_mock_data_are_no_packed_documents():
    with pytest.raises(ValueError, match="not of Mine"):
        weighted_class(type("Mine", (MockGPTDataset,), {}))
    with pytest.raises(ValueError, match="not of dict"):
        weighted_class(dict)


def test_what_is_known_from_arguments_is_refused_before_a_model_is_built(monkeypatch, config):
    host = Host(monkeypatch, config)
    host.args.sft = True
    monkeypatch.setattr(Host, "pretrain", own_start)
    with pytest.raises(ValueError, match="SFT data are not"):
        host.run(MegatronLM(UNMASKED))
    host.args.sft = False
    with pytest.raises(ValueError, match="tau=64 lies above the last bucket"):
        host.run(MegatronLM(ExactConfig(enabled=True, tau=64, allow_unmasked_documents=True)))


def own_start(self, train_valid_test_dataset_provider, model_type, forward_step_func):
    sys.modules["megatron.training.training"].initialize_megatron()
    raise AssertionError("a model would be built")


def test_sys_exit_inside_pretrain_looks_at_the_weights(monkeypatch, config):
    host, exact = Host(monkeypatch, config), MegatronLM(UNMASKED)
    looked = []
    monkeypatch.setattr(exact.loss, "check", lambda: looked.append(1))
    monkeypatch.setattr(
        Host, "pretrain", lambda self, train_valid_test_dataset_provider, model_type, forward_step_func: sys.exit(0)
    )
    with pytest.raises(SystemExit):
        host.run(exact)
    assert looked


# Forks with a pretrain of their own, as the launcher runs them.

OWN = """
import sys
from megatron.core.pipeline_parallel import get_forward_backward_func
print("started")
{train}
print("trained")
sys.exit(0)
"""


@pytest.fixture
def launch(monkeypatch, config, tmp_path):
    def run(text, exact=UNMASKED, timing=None):
        host = Host(monkeypatch, config)
        sys.modules["megatron.training"].pretrain = sys.modules["megatron.training.training"].pretrain = host.pretrain
        monkeypatch.setattr(megatron_lm, "launched", None)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        (tmp_path / "own.py").write_text(text)
        run_script(exact, tmp_path / "own.py", [], timing or QKTimingConfig())

    return run


@pytest.mark.parametrize(
    "train",
    [
        "get_forward_backward_func()",
        "from megatron.core.pipeline_parallel.schedules import get_forward_backward_func as g; g()",
        "import megatron.core.pipeline_parallel as p; p.get_forward_backward_func()",
        "import early; early.train()",
    ],
)
@pytest.mark.parametrize("exact", [UNMASKED, None])
def test_a_pretrain_of_its_own_ends_before_its_first_step(launch, monkeypatch, tmp_path, capsys, train, exact):
    stock = schedules.get_forward_backward_func
    early = type(sys)("early")
    early.get_forward_backward_func = stock
    exec("def train(): get_forward_backward_func()", early.__dict__)
    monkeypatch.setitem(sys.modules, "early", early)
    settings = (exact, None) if exact else (ExactConfig(), QKTimingConfig(enabled=True))
    with pytest.raises(
        ExactError, match=r"own.py is about to train and never called .*(\n|.)*from_command_line\(pretrain\)"
    ):
        launch(OWN.format(train=train), *settings)
    assert capsys.readouterr().out == "started\n"
    assert schedules.get_forward_backward_func is early.get_forward_backward_func is stock


def test_a_script_that_leaves_by_sys_exit_without_having_been_hooked_fails(launch):
    with pytest.raises(ExactError, match="own.py ended and never called megatron.training.pretrain"):
        launch(OWN.format(train=""))
    with pytest.raises(SystemExit) as end:
        launch(OWN.format(train="sys.exit(3)"))
    assert end.value.code == 3
    with pytest.raises(SystemExit) as end:
        launch(OWN.format(train=""), ExactConfig())
    assert end.value.code == 0


def test_a_pretrain_of_its_own_is_hooked_by_one_line(launch, config, capsys):
    text = (
        SCRIPT
        + """
from exact_megatron.integrations.megatron_lm import from_command_line
def pretrain(train_valid_test_dataset_provider, forward_step_func):
    data = train_valid_test_dataset_provider([8, 0, 0])[0]
    output, loss = forward_step_func(iter([data[0]]), lambda batch: __import__("torch").ones(32))
    print("weighted", data[0]["loss_mask"].unique().numel() > 1)
pretrain = from_command_line(pretrain)
cls, config = sys.modules["small"].cls, sys.modules["small"].config
pretrain(provider, forward_step)
sys.exit(0)
"""
    )
    small = type(sys)("small")
    small.cls, small.config = GPTDataset, config
    sys.modules["small"] = small
    try:
        with pytest.raises(SystemExit) as end:
            launch("import sys\n" + text)
    finally:
        del sys.modules["small"]
    assert end.value.code == 0 and "weighted True" in capsys.readouterr().out


# One reason, once.


def rejected(text="model.exact.alpha=-1"):
    ExactConfig.from_overrides([text])


@pytest.mark.parametrize("action", [lambda: 1 / 0, lambda: int("x"), lambda: open("missing")])
def test_errors_of_others_keep_their_traceback(action, capsys):
    with pytest.raises((ZeroDivisionError, ValueError, OSError)), failures.said_once("launch"):
        action()
    assert capsys.readouterr().err == ""


def test_rank_0_says_why_at_once_and_the_others_later(monkeypatch, capsys, tmp_path):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end, failures.said_once("launch"):
            rejected()
        assert end.value.code == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("launch: model.exact.alpha=-1 ") and second.startswith(
        "launch: rank 3: model.exact.alpha=-1"
    )
    assert waited == [failures.PATIENCE]
    assert "alpha=-1" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_torchrun_shows_one_reason_as_its_last_lines(tmp_path):
    (tmp_path / "rank.py").write_text(
        "from exact_megatron.config import ExactConfig\nfrom exact_megatron.utils.failures import said_once\n"
        "with said_once('launch'):\n    ExactConfig.from_overrides(['model.exact.alpha=-1'])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    text = ran.stdout + ran.stderr
    assert ran.returncode == 1
    assert text.count("launch: model.exact.alpha=-1") == 1 and "rank.py" in text and "rank 1: model" not in text
    assert "model.exact.alpha=-1" in "\n".join(text.rstrip().splitlines()[-2:])
    assert 'rank.py", line' not in text
