"""Models of Transformer Engine's layers, and checkpoints between them and megatron.core's own layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values

from exact_megatron.config import ExactError
from exact_megatron.training import checkpoint
from exact_megatron.training.config import load_config
from exact_megatron.training.model import build_chunks, build_model, build_optimizer

pytestmark = pytest.mark.te

MODEL = """
    model.num_layers=2 model.hidden_size=128 model.ffn_hidden_size=256 model.num_attention_heads=4 model.num_query_groups=2
    model.override_vocab_size=128 model.make_vocab_size_divisible_by=128 model.data.seq_length=128 model.data.eod_id=0
    trainer.devices=1 trainer.accelerator=gpu trainer.precision=bf16
""".split()
FP8 = {"delayed": "TEDelayedScaling", "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}


def build(folder, seed, *settings):
    """The chunk of a run's model, with weights of its own, as training/checkpoint.py takes it."""
    run = load_config(
        None, [*MODEL, f"model.data.data_prefix=[{folder}/x]", f"exp_manager.exp_dir={folder}", *settings]
    )
    (model,) = build_chunks(run, 128, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return SimpleNamespace(module=model, ddp_config=SimpleNamespace(overlap_param_gather=False))


@pytest.mark.parametrize("precision", ["bf16", *FP8])
def test_models_build(parallel_state, tmp_path, precision):
    """And megatron.core makes the recipe that the settings name, which Transformer Engine accepts for this device."""
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe

    fp8 = precision in FP8
    settings = [
        "model.fp8=true",
        f"model.fp8_recipe={precision}",
        f"model.fp8_hybrid={precision != 'blockwise'}".lower(),
    ]
    model = build(tmp_path, 0, *(settings if fp8 else []), "model.transformer_engine=true").module
    names = {type(module).__name__ for module in model.decoder.layers.modules()}
    assert {"DocumentAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= names, names
    assert not names & {"ColumnParallelLinear", "RowParallelLinear", "TEDotProductAttention"}, names
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if fp8:
        assert type(get_fp8_recipe(model.config)).__name__ == FP8[precision]
        with get_fp8_context(model.config, 0):
            pass


# In the checkpoint megatron.core's own layers have the names of Transformer Engine's, whose linears hold their norm.
NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
LAYERS = {
    "rmsnorm": [],
    "layernorm-bias-qk": [
        "model.normalization=layernorm",
        "model.bias=true",
        "model.qk_layernorm=true",
        "model.activation=gelu",
    ],
}


def parameters(model):
    """By Transformer Engine's names."""
    found = {}
    for name, parameter in model.module.named_parameters():
        for local, fused in NORMS.items():
            name = name.replace(local, fused)
        found[name] = parameter.detach().clone()
    return found


class Nothing:
    """In place of an optimizer and a schedule."""

    def __init__(self):
        self.loaded = None

    def sharded_state_dict(self, *_, **__):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        self.loaded = state


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("resume", [False, True], ids=["weights", "resume"])
@pytest.mark.parametrize(
    "saved, loaded", [(False, True), (True, False), (True, True)], ids=["local-te", "te-local", "te-te"]
)
def test_checkpoint_between_layers(parallel_state, tmp_path, saved, loaded, resume, layers):
    def engine(on):
        return f"model.transformer_engine={str(on).lower()}"

    first, second = (build(tmp_path, i, engine(on), *LAYERS[layers]) for i, on in enumerate((saved, loaded)))
    path = checkpoint.save(tmp_path, 1, [first], Nothing(), Nothing(), {"step": 1}, -1)
    before = parameters(second)
    if resume:
        assert checkpoint.load(path, [second], Nothing(), Nothing()) == {"step": 1}
    else:
        checkpoint.load_weights(path, [second])
    expected, found = parameters(first), parameters(second)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter) and not torch.equal(before[name], parameter), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("model.qkv_bias=true", r"lacks 1 tensors of this model: decoder.layers.self_attention.linear_qkv.bias\."),
        ("model.ffn_hidden_size=512", r"linear_fc2.weight is \(2, 128, 256\) there, \(2, 128, 512\) here"),
    ],
)
@pytest.mark.parametrize("resume", [False, True], ids=["weights", "resume"])
def test_a_whole_checkpoint_of_another_model(parallel_state, tmp_path, resume, settings, message):
    """Extra states may be missing, weights may not; the error names them, and does not advise to remove the checkpoint."""
    first, second = (build(tmp_path, 0, *more) for more in ([], [settings]))
    path = checkpoint.save(tmp_path, 1, [first], Nothing(), Nothing(), {}, -1)
    with pytest.raises(ExactError, match=message) as error:
        checkpoint.load(path, [second], Nothing(), Nothing()) if resume else checkpoint.load_weights(path, [second])
    assert "remove" not in str(error.value) and "damaged" not in str(error.value)


def test_a_damaged_checkpoint_without_checksums(parallel_state, tmp_path):
    first = build(tmp_path, 0)
    path = checkpoint.save(tmp_path, 1, [first], Nothing(), Nothing(), {}, -1)
    for file in path.glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(ExactError, match="cannot be read: .*If it is damaged .*remove it"):
        checkpoint.load_weights(path, [first])


@pytest.mark.parametrize("name", ["adam", "mcore_distributed_optim"])
@pytest.mark.parametrize("saved, loaded", [(False, True), (True, False)], ids=["local-te", "te-local"])
def test_optimizer_goes_along(parallel_state, monkeypatch, tmp_path, saved, loaded, name):
    """Adam's moments of each weight, on a resume with the other kind of layers; torch's Adam, since Transformer Engine's is CUDA."""
    import megatron.core.optimizer as core

    monkeypatch.setattr(core, "USING_PYTORCH_OPTIMIZER", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(core.distrib_optimizer, "HAVE_APEX_OR_TE", False)
    for module in (core, core.distrib_optimizer):
        monkeypatch.setattr(module, "Adam", torch.optim.AdamW)

    def start(seed, engine):
        settings = [f"model.optim.name={name}", f"model.transformer_engine={str(engine).lower()}"]
        run = load_config(
            None, [*MODEL, f"model.data.data_prefix=[{tmp_path}/x]", f"exp_manager.exp_dir={tmp_path}", *settings]
        )
        model = build_model(run, 128, torch.device("cpu"))
        optimizer, scheduler = build_optimizer(run, model)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model[0].parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        for inner in optimizer.chained_optimizers:
            inner.prepare_grads()
            inner.step_with_ready_grads()
        return model, optimizer, scheduler

    def moments(model, optimizer):
        state = optimizer.sharded_state_dict(model[0].module.sharded_state_dict(), metadata=dict(checkpoint._SHARDING))
        return {(t.key, t.global_offset): t.data.clone() for t in nested_values(state) if isinstance(t, ShardedTensor)}

    first, second = start(0, saved), start(1, loaded)
    path = checkpoint.save(tmp_path, 1, *first, {"step": 1}, -1)
    before = moments(*second[:2])
    checkpoint.load(path, *second)
    expected, found = moments(*first[:2]), moments(*second[:2])
    assert expected.keys() == found.keys() and len(found) > 30
    for key, moment in expected.items():
        assert torch.equal(found[key], moment) and not torch.equal(before[key], moment), key
