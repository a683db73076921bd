"""What the data say of themselves, checked before any rank starts: files, vocabulary, EOD. numpy only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..packing import TokenIndex, read_index
from ..utils.tokenizer import Identity, data_identity, refuse_other_tokenizer
from .config import parse_blend
from .schema import RunConfig

SCANNED_TOKENS = 1 << 28  # tokens of each file that are read before training to check them against the vocabulary
ACCEPT_TOKENIZER = "model.data.accept_other_tokenizer=true"
SCANNED_ENDS = 4096  # documents whose last token is compared with EOD


@dataclass
class Vocabulary:
    """What GPTDataset asks of a tokenizer, and the tokenizer of each member of the data."""

    vocab_size: int
    eod: int
    pad: int = -1
    tokenizers: dict[str, Identity] = field(default_factory=dict)

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"class": "Vocabulary", "vocab_size": self.vocab_size, "eod": self.eod}

    @property
    def special_tokens_dict(self) -> dict[str, int]:
        return {"eod": self.eod}


def data_prefixes(run: RunConfig) -> dict[str, tuple[list[str], list[float] | None] | None]:
    """Blends by split, or under "all" the one that splits_string divides.

    Raises:
        ValueError: an unknown split, no training data, or validation without data.
    """
    given = run.model.data.data_prefix
    if not isinstance(given, dict):
        return {"all": parse_blend(given)}
    names = ("train", "validation", "test")
    for name in given:
        if name not in names:
            raise ValueError(f"model.data.data_prefix has splits {', '.join(names)}, not {name!r}")
    if not given.get("train"):
        raise ValueError(f"model.data.data_prefix gives {', '.join(given)} and no train: name the training data")
    if run.trainer.limit_val_batches and not given.get("validation"):
        raise ValueError(
            f"trainer.limit_val_batches={run.trainer.limit_val_batches} asks for validation, model.data.data_prefix has no "
            "validation: name its data, or set limit_val_batches=0"
        )
    return {name: parse_blend(given[name]) if given.get(name) else None for name in names}


def read_vocabulary(run: RunConfig, scan: bool = True) -> Vocabulary:
    """Check every .bin/.idx pair and take vocabulary size and EOD from the configuration or from PREFIX.json.

    Members of different tokenizers, if accepted, need model.data.eod_id where their EODs differ; the largest vocabulary counts.
    model.override_vocab_size may be above the tokenizer's size, as in models that are published with a padded vocabulary.

    Args:
        scan: read tokens too; False checks the indices alone.

    Raises:
        FileNotFoundError, ValueError: see packing.read_index; also for members of different tokenizers or vocabularies, a size that
            nobody gives, token ids outside the vocabulary, and documents that do not end in EOD where eod_mask_loss relies on it.
    """
    data = run.model.data
    rows = run.model.override_vocab_size
    size = None
    eod = data.eod_id
    prefixes = sorted({p for blend in data_prefixes(run).values() if blend for p in blend[0]})
    for prefix in prefixes:
        if prefix.endswith((".bin", ".idx")):
            raise ValueError(f"{prefix}: give the common prefix of .bin and .idx, {prefix[:-4]}")
    indices = [read_index(p, run.whole_documents) for p in prefixes]
    described = {prefix: _described(prefix) for prefix in prefixes}
    tokenizers = {prefix: data_identity(prefix) for prefix in prefixes}
    accepted, known = data.accept_other_tokenizer, list[str]()
    refuse_other_tokenizer(tokenizers, ACCEPT_TOKENIZER, accepted)
    for prefix in prefixes:
        facts = described[prefix]
        if not facts:
            continue
        if eod is not None and facts["eod_id"] != eod and not (accepted and data.eod_id is not None):
            if data.eod_id is not None:
                other = f"model.data.eod_id={eod}: leave the setting out, or accept data with another EOD with {ACCEPT_TOKENIZER}"
            elif accepted:
                other = f"{known[-1]}.json says {eod}: set model.data.eod_id to the model's"
            else:
                other = (
                    f"{known[-1]}.json says {eod}: prepare the data with one tokenizer, or accept it with {ACCEPT_TOKENIZER} and "
                    "set model.data.eod_id to the model's"
                )
            raise ValueError(f"{prefix}.json says eod_id {facts['eod_id']}, {other}")
        if size is not None and facts["vocab_size"] != size and not accepted:
            raise ValueError(
                f"{prefix}.json says vocab_size {facts['vocab_size']}, {known[-1]}.json says {size}: prepare the data with one "
                f"tokenizer, or accept it with {ACCEPT_TOKENIZER}, which takes the larger"
            )
        if rows is not None and rows < facts["vocab_size"]:
            raise ValueError(
                f"model.override_vocab_size={rows} is below the {facts['vocab_size']} tokens of {prefix}'s tokenizer: the model has no "
                "row for some (published models have more rows than their tokenizer has tokens, which is fine)"
            )
        known.append(prefix)
        size, eod = max(size or 0, facts["vocab_size"]), facts["eod_id"] if eod is None else eod
    size = rows or size
    if size is None or eod is None:
        raise ValueError(
            f"the vocabulary of {prefixes[0]} is not known, since there is no {prefixes[0]}.json: set "
            "model.override_vocab_size and model.data.eod_id, or prepare the data with `exact-megatron prepare`"
        )
    if not 0 <= eod < size:
        raise ValueError(f"model.data.eod_id={eod} is not in the vocabulary of {size} tokens")
    for index in indices if scan else []:
        _scan(index, size, eod if data.eod_mask_loss else None)
    return Vocabulary(size, eod, tokenizers=tokenizers)


def _described(prefix: str) -> dict[str, int]:
    path = Path(prefix + ".json")
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
        return {key: int(facts[key]) for key in ("vocab_size", "eod_id")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not give vocab_size and eod_id ({error!r}): prepare the data again with --overwrite, or remove it"
        ) from error


def _scan(index: TokenIndex, size: int, eod: int | None) -> None:
    tokens = np.memmap(index.prefix + ".bin", dtype=index.dtype, mode="r")
    step = max(1, -(-len(tokens) // SCANNED_TOKENS))
    blocks = [tokens[i : i + (1 << 20)] for i in range(0, len(tokens), step << 20)]
    least = min(int(b.min()) for b in blocks)
    largest = max(int(b.max()) for b in blocks)
    if least < 0 or largest >= size:
        raise ValueError(
            f"{index.prefix}.bin holds token id {largest if largest >= size else least}, the vocabulary has 0..{size - 1}: it was made "
            "with another tokenizer or as another dtype, or model.override_vocab_size is too small"
        )
    if eod is not None:
        lengths = index.lengths[:SCANNED_ENDS]
        ends = np.cumsum(lengths, dtype=np.int64)[lengths > 0] - 1
        other = int(np.count_nonzero(tokens[ends] != eod))
        if other:
            raise ValueError(
                f"model.data.eod_mask_loss=true, but {other} of the first {len(ends)} documents of {index.prefix} do not end in "
                f"model.data.eod_id={eod}: set the right id, or append EOD when the data are prepared"
            )
