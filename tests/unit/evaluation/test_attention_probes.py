"""Probes of attention and residual writes: plain references, and a tiny run end to end."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from exact_megatron.evaluation import attention_probes
from exact_megatron.evaluation.attention_probes import MEASURES, Probe, attention_sharpness
from tests.helpers.forked import run
from tests.helpers.tiny import config_file, write_data


@pytest.mark.parametrize("rows", [3, 512])
def test_sharpness_is_that_of_a_plain_softmax(monkeypatch, rows):
    monkeypatch.setattr(attention_probes, "_ROWS", rows)
    torch.manual_seed(0)
    query, key = torch.randn(10, 4, 6), torch.randn(10, 2, 6)
    entropy, largest = attention_sharpness(query, key)
    for i in range(10):
        for head in range(4):
            weights = torch.softmax(key[: i + 1, head // 2] @ query[i, head] / math.sqrt(6), 0)
            torch.testing.assert_close(entropy[i, head], torch.distributions.Categorical(weights).entropy())
            torch.testing.assert_close(largest[i, head], weights.max())
    assert entropy[0].eq(0).all() and largest[0].eq(1).all()


class Core(torch.nn.Module):
    softmax_scale = None

    def forward(self, query, key, value, packed_seq_params=None):
        return query


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.core_attention = Core()

    def forward(self, x, params):
        self.core_attention(x, x, x, packed_seq_params=params)
        return x.flatten(2), torch.ones(4)


def test_documents_and_writes():
    """Uniform attention over documents of 3, 1 and 4 tokens: the first token of each is left out; writes include the bias."""
    layer = SimpleNamespace(layer_number=3, self_attention=Attention(), mlp=torch.nn.Module())
    layer.mlp.forward = lambda x: (3 * x.flatten(2), None)
    probe = Probe()
    x = torch.zeros(4, 2, 2, 2)  # two samples of four tokens, two heads
    with probe.watching([layer]):
        layer.self_attention(x, SimpleNamespace(cu_seqlens_q=torch.tensor([0, 3, 4, 8])))
        layer.mlp(x + 1)
    means = probe.means()
    seen = [2, 3, 2, 3, 4]
    assert means["entropy"] == pytest.approx([sum(map(math.log, seen)) / 5])
    assert means["largest"] == pytest.approx([sum(1 / n for n in seen) / 5])
    assert means["attention_write"] == pytest.approx([2.0]) and means["mlp_write"] == pytest.approx([6.0])
    layer.mlp(x + 5)
    assert probe.means() == means  # the hooks are gone


def test_a_run_from_end_to_end(tmp_path):
    config = config_file(tmp_path, write_data(tmp_path))
    steps = ["trainer.max_steps=2", "trainer.limit_val_batches=1", "model.num_layers=2", "model.qk_timing.enabled=true"]
    keep = ["every_n_train_steps=1", "save_top_k=-1"]
    keep = [f"exp_manager.checkpoint_callback_params.{setting}" for setting in keep]
    train = ["train", "--config", str(config), *steps, *keep]
    done = run(["-m", "exact_megatron", *train])
    assert done.returncode == 0, done.stderr[-3000:]
    out = [tmp_path / "probes.json", tmp_path / "probes.png"]
    probe = [str(tmp_path / "run"), "--batches", "1", "--json", str(out[0]), "--plot", str(out[1])]
    done = run(["-m", "exact_megatron.evaluation.attention_probes", *probe])
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads(out[0].read_text())
    assert result["steps"] == [1, 2] and result["slowed"] == [2] and len(result["rate"]) == 2
    assert result["slowed_rate"][0] == 0.25 * result["rate"][0] > 0
    for measure in MEASURES:
        assert len(result[measure]) == 2 and all(len(at_step) == 2 and min(at_step) > 0 for at_step in result[measure])
        assert result[measure][0] != result[measure][1]
    assert 0 < result["entropy"][0][0] < math.log(64) and result["largest"][0][0] < 1
    assert out[1].read_bytes().startswith(b"\x89PNG")
