"""GPTDataset that weights its targets, and the blended builder that gives every member the same table."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from .allocation import WeightTable
from .blend import member_samples, split_tokens
from .config import ExactConfig, ExactError
from .exposure import ExposureCensus
from .index_caches import cache_folder, check_blend, check_member, explain
from .loss import ExactLoss, proving_context
from .packing import check_index, reaching_samples, read_index, sample_segments

logger = logging.getLogger(__name__)
UNPACKED = {"MockGPTDataset", "GPTFIMDataset"}  # megatron.core's subclasses of GPTDataset with samples of other kinds
PACKED = ("tokens", "labels", "loss_mask")
PROVEN = 8  # samples of a subclass that are compared with GPTDataset's from the start, and as many over the whole split


class ExactGPTDataset(GPTDataset):
    """GPTDataset whose `loss_mask` carries the EXACT weight of each supervised target.

    Without a table, samples are bitwise those of GPTDataset. With `emit_cu_seqlens`, samples also hold `cu_seqlens`:
    int32[S + 1], the boundaries of the documents in the sample, filled up with S (the form of megatron-core 0.19's
    inter_document_masking).
    """

    weight_table: WeightTable | None = None
    emit_cu_seqlens = False
    boundaries_only = False  # samples are their cu_seqlens alone, and no token is read: for ranks that need no more
    cached_loss_mask: torch.Tensor | None
    _tail_start = 0  # least effective context with another weight than 0 has

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str | None,
        indexed_indices: np.ndarray | None,
        num_samples: int | None,
        index_split: Any,
        config: GPTDatasetConfig,
    ) -> None:
        """As GPTDataset.

        Raises:
            ValueError: the split holds no token; megatron.core would loop forever, looking for enough epochs of an empty dataset.
        """
        if indexed_indices is not None and not indexed_dataset.sequence_lengths[indexed_indices].any():
            raise ValueError(
                f"the {index_split.name} split of {dataset_path} holds no token ({len(indexed_indices)} of "
                f"{len(indexed_dataset.sequence_lengths)} documents, split {config.split!r}): give it a larger share, a share of "
                "0, or data of its own"
            )
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)

    def attach(self, table: WeightTable, loss: ExactLoss) -> None:
        """Weight the samples by `table`, which `loss` will read.

        Raises:
            ValueError: the table is for another window.
            ExactError: `loss` has not wrapped a loss function or is bound to another table.
        """
        if table.seq_length != self.config.sequence_length:
            raise ValueError(
                f"the weight table is for a window of {table.seq_length}, the dataset has {self.config.sequence_length}"
            )
        if not loss.wrapped or loss.table is None or loss.table.digest != table.digest:
            raise ExactError(
                "a weighted dataset needs its loss hook: call ExactLoss.wrap(loss_func) and ExactLoss.bind(table) with the "
                "same table first"
            )
        self.weight_table = table
        tail = np.flatnonzero(table.lookup != table.lookup[0])  # none with alpha = 0
        self._tail_start = int(tail[0]) if len(tail) else len(table.lookup)

    def segments(self, idx: int) -> tuple[np.ndarray, bool]:
        """Boundaries int64[segments + 1] of the documents in sample `idx`, and whether its last target is in the last one.

        See packing.sample_segments.
        """
        if self.shuffle_index is None:  # defer_npy_index_mmap: loaded at the first query
            self._query_document_sample_shuffle_indices(idx)
        return sample_segments(
            self.document_index,
            self.sample_index,
            self.dataset.sequence_lengths,
            int(self.shuffle_index[idx]),
            self.config.sequence_length,
            int(self.config.add_extra_token_to_sequence),
        )

    def _weighted(self, mask: np.ndarray, cu_seqlens: np.ndarray, continues: bool) -> np.ndarray:
        """mask * lookup[effective_context(cu_seqlens, continues)], without a pass over the targets: few segments reach the tail."""
        assert self.weight_table is not None
        lookup = self.weight_table.lookup
        first = self._tail_start
        weighted = mask * lookup[0]
        boundaries = cu_seqlens.tolist()
        for start, end in zip(boundaries, boundaries[1:]):
            if end - start > first:
                tail = slice(start + first - 1, end - 1)
                weighted[tail] = mask[tail] * lookup[first : end - start]
        if continues:
            weighted[-1] = mask[-1] * lookup[boundaries[-1] - boundaries[-2]]
        return weighted

    def _permuted(self, weighted: np.ndarray, idx: int) -> np.ndarray:
        """The weights in another order among the supervised targets, by the packed sample alone: the same in every layout."""
        sample = int(self.shuffle_index[idx])
        rng = np.random.default_rng([self.config.random_seed, self.index_split.value, sample])
        supervised = np.flatnonzero(weighted)
        permuted = weighted.copy()
        permuted[supervised] = weighted[rng.permutation(supervised)]
        return permuted

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        if self.boundaries_only:
            return {"cu_seqlens": self._filled_up(self.segments(idx or 0)[0])}
        if self.weight_table is not None and self.cached_loss_mask is not None:
            # Up to megatron-core 0.14 a pad of one sample is masked in the shared tensor, for all later samples.
            self.cached_loss_mask = torch.ones_like(self.cached_loss_mask)
        sample = super().__getitem__(idx)
        if self.weight_table is None and not self.emit_cu_seqlens:
            return sample
        cu_seqlens, continues = self.segments(idx or 0)
        if self.weight_table is not None:
            # Out of place: up to megatron-core 0.14 the mask is a tensor shared between samples.
            mask = self._weighted(sample["loss_mask"].numpy(), cu_seqlens, continues)
            if self.weight_table.config.placebo:
                mask = self._permuted(mask, idx or 0)
            sample["loss_mask"] = torch.from_numpy(mask)
        if self.emit_cu_seqlens:
            sample["cu_seqlens"] = self._filled_up(cu_seqlens)
        return sample

    def _filled_up(self, cu_seqlens: np.ndarray) -> torch.Tensor:
        padded = np.full(self.config.sequence_length + 1, self.config.sequence_length, np.int32)
        padded[: len(cu_seqlens)] = cu_seqlens
        return torch.from_numpy(padded)


def weighted_class(cls: type[GPTDataset]) -> type[ExactGPTDataset]:
    """ExactGPTDataset, mixed with a subclass of GPTDataset.

    Raises:
        ValueError: no subclass of GPTDataset, or one of Megatron's whose samples are no packed documents.
    """
    if cls is GPTDataset or issubclass(cls, ExactGPTDataset):
        return ExactGPTDataset if cls is GPTDataset else cls
    if not issubclass(cls, GPTDataset) or {base.__name__ for base in cls.__mro__} & UNPACKED:
        raise ValueError(
            f"EXACT weights the samples of GPTDataset, not of {cls.__name__} (mock, FIM and SFT data have no document "
            "segments that it knows): give real .bin/.idx data, or set model.exact.enabled=false"
        )
    return type(f"Exact{cls.__name__}", (ExactGPTDataset, cls), {"__module__": cls.__module__})


class ExactDatasetBuilder(BlendedMegatronDatasetBuilder):
    """BlendedMegatronDatasetBuilder that builds ExactGPTDataset and weights all splits by the census of the training split.

    Args:
        cls, sizes, is_built_on_rank, config: as BlendedMegatronDatasetBuilder; cls is GPTDataset, or a subclass whose samples keep its
            tokens, labels and loss_mask.
        exact: the settings; disabled, the samples are the stock ones.
        loss: the hook that will read the weights; its `bind` gets the table on every rank.
        emit_cu_seqlens: samples carry the documents' boundaries.

    After `build`, `census` and `table` hold what was counted and used (None when disabled), on every rank.
    """

    def __init__(
        self,
        cls: type[GPTDataset],
        sizes: list[int],
        is_built_on_rank: Callable[[], bool],
        config: GPTDatasetConfig,
        *,
        exact: ExactConfig,
        loss: ExactLoss,
        emit_cu_seqlens: bool = False,
    ) -> None:
        cls = weighted_class(cls)
        masked = emit_cu_seqlens or config.reset_attention_mask or getattr(config, "inter_document_masking", False)
        if exact.enabled and not masked and not exact.allow_unmasked_documents:
            raise ValueError(
                "the documents of a sample would see each other, so that the weights do not measure what a target sees: mask them "
                "(emit_cu_seqlens=True and an attention that uses it), or accept it with model.exact.allow_unmasked_documents=true"
            )
        super().__init__(cls, sizes, is_built_on_rank, config)
        self.exact = exact.validated(config.sequence_length) if exact.enabled else exact
        self.loss = loss
        self.emit_cu_seqlens = emit_cu_seqlens
        self.census: ExposureCensus | None = None
        self.table: WeightTable | None = None

    @property
    def digests(self) -> dict[str, str | None]:
        """{"census": ..., "weights": ...}: what they are recognised by in a checkpoint; None when disabled."""
        return {
            "census": self.census.digest if self.census else None,
            "weights": self.table.digest if self.table else None,
        }

    def build(self) -> list[Any]:
        """Build the splits (see BlendedMegatronDatasetBuilder.build), and weight them when enabled. Call on every rank.

        An unweighted blend of fewer samples than asked for is repeated, each member as often as the others.

        Raises:
            ValueError: a .idx does not describe its .bin, or has documents of several sequences where they are to be weighted or
                masked (packing.check_index); there is no training split to count, no target of it lies in the tail, a member of an
                unweighted blend has no sample, or Megatron's index caches are damaged or belong to other data than what lies there
                now.
            ExactError: no loss function is hooked, or the caches cannot be written.
        """
        from_rank_0(self.check_files)
        try:
            datasets = super().build()
        except Exception as error:
            blends = [self.config.blend] if self.config.blend else self.config.blend_per_split or []
            explain(error, {cache_folder(p, self.cls, self.config) for blend in blends if blend for p in blend[0]})
            raise
        return self.weight(datasets)

    def _build_megatron_datasets_parallel(self, prefixes: Any, split: Any, sizes_per_dataset: Any) -> Any:
        """As upstream, whose sizes are None, one epoch, without weights; see blend.member_samples."""
        sizes = from_rank_0(lambda: self._member_sizes(prefixes, split, sizes_per_dataset))
        return super()._build_megatron_datasets_parallel(prefixes, split, sizes)

    def _member_sizes(self, prefixes: Any, split: Any, sizes_per_dataset: Any) -> list[list[int | None]]:
        sizes = [list(row) for row in sizes_per_dataset]
        for part, asked in enumerate(self.sizes):
            on_disk = all(os.path.isfile(prefix + ".idx") for prefix in prefixes)  # or in an object store
            if split[part] is None or asked is None or any(row[part] is not None for row in sizes) or not on_disk:
                continue
            partial = part == 1 and not self.config.drop_last_partial_validation_sequence
            lengths = [read_index(prefix, self._whole_documents).lengths for prefix in prefixes]
            epochs, samples = member_samples(
                prefixes,
                [split_tokens(tokens, split[part]) for tokens in lengths],
                asked,
                self.config.sequence_length,
                split=("train", "valid", "test")[part],
                extra_token=int(self.config.add_extra_token_to_sequence),
                partial=partial,
            )
            if epochs > 1:
                for row, size in zip(sizes, samples):
                    row[part] = size
        return sizes

    def weight(self, datasets: list[Any]) -> list[Any]:
        """Weight the splits that another builder made of ExactGPTDataset; raises as `build`."""
        from_rank_0(lambda: self._check_indices(datasets))
        from_rank_0(lambda: self._check_packing(datasets))
        if self.exact.enabled:
            self.census = from_rank_0(lambda: self._census(datasets[0]))
            self.table = WeightTable.from_census(self.census, self.exact)
            _, least = proving_context(self.table)
            self.loss.bind(self.table, from_rank_0(lambda: _longest_gap(datasets[0], least)))
        for member in members(datasets):
            member.emit_cu_seqlens = self.emit_cu_seqlens
            if self.table is not None:
                member.attach(self.table, self.loss)
        return datasets

    @property
    def _whole_documents(self) -> bool:
        return self.exact.enabled or self.emit_cu_seqlens

    def check_files(self) -> None:
        """Raise ValueError as `build`, on the .idx files. Before Megatron packs by them: wrong lengths may crash it, or let it look
        for enough tokens forever."""
        for blend in [self.config.blend, *(self.config.blend_per_split or [])]:
            for prefix in blend[0] if blend else []:
                if "://" not in prefix:  # object storage, see _check_indices
                    read_index(prefix, self._whole_documents)

    def _check_indices(self, datasets: list[Any]) -> None:
        for member in members(datasets):
            index = member.dataset.index
            prefix = str(member.dataset.path_prefix)
            if "://" in prefix:  # Megatron has fetched the .idx
                arrays = index.sequence_lengths, index.sequence_pointers, index.document_indices
                check_index(prefix, *arrays, np.dtype(index.dtype), None, self._whole_documents)
            check_member(member, self.config)
        for blend in datasets:
            if isinstance(blend, BlendedDataset):
                check_blend(blend, self.config)

    def _check_packing(self, datasets: list[Any]) -> None:
        """Whether samples of a subclass are GPTDataset's, before weights are attached: the first ones, and some of the others."""
        for member in members(datasets):
            if type(member).__module__.startswith(f"{__package__}."):
                continue
            stock = object.__new__(ExactGPTDataset)
            stock.__dict__.update(member.__dict__)
            for idx in sorted(
                {*range(min(len(member), PROVEN)), *np.linspace(0, len(member) - 1, PROVEN, dtype=int).tolist()}
            ):
                mine, theirs = member[idx], stock[idx]
                wrong = [key for key in PACKED if key not in mine or not torch.equal(mine[key], theirs[key])]
                if wrong:
                    raise ValueError(
                        f"EXACT weights the samples of GPTDataset, and those of {type(member).__name__.removeprefix('Exact')} are "
                        f"others: {' and '.join(wrong)} of sample {idx} of {member.dataset_path} differ from GPTDataset's. Keep its "
                        "packing (other keys are free), or set model.exact.enabled=false"
                    )

    def _census(self, train: Any) -> ExposureCensus:
        if train is None:
            raise ValueError("there is no training split: EXACT takes its weights from the training stream")
        path = _census_path(train, self.config)
        if os.path.isfile(path):
            return ExposureCensus.load(path)
        census = (
            ExposureCensus.from_blend(train)
            if isinstance(train, BlendedDataset)
            else ExposureCensus.from_dataset(train)
        )
        try:
            census.save(path)
        except OSError as error:
            logger.warning("the census could not be cached (%s): it is counted again at the next start", error)
        return census


