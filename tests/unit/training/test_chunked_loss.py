"""The loss in chunks of the sequence gives the same steps: tied and untied, tensor and pipeline parallel, with weights."""

import json

import pytest

from exact_megatron.training.config import load_config
from tests.helpers.ranks import launch
from tests.helpers.tiny import config_file, write_data

STEPS = 3
TIED = ["model.share_embeddings_and_output_weights=true"]
VARIANTS = {
    "plain": [],
    "chunks": ["model.loss_chunk_tokens=24"],  # 64 positions: 24, 24, 16
    "tied": TIED,
    "tied_chunks": [*TIED, "model.loss_chunk_tokens=16"],
    # megatron.core's fusion rounds the logits' gradient to bfloat16, in float32 runs too, so it has its own reference
    "fused": ["model.cross_entropy_loss_fusion=true"],
    "fused_chunks": ["model.loss_chunk_tokens=24", "model.cross_entropy_loss_fusion=true"],
}


def metrics(folder, world, common, variants):
    config = config_file(folder, write_data(folder))
    jobs = [
        {"name": name, "steps": STEPS, "overrides": [f"trainer.devices={world}", *common, *more]}
        for name, more in variants.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch("distributed/run_layouts.py", [str(config), str(folder / "jobs.json"), str(folder)], world)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in variants}


def equal(own, reference):
    assert len(own) == len(reference) == STEPS
    for a, b in zip(own, reference):
        for key in ("lm_loss", "exact_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-6), (key, a, b)
        assert a["exact_loss"] != a["lm_loss"]


def test_chunks_change_nothing(tmp_path):
    found = metrics(tmp_path, 2, ["model.tensor_model_parallel_size=2"], VARIANTS)
    equal(found["chunks"], found["plain"])
    equal(found["fused_chunks"], found["fused"])
    equal(found["tied_chunks"], found["tied"])


def test_logits_exist_a_chunk_at_a_time(monkeypatch):
    """Neither forward nor backward sees more than a chunk's logits."""
    import torch

    from exact_megatron.training.chunked_loss import chunk_loss

    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"sequence_parallel": False})
            self.output_layer = torch.nn.Linear(8, 50, bias=False)
            plain = self.output_layer.forward
            self.output_layer.forward = lambda x, weight=None: (seen.append(len(x)), (plain(x), None))[1]

        def compute_language_model_loss(self, labels, logits):
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.t().flatten(), reduction="none")
            return losses.view(logits.shape[:2]).t()

        def forward(self, hidden, labels):
            return self.compute_language_model_loss(labels, self.output_layer(hidden)[0])

    torch.manual_seed(0)
    model, hidden = Model(), torch.randn(30, 2, 8, requires_grad=True)
    labels, weight = torch.randint(0, 50, (2, 30)), torch.rand(2, 30)
    results = []
    for chunks in (False, True):
        if chunks:
            chunk_loss(model, 12)
        model.zero_grad()
        hidden.grad = None
        losses = model(hidden, labels)
        (losses * weight).sum().backward()
        results.append((losses.detach(), hidden.grad, model.output_layer.weight.grad))
    assert seen[0] == 30 and seen[1:4] == [12, 12, 6] and sorted(seen[4:]) == [6, 12, 12]
    for own, reference in zip(results[1], results[0]):
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-6)
    model.config.sequence_parallel = True
    with pytest.raises(ValueError, match="loss_chunk_tokens=12 needs model.sequence_parallel=false"):
        chunk_loss(model, 12)


def test_other_loss_ends_are_measured_where_they_are_installed(monkeypatch):
    """Stand-ins for the two packages: one that weights each target, and one that gives all the first one's gradient."""
    import sys
    import types

    import torch

    from exact_megatron.benchmark.profile import loss_end

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx, losses):
            return losses.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.flatten()[0].expand_as(gradient)

    def plain(e, c, targets):
        logits = e.flatten(0, -2) @ c.T
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)

    def apply(e, c, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction):
        assert (bias, ce_weight, ignore_index, lse_square_scale, label_smoothing) == (None, None, -100, 0.0, 0.0)
        assert e.shape == (24, 8) and target.shape == (24,) and reduction == "none"
        return plain(e, c, target), None, None, None

    def linear_cross_entropy(e, c, targets, *, reduction, filter_eps):
        assert (reduction, filter_eps, e.shape) == ("none", None, (2, 12, 8))
        return First.apply(plain(e, c, targets))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output_layer = torch.nn.Linear(8, 50, bias=False)
            self.output_layer.forward = lambda x, weight: (x @ weight.T, None)

        def compute_language_model_loss(self, labels, logits):
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.t().flatten(), reduction="none")
            return losses.view(logits.shape[:2]).t()

    class Fused(torch.autograd.Function):
        """As megatron.core's linear layer with a fused weight gradient: autograd gets a placeholder."""

        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.zeros_like(gradient)

    run = load_config(
        None,
        [
            "model.data.data_prefix=[none]",
            "model.data.seq_length=12",
            "model.micro_batch_size=2",
            "model.hidden_size=8",
            "model.override_vocab_size=50",
        ],
    )
    model = [types.SimpleNamespace(module=Model())]
    trainer = types.SimpleNamespace(run=run, model=model, device=torch.device("cpu"))
    assert loss_end(trainer)["others"] == {}
    modules = {
        "liger_kernel.ops.fused_linear_cross_entropy": {
            "LigerFusedLinearCrossEntropyFunction": types.SimpleNamespace(apply=apply)
        },
        "cut_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
    }
    for name, values in modules.items():
        for part in (name.split(".")[0], name):
            module = types.ModuleType(part)
            module.__spec__ = types.SimpleNamespace(name=part)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, part, module)
    found = loss_end(trainer)["others"]
    assert found["liger"]["error"] < 1e-5 and found["cut-cross-entropy"]["error"] > 0.1
    assert all(values["s"] > 0 and values["GiB"] == 0 for values in found.values())

    layer = model[0].module.output_layer
    layer.gradient_accumulation_fusion = True
    layer.forward = lambda x, weight: (
        x @ (Fused.apply(weight) if layer.gradient_accumulation_fusion else weight).T,
        None,
    )
    assert loss_end(trainer)["others"]["liger"]["error"] < 1e-5 and layer.gradient_accumulation_fusion
    run.model.tensor_model_parallel_size = 2
    assert loss_end(trainer)["others"] == {}
