"""YaRN (arXiv 2309.00071) for megatron.core's RotaryEmbedding, with the names and defaults of a Hugging Face config.json.

megatron.core's own YarnRotaryEmbedding needs a GPU, leaves packed sequences out and multiplies cosine and sine by the attention factor,
which Transformer Engine's fused RoPE cannot. The factor is in queries and keys alike, so that the scale of the softmax holds its square.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .schema import RopeScalingConfig

if TYPE_CHECKING:
    import torch


def yarn_frequencies(frequencies: torch.Tensor, base: float, scaling: RopeScalingConfig) -> torch.Tensor:
    """Frequencies of a longer window: fast ones stay, slow ones are divided by the factor, a linear ramp lies between (section 3.2).

    Args:
        frequencies: float32 [head_dim / 2], radians a token, `base ** (-2 i / head_dim)`.
        base: of the frequencies.
        scaling: of type yarn.

    Returns:
        float32 [head_dim / 2].
    """
    import torch  # here: a conversion's settings are read without it

    pairs = len(frequencies)

    def pair_with(turns: float) -> float:
        """Where the frequency lies that makes so many turns in the original window."""
        return pairs * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(base)

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    slow = ((torch.arange(pairs, device=frequencies.device) - first) / (last - first)).clamp(0, 1)
    return frequencies / scaling.factor * slow + frequencies * (1 - slow)


def attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What queries and keys are multiplied by in a window that is `factor` times as long (section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(head_dim: int, scaling: RopeScalingConfig) -> float | None:
    """Scale of the attention's logits; None is the usual head_dim ** -0.5."""
    if scaling.rope_type != "yarn":
        return None
    factor = scaling.attention_factor or attention_factor(scaling.factor)
    return factor**2 * head_dim**-0.5
