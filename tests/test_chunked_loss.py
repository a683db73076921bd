"""The loss in chunks of the sequence gives the same steps: tied and untied, tensor and pipeline parallel, with weights."""

import json

import pytest
from ranks import launch
from tiny import config_file, write_data

STEPS = 3
TIED = ["model.share_embeddings_and_output_weights=true"]
VARIANTS = {
    "plain": [], "chunks": ["model.loss_chunk_tokens=24"],  # 64 positions: 24, 24, 16
    "tied": TIED, "tied_chunks": [*TIED, "model.loss_chunk_tokens=16"],
    # megatron.core's fusion rounds the logits' gradient to bfloat16, in float32 runs too, so it has its own reference
    "fused": ["model.cross_entropy_loss_fusion=true"],
    "fused_chunks": ["model.loss_chunk_tokens=24", "model.cross_entropy_loss_fusion=true"],
}  # fmt: skip


def metrics(folder, world, common, variants):
    config = config_file(folder, write_data(folder))
    jobs = [
        {"name": name, "steps": STEPS, "overrides": [f"trainer.devices={world}", *common, *more]}
        for name, more in variants.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch("run_layouts.py", [str(config), str(folder / "jobs.json"), str(folder)], world)
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
