"""A Hugging Face config.json and the native runner's model settings, either way. Needs neither torch nor transformers."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..training.rope import attention_factor
from ..training.schema import ROPE_SCALING_KEYS, ModelConfig, RopeScalingConfig


@dataclass(frozen=True)
class Family:
    """What a model_type means beyond its config.json: biases, norms and the defaults of the transformers class."""

    architecture: str
    qkv_bias: bool = False
    qk_layernorm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    key_value_heads: int | None = None  # None: num_attention_heads
    max_position_embeddings: int = 32768


# transformers 5.23 models/{llama,qwen2,qwen3}/configuration_*.py; a test compares them. SmolLM2 is of the type llama.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", max_position_embeddings=2048),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, key_value_heads=32),
    "qwen3": Family("Qwen3ForCausalLM", qk_layernorm=True, head_dim=128, key_value_heads=32),
}
_ROPE = ("rotary_base", "seq_len_interpolation_factor", "rope_scaling")
# Keys whose every value but these would need layers that are not built here. transformers reads no others for these types.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
    "auto_map": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
}


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    path = Path(folder, "config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return config


def model_settings(config: dict[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The `model:` settings of the native runner for a config.json.

    Args:
        config: of model_type llama, qwen2 or qwen3, as transformers 4 or 5 writes it.
        where: names the file in errors.

    Returns:
        Settings by their name in ModelConfig; rope_scaling is a mapping.

    Raises:
        ValueError: names the first key, and its value, that these layers cannot compute.
    """

    def refuse(key: str, value: Any, reason: str) -> None:
        raise ValueError(f"{where}: {key}={json.dumps(value)} is not supported: {reason}")

    kind = config.get("model_type")
    if kind not in FAMILIES:
        reason = f"the dense models {', '.join(FAMILIES)} are (SmolLM2 is of type llama)"
        refuse("model_type", kind, reason + (", mixtures of experts are not" if "moe" in str(kind) else ""))
    family = FAMILIES[str(kind)]
    if config.get("architectures") not in (None, [family.architecture]):
        refuse("architectures", config["architectures"], f"the weights of a {family.architecture} are converted")
    for key, allowed in _ONLY.items():
        value = config.get(key)
        if value not in allowed:
            refuse(key, value, f"it can be {' or '.join(map(json.dumps, allowed))}")
    layers = _number(config, "num_hidden_layers", where)
    if kind == "llama" and config.get("sliding_window") is not None:
        refuse("sliding_window", config["sliding_window"], "all layers attend to the whole window")
    if config.get("use_sliding_window") and config.get("max_window_layers", 28) < layers:
        refuse("use_sliding_window", True, "all layers attend to the whole window")
    for layer_type in config.get("layer_types") or ():
        if layer_type != "full_attention":
            refuse("layer_types", config["layer_types"], "all layers attend to the whole window")

    hidden, heads = (_number(config, key, where) for key in ("hidden_size", "num_attention_heads"))
    if config.get("head_dim") is None and family.head_dim is None and hidden % heads:
        refuse("hidden_size", hidden, f"it is no multiple of num_attention_heads={heads}, and head_dim is not given")
    groups = config.get("num_key_value_heads", family.key_value_heads) or heads
    if heads % groups:
        refuse("num_key_value_heads", groups, f"num_attention_heads={heads} is no multiple of it")
    vocabulary = _number(config, "vocab_size", where)
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": _number(config, "intermediate_size", where),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": config.get("head_dim") or family.head_dim or hidden // heads,
        "max_position_embeddings": config.get("max_position_embeddings", family.max_position_embeddings),
        "normalization": "rmsnorm",
        "layernorm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_layernorm,
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
        **_rope_settings(config, where),
        "rotary_percentage": 1.0,
        "init_method_std": float(config.get("initializer_range", 0.02)),
        # No more padding than the published model has: its loss is then reproduced, see docs/convert.md.
        "make_vocab_size_divisible_by": math.gcd(vocabulary, 128),
        "override_vocab_size": vocabulary,
    }


