"""Model geometries of the throughput benchmark, and the floating-point operations of a training step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """A LLaMA-style decoder; sizes from the models' config.json (meta-llama, Hugging Face names)."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    rotary_base: float = 500000.0

    def overrides(self, layers: int) -> list[str]:
        """The native runner's settings of a model with this many layers."""
        return [
            f"model.num_layers={layers}", f"model.hidden_size={self.hidden}", f"model.ffn_hidden_size={self.ffn}",
            f"model.num_attention_heads={self.heads}", f"model.num_query_groups={self.kv_heads}",
            f"model.kv_channels={self.head_dim}", f"model.override_vocab_size={self.vocabulary}",
            f"model.share_embeddings_and_output_weights={str(self.tied).lower()}",
            f"model.rotary_base={self.rotary_base}",
        ]  # fmt: skip

    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the matrices of a layer, as Megatron fuses them."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            "attention output": (attention, self.hidden),
            "gate and up": (self.hidden, 2 * self.ffn),
            "down": (self.ffn, self.hidden),
        }

    def step_flops(self, layers: int, tokens: int, pairs: int) -> float:
        """Floating-point operations of forward and backward, of the matrices and the attention alone.

        Args:
            tokens: in the step; each takes 6 operations a matrix element (the logits' matrix too, the embedding's look-up not).
            pairs: query-key pairs that attend each other, a head (`causal_pairs`); each takes 12 operations a channel: two
                products in forward, four in backward. A kernel that recomputes is not credited for it.
        """
        matrices = layers * sum(a * b for a, b in self.layer_matrices().values()) + self.hidden * self.vocabulary
        return 6.0 * tokens * matrices + 12.0 * layers * self.heads * self.head_dim * pairs


def causal_pairs(lengths: Iterable[int] | np.ndarray) -> int:
    """Query-key pairs of causal attention inside pieces of these lengths: the sum of L (L + 1) / 2, about half their squares."""
    n = np.asarray(lengths, dtype=np.int64)
    return int((n * (n + 1) // 2).sum())


GEOMETRIES = {
    "llama-3.2-1b": Geometry(16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3-8b": Geometry(32, 4096, 14336, 32, 8, 128, 128256, False),
    "tiny": Geometry(2, 64, 128, 4, 2, 16, 512, True, 10000.0),  # for tests and dry runs on a CPU
}
