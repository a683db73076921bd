"""The cost model counts what DocumentAttention really exchanges and calls, and the emulated ranks compute the same attention."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exact_megatron import attention
from exact_megatron.attention import context_parallel, kernels
from exact_megatron.benchmark import attention as attention_benchmark
from exact_megatron.benchmark import harness
from exact_megatron.benchmark.attention import cost_rows, packings, rank_work
from exact_megatron.benchmark.attention_emulation import Emulation, kernel_calls, relative_error
from exact_megatron.benchmark.geometry import Shape
from exact_megatron.cli import main
from tests.unit.attention.test_attention import OneOf, config, packing

S, D = 96, 8
CPU = torch.device("cpu")
MODES = [("ulysses", 2, 4), ("ulysses", 4, 4), ("gather", 2, 2), ("gather", 4, 1)]  # mode, cp, KV heads of 8 heads


def shape(kv_heads: int, batch: int = 2) -> Shape:
    return Shape(S, batch, heads=8, kv_heads=kv_heads, head_dim=D, itemsize=4)


@pytest.fixture
def sent(monkeypatch):
    """Collectives that count the bytes a rank sends by ring algorithms, and leave zeros."""
    total = [0]

    def count(tensor, times):
        total[0] += round(tensor.numel() * tensor.element_size() * times)

    def all_to_all_single(out, x, group):
        count(x, (group.size() - 1) / group.size())
        out.zero_()

    def all_gather_into_tensor(out, x, group):
        count(x, group.size() - 1)
        out.zero_()

    def reduce_scatter_tensor(out, x, group):
        count(out, group.size() - 1)
        out.zero_()

    ours = (all_to_all_single, all_gather_into_tensor, reduce_scatter_tensor)
    fake = SimpleNamespace(get_backend=lambda group: "nccl", **{f.__name__: f for f in ours})
    monkeypatch.setattr(context_parallel, "dist", fake)
    return total


@pytest.mark.parametrize(("mode", "cp", "kv_heads"), MODES)
def test_model_is_what_a_rank_exchanges_and_calls(monkeypatch, sent, mode, cp, kv_heads):
    calls, sdpa = [], kernels._sdpa
    monkeypatch.setitem(kernels.KERNEL_FUNCTIONS, "sdpa", lambda *a, **k: calls.append(a) or sdpa(*a, **k))
    cuts, layer, rank = tuple(packing(3, 2)), shape(kv_heads), cp - 1
    group = OneOf(cp)
    group.rank = lambda: rank
    given = config(8, kv_heads, context_parallel_size=cp)
    module = attention.DocumentAttention(given, 1, pg_collection=SimpleNamespace(cp=group), mode=mode)
    q, k, v = (torch.randn(S // cp, 2, n, D, requires_grad=True) for n in (8, kv_heads, kv_heads))
    out = module(q, k, v, None, packed_seq_params=attention.document_boundaries(cuts, S, 2))
    expected = kernel_calls(layer, cuts, mode, cp, rank)
    assert [(c.queries, c.keys) for c in expected] == [call[3:5] for call in calls]
    for call, (q_, k_, v_, *_) in zip(expected, calls, strict=True):
        k_, v_ = k_.unbind(1) if call.interleaved else (k_, v_)
        assert q_.shape == torch.empty(2 * S, 8, D)[call.rows, call.heads].shape
        assert k_.shape == v_.shape == torch.empty(2 * S, kv_heads, D)[call.columns, call.kv_heads].shape
    out.sum().backward()
    assert sent[0] == layer.sent_bytes(mode, cp) > 0


def test_ulysses_where_the_heads_divide():
    assert [shape(2).modes(cp) for cp in (2, 4)] == [("ulysses", "gather"), ("gather",)]


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_work_counts_the_pairs(seed, cp):
    cuts, expected = packing(seed, 2), [0] * cp
    for token in range(2 * S):
        chunk = token % S // (S // (2 * cp))
        expected[min(chunk, 2 * cp - 1 - chunk)] += token - max(c for c in cuts if c <= token) + 1
    assert rank_work(tuple(cuts), S, cp).tolist() == expected


def test_the_zigzag_balances_one_long_document_but_not_others():
    assert len(set(rank_work((0, S), S, 4).tolist())) == 1
    rows = {row.name: row for row in cost_rows(shape(8, 1), [4], [(0, *range(S // 2, S + 1))])}
    assert rows["cp 4 ulysses: work"].ratio == 1
    gather = rows[
        "cp 4 gather: work"
    ]  # rank 3 has the end of the long document, and each rank 12 documents of one token
    assert gather.own * 1e6 == pytest.approx(sum(range(37, 49)) + 12)
    assert gather.reference * 1e6 == pytest.approx(sum(range(49)) / 4 + 12)


def test_packings_are_the_stream_cut_into_samples():
    lengths = np.array([5, 3, 20, 1, 11, 8, 40], np.int32)
    stream = np.cumsum(lengths[np.random.default_rng(harness.SEED).permutation(7)])
    pieces = {tuple(c - s for c in [s, *[e for e in stream if s < e < s + 8], s + 8]) for s in range(0, 88, 8)}
    found = packings(lengths, 8, 1, 11)
    assert sorted(found) == sorted(tuple(map(int, p)) for p in pieces for _ in range(found.count(p)))
    pairs = packings(lengths, 8, 2, 30)  # more than there are: some come again
    assert len(pairs) == 30
    for cuts in pairs:
        assert {cuts[: cuts.index(8) + 1], tuple(c - 8 for c in cuts[cuts.index(8) :])} <= pieces
    with pytest.raises(ValueError, match="88 tokens do not fill one sample of 89: use a shorter --seq-length"):
        packings(lengths, 89, 1, 1)


@pytest.mark.parametrize(("mode", "cp", "kv_heads"), MODES)
def test_emulated_ranks_together_are_the_whole(mode, cp, kv_heads):
    layer, cuts = shape(kv_heads), tuple(packing(4, 2))
    emulation = Emulation(layer, torch.float32, CPU, "auto")
    reference = emulation.reference(kernel_calls(layer, cuts, "ulysses", 1, 0)[0])
    ranks = [kernel_calls(layer, cuts, mode, cp, rank) for rank in range(cp)]
    assert relative_error(emulation.together(ranks), reference) < 1e-5
    assert relative_error(emulation.together(ranks[:-1]), reference) > 0.1


def measure(*arguments):
    parser = argparse.ArgumentParser()
    attention_benchmark.add_arguments(parser)
    facts, rows = attention_benchmark.measure(parser.parse_args([*arguments]))
    return facts["setup"], rows


SMALL = "--seq-length 128 --heads 4 --kv-heads 2 --head-dim 8 --cp 2,4 --samples 6 --repeats 2".split()


def test_measure(tmp_path, write_corpus):
    setup, rows = measure(*SMALL)
    ways = ["cp 2 ulysses", "cp 2 gather", "cp 4 gather"]
    assert [row.name for row in rows] == [
        f"{way}: {what}" for way in ways for what in ("sent", "work", "time", "error")
    ]
    assert all(row.passed and row.own > 0 and row.reference > 0 for row in rows)
    assert all((row.bar == "own <= 1e-05") == row.name.endswith("error") for row in rows)
    assert "EMULATED, no communication" in setup and "kernel sdpa" in setup and "6 micro-batches" in setup
    prefix = write_corpus(np.full(40, 64, np.int32))
    setup, rows = measure(*SMALL, "--prefix", prefix, "--only", "cost", "--batch", "2", "--tp", "2")
    assert f"{prefix}.idx" in setup and "EMULATED" not in setup and "24 segments, median 64" in setup
    assert [row.name for row in rows] == [f"cp {cp} gather: {what}" for cp in (2, 4) for what in ("sent", "work")]
    assert rows[0].own == 3 * 2 * 64 * 2 * 8 * 4 / 2**20  # K and V of 1 head, 64 tokens, batch 2
    assert rows[1].own * 1e6 == pytest.approx(2 * 2 * sum(range(65)) / 2)  # two samples of two documents, two ranks


def test_command(tmp_path, capsys):
    where = tmp_path / "result.json"
    assert main(["benchmark", "attention", *SMALL, "--only", "cost", "--json", str(where)]) == 0
    result, printed = json.loads(where.read_text()), capsys.readouterr().out
    assert [row["name"] for row in result["rows"]][:2] == ["cp 2 ulysses: sent", "cp 2 ulysses: work"]
    assert "cp 4 gather: work" in printed and "passed" not in printed, "a model has no bar"
    options = "--seq-length 128 --batch 1 --heads 4 --kv-heads 2 --head-dim 8 --tp 1 --cp 2,4 --samples 6 --repeats 2"
    assert result["command"] == f"exact-megatron benchmark attention {options} --kernel auto --only cost"
    assert main(["benchmark", "attention", "--batch", "0"]) == 2
    assert "--batch 0 must be at least 1" in capsys.readouterr().err


def test_a_wrong_kernel_misses_the_bar(monkeypatch):
    sdpa = kernels._sdpa

    def wrong(q, *a, **k):
        return [t * 1.001 if q.size(0) < 128 else t for t in sdpa(q, *a, **k)]

    monkeypatch.setitem(kernels.KERNEL_FUNCTIONS, "varlen", wrong)
    rows = measure(*SMALL, "--only", "time", "--kernel", "varlen")[1]
    assert [row.name for row in rows if not row.passed] == ["cp 2 gather: error", "cp 4 gather: error"]

    def empty(*a, **k):
        return [t * torch.nan for t in sdpa(*a, **k)]

    monkeypatch.setitem(kernels.KERNEL_FUNCTIONS, "varlen", empty)
    assert not any(row.passed for row in measure(*SMALL, "--only", "time", "--kernel", "varlen")[1] if row.bar)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["te", "varlen", "sdpa"])
def test_kernels_on_a_gpu(kernel):
    """All ranks of both ways on one GPU, with document boundaries off the chunks' edges."""
    pytest.importorskip(
        {"te": "transformer_engine.pytorch", "varlen": "torch.nn.attention.varlen"}.get(kernel, "torch")
    )
    sizes = (
        "--seq-length 2048 --batch 2 --heads 8 --kv-heads 4 --head-dim 64 --cp 2,4,8 --samples 4 --repeats 2".split()
    )
    setup, rows = measure(*sizes, "--only", "time", "--kernel", kernel)
    assert f"(cuda, kernel {kernel}," in setup and ", bf16;" in setup
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cp", "1,2"], "--cp 1,2: give sizes from 2 on"),
        (["--cp", "two"], "--cp two: give sizes from 2 on"),
        (["--cp", "3"], "--seq-length 128 must be a multiple of 6"),
        (["--heads", "3"], "--heads 3 must be a multiple of 2"),
        (["--tp", "4"], "--kv-heads 2 must be a multiple of 4"),
        (["--kernel", "flash"], "--kernel flash is not one of auto, te, varlen, sdpa"),
    ],
)
def test_sizes_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(*SMALL, *arguments)


def test_arguments_need_no_torch():
    """Every command builds this parser."""
    code = "import argparse, sys; from exact_megatron.benchmark.attention import add_arguments as add; "
    code += "add(argparse.ArgumentParser()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
