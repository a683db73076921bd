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

import argparse
import fcntl
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..utils.files import read_json, write_json, writing
from ..utils.tokenizer import EOD, added_tokens, find_eod, identity, load_tokenizer, tokenizer_file
from .files import GLOBS, File, LeftOut, list_files, merge_left_out
from .formats import RECORDS
from .shards import Shard, cut_shards, read_documents, stable_hash
from .tokenizer import train_bpe

FORMAT = 2
SPLITS = ("", "_valid")
COUNTED = ("empty", "binary", "replaced", "eod_in_text")
NAMED = 10  # files that are named for each reason to leave them out
STRICT = 3  # exit code of --strict where something was left out
_Tokens = tuple[np.ndarray, np.ndarray, dict[str, int]]


class _Job(NamedTuple):
    """What a worker has to know; all but the tokenizer's path is in a part's name."""

    tokenizer: str
    checksum: str
    before: list[int]
    after: list[int]
    eod: int
    dtype: str
    text_key: str
    valid_fraction: float
    seed: int
    format: int = FORMAT

    def is_valid(self, name: str) -> bool:
        return stable_hash("valid", self.seed, name) < self.valid_fraction * 2**64


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _say(message: str) -> None:
    print(f"prepare: {message}", file=sys.stderr, flush=True)


_worker: tuple[Any, _Job]


def _start_worker(job: _Job) -> None:
    """Runs once in each worker and loads the tokenizer there, so forked and spawned workers are alike."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent: Any = multiprocessing.parent_process()  # if it is killed, the workers go too
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = (load_tokenizer(Path(job.tokenizer)), job)


def _encode_shard(shard: Shard) -> tuple[list[_Tokens], list[LeftOut]]:
    """For each of SPLITS: tokens [T], EODs included; document lengths int64[D], which sum to T; counts. And what is
    left out."""
    tokenizer, job = _worker
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    documents: list[list[np.ndarray]] = [[], []]
    counts = [Counter(dict.fromkeys(COUNTED, 0)) for _ in SPLITS]
    left: list[LeftOut] = []
    for name, text, note, reason in read_documents(shard, job.text_key):
        split = int(job.is_valid(name))
        ids = encode([text], add_special_tokens=False)[0].ids if reason is None else []
        if ids:
            ids = [*job.before, *ids, *job.after]
            counts[split].update(replaced=int(note == "replaced"), eod_in_text=int(job.eod in ids))
            documents[split].append(np.array([*ids, job.eod], dtype=job.dtype))
        else:
            counts[split]["binary" if note == "binary" else "empty"] += 1
            no_token = "the tokenizer has no token for its text"
            record = shard.data is not None
            left.append(reason or LeftOut(shard.files[0].path if record else name, no_token, 1, name if record else ""))
    results: list[_Tokens] = []
    for arrays, count in zip(documents, counts, strict=True):
        tokens = np.concatenate([np.empty(0, job.dtype), *arrays])
        count.update(bytes=tokens.nbytes, max_token_id=int(tokens.max(initial=0)))
        results.append((tokens, np.array([len(array) for array in arrays], dtype=np.int64), dict(count)))
    return results, merge_left_out(left)


def _write_part(parts: Path, name: str, results: list[_Tokens], left: list[LeftOut]) -> None:
    """Write one shard; an OSError names the file. Its .json comes last, by a rename: only with it is the shard finished."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for split, (tokens, lengths, _) in zip(SPLITS, results, strict=True):
        if len(lengths):
            with writing(path := f"{parts}/{name}{split}.bin"):
                builder = IndexedDatasetBuilder(path, dtype=tokens.dtype.type)
                for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                    builder.add_document(tokens[end - length : end], [length])
                builder.finalize(f"{parts}/{name}{split}.idx")
    write_json(parts / f"{name}.json", {"splits": [counts for _, _, counts in results], "left_out": left})


