"""Tokenizers that are there: loading one, its end-of-document token, and whether two give the same ids."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .files import read_json

EOD = "<|endoftext|>"
RECORD = "tokenizer_identity.json"  # what `convert` notes in a Hugging Face folder


def tokenizer_file(path: str | Path) -> Path:
    return Path(path, "tokenizer.json") if os.path.isdir(path) else Path(path)


def load_tokenizer(file: Path) -> Any:
    """The tokenizer, set to encode all of a text and nothing else. Raises OSError or ValueError."""
    from tokenizers import Tokenizer

    content = file.read_text("utf-8")
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:
        raise ValueError(f"{file}: not a tokenizer.json that tokenizers can load: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text must not end the document
    return tokenizer


def find_eod(tokenizer: Any, file: Path, eod: str | None) -> tuple[str, int]:
    """Token and id: ``eod``, else eos_token of tokenizer_config.json beside ``file``, else ValueError."""
    if eod is None:
        eos = read_json(file.with_name("tokenizer_config.json")).get("eos_token")
        eod = eos.get("content") if isinstance(eos, dict) else eos
    if not eod:
        raise ValueError(f"{file}: no eos_token in a tokenizer_config.json beside it; use --eod TOKEN")
    if (number := tokenizer.token_to_id(eod)) is None:
        raise ValueError(f"{file}: the end-of-document token {eod!r} is not in the vocabulary")
    return eod, number


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer's post-processor puts before a text (LLaMA 3's beginning of text) and after it.

    transformers' ``tokenizer(text)``, and with it Megatron's preprocessing, keeps both.
    """
    for probe in itertools.chain(("a",), tokenizer.get_vocab()):
        encoding = tokenizer.encode(probe, add_special_tokens=True)
        if 0 in (mask := encoding.special_tokens_mask):
            first = mask.index(0)
            last = len(mask) - mask[::-1].index(0)
            return encoding.ids[:first], encoding.ids[last:]
    return [], []


def identity(tokenizer: Any) -> str:
    """32 hex digits that change with the ids a text gets: vocabulary, merges, normalizer, pre-tokenizer.

    Not with the chat template, padding, truncation or what a post-processor adds, nor with the version of tokenizers that
    wrote the file: settings that are off or empty are as good as absent.
    """

    def set_only(value: Any) -> Any:
        if isinstance(value, dict):
            kept = ((key, set_only(child)) for key, child in value.items())
            return {key: child for key, child in kept if not (child is None or child is False or child == "")}
        return [set_only(child) for child in value] if isinstance(value, list) else value

    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    if "merges" in model:  # "a b" before tokenizers 0.20, ["a", "b"] since
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary = model.pop("vocab", None)  # ids, of which 0 is no setting that is off
    added = sorted((token["id"], token["content"]) for token in spec["added_tokens"])
    facts = [set_only([model, spec["normalizer"], spec["pre_tokenizer"]]), vocabulary, added]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Identity(NamedTuple):
    """A tokenizer's `identity` (None: unknown) and where that comes from, for messages."""

    digest: str | None
    source: str

    def __str__(self) -> str:
        return f"{self.digest or 'unknown'} ({self.source})"


UNKNOWN = Identity(None, "nothing is recorded")


def data_identity(prefix: str) -> Identity:
    """What PREFIX.json says of the tokenizer that made the data."""
    facts = read_json(f"{prefix}.json")
    if not facts:
        return Identity(None, f"no {prefix}.json")
    name = facts.get("tokenizer")
    return Identity(facts.get("tokenizer_identity"), f"{prefix}.json{f', tokenizer {name}' if name else ''}")


def folder_identity(folder: str | Path) -> Identity:
    """What `convert` recorded in a model's folder, else the identity of its tokenizer.json."""
    record, file = Path(folder, RECORD), Path(folder, "tokenizer.json")
    if found := read_json(record).get("tokenizer_identity"):
        return Identity(found, str(record))
    if not file.is_file():
        return Identity(None, f"no {file}")
    try:
        return Identity(identity(load_tokenizer(file)), str(file))
    except ImportError:
        return Identity(None, f"{file}; to read it: pip install tokenizers")
    except ValueError as error:
        return Identity(None, str(error))


def refuse_other_tokenizer(known: Mapping[str, Identity], accept: str, accepted: bool) -> list[str]:
    """Compare the tokenizers of a model and of data, or of the members of a blend.

    Args:
        known: by what has it, for example a model's folder or a prefix.
        accept: the setting that lets them differ.

    Returns:
        Remarks for the user: what is unknown, and a difference that is ``accepted``.

    Raises:
        ValueError: two known ones differ, unless ``accepted``.
    """
    unknown = [f"{what} ({found.source})" for what, found in known.items() if found.digest is None]
    more = f", and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    remarks = [f"tokenizer unknown, not compared: {'; '.join(unknown[:3])}{more}"] if unknown else []
    recorded = [(what, found) for what, found in known.items() if found.digest is not None]
    for what, found in recorded:
        if found.digest != recorded[0][1].digest:
            problem = f"{recorded[0][0]} has the tokenizer {recorded[0][1]}, {what} has {found}"
            if not accepted:
                raise ValueError(
                    f"{problem}: the same ids stand for other text. Prepare the data with one tokenizer, or accept it with {accept}"
                )
            remarks.append(f"{problem}; accepted with {accept}")
    return remarks
