"""The host scaffold and the tables of refusals, on a host of a few lines."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from exact_megatron import ExactConfig
from exact_megatron.commands.doctor import installed
from exact_megatron.config import ExactError
from exact_megatron.integrations import megatron_lm_arguments as mlm
from exact_megatron.integrations.hooks import functions_of, script_global
from exact_megatron.integrations.host import Host, HostBuilder, Words, averages, say
from exact_megatron.loss import gpt_loss
from exact_megatron.refusals import Row, is_above_1, is_set, reasons, refuse

WORDS = Words(hooked="its loss and data", anew="start anew with another folder", ask="mask=true")
ON = ExactConfig(enabled=True, alpha=0.5, tau=8)


class Small(Host):
    masking, seq_length = True, 32

    def reads_tokens(self, is_built_on_rank):
        return self.tokens

    def notes(self):
        return [averages("eod", "per_token")]


@pytest.fixture
def build(write_corpus, tmp_path):
    """build(host) is a host's construction of its data; returns the training samples and its config."""
    from tests.helpers.references import PositionTokenizer

    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=32,
        blend=([write_corpus(np.array([5, 70, 33, 9, 120, 64, 40, 11, 90], np.int32))], None),
        split="1,0,0",
        tokenizer=PositionTokenizer(),
        path_to_cache=str(tmp_path / "cache"),
        reset_position_ids=False,
        reset_attention_mask=True,
        eod_mask_loss=False,
        create_attention_mask=True,
    )

    def run(host, tokens=True):
        host.tokens = tokens
        host.loss.wrap(gpt_loss)
        builder = functools.partial(HostBuilder, host)
        return builder(GPTDataset, [8, 0, 0], lambda: False, config).build()[0], config

    return run


def test_data_are_weighted_and_the_hosts_own_config_is_left_alone(build, capsys):
    host = Small(ON, WORDS)
    data, config = build(host)
    sample = data[0]
    assert sample["loss_mask"].max() > 1 and sample["cu_seqlens"][-1] == 32 and "attention_mask" not in sample
    assert config.reset_attention_mask and config.create_attention_mask
    said = capsys.readouterr().out
    assert said.startswith(
        "EXACT\n  hooked      its loss and data\n  masking     masked by DocumentAttention\n  weights"
    )
    assert said.endswith("  note        eod without per_token averages over micro-batches, not targets\n")
    assert host.entry == {**ON.to_dict(), "table": host.loss.table.digest, "census": host.entry["census"]}
    build(host)
    assert "EXACT" not in capsys.readouterr().out  # said once


def test_ranks_that_read_no_tokens_draw_boundaries(build):
    assert set(build(Small(ON, WORDS), tokens=False)[0][0]) == {"cu_seqlens"}


def test_no_step_before_data_and_model_are_ready(build):
    host = Small(ON, WORDS)
    with pytest.raises(ExactError, match="on data that EXACT did not weight"):
        host.ready()
    build(host)
    with pytest.raises(ExactError, match="no GPTModel was built.* and without mask=true"):
        host.ready()
    host.masking = False
    host.ready()


@pytest.mark.parametrize("first", ["checkpoint", "data"])
def test_a_checkpoint_is_compared_whichever_comes_first(build, first):
    """Hosts load their checkpoints before or after they build their data."""
    host, other = Small(ON, WORDS), Small(ExactConfig(enabled=True, alpha=0.25, tau=8), WORDS)
    build(host)
    host.guard(host.entry)
    host.guard(None)  # of a run without EXACT
    entry = dict(host.entry)
    steps = [lambda: other.guard(entry), lambda: build(other)]
    if first == "data":
        steps.reverse()
    steps[0]()
    with pytest.raises(
        ValueError, match=r"alpha: 0.5 in the checkpoint, now 0.25(.|\n)*start anew with another folder"
    ):
        steps[1]()


def test_weights_are_not_dropped_by_a_run_without_them(build):
    host = Small(ON, WORDS)
    build(host)
    with pytest.raises(ValueError, match="does not enable them.* start anew with another folder"):
        Host(ExactConfig(), WORDS).guard(host.entry)
    Host(ExactConfig(), WORDS).guard({})


