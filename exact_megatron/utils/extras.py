"""Which extra of the package brings what its commands import where they need it."""

from __future__ import annotations

# Top-level module: extra. What several extras bring is named by the one that most commands need it for.
MODULES = {
    "tokenizers": "prepare",
    "zstandard": "prepare",
    "pyarrow": "prepare",
    "rich": "report",
    "matplotlib": "report",
    "scipy": "report",
    "torch": "train",
    "megatron": "train",
    "omegaconf": "train",
    "yaml": "train",
    "tensorboard": "train",
    "psutil": "train",
    "einops": "train",
    "packaging": "train",
    "six": "train",
    "regex": "train",
    "transformers": "hf",
    "safetensors": "hf",
    "huggingface_hub": "hf",
    "accelerate": "hf",
    "gguf": "hf",
    "lm_eval": "eval",
    "nltk": "eval",  # with lm-eval[ruler]
    "datasets": "eval",  # with lm-eval
    "tqdm": "eval",
}


def remedy(error: ImportError) -> str | None:
    """What is missing, and the command that installs it; None where the error is not about one of these modules."""
    module = (error.name or "").partition(".")[0]
    if module not in MODULES:
        return None
    return f"{module} cannot be imported ({error}): pip install 'exact-megatron[{MODULES[module]}]'"
