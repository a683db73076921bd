"""Whole models: a Hugging Face folder to a checkpoint for the native runner, and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress

from ..training import checkpoint, checkpoint_files, checkpoint_state
from ..training.run_lock import NAME as LOCK
from ..training.run_lock import only_writer
from ..training.schema import ModelConfig, RopeScalingConfig, RunConfig
from ..utils.files import write_json, write_text, writing
from ..utils.tokenizer import RECORD, folder_identity, refuse_other_tokenizer
from .config_json import config_json, kv_heads, model_settings, read_config_json
from .config_json import pad_kv_heads as padded_settings
from .mapping import EMBEDDING, OUTPUT, Tensor, all_parts, groups_of_tensors
from .weights import HuggingFaceWeights, MegatronCheckpoint, SafetensorsWriter, write_checkpoint

# Everything of a model's folder that is neither weights nor config.json: tokenizer, generation settings, licence.
CARRIED = (
    *("tokenizer*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.jinja", "*.tiktoken"),
    *("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
PRECISION = {torch.float32: "32", torch.bfloat16: "bf16", torch.float16: "bf16"}
DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Converted:
    """What a conversion wrote: the folder, the number of parameters and of bytes of weights, and remarks for the user."""

    folder: Path
    parameters: int
    bytes: int
    remarks: list[str]


def hf_to_megatron(
    source: str | Path, output: str | Path, pad_kv_heads: int | None = None, quiet: bool = False
) -> Converted:
    """Convert a Hugging Face folder to `output`, which `restore_from_path` of the native runner takes.

    Writes `checkpoints/step_00000000` (loads in any layout), `model.yaml` (the native runner's settings for it) and `hf/`
    (config.json, tokenizer and licence, which megatron_to_hf takes up again). dtypes are kept; one tensor is in memory.

    Args:
        pad_kv_heads: KV heads to pad the model to with zeros, for tensor-parallel sizes that the published number does not divide by.

    Raises:
        FileNotFoundError, FileExistsError: no such model; `output` is there.
        ValueError: names the key of config.json, or the tensor, that is not supported.
    """
    source, output = Path(source), Path(output)
    config = read_config_json(source)
    settings = model_settings(config, str(source / "config.json"))
    groups = settings["num_query_groups"]
    if pad_kv_heads is not None:
        settings = padded_settings(settings, pad_kv_heads)
    model = ModelConfig(**{**settings, "rope_scaling": RopeScalingConfig(**settings["rope_scaling"])})
    vocab_size = settings["override_vocab_size"]
    parts = all_parts(model, vocab_size, groups)
    weights = HuggingFaceWeights(source, parts)

    tensors: list[tuple[Tensor, int | None, torch.dtype]] = []
    dtypes: dict[str, torch.dtype] = {}
    for tensor, layer in _in_order(model, vocab_size, groups):
        for name in tensor.names(layer):
            if weights.dtypes[name] != dtypes.setdefault(tensor.key, weights.dtypes[name]):
                raise ValueError(
                    f"{source}: {name} is {weights.dtypes[name]}, what it is stored with in Megatron is {dtypes[tensor.key]}: convert "
                    "the weights to one dtype first"
                )
        tensors.append((tensor, layer, dtypes[tensor.key]))
    precision = PRECISION[dtypes["decoder.layers.mlp.linear_fc2.weight"]]
    tokenizer = folder_identity(source)
    start: dict[str, Any] = {"restore_from_path": str(output.absolute()), "trainer": {"precision": precision}}
    run = RunConfig(model=model)
    run.trainer.precision = precision
    with _whole(output) as folder, _progress("to Megatron", len(tensors), quiet) as advance:
        _carry(source, folder / "hf")
        shutil.copyfile(source / "config.json", folder / "hf" / "config.json")
        write_text(
            folder / "model.yaml",
            f"# {source.resolve().name} for the native runner: exact-megatron train --config THIS model.data.data_prefix=[PREFIX] ...\n"
            + yaml.safe_dump({**start, "model": settings}, sort_keys=False),
        )

        def read(tensor: Tensor, layer: int | None) -> torch.Tensor:
            advance()
            return tensor.pack([weights[name] for name in tensor.names(layer)])

        path = folder / "checkpoints" / "step_00000000"
        path.mkdir(parents=True)
        state = checkpoint_state.describe(run, 0, vocab_size, None, None, tokenizer)
        write_checkpoint(path, tensors, model.num_layers, read, {"state": state, **checkpoint.CONTENT})
    remarks = [] if tokenizer.digest else [f"the checkpoint records no tokenizer: {tokenizer.source}"]
    if torch.float16 in dtypes.values():
        remarks.append(
            "weights are fp16 and stay so in the checkpoint; a run loads them as bf16 or fp32 (trainer.precision)"
        )
    return _converted(output, weights.dtypes, parts, remarks)


def megatron_to_hf(
    source: str | Path,
    output: str | Path,
    hf: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    quiet: bool = False,
    accept_other_tokenizer: bool = False,
) -> Converted:
    """Convert a checkpoint of the native runner, or the newest of a run, to a Hugging Face folder.

    config.json and tokenizer come from the model that training started from; max_position_embeddings, rope_theta and rope_scaling are those
    of the run. Holds a layer and a file of `max_shard_size` in memory.

    Args:
        hf: folder with config.json and tokenizer; None: found by following restore_from_path. A model that was not started from a
            converted one gets a config.json of the family with its layers, and no tokenizer.
        dtype: fp32 or bf16; None: as in the checkpoint.
        accept_other_tokenizer: take the folder's tokenizer even if training had data of another.

    Raises:
        FileNotFoundError, FileExistsError: no checkpoint there; `output` is there.
        ValueError: the checkpoint is not of the model in config.json, of layers that no family has, or trained with another tokenizer
            than the folder's.
    """
    output = Path(output)
    path = checkpoint_files.find_checkpoint(source)
    stored = MegatronCheckpoint(path)
    run = _run_of(stored.state)
    model = run.model
    vocab_size = model.override_vocab_size or stored.state.get("vocab_size")
    if vocab_size is None:
        raise ValueError(f"{path} does not say how many tokens the vocabulary has: it is of an older version")
    folder = Path(hf) if hf is not None else _origin(path)
    tokenizer = checkpoint_state.tokenizer_of(stored.state)
    remarks = list[str]()
    if folder is not None:
        known = {str(path): tokenizer, str(folder): folder_identity(folder)}
        remarks += refuse_other_tokenizer(known, "--accept-other-tokenizer", accept_other_tokenizer)
        tokenizer = tokenizer if tokenizer.digest else known[str(folder)]
    else:
        remarks.append("no tokenizer: training did not start from a converted model; --hf names a folder that has one")
    original = None if folder is None else read_config_json(folder)
    config = config_json(model, run.model.data.seq_length, vocab_size, original)
    groups = (model.num_query_groups or model.num_attention_heads) if original is None else kv_heads(original)
    order = list(_in_order(model, vocab_size, groups))
    _check(stored, order, path)
    parts = all_parts(model, vocab_size, groups)
    wanted = None if dtype is None else DTYPE_NAMES[dtype]
    dtypes = {name: wanted or stored.dtypes[t.key] for t, layer in order for name in t.names(layer)}
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtypes["model.norm.weight"]).removeprefix("torch.")
    with _whole(output) as new, _progress("to Hugging Face", len(order), quiet) as advance:
        writer = SafetensorsWriter(new, parts, dtypes, max_shard_size)
        for group, layer in groups_of_tensors(model, vocab_size, groups):
            for tensor, content in zip(group, stored.read(group, layer)):
                for part_name, part in zip(tensor.names(layer), tensor.unpack(content)):
                    writer.add(part_name, part.to(dtypes[part_name]))
                advance()
        writer.close()
        if folder is not None:
            _carry(folder, new)
        write_json(new / "config.json", config)
        if tokenizer.digest:
            write_json(new / RECORD, {"tokenizer_identity": tokenizer.digest})
    return _converted(output, dtypes, parts, remarks)


def _in_order(model: ModelConfig, vocab_size: int, kv_heads: int) -> Iterator[tuple[Tensor, int | None]]:
    for group, layer in groups_of_tensors(model, vocab_size, kv_heads):
        yield from ((tensor, layer) for tensor in group)


def _run_of(state: dict[str, Any]) -> RunConfig:
    """The configuration that a checkpoint was saved with; keys that it lacks are at their defaults."""
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(state["config"])))
    assert isinstance(run, RunConfig)
    return run


def _origin(path: Path) -> Path | None:
    """hf/ of the converted model at the beginning of a checkpoint's chain of stages; None: the chain has no such beginning.

    Raises:
        FileNotFoundError: a checkpoint of the chain is gone.
    """
    while not (path.parent.parent / "hf" / "config.json").is_file():
        start = _run_of(checkpoint_state.read_state(path)).restore_from_path
        if start is None:
            return None
        try:
            path = checkpoint_files.find_checkpoint(start)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; training started from it: --hf gives config.json and tokenizer"
            ) from None
    return path.parent.parent / "hf"


def _check(stored: MegatronCheckpoint, order: list[tuple[Tensor, int | None]], path: Path) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for tensor, layer in order:
        expected[tensor.key] = tensor.shape if layer is None else (layer + 1, *tensor.shape)
    for key in expected.keys() ^ stored.shapes.keys():
        where = "the model has none" if key in stored.shapes else "the checkpoint has none"
        raise ValueError(f"{path}: {key}: {where}, by the configuration that it was saved with")
    for key, shape in expected.items():
        found = stored.shapes[key]
        padded = key in (EMBEDDING, OUTPUT) and found[1:] == shape[1:] and found[0] >= shape[0]
        if found != shape and not padded:
            raise ValueError(f"{path}: {key} has the shape {list(found)}, its configuration asks for {list(shape)}")


def _carry(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in CARRIED):
            shutil.copyfile(file, target / file.name)


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A folder to write to that gets the name `output` when all is written."""
    partial = output.with_name(output.name + ".partial")

    def refuse_existing() -> None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"{output} exists: remove it, or choose another folder")

    refuse_existing()
    with only_writer(partial, "another OUTPUT"):
        refuse_existing()  # another conversion may have ended meanwhile
        for left in partial.iterdir():  # of a conversion that was killed
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()
        with writing(partial):
            yield partial
        partial.rename(output)
        (output / LOCK).unlink(missing_ok=True)


@contextmanager
def _progress(title: str, total: int, quiet: bool) -> Iterator[Any]:
    with Progress(console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def _converted(
    output: Path, dtypes: dict[str, torch.dtype], parts: dict[str, tuple[int, ...]], remarks: list[str]
) -> Converted:
    sizes = {name: torch.Size(shape).numel() for name, shape in parts.items()}
    return Converted(output, sum(sizes.values()), sum(sizes[name] * dtypes[name].itemsize for name in parts), remarks)