def test_a_checkpoint_is_not_written_with_strange_weights(build):
    host, saved = Small(ON, WORDS), []
    build(host)
    loss = functools.partial(host.loss.report, torch.ones(32), mask=torch.ones(32))
    save = host.saving(saved.append)
    save("good")
    with pytest.raises(ExactError, match="not in the weight table"):
        loss(weights=torch.full((32,), 7.0))
    with pytest.raises(ExactError, match="not in the weight table"):
        save("bad")
    assert saved == ["good"]


@pytest.mark.parametrize(("rank", "printed"), [("0", "line\n"), ("1", "")])
def test_one_rank_says_it(rank, printed, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    say("line")
    assert capsys.readouterr().out == printed


# Tables of refusals.

ROWS = (
    Row("model.mtp_num_layers", is_set, "unset it"),
    Row("cp data.eod", lambda cp, eod: is_above_1(cp) and eod, lambda cp, eod: f"cp={cp} with eod={eod}"),
)


def test_rows_read_mappings_and_objects_and_what_is_absent_is_unset():
    assert reasons(ROWS, {}) == reasons(ROWS, types.SimpleNamespace(model=None)) == []
    assert reasons(ROWS, {"model": types.SimpleNamespace(mtp_num_layers=1)}) == ["unset it"]
    assert reasons(ROWS, {"cp": 2}, types.SimpleNamespace(cp=1, data={"eod": True})) == ["cp=2 with eod=True"]
    for value in (None, False, 0, 0.0, "", "None", "none", [], ()):
        assert not is_set(value)
    refuse([])
    with pytest.raises(ValueError, match="EXACT refuses this run:\n  a\n  b"):
        refuse(["a", "b"])


# What doctor reads of a command line and of a script, and what the run will see.


def test_command_lines_are_read_as_megatrons_parser_does():
    line = "--a-flag --lr 1e-3 --seq-length=64 --seq-length 128 --data-path 0.3 x 0.7 y --no-masked-softmax-fusion --tp-comm -1"
    args = mlm.read_arguments(line.split())
    assert (args.a_flag, args.lr, args.seq_length, args.data_path) == (True, 1e-3, 128, ["0.3", "x", "0.7", "y"])
    assert not args.masked_softmax_fusion and args.create_attention_mask_in_dataloader and args.tp_comm == -1
    assert mlm.training_data(args) == ["x", "y"]
    assert mlm.training_data(mlm.read_arguments(["--data-path", "x"])) == ["x"]
    for words, message in ((["--seq-length"], "expected one argument"), (["--seq-length", "x"], "invalid int value")):
        with pytest.raises(ValueError, match=f"argument --seq-length: {message}"):
            mlm.read_arguments(words)


def test_an_empty_variable_of_the_shell_is_no_data():
    """--data-path $DATA with DATA unset."""
    args = mlm.read_arguments("--data-path --seq-length 64 --reset-attention-mask --attention-dropout 0".split())
    assert mlm.training_data(args) == []
    (reason,) = mlm.refusals(args, ON, (0, 16))
    assert "give --data-path" in reason


SCRIPT = """
from megatron.training import pretrain
BlendedMegatronDatasetBuilder = loss_func = None
def loss_func(loss_mask, output_tensor): pass
def forward_step(data_iterator, model):
    {forward}
def train_valid_test_datasets_provider(sizes):
    return BlendedMegatronDatasetBuilder
"""


@pytest.mark.parametrize(
    ("forward", "hooked"),
    [("return loss_func", True), ("return lambda: loss_func", False), ("return None", False)],
)
def test_doctor_finds_in_a_script_what_the_run_finds(forward, hooked, tmp_path):
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(SCRIPT.format(forward=forward))
    names = {}
    exec(
        compile(SCRIPT.replace("from megatron.training import pretrain", "").format(forward=forward), "x", "exec"),
        names,
    )
    assert installed.megatron_lm(script).startswith("hookable") == hooked
    if hooked:
        assert script_global(names["forward_step"], "loss_func") is names["loss_func"]
    else:
        with pytest.raises(ExactError, match="does not use a global loss_func"):
            script_global(names["forward_step"], "loss_func")
    assert set(functions_of(script.read_text())) >= set(mlm.USES)


def test_a_script_that_is_no_python_is_one_line(tmp_path):
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("def forward_step(:\n")
    assert installed.megatron_lm(script).startswith(f"no: {script}, line 1: ")
