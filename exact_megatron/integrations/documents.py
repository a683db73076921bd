"""Document masking inside a host: DocumentAttention in its model, and the boundaries on every rank of every stage.

Hosts drop unknown batch keys, give middle pipeline stages no batch, and cut or broadcast only what they know. So the boundaries
take another way: every rank draws them itself from the dataset (they follow from the index, no token is read), and they enter
the model as `packed_seq_params` beside the host's own arguments. The batch stays the host's, whole-sequence zigzag under
context parallelism included.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..attention.boundaries import DocumentBoundaries, document_boundaries
from ..attention.document_attention import DocumentAttention
from ..attention.supported import check_supported
from ..config import ExactError
from .hooks import replaced


class MaskAttention(DocumentAttention):
    """DocumentAttention that finds the boundaries in `attention_mask`, for megatron-core below 0.16, where attention takes every
    packed_seq_params for thd.

    `attention_mask` is an integer tensor [boundaries] on the CPU, as `feed_documents(..., in_mask=True)` passes it. Megatron
    hands it to every layer, recomputed ones too.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        if attention_mask is None or attention_mask.dim() != 1:
            raise ExactError("this layer got no document boundaries: its model was not called through feed_documents")
        documents = _remembered(tuple(attention_mask.tolist()), query.size(0) * self.cp, query.size(1))
        return super().forward(query, key, value, None, attn_mask_type, attention_bias, documents)


@functools.lru_cache(maxsize=64)
def _remembered(cuts: Sequence[int], seq_length: int, batch: int) -> DocumentBoundaries:
    return document_boundaries(cuts, seq_length, batch)


@contextmanager
def masking_documents(attention: type[DocumentAttention] = DocumentAttention) -> Iterator[None]:
    """While a host builds its model within this block, SelfAttention gets `attention` in place of the core attention of the
    host's layer spec. Core attention holds no parameters. `check_masked` says whether that reached every layer.

    Raises (while the host builds):
        ValueError: the spec's core attention is one of Megatron-Bridge's models and computes something else (Gemma2's soft cap,
            Gemma3's windows, Ministral's scaling), which DocumentAttention would drop.
    """
    build = SelfAttention.__init__

    @functools.wraps(build)
    def built(layer: Any, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        stock = getattr(submodules.core_attention, "module", submodules.core_attention)
        if getattr(stock, "__module__", "").startswith("megatron.bridge."):
            raise ValueError(
                f"this model has a core attention of its own, {stock.__module__}.{stock.__name__}, which DocumentAttention would "
                "replace: accept unmasked documents with model.exact.allow_unmasked_documents=true, or train another model"
            )
        build(layer, config, dataclasses.replace(submodules, core_attention=attention), *args, **kwargs)

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
    depths = [m for m in getattr(model, "mtp", torch.nn.Module()).modules() if isinstance(m, TransformerLayer)]
    for layer in [*model.decoder.layers, *depths]:  # multi-token prediction's are after the model's own
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


def feed_documents(
    forward_step: Callable[..., Any], seq_length: int, device: Any = None, in_mask: bool = False
) -> Callable[..., Any]:
    """Wrap a host's `forward_step(data_iterator, model, ...)` so that its model gets the boundaries of each micro-batch.

    Every rank needs an iterator over samples with `cu_seqlens` int32[b, S + 1] (ExactDatasetBuilder with emit_cu_seqlens);
    the host sees the batch without them.

    Args:
        forward_step: calls model(tokens, ...) once.
        seq_length: S.
        device: of the boundaries' tensors; None is the current CUDA device, or the CPU without one.
        in_mask: pass them for a model of MaskAttention.

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
        if in_mask:
            model = _WithDocuments(model, {"attention_mask": torch.tensor(cuts)})
        else:
            boundaries = document_boundaries(cuts, seq_length, len(cu_seqlens), device=where)
            model = _WithDocuments(model, {"packed_seq_params": boundaries})
        return forward_step(iter([batch]), model, *args, **kwargs)

    return hooked


class _WithDocuments:
    """The model, called with boundaries."""

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self._model, self._arguments = model, arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **{**kwargs, **self._arguments})

    def __getattr__(self, name: str) -> Any:
        if name == "build_schedule_plan":
            raise ExactError("document masking does not reach --overlap-moe-expert-parallel-comm: unset it")
        return getattr(self._model, name)