def _number(config: dict[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {key}={json.dumps(value)} is not a number of at least 1")
    return value


def _rope_settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers 4 writes rope_theta and rope_scaling; 5 puts both into rope_parameters, and prefers rope_scaling."""
    name = next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), "rope_scaling")
    rope = config.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    settings: dict[str, Any] = {
        "rotary_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "seq_len_interpolation_factor": None,
        "rope_scaling": RopeScalingConfig().used(),
    }
    if kind not in ("linear", *ROPE_SCALING_KEYS) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"{where}: {name}={json.dumps(rope)} is not supported: rope_type can be default, linear, llama3 or yarn, the same in all layers"
        )
    needed = {"linear": ("factor",), "yarn": ("factor",), "llama3": ROPE_SCALING_KEYS["llama3"]}.get(kind, ())
    if missing := [key for key in needed if rope.get(key) is None]:
        raise ValueError(f"{where}: {name}={json.dumps(rope)} of type {kind} needs {', '.join(missing)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where}: {name}={json.dumps(rope)} is not supported: partial_rotary_factor can be 1")
    if kind == "linear":
        settings["seq_len_interpolation_factor"] = float(rope["factor"])
    elif kind != "default":
        values = {key: rope[key] for key in ROPE_SCALING_KEYS[kind] if rope.get(key) is not None}
        values = {key: value if isinstance(value, bool) else float(value) for key, value in values.items()}
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = int(original or config["max_position_embeddings"])
        if kind == "yarn" and "attention_factor" not in values and rope.get("mscale") and rope.get("mscale_all_dim"):
            scales = [attention_factor(values["factor"], float(rope[key])) for key in ("mscale", "mscale_all_dim")]
            values["attention_factor"] = scales[0] / scales[1]
        settings["rope_scaling"] = RopeScalingConfig(rope_type=kind, **values).used()
    return settings


def config_json(model: ModelConfig, seq_length: int, vocab_size: int, source: dict[str, Any] | None) -> dict[str, Any]:
    """The config.json of a trained model: that of the model it came from, with the window and RoPE it was trained with.

    Args:
        model: settings of the run. Position settings may be another than `source` has; everything else must be the same.
        seq_length: window of the run, the least value of max_position_embeddings.
        vocab_size: rows of the embeddings without padding.
        source: config.json of the model that training started from; None writes a minimal one of the family with these layers.

    Raises:
        ValueError: no family has these layers, or the run's model is not the source's.
    """
    for key in ("num_moe_experts", "mtp_num_layers"):
        if getattr(model, key):
            raise ValueError(
                f"model.{key}={getattr(model, key)}: only dense models that predict one token can be exported"
            )
    if source is None:
        return _minimal_config(model, seq_length, vocab_size)
    before = model_settings(source, "the source's config.json")
    now = {key: value for key, value in asdict(model).items() if key in before}
    now["rope_scaling"] = model.rope_scaling.used()
    now |= {"override_vocab_size": vocab_size, "num_query_groups": model.num_query_groups or model.num_attention_heads}
    now["kv_channels"] = model.kv_channels or model.hidden_size // model.num_attention_heads
    if now["num_query_groups"] > before["num_query_groups"]:
        before = pad_kv_heads(before, now["num_query_groups"])
    free = {*_ROPE, "max_position_embeddings", "init_method_std", "make_vocab_size_divisible_by"}
    if other := {k: (v, now[k]) for k, v in before.items() if v != now[k] and k not in free}:
        listed = ", ".join(f"model.{k}: config.json {old}, checkpoint {new}" for k, (old, new) in other.items())
        raise ValueError(
            f"the checkpoint is not of the model in the source's config.json ({listed}): give the right one"
        )
    config = copy.deepcopy(source)
    window = _window(model, seq_length, int(before["max_position_embeddings"]))
    if window != before["max_position_embeddings"]:
        config["max_position_embeddings"] = window
    if any(before[key] != now[key] for key in _ROPE):
        config |= _rope_json(model)
        if "rope_parameters" in source:
            config["rope_parameters"] = {"rope_type": "default", **(config["rope_scaling"] or {})}
            config["rope_parameters"]["rope_theta"] = model.rotary_base
    return config


def kv_heads(source: dict[str, Any]) -> int:
    """KV heads of a config.json."""
    return int(model_settings(source)["num_query_groups"])


def pad_kv_heads(settings: dict[str, Any], wanted: int) -> dict[str, Any]:
    """Settings of the same model with more KV heads, and as many more query heads; their weights are to be zero.

    Zero heads add nothing to the output and get no gradient, so that they stay zero.

    Raises:
        ValueError: fewer KV heads than the model has.
    """
    heads, groups = settings["num_attention_heads"], settings["num_query_groups"]
    if wanted < groups:
        raise ValueError(f"--pad-kv-heads {wanted}: the model has {groups} KV heads, it can be padded to more")
    return settings | {"num_attention_heads": heads // groups * wanted, "num_query_groups": wanted}


def _window(model: ModelConfig, seq_length: int, published: int) -> int:
    return model.max_position_embeddings or max(seq_length, published)


def _rope_json(model: ModelConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling, which transformers 4 and 5, vLLM and llama.cpp read."""
    scaling: dict[str, Any] | None = None
    if model.seq_len_interpolation_factor is not None:
        scaling = {"rope_type": "linear", "factor": model.seq_len_interpolation_factor}
    if model.rope_scaling.rope_type != "default":
        scaling = model.rope_scaling.used()
    return {"rope_theta": model.rotary_base, "rope_scaling": scaling}


def _minimal_config(model: ModelConfig, seq_length: int, vocab_size: int) -> dict[str, Any]:
    for key, allowed in (
        ("normalization", "rmsnorm"),
        ("activation", "fast-swiglu"),
        ("bias", False),
        ("rotary_percentage", 1.0),
    ):
        if getattr(model, key) != allowed:
            raise ValueError(f"model.{key}={getattr(model, key)}: only models with {allowed} can be exported")
    flags = (model.qkv_bias, model.qk_layernorm)
    kinds = [kind for kind, family in FAMILIES.items() if (family.qkv_bias, family.qk_layernorm) == flags]
    if not kinds:
        raise ValueError("no family of models has both model.qkv_bias=true and model.qk_layernorm=true")
    return {
        "architectures": [FAMILIES[kinds[0]].architecture],
        "model_type": kinds[0],
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _window(model, seq_length, 0),
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_rope_json(model),
        "bos_token_id": None,
        "eos_token_id": None,
    }
