"""Shapes of attention layers, and model geometries of the throughput benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..planning.flops import step_flops
from ..planning.memory import layer_matrices


@dataclass(frozen=True)
class Shape:
    """One attention layer on a tensor-parallel rank: `heads` and `kv_heads` are the rank's, `itemsize` bytes an element."""

    seq_length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    def modes(self, cp: int) -> tuple[str, ...]:
        """The ways that are there at this context-parallel size; "auto" takes the first."""
        return ("ulysses", "gather") if self.kv_heads % cp == 0 else ("gather",)

    def local_bytes(self, cp: int, heads: int) -> int:
        """Bytes of a tensor [S/cp, b, heads, d]."""
        return self.seq_length // cp * self.batch * heads * self.head_dim * self.itemsize

    def sent_bytes(self, mode: str, cp: int) -> int:
        """Bytes that leave a rank in forward and backward of a layer, by ring collectives as NCCL has them.

        ulysses: q, k, v and the output go to their heads' or tokens' ranks, and their gradients back; 1/cp stays. gather: K/V go
        to cp - 1 ranks in forward and again in backward, and as many bytes of dK/dV are reduced. (gloo has an all-reduce
        in place of the reduce-scatter, twice the bytes.)
        """
        if mode == "ulysses":
            return 2 * self.local_bytes(cp, 2 * self.heads + 2 * self.kv_heads) * (cp - 1) // cp
        return 3 * self.local_bytes(cp, 2 * self.kv_heads) * (cp - 1)


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

    def model(self, layers: int) -> dict[str, Any]:
        """The native runner's settings of a model with this many layers, named as in `model.*`."""
        return {
            "num_layers": layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_query_groups": self.kv_heads,
            "kv_channels": self.head_dim,
            "override_vocab_size": self.vocabulary,
            "share_embeddings_and_output_weights": self.tied,
            "rotary_base": self.rotary_base,
        }

    def overrides(self, layers: int) -> list[str]:
        """`model` as overrides."""
        return [f"model.{name}={str(value).lower()}" for name, value in self.model(layers).items()]

    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the matrices of a layer, as Megatron fuses them."""
        from ..training.schema import ModelConfig

        return layer_matrices(ModelConfig(**self.model(self.layers)))

    def step_flops(self, layers: int, tokens: int, pairs: int) -> float:
        """Floating-point operations of forward and backward, see planning/flops.py."""
        from ..training.schema import ModelConfig

        return step_flops(ModelConfig(**self.model(layers)), self.vocabulary, tokens, pairs)[0]


GEOMETRIES = {
    "llama-3.2-1b": Geometry(16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3-8b": Geometry(32, 4096, 14336, 32, 8, 128, 128256, False),
    "tiny": Geometry(2, 64, 128, 4, 2, 16, 512, True, 10000.0),  # for tests and dry runs on a CPU
}
