"""Turn text into Megatron's ``PREFIX.bin`` and ``.idx``: one sequence per document, an EOD token after each.

Shards of about ``shard_bytes`` of input are tokenized by worker processes, written to ``PREFIX.parts/`` and
joined in order, so the output depends neither on the number of workers nor on interruptions. A part is named by a
digest of its text and of the settings that its tokens depend on: a rerun makes those that are missing, whatever else
has changed. ``PREFIX.idx`` appears last, by a rename.

A document is what the tokenizer makes of it, with the tokens that it puts before a text (``bos=False`` leaves them
out) and after it, and one EOD. A special token spelled out in a text is tokenized as plain text.

A hash of seed and document name (``folder/file.py``, ``file.jsonl:17``) picks the held-out documents.
Texts with a NUL byte ("binary") and documents of white space only, or null ("empty") are left out, undecodable bytes
become U+FFFD ("replaced"); all are counted. What is left out is named on stderr and in ``PREFIX.json``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from .. import __version__
from ..utils.files import read_json, write_json
from ..utils.tokenizer import EOD, added_tokens, find_eod, identity, load_tokenizer, tokenizer_file
from .encode import FORMAT, SPLITS, Job, encode_all, join_parts, read_made, read_part, say, sha256, start_worker
from .files import File, LeftOut, list_files, merge_left_out
from .shards import cut_shards
from .tokenizer import train_bpe

NAMED = 10  # files that are named for each reason to leave them out


def _is_current(prefix: Path, splits: Sequence[str], digest: str) -> bool:
    """Whether PREFIX is whole, was made from these settings, and its tokenizer is unchanged."""
    for path in (f"{prefix}{split}" for split in splits):
        meta = read_made(f"{path}.json", f"--overwrite prepares {prefix} again")
        if meta.get("settings") != digest or not os.path.exists(f"{path}.idx"):
            return False
        if not meta.keys() >= {"tokenizer", "tokenizer_sha256", "bytes", "left_out"}:
            return False
        tokenizer = tokenizer_file(prefix.parent / meta["tokenizer"])
        if not tokenizer.exists() or sha256(tokenizer) != meta["tokenizer_sha256"]:
            return False
        if not os.path.exists(f"{path}.bin") or os.path.getsize(f"{path}.bin") != meta["bytes"]:
            return False
    return True


def _settings(parts: Path) -> dict[str, Any]:
    """Of the unfinished run in ``parts``: "data", "job", "shard_bytes"; {} without one, or of an older version."""
    return read_made(parts / "settings.json", f"remove {parts} and run again")


def _train(
    files: Sequence[File], folder: Path, size: int, sample: int, seed: int, text_key: str, valid_fraction: float
) -> None:
    """Train a tokenizer on the training split."""
    job = Job("", "", [], [], 0, "", text_key, valid_fraction, seed)
    train_bpe(files, folder, size, sample, seed, text_key, lambda name: not job.is_valid(name))


def _describe(left: Sequence[LeftOut]) -> list[str]:
    """A line for the user for each file and reason, NAMED of a reason."""
    lines = list[str]()
    seen = Counter[str]()
    for item in left:
        seen[item.reason] += 1
        if seen[item.reason] > NAMED:
            continue
        records = f"{item.documents} record{'s' * (item.documents > 1)}, " if item.first else ""
        first = f" (first: {item.first})" if item.first else ""
        lines.append(f"{item.path}: {records}{item.reason}{first}")
    return [*lines, *(f"{n - NAMED} more files: {reason}" for reason, n in seen.items() if n > NAMED)]


def _say_all(left_out: Sequence[str]) -> None:
    for line in left_out:
        say(f"left out: {line}")


def _check_arguments(
    train_tokenizer: int | None, tokenizer: str | None, eod: str | None, valid_fraction: float
) -> None:
    if (train_tokenizer is None) == (tokenizer is None):
        raise ValueError("give either a vocabulary size to train a tokenizer or an existing tokenizer")
    if train_tokenizer is not None and (train_tokenizer < 257 or eod is not None):
        raise ValueError(f"a trained tokenizer has 257 entries or more, not {train_tokenizer}, and EOD {EOD}")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction {valid_fraction} is not in [0, 1)")


@contextlib.contextmanager
def _only_process(parts: Path) -> Iterator[None]:
    """Hold the lock of the unfinished run in ``parts``, which is made if it is missing.

    Raises:
        FileExistsError: another process holds it.
    """
    parts.mkdir(parents=True, exist_ok=True)
    with open(parts / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FileExistsError(f"another process is working in {parts}") from None
        yield


def _discard_parts(parts: Path, quiet: bool) -> None:
    """Remove the finished shards in ``parts``."""
    if not quiet:
        say(f"discarding {parts}: it holds an unfinished run with other settings")
    for path in sorted(parts.iterdir(), key=lambda path: path.suffix != ".json"):  # a part without it is none
        if path.is_file() and path.name not in ("lock", "settings.json"):
            path.unlink()


def _publish(parts: Path, prefix: Path, metas: dict[str, dict[str, Any]], tokenizer: Path | None) -> None:
    """Move what `join_parts` wrote to ``prefix``, the .idx last.

    Args:
        metas: what is said of each split, by its ending of SPLITS.
        tokenizer: the folder for the tokenizer that was trained in ``parts``; None for a given one.
    """
    if tokenizer is not None:
        tokenizer.mkdir(exist_ok=True)
        for name in ("tokenizer_config.json", "tokenizer.json"):
            os.replace(parts / "tokenizer" / name, tokenizer / name)
    for split, meta in metas.items():
        os.replace(parts / f"joined{split}.bin", f"{prefix}{split}.bin")
        write_json(f"{prefix}{split}.json", meta)
    for split in reversed(metas):
        os.replace(parts / f"joined{split}.idx", f"{prefix}{split}.idx")


def prepare(
    inputs: Sequence[str],
    output: str,
    *,
    train_tokenizer: int | None = None,
    tokenizer: str | None = None,
    eod: str | None = None,
    text_key: str = "text",
    globs: Sequence[str] | None = None,
    valid_fraction: float = 0.0,
    seed: int = 0,
    bos: bool = True,
    tokenizer_bytes: int = 32 << 20,
    shard_bytes: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    start_method: str | None = None,
) -> dict[str, Any]:
    """Write ``output``.bin/.idx/.json, and ``output``_valid.* if valid_fraction > 0; returns the first .json.

    Give one of ``train_tokenizer`` (vocabulary size) and ``tokenizer`` (folder or tokenizer.json). A dataset
    that is there, made from the same settings and files, is left alone. Lengths are in tokens, EOD included.
    "left_out" of the .json says, in lines for the user, what was not read and why.
    Raises ValueError or OSError with a message for the user.
    """
<<<<<<< HEAD
    _check_arguments(train_tokenizer, tokenizer, eod, valid_fraction)
=======
    if (train_tokenizer is None) == (tokenizer is None):
        raise ValueError("give either a vocabulary size to train a tokenizer or an existing tokenizer")
    if train_tokenizer is not None and (train_tokenizer < 257 or eod is not None):
        raise ValueError(f"a trained tokenizer has 257 entries or more, not {train_tokenizer}, and EOD {EOD}")
    for name, value in {"workers": workers, "shard_bytes": shard_bytes, "tokenizer_bytes": tokenizer_bytes}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction {valid_fraction} is not in [0, 1)")
>>>>>>> w-b
    files, beside = list_files(inputs := [str(source) for source in inputs], globs, text_key)
    size = sum(file.size for file in files)
    prefix = Path(output).absolute()
    parts = Path(f"{output}.parts").absolute()
    splits = SPLITS if valid_fraction else SPLITS[:1]
    file = parts / "tokenizer" / "tokenizer.json"
    origin: list[Any] = [train_tokenizer, tokenizer_bytes]
    if tokenizer is not None:
        file = tokenizer_file(tokenizer).absolute()
        origin = [*find_eod(load_tokenizer(file), file, eod), sha256(file)]
    listed = [f._replace(path=os.path.abspath(f.path)) for f in files]
    facts = [FORMAT, listed, origin, text_key, valid_fraction, seed, bos]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if not overwrite and _is_current(prefix, splits, digest):
        meta = read_json(f"{prefix}.json")
        if not quiet:
            _say_all(meta["left_out"])
            say(f"{output} is up to date")
        return meta
    settings = _settings(parts)
    resumed = settings.get("data") == digest
    existing = [Path(f"{prefix}{split}.{end}") for split in SPLITS for end in ("idx", "json", "bin")]
    existing = [path for path in existing if path.exists()]
    if existing and not (overwrite or resumed):
        raise FileExistsError(f"{existing[0]} exists, with other settings or inputs; --overwrite replaces it")

    from megatron.core.datasets.indexed_dataset import DType

    with _only_process(parts):
        if not resumed:
            shutil.rmtree(parts / "tokenizer", ignore_errors=True)
        final = file
        if tokenizer is None:
            if not file.exists():
                assert train_tokenizer is not None
                write_json(parts / "settings.json", settings | {"data": digest})
                _train(files, file.parent, train_tokenizer, tokenizer_bytes, seed, text_key, valid_fraction)
            final = prefix.parent / "tokenizer" / "tokenizer.json"
            if final.exists() and not overwrite and sha256(final) != sha256(file):
                raise FileExistsError(f"{final} is another dataset's: change the folder or --overwrite")
        loaded = load_tokenizer(file)
        checksum = sha256(file)
        token, number = find_eod(loaded, file, eod)
        before, after = added_tokens(loaded)
        before = before if bos else []
        after = after[:-1] if after[-1:] == [number] else after
        vocab_size = max(loaded.get_vocab().values()) + 1
        dtype = DType.optimal_dtype(vocab_size)
        job = Job(str(file), checksum, before, after, number, dtype.__name__, text_key, valid_fraction, seed)
        if settings.get("job", list(job[1:])) != list(job[1:]):
            _discard_parts(parts, quiet)
        # Not by the size alone: cuts that move would throw away the parts of the files that did not change.
        shard_bytes = shard_bytes or settings.get("shard_bytes") or min(max(size // 256, 1 << 20), 32 << 20)
        write_json(parts / "settings.json", {"data": digest, "job": list(job[1:]), "shard_bytes": shard_bytes})
        workers = workers or len(os.sched_getaffinity(0))
        context = multiprocessing.get_context(start_method)
        pool = ProcessPoolExecutor(workers, context, start_worker, (job,))
        try:
            shards = cut_shards(files, shard_bytes, text_key)
            names = encode_all(shards, parts, job, pool, workers + 1, size, quiet)
        finally:
            pool.shutdown(cancel_futures=True)
        left = [LeftOut(*item) for name in names for item in read_part(parts, name)["left_out"]]
        left_out = _describe(merge_left_out([*beside, *left]))
        if not quiet:
            _say_all(left_out)
        shown = final.parent if final.name == "tokenizer.json" else final
        made = {
            "format": FORMAT,
            "exact_megatron": __version__,
            "settings": digest,
            "sources": inputs,
            "valid_fraction": valid_fraction,
            "seed": seed,
            "tokenizer": os.path.relpath(shown, prefix.parent),
            "tokenizer_sha256": checksum,
            "tokenizer_identity": identity(loaded),
            "left_out": left_out,
            "dtype": dtype.__name__,
            "before_text": [loaded.id_to_token(i) for i in before],
            "before_text_ids": before,
            "eod_token": token,
            "eod_id": number,
            "vocab_size": vocab_size,
        }
        metas = [{"split": s[1:] or "train"} | made | join_parts(parts, names, s, dtype, left_out) for s in splits]
        for path in existing:
            path.unlink(missing_ok=True)
        _publish(parts, prefix, dict(zip(splits, metas, strict=True)), final.parent if tokenizer is None else None)
        shutil.rmtree(parts)
    return metas[0]
