"""A small model that FP8 products take, in every precision, and real text for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.helpers.tiny import write_documents

FP8 = ("delayed", "tensorwise", "blockwise")
PRECISIONS = ("fp32", "bf16", *FP8)  # fp32 is the CPU's
SEQ_LENGTH = 256

# Every dimension a multiple of 128: the blocks of blockwise scaling.
MODEL = """
    model.num_layers=2 model.hidden_size=256 model.ffn_hidden_size=512 model.num_attention_heads=4
    model.num_query_groups=2 model.kv_channels=64 model.override_vocab_size=256 model.make_vocab_size_divisible_by=128
""".split()


def precision_settings(precision: str) -> list[str]:
    """Overrides of the native runner; fp32 is the CPU's."""
    if precision == "fp32":
        return ["trainer.accelerator=cpu", "trainer.precision=32"]
    settings = ["trainer.accelerator=gpu", "trainer.precision=bf16"]
    if precision in FP8:
        hybrid = str(precision != "blockwise").lower()
        settings += ["model.fp8=true", f"model.fp8_recipe={precision}", f"model.fp8_hybrid={hybrid}"]
    return [*settings, "model.transformer_engine=true"]


def write_text(folder: Path, documents: int = 400) -> str:
    """Bytes of Python's own library sources, one document a piece of a file, EOD (0) last; returns the prefix."""
    import argparse
    import inspect
    import typing

    text = "".join(inspect.getsource(module) for module in (argparse, inspect, typing)).encode()
    stream = np.frombuffer(text.replace(b"\0", b""), np.uint8)
    rng = np.random.default_rng(5)
    lengths = np.clip(rng.lognormal(4.5, 1.2, documents), 2, 4 * SEQ_LENGTH).astype(int)
    starts = rng.integers(0, len(stream) - 4 * SEQ_LENGTH, documents)
    pieces = zip(starts.tolist(), lengths.tolist())
    return write_documents(folder / "text", (np.append(stream[start : start + n - 1], 0) for start, n in pieces))
