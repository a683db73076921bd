"""Tensors on disk, one or one layer at a time: safetensors files, and dist_checkpointing checkpoints (torch_dist)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..training.checkpoint import stored_entries
from ..training.checkpoint_files import refuse_damaged, write_checksums
from ..training.checkpoint_state import read_state
from ..utils.files import write_text
from ..utils.settings_file import json_object
from .mapping import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NOT_WEIGHTS = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # a buffer that transformers 4.31 saved


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as model.safetensors.index.json lists them."""
    try:
        listed = json_object(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{error}: fetch the model again") from None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} has no weight_map that names a file for each tensor: fetch the model again")
    return listed


class HuggingFaceWeights:
    """The safetensors of a folder: model.safetensors, or the files of model.safetensors.index.json.

    Attributes:
        dtypes: torch dtype by tensor name.

    Raises:
        FileNotFoundError: no safetensors, or a file of the index is missing.
        ValueError: names a tensor that is missing, unknown, of another shape than `expected`, or of a dtype without a
            counterpart; or an index that does not fit its files.
    """

    def __init__(self, folder: str | Path, expected: dict[str, tuple[int, ...]]) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        listed = _weight_map(index) if index.is_file() else {}
        files = sorted(set(listed.values())) or ([single.name] if single.is_file() else self._shards()) or [single.name]
        if missing := [name for name in files if not (self.folder / name).is_file()]:
            raise FileNotFoundError(
                f"{self.folder / missing[0]} does not exist: weights are read from safetensors; load others with transformers and "
                "save_pretrained them first"
            )
        self._files = {}
        for name in files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.folder / name} is damaged ({error}): fetch the model again") from None
        self._file_of = {tensor: name for name, file in self._files.items() for tensor in file.keys()}
        if listed and listed != self._file_of:
            raise ValueError(f"{index} lists other tensors than its files hold: fetch the model again")
        names = {name for name in self._file_of if not _NOT_WEIGHTS.fullmatch(name)}
        tied = names - expected.keys() == {"lm_head.weight"}
        if tied and not torch.equal(self["lm_head.weight"], self["model.embed_tokens.weight"]):
            raise ValueError(
                f"{self.folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json says that they are tied "
                "(tie_word_embeddings)"
            )
        names -= {"lm_head.weight"} if tied else set()
        for problem, found in (("lacks", expected.keys() - names), ("holds unknown", names - expected.keys())):
            if found:
                some = ", ".join(sorted(found)[:4]) + (", ..." if len(found) > 4 else "")
                raise ValueError(f"{self.folder} {problem} tensors: {some}; they do not fit config.json")
        self.dtypes: dict[str, torch.dtype] = {}
        for name, shape in expected.items():
            header = self._files[self._file_of[name]].get_slice(name)
            if tuple(header.get_shape()) != shape:
                raise ValueError(
                    f"{self.folder}: {name} has the shape {header.get_shape()}, config.json asks for {list(shape)}"
                )
            if header.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{self.folder}: {name} has the dtype {header.get_dtype()}; {', '.join(DTYPES)} are converted"
                )
            self.dtypes[name] = DTYPES[header.get_dtype()]

    def _shards(self) -> list[str]:
        """The files of a model without index.json, when all are there (what tensors they lack, the caller says); else nothing."""
        shard = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
        found = {f.name: match for f in self.folder.glob("*.safetensors") if (match := shard.fullmatch(f.name))}
        if not found:
            return []
        counts = {int(match[2]) for match in found.values()}
        numbers = {int(match[1]) for match in found.values()}
        if len(counts) > 1 or (missing := sorted(set(range(1, max(counts) + 1)) - numbers)):
            what = "shards of several models" if len(counts) > 1 else f"no shard {', '.join(map(str, missing))}"
            raise FileNotFoundError(
                f"{self.folder} has no model.safetensors.index.json, and {what} of {max(counts)}: fetch the model again"
            )
        return sorted(found)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[self._file_of[name]].get_tensor(name)


class SafetensorsWriter:
    """Writes tensors, given in the order of `shapes`, to files of at most `max_shard_size`; one file is held in memory.

    Args:
        shapes: name to shape of all tensors.
        dtypes: name to dtype.
        max_shard_size: bytes, or text such as "5GB".
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, torch.dtype],
        max_shard_size: int | str,
    ) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory

        self.folder = folder
        self._split = split_state_dict_into_shards_factory(
            {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()},
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._waiting: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        from safetensors.torch import save_file

        self._waiting[name] = tensor
        file = self._split.tensor_to_filename[name]
        if len(self._waiting) == len(self._split.filename_to_tensors[file]):
            save_file(self._waiting, self.folder / file, metadata={"format": "pt"})
            self._waiting = {}

    def close(self) -> None:
        assert not self._waiting, f"{len(self._waiting)} tensors of the last file were not given"
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            write_text(self.folder / "model.safetensors.index.json", text)


def _place(tensor: Tensor, layer: int | None) -> ChunkStorageMetadata:
    """Where a layer's tensor is in the stacked one."""
    offsets = (*(() if layer is None else (layer,)), *(0 for _ in tensor.shape))
    sizes = (*(() if layer is None else (1,)), *tensor.shape)
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


