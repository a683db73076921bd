"""The real SmolLM2-135M, downloaded once into the user's cache (examples/continued_pretraining/get_smollm2.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from exact_megatron.convert.convert import hf_to_megatron, megatron_to_hf
from tests.helpers.hf_models import tensors
from tests.helpers.ranks import launch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "continued_pretraining"))


@pytest.mark.slow
def test_smollm2(tmp_path):
    """Logits equal transformers' to 1e-4 on one rank and, with its 9 heads padded to 12, on TP2; back bit by bit."""
    pytest.importorskip("gguf", reason="reads the model's file; pip install exact-megatron[hf]")
    from get_smollm2 import get
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = get()
    text = Path(json.__file__).read_text()
    tokens = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(tokens).logits
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], tokens[0, 1:])
    assert loss < 2.5  # the weights are those of a trained model
    for name, world, kv_heads in (("one", 1, None), ("tp2", 2, 4)):
        model = tmp_path / name
        hf_to_megatron(source, model, kv_heads, quiet=True)
        job = {"model": str(model), "tokens": tokens.tolist(), "out": f"{tmp_path}/{name}"}
        job["overrides"] = [f"model.tensor_model_parallel_size={world}", f"trainer.devices={world}"]
        (tmp_path / "jobs.json").write_text(json.dumps([job]))
        launch("distributed/run_logits.py", [str(tmp_path / "jobs.json")], world)
        difference = (torch.load(f"{tmp_path}/{name}.pt") - expected).abs().max().item()
        print(
            f"{name}: largest difference of logits {difference:.1e}, largest logit {expected.abs().max():.1f}, loss {loss:.3f}"
        )
        assert difference < 1e-4
        megatron_to_hf(model, tmp_path / f"{name}.hf", quiet=True)
        held, back = tensors(source), tensors(tmp_path / f"{name}.hf")
        assert held.keys() == back.keys() and all(torch.equal(held[k], back[k]) for k in held)