def _encode_all(
    shards: Iterator[Shard], parts: Path, job: _Job, pool: Any, ahead: int, total: int, quiet: bool
) -> list[str]:
    """Tokenize the unfinished shards, ``ahead`` at a time, into ``parts``; returns the names of all, in order.

    What fails ends the run after the shards that are under way are written."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    last = time.monotonic()
    reused = 0
    names: dict[str, None] = {}
    order: list[str] = []
    failed: list[Exception] = []
    pending: deque[tuple[str, int, Any]] = deque()
    columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
    task = bar.add_task("", total=total)
    pool.submit(os.getpid).result()  # a forking pool forks now, before the bar starts its thread

    def write_first() -> None:
        nonlocal last
        name, cost, future = pending.popleft()
        try:
            _write_part(parts, name, *future.result())
        except Exception as error:
            failed.append(error)
        bar.advance(task, cost)
        if bar.disable and not quiet and time.monotonic() - last >= 10:
            last = time.monotonic()
            _say(f"{bar.tasks[0].completed / 1e6:.0f} of {total / 1e6:.0f} MB of input")

    with bar:
        try:
            for shard in shards:
                name = shard.digest(*job[1:])
                order.append(name)
                if name in names:  # the same file, named twice
                    bar.advance(task, shard.cost)
                elif (parts / f"{name}.json").exists():
                    bar.advance(task, shard.cost)
                    reused += 1
                else:
                    pending.append((name, shard.cost, pool.submit(_encode_shard, shard)))
                names[name] = None
                if len(pending) > ahead:
                    write_first()
                if failed:
                    break
        except (ValueError, OSError) as error:  # a file that cannot be read further
            failed.append(error)
        while pending:
            write_first()
    if reused and not quiet:
        _say(f"{reused} of {len(order)} shards were finished by an earlier run")
    if failed:
        raise failed[0]
    return order


def _part(parts: Path, name: str) -> dict[str, Any]:
    """What `_write_part` says of a finished shard."""
    return _read_record(parts / f"{name}.json", f"remove {parts} and run again")


def _join_parts(parts: Path, names: Sequence[str], split: str, dtype: type, left: Sequence[str]) -> dict[str, Any]:
    """Join one split's parts into ``parts``/joined.bin and .idx; returns its counts or raises ValueError."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    joined = f"{parts}/joined{split}"
    total = Counter[str]()
    top = 0
    gc.freeze()  # add_index collects garbage each time: let it not walk through all of torch
    with writing(f"{joined}.bin"):
        builder = IndexedDatasetBuilder(f"{joined}.bin", dtype=dtype)
        for name in names:
            record = _part(parts, name)["splits"][SPLITS.index(split)]
            top = max(top, record.pop("max_token_id"))
            total.update(record)
            if record["bytes"]:
                builder.add_index(f"{parts}/{name}{split}")
    gc.unfreeze()
    lengths = np.array(builder.sequence_lengths, dtype=np.int64)
    if not lengths.size:
        found = ", ".join(f"{total[key]} {key}" for key in ("empty", "binary"))
        reasons = "".join(f"; {line}" for line in left[:3])
        raise ValueError(f"no document in the {'held-out' if split else 'training'} split ({found}){reasons}")
    with writing(f"{joined}.idx"):
        builder.finalize(f"{joined}.idx")
    size = os.path.getsize(f"{joined}.bin")
    if not lengths.sum() * np.dtype(dtype).itemsize == size == total["bytes"]:
        raise ValueError(f"{parts} is damaged ({size} bytes, not {total['bytes']}): delete it, run again")
    counts = {"documents": lengths.size, "tokens": int(lengths.sum()), "longest_document": int(lengths.max())}
    counts |= {f"length_p{q}": int(np.percentile(lengths, q, method="nearest")) for q in (50, 90, 99)}
    return counts | {"max_token_id": top, "bytes": size} | {f"{key}_documents": total[key] for key in COUNTED}


def _read_record(path: str | Path, remedy: str) -> dict[str, Any]:
    """A file that `prepare` wrote, {} where there is none; ValueError with the remedy where it is damaged."""
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def _is_current(prefix: Path, splits: Sequence[str], digest: str) -> bool:
    """Whether PREFIX is whole, was made from these settings, and its tokenizer is unchanged."""
    for path in (f"{prefix}{split}" for split in splits):
        meta = _read_record(f"{path}.json", f"--overwrite prepares {prefix} again")
        if meta.get("settings") != digest or not os.path.exists(f"{path}.idx"):
            return False
        if not meta.keys() >= {"tokenizer", "tokenizer_sha256", "bytes", "left_out"}:
            return False
        tokenizer = tokenizer_file(prefix.parent / meta["tokenizer"])
        if not tokenizer.exists() or _sha256(tokenizer) != meta["tokenizer_sha256"]:
            return False
        if not os.path.exists(f"{path}.bin") or os.path.getsize(f"{path}.bin") != meta["bytes"]:
            return False
    return True