def members(datasets: Iterable[Any]) -> Iterator[ExactGPTDataset]:
    """All GPT datasets in what a builder returned: splits that are None, single, blended or lists of validation sets."""
    for dataset in datasets:
        if isinstance(dataset, BlendedDataset):
            yield from members(dataset.datasets)
        elif isinstance(dataset, (list, tuple)):
            yield from members(dataset)
        elif dataset is not None:
            yield dataset


def _census_path(train: Any, config: GPTDatasetConfig) -> str:
    """Beside Megatron's index caches, under a name that changes with all that the counts depend on."""
    parts = list(members([train]))
    digest = hashlib.md5(train.unique_description.encode(), usedforsecurity=False)
    digest.update(repr((bool(config.add_extra_token_to_sequence), bool(config.eod_mask_loss))).encode())
    for part in parts:  # the description names paths, not what lies there
        digest.update(np.ascontiguousarray(part.dataset.sequence_lengths).data)
    folder = cache_folder(parts[0].dataset.path_prefix, type(parts[0]), config)
    return os.path.join(folder, f"{digest.hexdigest()}-{type(parts[0]).__name__}-train-census.json")


def _longest_gap(train: Any, least: int) -> int:
    """Most samples in a row, in the order in which they are drawn, without a target of effective context `least` or more."""
    if least > train.config.sequence_length:  # alpha=0: no weight tells such a target from others
        return 0
    if isinstance(train, BlendedDataset):
        if train.dataset_index is None:  # defer_npy_index_mmap
            train[0]
        reach = np.zeros(len(train), bool)
        for number, member in enumerate(train.datasets):
            drawn = np.flatnonzero(np.asarray(train.dataset_index[: len(train)]) == number)
            reach[drawn] = _reaching(member, least)[train.dataset_sample_index[drawn]]
    else:
        reach = _reaching(train, least)
    return int(np.diff(np.flatnonzero(reach), prepend=-1, append=len(reach)).max()) - 1


def _reaching(dataset: ExactGPTDataset, least: int) -> np.ndarray:
    extra = int(dataset.config.add_extra_token_to_sequence)
    lengths = dataset.dataset.sequence_lengths
    reach = reaching_samples(dataset.document_index, dataset.sample_index, lengths, least, extra)
    return reach[dataset.shuffle_index]


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Make a value on rank 0 and give it to all; an error on rank 0 is raised on all."""
    if not torch.distributed.is_initialized():
        return make()
    box: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [make()]
        except Exception as error:  # handed to all ranks, which raise it
            box = [error]
    torch.distributed.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]