class _StreamPlanner(dcp.DefaultSavePlanner):
    """Tells torch's writer what there is to write, and fetches each tensor when its turn comes."""

    def __init__(self, items: list[WriteItem], read: Callable[[MetadataIndex], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._items, self._read = items, read

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._read(write_item.index)


def write_checkpoint(
    path: Path,
    tensors: list[tuple[Tensor, int | None, torch.dtype]],
    layers: int,
    read: Callable[[Tensor, int | None], torch.Tensor],
    common: dict[str, Any],
) -> None:
    """Write a checkpoint that megatron.core 0.16 and 0.19 load in any layout, one tensor in memory at a time.

    megatron.core's own save wants all of the model's tensors at hand. Its format is torch's distributed checkpoint with a common.pt
    and a metadata.json beside it (dist_checkpointing/serialization.py:save, strategies/torch.py in 0.16.1).

    Args:
        path: an empty folder.
        tensors: what to write, in this order: description, number of the layer (None: not of a layer) and dtype.
        layers: length of the first axis of the layers' tensors.
        read: gives a tensor's content, of the description's shape.
        common: what dist_checkpointing.load returns beside the tensors; plain Python values.
    """
    items = []
    sources = {}
    for tensor, layer, dtype in tensors:
        chunk = _place(tensor, layer)
        size = torch.Size((*(() if layer is None else (layers,)), *tensor.shape))
        index = MetadataIndex(tensor.key, chunk.offsets)
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=dtype), size=size)
        items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        sources[index] = (tensor, layer, chunk.sizes)

    def fetch(index: MetadataIndex) -> torch.Tensor:
        tensor, layer, shape = sources[index]
        return read(tensor, layer).reshape(shape)

    planner = _StreamPlanner(items, fetch)
    dcp.save({}, storage_writer=dcp.FileSystemWriter(path, thread_count=1), planner=planner, no_dist=True)
    torch.save(common, path / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(path))
    write_checksums(path)


class _SlicePlanner(dcp.DefaultLoadPlanner):
    """Tells torch's reader to fill tensors, each from one place of a stored one.

    megatron.core's own load cannot do it in one process: where a ShardedTensor is not whole, it takes the rest to be another rank's.
    """

    def __init__(self, wanted: dict[str, tuple[torch.Tensor, ChunkStorageMetadata]]) -> None:
        super().__init__()
        self._wanted = wanted

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        entries = self.metadata.state_dict_metadata
        plans = [
            create_read_items_for_chunk_list(key, entries[key], [chunk]) for key, (_, chunk) in self._wanted.items()
        ]
        return LoadPlan([item for plan in plans for item in plan])

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self._wanted[read_item.dest_index.fqn][0]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            tensor = tensor.narrow(axis, start, length)
        return tensor


class MegatronCheckpoint:
    """Reads a checkpoint that was saved from any layout, as much at a time as is asked for.

    Attributes:
        shapes, dtypes: of the model's tensors by key; layers' tensors have the layers as first axis.
        state: what the native runner saved with them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_damaged(path)
        self.state = read_state(path)
        entries = stored_entries(path).items()
        model = {k: e for k, e in entries if isinstance(e, TensorStorageMetadata) and not k.startswith("optimizer.")}
        self.shapes: dict[str, tuple[int, ...]] = {key: tuple(entry.size) for key, entry in model.items()}
        self.dtypes: dict[str, torch.dtype] = {key: entry.properties.dtype for key, entry in model.items()}
        self._reader = dcp.FileSystemReader(path)

    def read(self, tensors: list[Tensor], layer: int | None) -> list[torch.Tensor]:
        """Tensors of a layer, or those of no layer; padded rows of a vocabulary are left out."""
        wanted = {}
        for tensor in tensors:
            chunk = _place(tensor, layer)
            wanted[tensor.key] = (torch.empty(chunk.sizes, dtype=self.dtypes[tensor.key]), chunk)
        dcp.load({}, storage_reader=self._reader, planner=_SlicePlanner(wanted), no_dist=True)
        return [wanted[tensor.key][0].reshape(tensor.shape) for tensor in tensors]
