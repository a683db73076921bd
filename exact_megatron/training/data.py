"""Packed samples for the native runner: datasets, loader and the batch of one rank."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.utils.data import DataLoader, Dataset, default_collate

from ..attention.boundaries import document_boundaries
from ..config import ExactError
from ..dataset import ExactDatasetBuilder
from ..loss import ExactLoss
from .data_files import Vocabulary, data_prefixes
from .schema import RunConfig


def build_datasets(run: RunConfig, vocabulary: Vocabulary, loss: ExactLoss) -> tuple[list[Any], ExactDatasetBuilder]:
    """Training, validation and test data (None where there is none), and the builder with its census and weight table."""
    data = run.model.data
    trainer = run.trainer
    # Every validation sees the same samples.
    sizes = [n * run.model.global_batch_size for n in (trainer.max_steps, trainer.limit_val_batches, 0)]
    blends = data_prefixes(run)
    where: dict[str, Any] = (
        {"blend": blends["all"], "split": data.splits_string}
        if "all" in blends
        else {"blend_per_split": [blends["train"], blends["validation"] if sizes[1] else None, None]}
    )
    config = GPTDatasetConfig(
        random_seed=run.model.seed,
        sequence_length=data.seq_length,
        path_to_cache=data.index_mapping_dir,
        tokenizer=vocabulary,  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,
        **where,
    )
    # A share that nobody asked for is not built, and need not hold a sample.
    asked = [part if size else None for part, size in zip(config.split_matrix or [], sizes)]
    config.split_matrix = asked or None  # type: ignore[assignment]
    builder = ExactDatasetBuilder(
        GPTDataset,
        sizes,
        lambda: True,
        config,
        exact=run.model.exact,
        loss=loss,
        emit_cu_seqlens=data.document_masking,
    )
    datasets = builder.build()
    for name, dataset, size in zip(("training", "validation"), datasets, sizes):
        if dataset is not None and len(dataset) < size:
            raise ValueError(
                f"the {name} data hold {len(dataset)} samples, the run needs {size} (trainer.max_steps or trainer.limit_val_batches x "
                f"model.global_batch_size={run.model.global_batch_size}): give more data or fewer steps"
            )
    return datasets, builder


class StepSampler:
    """Sample numbers of this data-parallel rank, one micro-batch after another, in Megatron's order (so that the samples of a
    step do not depend on the layout), starting after `consumed` samples."""

    def __init__(self, run: RunConfig, rank: int, consumed: int, total: int) -> None:
        self.size = run.model.micro_batch_size
        self.stride = self.size * run.data_parallel_size
        self.first = consumed + rank * self.size
        self.total = total

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.first, self.total - self.size + 1, self.stride):
            yield list(range(start, start + self.size))


@dataclass
class Collate:
    """Micro-batch of samples: tensors [b, s], and `boundaries` int32, the documents' boundaries over the flattened batch.

    Raises:
        ValueError: a token id outside the vocabulary.
    """

    vocab_size: int
    seq_length: int

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        boundaries = [np.unique(s.pop("cu_seqlens").numpy()) for s in samples if "cu_seqlens" in s]
        batch = default_collate([{k: s[k] for k in ("tokens", "labels", "loss_mask", "position_ids")} for s in samples])
        for key in ("tokens", "labels"):
            least, largest = int(batch[key].min()), int(batch[key].max())
            if least < 0 or largest >= self.vocab_size:
                strange = largest if largest >= self.vocab_size else least
                raise ValueError(f"a sample holds token id {strange}, the vocabulary has 0..{self.vocab_size - 1}")
        if boundaries:
            shifted = [cu[:-1] + i * self.seq_length for i, cu in enumerate(boundaries)]
            end = np.array([len(samples) * self.seq_length])
            batch["boundaries"] = torch.from_numpy(np.concatenate([*shifted, end]).astype(np.int32))
        return batch


def build_loader(run: RunConfig, dataset: Dataset[Any], vocabulary: Vocabulary, consumed: int) -> DataLoader[Any]:
    """Loader of this rank's micro-batches. Every tensor-, context- and pipeline-parallel rank reads its own copy from the
    memory-mapped file, so that nothing has to be broadcast and all stages know the boundaries."""
    data = run.model.data
    total = len(dataset)  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_sampler=StepSampler(run, parallel_state.get_data_parallel_rank(), consumed, total),
        num_workers=data.num_workers,
        collate_fn=Collate(vocabulary.vocab_size, data.seq_length),
        persistent_workers=data.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_stop_signals,
    )


def _ignore_stop_signals(worker: int) -> None:
    """torchrun and srun signal loader processes too; the rank stops them itself, after its checkpoint."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_CP_ARGUMENTS = (
    {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else {}
)


def get_batch(
    iterator: Iterator[dict[str, torch.Tensor]], device: torch.device, documents: bool
) -> tuple[dict[str, torch.Tensor], Any]:
    """Next micro-batch of this rank: ([b, s / cp] tensors in Megatron's zigzag order, boundaries or None).

    Args:
        documents: the batch must carry documents' boundaries.

    Raises:
        ExactError: it does not, so that documents would see each other.
    """
    batch = {k: v.to(device, non_blocking=True) if k != "boundaries" else v for k, v in next(iterator).items()}
    cu_seqlens = batch.pop("boundaries", None)
    packed = None
    if documents and cu_seqlens is None:
        raise ExactError(
            "documents are to be masked, but the batch has no boundaries: build the data with emit_cu_seqlens=True"
        )
    if cu_seqlens is not None:
        size, seq_length = batch["tokens"].shape
        packed = document_boundaries(cu_seqlens, seq_length, size, device=device)
    batch = get_batch_on_this_cp_rank(batch, cp_group=parallel_state.get_context_parallel_group(), **_CP_ARGUMENTS)
    return batch, packed