def _settings(parts: Path) -> dict[str, Any]:
    """Of the unfinished run in ``parts``: "data", "job", "shard_bytes"; {} without one, or of an older version."""
    return _read_record(parts / "settings.json", f"remove {parts} and run again")


def _train(
    files: Sequence[File], folder: Path, size: int, sample: int, seed: int, text_key: str, valid_fraction: float
) -> None:
    """Train a tokenizer on the training split."""
    job = _Job("", "", [], [], 0, "", text_key, valid_fraction, seed)
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
        _say(f"left out: {line}")


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
    if (train_tokenizer is None) == (tokenizer is None):
        raise ValueError("give either a vocabulary size to train a tokenizer or an existing tokenizer")
    if train_tokenizer is not None and (train_tokenizer < 257 or eod is not None):
        raise ValueError(f"a trained tokenizer has 257 entries or more, not {train_tokenizer}, and EOD {EOD}")
    for name, value in {"workers": workers, "shard_bytes": shard_bytes, "tokenizer_bytes": tokenizer_bytes}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction {valid_fraction} is not in [0, 1)")
    files, beside = list_files(inputs := [str(source) for source in inputs], globs, text_key)
    size = sum(file.size for file in files)
    prefix = Path(output).absolute()
    parts = Path(f"{output}.parts").absolute()
    splits = SPLITS if valid_fraction else SPLITS[:1]
    file = parts / "tokenizer" / "tokenizer.json"
    origin: list[Any] = [train_tokenizer, tokenizer_bytes]
    if tokenizer is not None:
        file = tokenizer_file(tokenizer).absolute()
        origin = [*find_eod(load_tokenizer(file), file, eod), _sha256(file)]
    listed = [f._replace(path=os.path.abspath(f.path)) for f in files]
    facts = [FORMAT, listed, origin, text_key, valid_fraction, seed, bos]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if not overwrite and _is_current(prefix, splits, digest):
        meta = read_json(f"{prefix}.json")
        if not quiet:
            _say_all(meta["left_out"])
            _say(f"{output} is up to date")
        return meta
    settings = _settings(parts)
    resumed = settings.get("data") == digest
    existing = [Path(f"{prefix}{split}.{end}") for split in SPLITS for end in ("idx", "json", "bin")]
    existing = [path for path in existing if path.exists()]
    if existing and not (overwrite or resumed):
        raise FileExistsError(f"{existing[0]} exists, with other settings or inputs; --overwrite replaces it")

    from megatron.core.datasets.indexed_dataset import DType

    import exact_megatron

    parts.mkdir(parents=True, exist_ok=True)
    with open(parts / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FileExistsError(f"another process is working in {parts}") from None
        if not resumed:
            shutil.rmtree(parts / "tokenizer", ignore_errors=True)
        final = file
        if tokenizer is None:
            if not file.exists():
                assert train_tokenizer is not None
                write_json(parts / "settings.json", settings | {"data": digest})
                _train(files, file.parent, train_tokenizer, tokenizer_bytes, seed, text_key, valid_fraction)
            final = prefix.parent / "tokenizer" / "tokenizer.json"
            if final.exists() and not overwrite and _sha256(final) != _sha256(file):
                raise FileExistsError(f"{final} is another dataset's: change the folder or --overwrite")
        loaded = load_tokenizer(file)
        checksum = _sha256(file)
        token, number = find_eod(loaded, file, eod)
        before, after = added_tokens(loaded)
        before = before if bos else []
        after = after[:-1] if after[-1:] == [number] else after
        vocab_size = max(loaded.get_vocab().values()) + 1
        dtype = DType.optimal_dtype(vocab_size)
        job = _Job(str(file), checksum, before, after, number, dtype.__name__, text_key, valid_fraction, seed)
        if settings.get("job", list(job[1:])) != list(job[1:]):
            if not quiet:
                _say(f"discarding {parts}: it holds an unfinished run with other settings")
            for path in sorted(parts.iterdir(), key=lambda path: path.suffix != ".json"):  # a part without it is none
                if path.is_file() and path.name not in ("lock", "settings.json"):
                    path.unlink()
        # Not by the size alone: cuts that move would throw away the parts of the files that did not change.
        shard_bytes = shard_bytes or settings.get("shard_bytes") or min(max(size // 256, 1 << 20), 32 << 20)
        write_json(parts / "settings.json", {"data": digest, "job": list(job[1:]), "shard_bytes": shard_bytes})
        workers = workers or len(os.sched_getaffinity(0))
        context = multiprocessing.get_context(start_method)
        pool = ProcessPoolExecutor(workers, context, _start_worker, (job,))
        try:
            shards = cut_shards(files, shard_bytes, text_key)
            names = _encode_all(shards, parts, job, pool, workers + 1, size, quiet)
        finally:
            pool.shutdown(cancel_futures=True)
        left = [LeftOut(*item) for name in names for item in _part(parts, name)["left_out"]]
        left_out = _describe(merge_left_out([*beside, *left]))
        if not quiet:
            _say_all(left_out)
        shown = final.parent if final.name == "tokenizer.json" else final
        made = {
            "format": FORMAT,
            "exact_megatron": getattr(exact_megatron, "__version__", None),
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
        metas = [{"split": s[1:] or "train"} | made | _join_parts(parts, names, s, dtype, left_out) for s in splits]

        for path in existing:
            path.unlink(missing_ok=True)
        if tokenizer is None:
            final.parent.mkdir(exist_ok=True)
            for name in ("tokenizer_config.json", "tokenizer.json"):
                os.replace(file.with_name(name), final.with_name(name))
        for split, meta in zip(splits, metas, strict=True):
            os.replace(parts / f"joined{split}.bin", f"{prefix}{split}.bin")
            write_json(f"{prefix}{split}.json", meta)
        for split in reversed(splits):
            os.replace(parts / f"joined{split}.idx", f"{prefix}{split}.idx")
        shutil.rmtree(parts)
    return metas[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``exact-megatron prepare``."""
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    add("inputs", nargs="+", help="text, .json, .jsonl or .parquet, also .gz, .xz, .bz2, .zst; folder; or stdlib")
    add("--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx and PREFIX.json")
    which.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or a folder that holds one")
    text = "train a byte-level BPE of this size and save it in tokenizer/ beside PREFIX"
    which.add_argument("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help=text)
    add("--tokenizer-bytes", type=int, default=32 << 20, help="text to train on (default: %(default)s)")
    add("--eod", metavar="TOKEN", help="end of document (default: eos_token of tokenizer_config.json)")
    add("--text-key", default="text", help="key of the text in JSON, column in Parquet (default: %(default)s)")
    globs = f"files of a folder, repeatable (default: {GLOBS}, data files of the kinds {', '.join(RECORDS)})"
    add("--glob", action="append", dest="globs", help=globs)
    text = "leave out what the tokenizer puts before a text; kept without this, as Megatron's preprocessing does"
    add("--no-bos", action="store_false", dest="bos", help=text)
    add("--valid-fraction", type=float, default=0.0, help="share of documents held out in PREFIX_valid")
    add("--seed", type=int, default=0, help="picks held-out documents and the sample for the tokenizer")
    add("--workers", type=int, help="processes (default: the CPUs at hand); the output does not depend on it")
    add("--shard-bytes", type=int, help="input per unit of work and resume (default: 1 to 32 MiB, by size)")
    add("--overwrite", action="store_true", help="replace PREFIX, even if it is up to date")
    add("--strict", action="store_true", help=f"exit code {STRICT} if anything was left out")


def run(args: argparse.Namespace) -> int:
    """Run ``exact-megatron prepare``: 0 done or up to date, 2 an error (printed), 3 done but for what --strict does not
    leave out, 130 interrupted."""
    from rich.console import Console
    from rich.table import Table

    options = {key: value for key, value in vars(args).items() if key in (prepare.__kwdefaults__ or ())}
    try:
        metas = [prepare(args.inputs, args.output, **options)]
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the finished shards")
        return 130
    except (OSError, ValueError, BrokenProcessPool) as error:  # the last: a worker was killed, for memory say
        if getattr(args, "traceback", False):
            raise
        _say(f"error: {error}")
        return 2
    metas += [read_json(f"{args.output}_valid.json")] if args.valid_fraction else []
    table = Table(args.output, *(meta["split"] for meta in metas))
    shown = itertools.dropwhile(lambda key: key != "dtype", metas[0])  # from there on facts and counts
    for key in shown:
        table.add_row(key, *(_shown(meta[key]) for meta in metas))
    Console().print(table)
    if args.strict and metas[0]["left_out"]:
        _say("error: --strict, and something was left out, see above")
        return STRICT
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
