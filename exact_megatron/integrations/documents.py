"""Document masking inside a host: DocumentAttention in its model, and the boundaries on every rank of every stage.

Hosts drop unknown batch keys, give middle pipeline stages no batch, and cut or broadcast only what they know. So the boundaries
take another way: every rank draws them itself from the dataset (they follow from the index, no token is read), and they enter
the model as `packed_seq_params` beside the host's own arguments. The batch stays the host's, whole-sequence zigzag under
context parallelism included.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..attention import DocumentAttention, DocumentBoundaries, check_supported, document_boundaries
from ..config import ExactError
from .hooks import replaced


@contextmanager
def masking_documents() -> Iterator[None]:
    """While a host builds its model within this block, SelfAttention gets DocumentAttention in place of the core attention of
    the host's layer spec. Core attention holds no parameters. `check_masked` says whether that reached every layer.

    Raises (while the host builds):
        ValueError: the spec's core attention is one of Megatron-Bridge's models and computes something else (Gemma2's soft cap,
            Gemma3's windows, Ministral's scaling), which DocumentAttention would drop.
    """
    build = SelfAttention.__init__

    @functools.wraps(build)
    def built(attention: Any, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        stock = getattr(submodules.core_attention, "module", submodules.core_attention)
        if getattr(stock, "__module__", "").startswith("megatron.bridge."):
            raise ValueError(
                f"this model has a core attention of its own, {stock.__module__}.{stock.__name__}, which DocumentAttention would "
                "replace: accept unmasked documents with model.exact.allow_unmasked_documents=true, or train another model"
            )
        build(attention, config, dataclasses.replace(submodules, core_attention=DocumentAttention), *args, **kwargs)

    with replaced(SelfAttention, "__init__", built):
        yield


def check_masked(model: Any, seq_length: int) -> None:
    """Look at what was built, whatever the layer spec said.

    Args:
        model: GPTModel, or one pipeline stage of it.
        seq_length: S, the window before context parallelism cuts it.

    Raises:
        ValueError: a layer that is not causal self-attention with DocumentAttention, or a setting that DocumentAttention does
            not support.
    """
    check_supported(model.config, seq_length)
    for layer in model.decoder.layers:
        core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if not isinstance(layer, TransformerLayer) or not isinstance(core, DocumentAttention):
            raise ValueError(
                f"documents can be masked in layers of SelfAttention, and a layer here is {type(layer).__name__} with "
                f"{type(getattr(layer, 'self_attention', None)).__name__} and {type(core).__name__}: use such a model, or "
                "accept unmasked documents with model.exact.allow_unmasked_documents=true"
            )


def join_boundaries(cu_seqlens: torch.Tensor, seq_length: int) -> list[int]:
    """Boundaries int[b, S + 1] of b samples, each filled up with S, as one increasing list over the flattened micro-batch."""
    joined: list[int] = []
    for start, row in zip(range(0, len(cu_seqlens) * seq_length, seq_length), cu_seqlens.cpu()):
        joined += (row[row < seq_length].long() + start).tolist()
    return [*joined, len(cu_seqlens) * seq_length]


def feed_documents(forward_step: Callable[..., Any], seq_length: int, device: Any = None) -> Callable[..., Any]:
    """Wrap a host's `forward_step(data_iterator, model, ...)` so that its model gets the boundaries of each micro-batch.

    Every rank needs an iterator over samples with `cu_seqlens` int32[b, S + 1] (ExactDatasetBuilder with emit_cu_seqlens);
    the host sees the batch without them.

    Args:
        forward_step: calls model(tokens, ...) once.
        seq_length: S.
        device: of the boundaries' tensors; None is the current CUDA device, or the CPU without one.

    Raises (the wrapped function):
        ExactError: this rank has no data iterator, or the batch has no boundaries.
    """

    @functools.wraps(forward_step)
    def hooked(data_iterator: Iterator[dict[str, Any]] | None, model: Any, *args: Any, **kwargs: Any) -> Any:
        batch = None if data_iterator is None else dict(next(data_iterator))
        if batch is None or "cu_seqlens" not in batch:
            raise ExactError(
                "this rank got no document boundaries: its data were not built by ExactDatasetBuilder with emit_cu_seqlens"
            )
        cu_seqlens = batch.pop("cu_seqlens")
        # core 0.19 cuts every key of the batch under context parallelism, and a blend's number of the data set has no sequence
        batch.pop("dataset_id", None)
        where = device if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cuts = join_boundaries(cu_seqlens, seq_length)
        boundaries = document_boundaries(cuts, seq_length, len(cu_seqlens), device=where)
        return forward_step(iter([batch]), _WithDocuments(model, boundaries), *args, **kwargs)

    return hooked


class _WithDocuments:
    """The model, called with boundaries."""

    def __init__(self, model: Any, boundaries: DocumentBoundaries) -> None:
        self._model, self._boundaries = model, boundaries

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **{**kwargs, "packed_seq_params": self._boundaries})

    def __getattr__(self, name: str) -> Any:
        if name == "build_schedule_plan":
            raise ExactError("document masking does not reach --overlap-moe-expert-parallel-comm: unset it")
        return getattr(self._model, name)
