"""Megatron's index caches: where they lie, and whether they are damaged or belong to other data. numpy only.

megatron.core names its caches by the path of the data, and reads them without a look at what lies there now.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from .config import ExactError
from .packing import misplaced_sample

_NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EEXIST,
)


def cache_folder(prefix: str, cls: type, config: Any) -> str:
    """Where megatron.core keeps the indices of a data set of class `cls`, with its GPTDatasetConfig."""
    return config.path_to_cache or os.path.join(prefix, "cache", f"{cls.__name__}_indices")


def explain(error: Exception, folders: Iterable[str]) -> None:
    """Raise what an error of megatron.core means where the index caches in `folders` are the reason; else return.

    Raises:
        ExactError: a folder cannot be written to.
        ValueError: a cache is no whole .npy file.
    """
    folders = sorted(folders)
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in _NOT_WRITABLE:
        raise ExactError(
            f"Megatron's index caches cannot be written to {cause.filename or ' or '.join(folders)}: {cause.strerror}. Name "
            "a folder that can be written to, which all nodes see: model.data.index_mapping_dir=FOLDER (Megatron-LM: "
            "--data-cache-path, Megatron-Bridge: dataset.path_to_cache), or free space there"
        ) from error
    for folder in folders:
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if name.endswith(".npy") and (problem := _unreadable(os.path.join(folder, name))):
                raise ValueError(
                    f"the index cache {os.path.join(folder, name)} is damaged ({problem}): remove it, and it is built again"
                ) from error


def check_member(dataset: Any, config: Any) -> None:
    """Compare the caches of a GPTDataset to the documents' lengths.

    Raises:
        ValueError: a sample starts elsewhere, or samples are not drawn once each; names the files to remove.
    """
    if dataset.shuffle_index is None:  # defer_npy_index_mmap: loaded at the first query
        dataset._query_document_sample_shuffle_indices(0)
    folder = cache_folder(dataset.dataset.path_prefix, type(dataset), config)
    caches = f"{os.path.join(folder, dataset.unique_description_hash)}-*"
    partial = dataset.index_split.name == "valid" and not config.drop_last_partial_validation_sequence
    starts = dataset.sample_index[:-1] if partial else dataset.sample_index
    lengths = dataset.dataset.sequence_lengths
    wrong = misplaced_sample(dataset.document_index, starts, lengths, config.sequence_length)
    if wrong is None and (np.diff(starts[:, 0]) < 0).any() | (starts[-1, 0] > len(dataset.document_index)):
        wrong = len(starts) - 1  # misplaced_sample relies on their order
    if wrong is not None:
        raise ValueError(
            f"Megatron's index caches of {dataset.dataset_path} are damaged or were built from other data than what lies there "
            f"now (sample {wrong} starts elsewhere): remove {caches}"
        )
    if not _permutation(dataset.shuffle_index, len(dataset.sample_index) - 1):
        raise ValueError(
            f"Megatron's index cache of {dataset.dataset_path} is damaged (its shuffle index does not hold every sample once): "
            f"remove {caches}"
        )


def check_blend(blend: Any, config: Any) -> None:
    """Check the cache of a BlendedDataset; raises as `check_member`."""
    if blend.dataset_index is None:
        return  # defer_npy_index_mmap
    for number, member in enumerate(blend.datasets):
        drawn = blend.dataset_sample_index[blend.dataset_index == number]
        if len(drawn) > len(member) or not _permutation(drawn, len(drawn)):
            raise ValueError(
                f"Megatron's index cache of the blend of {len(blend.datasets)} data sets is damaged (samples of "
                f"{member.dataset_path} are not drawn one after another): remove "
                f"{os.path.join(config.path_to_cache or '', blend.unique_description_hash)}-*"
            )


def _unreadable(path: str) -> str | None:
    """Why numpy cannot map a .npy file, None where it can."""
    try:
        np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError) as error:
        return " ".join(str(error).split())
    return None


def _permutation(index: np.ndarray, size: int) -> bool:
    """Whether an index holds each of 0 .. size - 1 once."""
    if index.ndim != 1 or len(index) != size or index.dtype.kind not in "ui":
        return False
    if size and (int(index.min()) < 0 or int(index.max()) >= size):
        return False
    seen = np.zeros(size, bool)
    seen[index] = True
    return bool(seen.all())
