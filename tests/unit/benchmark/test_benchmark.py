import json
import re

import numpy as np
import pytest

from exact_megatron.benchmark import harness, one_rank, synthetic
from exact_megatron.cli import main
from tests.helpers.forked import run


@pytest.fixture
def measure(tmp_path, capsys):
    """measure(arguments...) -> (the JSON result, what was printed); whether bars are kept is not asked."""

    def run(*arguments):
        where = tmp_path / "result.json"
        code = main(["benchmark", *arguments, "--json", str(where)])
        result = json.loads(where.read_text())
        assert code == (0 if all(row["passed"] for row in result["rows"]) else 1)
        return result, capsys.readouterr().out

    return run


def check(result, printed, rows):
    """Whole numbers and facts, in the JSON and on the terminal."""
    assert [row["name"] for row in result["rows"]] == rows
    for row in result["rows"]:
        assert row["own"] > 0 and row["reference"] > 0
        assert row["name"] in printed and row["unit"] in printed and row["bar"] in printed
        assert ("passed" if row["passed"] else "MISSED") in printed
    assert set(result["versions"]) == {"exact-megatron", "megatron-core", "torch", "numpy", "python"}
    assert all(result[key] for key in ("date", "CPU", "GPU", "setup", "command"))
    assert result["command"] in printed and result["load average at the start"] >= 0
    assert result["cores used by other processes"] >= 0


def test_census(measure):
    result, printed = measure("census", "--documents", "20000", "--seq-length", "1024", "--repeats", "2")
    check(result, printed, ["census", "extra memory"])
    time, memory = result["rows"]
    assert time["ratio"] == time["own"] / time["reference"] and time["passed"] == (time["ratio"] <= 0.5)
    assert memory["passed"] and memory["own"] < 256
    assert result["command"].endswith(" census --documents 20000 --seq-length 1024 --repeats 2")


def test_getitem(measure):
    result, printed = measure("getitem", "--seq-length", "256", "--samples", "20")
    check(result, printed, ["against stock", "against reset flags"])
    assert result["arms"]["tail targets"] > 0
    for row, limit in zip(result["rows"], (1.25, 0.05)):
        assert row["ratio"] == row["own"] / row["reference"] and row["passed"] == (row["ratio"] <= limit)


def test_step(tmp_path):
    """In a process of its own: the CPU runtime changes torch.cuda for good."""
    model = "num_layers=1 hidden_size=32 ffn_hidden_size=32 micro_batch_size=1 global_batch_size=2"
    more = "data.seq_length=128 tensor_model_parallel_size=2 optim.sched.name=WSD"
    overrides = ["trainer.accelerator=cpu", *(f"model.{setting}" for setting in (model + " " + more).split())]
    where = tmp_path / "result.json"
    command = ["-m", "exact_megatron", "benchmark", "step", "--steps", "4", "--json", str(where)]
    done = run([*command, *overrides])
    assert where.exists(), done.stderr
    result = json.loads(where.read_text())
    check(result, done.stdout, ["training step"])
    (row,) = result["rows"]
    assert done.returncode == (0 if row["ratio"] >= 0.99 else 1)
    low, high = row["interval"]
    assert 0 < low <= row["ratio"] <= high
    assert "256 tokens a step in windows of 128, one rank on cpu" in result["setup"]
    proof = result["arms"]
    assert proof["tail targets"] > 0 and proof["loss mask of exact"] != proof["loss mask of baseline"]
    assert all(f"{name} {value}" in done.stdout for name, value in proof.items())
    assert all(setting in result["command"] for setting in overrides)


