"""The recipes in configs/: geometry as published, stages as in the paper, and a layout that fits."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from exact_megatron.benchmark.geometry import Geometry
from exact_megatron.planning.flops import causal_pairs, flops_per_token
from exact_megatron.planning.memory import GIB, memory, parameters
from exact_megatron.planning.plan import GPU_MEMORY
from exact_megatron.training.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"

# config.json of each model as published: layers, hidden, intermediate, heads, KV heads, rows of the vocabulary, tied
# embeddings, rope_theta, rms_norm_eps, factor of RoPE scaling (llama3) or None, max_position_embeddings; then the number of
# parameters on its model card (safetensors' count).
PUBLISHED = {
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151936, True, 1e6, 1e-6, None, 32768, 494_032_768),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936, True, 1e6, 1e-6, None, 131072, 1_543_714_304),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, 151936, True, 1e6, 1e-6, None, 32768, 3_085_938_688),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, False, 1e6, 1e-6, None, 131072, 7_615_616_512),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 128256, True, 5e5, 1e-5, 32.0, 131072, 1_235_814_400),
    "llama-3.2-3b": (28, 3072, 8192, 24, 8, 128256, True, 5e5, 1e-5, 32.0, 131072, 3_212_749_824),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128256, False, 5e5, 1e-5, 8.0, 131072, 8_030_261_248),
    "llama-3.1-70b": (80, 8192, 28672, 64, 8, 128256, False, 5e5, 1e-5, 8.0, 131072, 70_553_706_496),
    "smollm2-135m": (30, 576, 1536, 9, 3, 49152, True, 1e5, 1e-5, None, 8192, 134_515_008),
}
STAGES = {"4k": (4096, 1024), "8k": (8192, 2048), "16k": (16384, 4096)}


@functools.cache
def recipe(model, stage, *overrides):
    files = [CONFIGS / "cpt.yaml", CONFIGS / "models" / f"{model}.yaml", CONFIGS / "stages" / f"{stage}.yaml"]
    return load_config(files, list(overrides))


def test_every_file_is_in_the_tables():
    assert {path.stem for path in (CONFIGS / "models").iterdir()} == set(PUBLISHED)
    assert {path.stem for path in (CONFIGS / "stages").iterdir()} == set(STAGES)


@pytest.mark.parametrize("model", PUBLISHED)
def test_geometry_is_the_published_one(model):
    layers, hidden, ffn, heads, groups, vocabulary, tied, theta, eps, factor, positions, count = PUBLISHED[model]
    m = recipe(model, "4k").model
    assert (m.num_layers, m.hidden_size, m.ffn_hidden_size) == (layers, hidden, ffn)
    assert (m.num_attention_heads, m.num_query_groups, m.override_vocab_size) == (heads, groups, vocabulary)
    assert (m.share_embeddings_and_output_weights, m.rotary_base, m.layernorm_epsilon) == (tied, theta, eps)
    assert m.qkv_bias == model.startswith("qwen") and not m.bias and not m.qk_layernorm and m.kv_channels is None
    assert (m.normalization, m.activation, m.rotary_percentage) == ("rmsnorm", "fast-swiglu", 1.0)
    # SmolLM2's third stage is longer than its published positions.
    assert m.max_position_embeddings == (16384 if model == "smollm2-135m" else positions)
    scaling = m.rope_scaling
    assert scaling.rope_type == ("default" if factor is None else "llama3")
    if factor is not None:
        assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (factor, 1.0, 4.0)
        assert scaling.original_max_position_embeddings == 8192
    assert parameters(recipe(model, "4k"), vocabulary) == count


@pytest.mark.parametrize("model", PUBLISHED)
def test_plan_and_benchmark_count_the_same_operations(model):
    layers, hidden, ffn, heads, groups, vocabulary, tied, *_ = PUBLISHED[model]
    run = recipe(model, "4k")
    channels = run.model.kv_channels or hidden // heads
    geometry = Geometry(layers, hidden, ffn, heads, groups, channels, vocabulary, tied)
    planned = flops_per_token(run, vocabulary, None)["total"]
    assert planned == geometry.step_flops(layers, 4096, causal_pairs([4096])) / 4096
    attention = hidden * channels * (2 * heads + 2 * groups)
    matrices = layers * (attention + 3 * hidden * ffn) + hidden * vocabulary
    assert planned == 6 * matrices + 12 * layers * heads * channels * (4096 + 1) / 2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_stage_fits_with_a_tenth_to_spare(model, stage):
    window, tau = STAGES[stage]
    baseline = recipe(model, stage)
    assert baseline.world_size == (64 if model == "llama-3.1-70b" else 8)
    settings = baseline.model.exact.validated(window)
    assert (baseline.model.data.seq_length, settings.tau, settings.alpha, settings.gamma) == (window, tau, 0.15, 0.5)
    assert baseline.tokens_per_step == 2**20
    assert baseline.model.micro_batch_size * window == 2**14
    assert window <= baseline.model.max_position_embeddings
    vocabulary = baseline.model.override_vocab_size
    assert baseline.padded_vocab_size(vocabulary) == vocabulary
    assert max(part.total for part in memory(baseline, vocabulary)) <= 0.9 * GPU_MEMORY * GIB


def test_arms_differ_in_nothing_else():
    baseline, exact = recipe("llama-3.2-1b", "8k"), recipe("llama-3.2-1b", "8k", "model.exact.enabled=true")
    changed = [
        (a, b) for a, b in zip(baseline.to_yaml().splitlines(), exact.to_yaml().splitlines(), strict=True) if a != b
    ]
    assert changed == [("    enabled: false", "    enabled: true")]


def test_a_later_file_wins_key_by_key(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "model: {hidden_size: 64, num_layers: 6, data: {data_prefix: [1, x, 2, y]}, optim: {betas: [0.8, 0.9]}}"
    )
    second.write_text("model: {num_layers: 4, data: {data_prefix: [z]}}")
    run = load_config([first, second], ["model.hidden_size=32"])
    assert (run.model.hidden_size, run.model.num_layers) == (32, 4)
    assert run.model.data.data_prefix == ["z"] and run.model.optim.betas == [0.8, 0.9]
    assert load_config([second, first]).model.num_layers == 6
    second.write_text("model: {num_layer: 4}")
    with pytest.raises(ValueError, match=r"unknown key model\.num_layer: did you mean model\.num_layers"):
        load_config([first, second])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.activations_checkpoint_granularity=full", "model.activations_checkpoint_method=block"],
            "needs a number",
        ),
        (["model.activations_checkpoint_num_layers=2"], "anything else takes none"),
        (["model.rope_scaling.rope_type=longrope"], "rope_type='longrope' is not one of default, llama3, yarn"),
        (["model.rope_scaling.rope_type=yarn", "model.seq_len_interpolation_factor=2"], "both scale the positions"),
        (["model.rope_scaling.rope_type=yarn", "model.rotary_percentage=0.5"], "rotary_percentage=0.5 rotates a part"),
        (["model.rope_scaling.rope_type=yarn", "model.rope_scaling.beta_slow=40"], "beta_fast=32 must be above .*=40"),
    ],
)
def test_settings_that_a_recipe_may_get_wrong(overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe("qwen2.5-0.5b", "4k", *overrides)
