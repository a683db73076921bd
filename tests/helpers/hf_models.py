"""Tiny random models of each family, as transformers saves them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# Name -> (transformers' class prefix, what differs from SIZES). Vocabularies of 99 rows need padding under tensor parallelism.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "llama3.1": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama3.2": (
        "Llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3 | {"factor": 32.0},
            "tie_word_embeddings": True,
            "head_dim": 32,
        },
    ),
    "llama_linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama_yarn": (
        "Llama",
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 8.0, "truncate": False}},
    ),
    "qwen3_yarn": ("Qwen3", {"rope_theta": 1000000.0, "head_dim": 32, "rope_scaling": YARN}),
    "qwen2.5": ("Qwen2", {"rope_theta": 1000000.0, "tie_word_embeddings": True}),
    "qwen2.5_untied": ("Qwen2", {"rope_theta": 1000000.0, "vocab_size": 128}),
    "qwen3": ("Qwen3", {"rope_theta": 1000000.0, "head_dim": 32}),
    "qwen3_tied": ("Qwen3", {"rope_theta": 1000000.0, "head_dim": 24, "tie_word_embeddings": True}),
    "smollm2": ("Llama", {"rope_theta": 100000.0, "tie_word_embeddings": True, "num_attention_heads": 2}),
}
TOKENIZER = {
    "tokenizer.json": '{"version": "1.0", "model": "a stand-in, carried along byte by byte"}',
    "tokenizer_config.json": '{"eos_token": "<|end|>"}',
    "special_tokens_map.json": "{}",
    "LICENSE": "the licence of the weights",
}


def make(name: str, folder: Path, dtype: str = "float32", max_shard_size: str = "5GB") -> Path:
    """Save the random model `name` with a stand-in for its tokenizer; returns `folder`."""
    import torch
    import transformers

    prefix, changes = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**copy.deepcopy(SIZES | changes))  # it writes into rope_scaling
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in model.parameters():  # norms and biases too: at 1 and 0 they would hide a wrong mapping
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    for file, text in TOKENIZER.items():
        (folder / file).write_text(text)
    return folder


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