def test_qk_timing(tmp_path):
    model = "num_layers=2 hidden_size=32 ffn_hidden_size=32 micro_batch_size=1 global_batch_size=1 data.seq_length=64"
    overrides = ["trainer.accelerator=cpu", *(f"model.{setting}" for setting in model.split())]
    where = tmp_path / "result.json"
    command = ["-m", "exact_megatron", "benchmark", "qk-timing", "--steps", "3", "--json", str(where)]
    done = run([*command, *overrides])
    assert done.returncode == 0, done.stderr
    result = json.loads(where.read_text())
    during, after, memory = result["rows"]
    assert during["name"] == "step during the phase" and after["name"] == "step after the phase"
    assert during["interval"][0] <= during["ratio"] <= during["interval"][1]
    assert result["arms"]["during"].startswith("factor 0.") and "hooked True" in result["arms"]["during"]
    tokens = {said.split("tokens ")[1] for said in result["arms"].values()}
    assert len(result["arms"]) == 3 and len(tokens) == 1
    slowed = (8 + 4) * 4 * 32  # queries and keys of the second layer
    assert result["setup"].startswith(f"{slowed:,} parameters slowed")
    assert memory["own"] == slowed * 4 / 2**20 and 0 < memory["ratio"] < 1


ONE_MODEL = """
import sys

from exact_megatron.cli import main
from exact_megatron.training import trainer

built, build = [], trainer.build_model
trainer.build_model = lambda *args: built.append(args) or build(*args)
small = "num_layers=1 hidden_size=32 ffn_hidden_size=32 micro_batch_size=1 global_batch_size=1 data.seq_length=64".split()
overrides = ["trainer.accelerator=cpu", *(f"model.{setting}" for setting in small)]
codes = [main(["benchmark", name, "--steps", "1", *overrides]) for name in sys.argv[1:]]
print("codes", codes, "models", len(built))
"""


@pytest.mark.parametrize("first, second", [("step", "qk-timing"), ("qk-timing", "step")])
def test_a_process_holds_one_model(first, second):
    """All arms of a benchmark are of one model; another benchmark, whose peaks would count it, is rejected before it builds one."""
    done = run(["-c", ONE_MODEL, first, second])
    assert re.search(r"codes \[[01], 2\] models 1$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert f"`exact-megatron benchmark {second}` is one rank, in a process of its own" in done.stderr


def test_sizes_must_be_positive(capsys):
    assert main(["benchmark", "census", "--documents", "0"]) == 2
    assert "--documents 0 must be at least 1" in capsys.readouterr().err


def test_arms_take_turns():
    calls = []
    arms = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    seconds = harness.interleaved(arms, 3)
    assert "".join(name for name, _ in calls) == "abbaab" and [i for _, i in calls] == [0, 0, 1, 1, 2, 2]
    assert all(len(values) == 3 and (values >= 0).all() for values in seconds.values())


def test_corpus_holds_what_was_asked_for(tmp_path):
    from exact_megatron.packing import read_index

    written = synthetic.write_corpus(str(tmp_path / "x"), 5000)
    documents = len(written)
    lengths = read_index(str(tmp_path / "x")).lengths
    tokens = np.fromfile(tmp_path / "x.bin", np.uint16)
    assert len(lengths) == documents and lengths[:-1].sum() < 5000 <= lengths.sum()
    np.testing.assert_array_equal(np.flatnonzero(tokens == 0), np.cumsum(lengths) - 1)
    np.testing.assert_array_equal(lengths, synthetic.document_lengths(5000 // 8 + 1)[:documents])
    np.testing.assert_array_equal(lengths, written)
    given = synthetic.write_corpus(str(tmp_path / "y"), 1000, 128256, np.array([70, 30, 200]))
    assert given.tolist() == [70, 30, 200] * 3 + [70, 30] and np.fromfile(tmp_path / "y.bin", np.int32).max() > 65535


def test_unweighted_twin_leaves_the_weighted_data_alone():
    class Data:
        weight_table = "table"

        def __init__(self, *datasets):
            if datasets:
                self.datasets = list(datasets)

    member = Data()
    blend = Data(member)
    copied = one_rank.copy_dataset(blend, weight_table=None)
    assert copied.datasets[0].weight_table is None and member.weight_table == "table"
    assert blend.datasets == [member]
