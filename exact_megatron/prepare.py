"""Turn text into Megatron's ``PREFIX.bin`` and ``.idx``: one sequence per document, an EOD token after each.

Shards of about ``shard_bytes`` of input are tokenized by worker processes, written to ``PREFIX.parts/`` and
joined in order, so the output depends neither on the number of workers nor on interruptions: a rerun with the
same settings skips the finished shards. ``PREFIX.idx`` appears last, by a rename.

A hash of seed and document name (``folder/file.py``, ``file.jsonl:17``) picks the held-out documents.
Files with a NUL byte ("binary") and documents of white space only ("empty") are left out, undecodable bytes
become U+FFFD ("replaced"); all are counted. A special token spelled out in a text is tokenized as plain text.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import functools
import gc
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1
EOD = "<|endoftext|>"
GLOBS = "*.txt *.md *.rst *.tex *.py *.pyi *.c *.h *.cc *.cpp *.hpp *.cu *.cuh *.java *.js *.ts *.go *.rs"
JSONL = re.compile(r"\.(jsonl|ndjson)(\.gz|\.zst)?$|\.json\.(gz|zst)$")
LONG_WORD = re.compile(r"\S{200}(?=\S)")  # cut for training: the trainer is quadratic in a word's length
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SPLITS = ("", "_valid")
COUNTED = ("empty", "binary", "replaced", "eod_in_text")
_Tokens = tuple[np.ndarray, np.ndarray, dict[str, int]]


class _File(NamedTuple):
    name: str
    path: str
    size: int
    mtime_ns: int


class _Shard(NamedTuple):
    """Text files, or ``data``: complete lines of the JSONL ``files[0]`` from line ``first_line`` on."""

    index: int
    cost: int  # bytes of input on disk, for the progress display
    files: tuple[_File, ...]
    data: bytes | None = None
    first_line: int = 1


class _Job(NamedTuple):
    """What a worker has to know."""

    tokenizer: str
    eod: int
    dtype: str
    text_key: str
    valid_fraction: float
    seed: int

    def is_valid(self, name: str) -> bool:
        return _rank("valid", self.seed, name) < self.valid_fraction * 2**64


def _rank(*words: object) -> int:
    """Stable hash of the words, uniform in [0, 2**64)."""
    data = "\0".join(map(str, words)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _say(message: str) -> None:
    print(f"prepare: {message}", file=sys.stderr, flush=True)


def _write_json(path: str | Path, value: Any) -> None:
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=2) + "\n")
    os.replace(f"{path}.tmp", path)


def _read_json(path: str | Path) -> Any:
    """The parsed file, or {} where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _list_files(inputs: Sequence[str], globs: Sequence[str]) -> list[_File]:
    """Input files in the order given, folders sorted by relative path and without their hidden folders.

    Raises FileNotFoundError for a missing input, ValueError for a folder in which no file matches.
    """
    found: list[_File] = []
    for source in inputs:
        stdlib = source == "stdlib"
        root = Path(sysconfig.get_path("stdlib") if stdlib else source)
        if not root.exists():
            raise FileNotFoundError(f"input {source!r} is neither a file, nor a folder, nor the word stdlib")
        patterns, matching = ["*.py"] if stdlib else globs, [(root.name, root)] if root.is_file() else []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [n for n in subfolders if n[0] != "." and not (stdlib and n in NOT_STDLIB)]
            for path in (Path(folder, name) for name in names):
                relative = path.relative_to(root).as_posix()
                if any(fnmatch.fnmatchcase(relative if "/" in p else path.name, p) for p in patterns):
                    matching.append((f"{'stdlib' if stdlib else root.resolve().name}/{relative}", path))
        if not matching:
            raise ValueError(f"no file in folder {source!r} matches --glob {' '.join(patterns)}")
        stats = ((name, path, path.stat()) for name, path in sorted(matching))
        found += [_File(name, str(path), stat.st_size, stat.st_mtime_ns) for name, path, stat in stats]
    return found


def _blocks(path: str, size: int) -> Iterator[tuple[bytes, int]]:
    """(decompressed bytes, bytes read) of a plain, .gz or .zst file; ValueError if it is damaged or cut."""
    new, member, damage = None, None, zlib.error
    if path.endswith(".gz"):
        new = functools.partial(zlib.decompressobj, 31)
    elif path.endswith(".zst"):
        import zstandard

        damage = zstandard.ZstdError
        # Not its stream_reader, which ends silently where a file is cut off.
        new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    with open(path, "rb") as file:
        while data := file.read(size):
            cost = len(data)
            while new and data:
                member = member or new()
                try:
                    yield member.decompress(data), cost
                except damage as error:
                    raise ValueError(f"{path}: damaged compressed file: {error}") from None
                data, cost, member = member.unused_data, 0, None if member.eof else member
            if not new:
                yield data, cost
    if member:
        raise ValueError(f"{path}: the compressed file is cut off")


def _shards(files: Sequence[_File], shard_bytes: int) -> Iterator[_Shard]:
    """Cut the input into shards, always the same for the same files; holds one JSONL shard at a time."""
    index, group, size = 0, list[_File](), 0
    for file in files:
        is_jsonl = JSONL.search(file.name)
        if group and (is_jsonl or size >= shard_bytes):
            yield _Shard(index, size, tuple(group))
            index, group, size = index + 1, [], 0
        if not is_jsonl:
            group.append(file)
            size += file.size
            continue
        buffer, line, cost = bytearray(), 1, 0
        for block, read in _blocks(file.path, min(shard_bytes, 1 << 18)):
            buffer += block
            cost += read
            if len(buffer) >= shard_bytes and b"\n" in block:
                end = buffer.rindex(b"\n") + 1
                yield _Shard(index, cost, (file,), bytes(buffer[:end]), line)
                index, line, cost = index + 1, line + buffer.count(b"\n", 0, end), 0
                del buffer[:end]
        if buffer:
            yield _Shard(index, cost, (file,), bytes(buffer), line)
            index += 1
    if group:
        yield _Shard(index, size, tuple(group))


def _decode(data: bytes) -> tuple[str, str]:
    try:
        return data.decode(), ""
    except UnicodeDecodeError:
        return data.decode(errors="replace"), "replaced"


def _documents(
    shard: _Shard, key: str, want: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, str, str]]:
    """(name, text, note) of the documents that ``want(name)``; note is "", "replaced", "empty" or "binary".

    Blank lines are no documents, a binary one has the text "". Raises ValueError, naming file and line, where
    a line is not a JSON object with a string under ``key``.
    """
    if shard.data is None:
        for file in filter(lambda file: want(file.name), shard.files):
            text, note = _decode(Path(file.path).read_bytes())
            note = "binary" if "\0" in text else note if text.strip() else "empty"
            yield file.name, "" if note == "binary" else text, note
        return
    for number, line in enumerate(shard.data.split(b"\n"), shard.first_line):
        if not line.strip() or not want(name := f"{shard.files[0].name}:{number}"):
            continue
        where = f"{shard.files[0].path}:{number}"
        decoded, note = _decode(line)
        try:
            text = json.loads(decoded)[key]
            text.encode()
        except UnicodeEncodeError:  # JSON can spell a lone surrogate, UTF-8 cannot
            text, note = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), "replaced"
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{where}: no text under the key {key!r} (--text-key): {decoded[:80]}") from None
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        yield name, text, note if text.strip() else "empty"


def _train_tokenizer(files: Sequence[_File], folder: Path, size: int, sample_bytes: int, job: _Job) -> None:
    """Train a byte-level BPE of ``size`` entries into ``folder``; held-out documents are not read.

    The sample is the ``sample_bytes`` of text that come first when documents are ordered by hash.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    sample: list[tuple[int, str, str, int]] = []  # a heap, the last document of the order on top
    total, limit = 0, 2**64

    def want(name: str) -> bool:
        return _rank("sample", job.seed, name) < limit and not job.is_valid(name)

    for shard in _shards(files, 1 << 20):
        for name, text, _ in _documents(shard, job.text_key, want):
            length = len(text.encode()) if text.strip() else 0
            heapq.heappush(sample, (-_rank("sample", job.seed, name), name, text, length))
            total += length
            while total - sample[0][3] >= sample_bytes:
                total -= heapq.heappop(sample)[3]
            limit = -sample[0][0] if total >= sample_bytes else limit
    texts = [text for _, _, text, _ in sorted(sample, reverse=True)]
    if not total:
        raise ValueError("there is no text to train a tokenizer on")
    if total > sample_bytes:
        texts[-1] = texts[-1].encode()[: sample_bytes - total].decode(errors="ignore")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [EOD], "initial_alphabet": alphabet, "show_progress": False}
    texts = [LONG_WORD.sub(r"\g<0>\n", text) for text in texts]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    folder.mkdir(exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD}
    _write_json(folder / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})
    tokenizer.save(str(folder / "tmp"))
    os.replace(folder / "tmp", folder / "tokenizer.json")


def _tokenizer_file(path: str | Path) -> Path:
    return Path(path, "tokenizer.json") if os.path.isdir(path) else Path(path)


def _load_tokenizer(file: Path) -> Any:
    """The tokenizer, set to encode all of a text and nothing else. Raises OSError or ValueError."""
    from tokenizers import Tokenizer

    content = file.read_text("utf-8")
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # noqa: BLE001, the library raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer.json that tokenizers can load: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text must not end the document
    return tokenizer


def _find_eod(tokenizer: Any, file: Path, eod: str | None) -> tuple[str, int]:
    """Token and id: ``eod``, else eos_token of tokenizer_config.json beside ``file``, else ValueError."""
    if eod is None:
        eos = _read_json(file.with_name("tokenizer_config.json")).get("eos_token")
        eod = eos.get("content") if isinstance(eos, dict) else eos
    if not eod:
        raise ValueError(f"{file}: no eos_token in a tokenizer_config.json beside it; use --eod TOKEN")
    if (number := tokenizer.token_to_id(eod)) is None:
        raise ValueError(f"{file}: the end-of-document token {eod!r} is not in the vocabulary")
    return eod, number


def _start_worker(job: _Job) -> None:
    """Runs once in each worker and loads the tokenizer there, so forked and spawned workers are alike."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()  # if it is killed, the workers go too
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = (_load_tokenizer(Path(job.tokenizer)), job)


def _encode_shard(shard: _Shard) -> list[_Tokens]:
    """For each of SPLITS: tokens [T], EODs included; document lengths int64[D], which sum to T; counts."""
    tokenizer, job = _worker
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    documents: list[list[np.ndarray]] = [[], []]
    counts = [Counter(dict.fromkeys(COUNTED, 0)) for _ in SPLITS]
    for name, text, note in _documents(shard, job.text_key):
        split = int(job.is_valid(name))
        ids = encode([text], add_special_tokens=False)[0].ids if text.strip() else []
        if ids:
            documents[split].append(np.array([*ids, job.eod], dtype=job.dtype))
            counts[split].update(replaced=int(note == "replaced"), eod_in_text=int(job.eod in ids))
        else:
            counts[split]["binary" if note == "binary" else "empty"] += 1
    results: list[_Tokens] = []
    for arrays, count in zip(documents, counts, strict=True):
        tokens = np.concatenate([np.empty(0, job.dtype), *arrays])
        count.update(bytes=tokens.nbytes, max_token_id=int(tokens.max(initial=0)))
        results.append((tokens, np.array([len(array) for array in arrays], dtype=np.int64), dict(count)))
    return results


def _write_part(parts: Path, index: int, results: list[_Tokens]) -> None:
    """Write one shard. Its .json comes last, by a rename: only with it is the shard finished."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for split, (tokens, lengths, _) in zip(SPLITS, results, strict=True):
        if len(lengths):
            builder = IndexedDatasetBuilder(f"{parts}/{index}{split}.bin", dtype=tokens.dtype.type)
            for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                builder.add_document(tokens[end - length : end], [length])
            builder.finalize(f"{parts}/{index}{split}.idx")
    _write_json(parts / f"{index}.json", [counts for _, _, counts in results])


def _encode_all(shards: Iterator[_Shard], parts: Path, pool: Any, ahead: int, total: int, quiet: bool) -> int:
    """Tokenize the unfinished shards, ``ahead`` at a time, into ``parts``; returns the number of all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    last, count, reused = time.monotonic(), 0, 0
    pending: deque[tuple[int, int, Any]] = deque()
    columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
    task = bar.add_task("", total=total)
    pool.submit(os.getpid).result()  # a forking pool forks now, before the bar starts its thread
    with bar:
        for shard in itertools.chain(shards, [None]):
            if shard and (parts / f"{shard.index}.json").exists():
                bar.advance(task, shard.cost)
                reused += 1
            elif shard:
                pending.append((shard.index, shard.cost, pool.submit(_encode_shard, shard)))
            count += shard is not None
            while pending and (shard is None or len(pending) > ahead):
                index, cost, future = pending.popleft()
                _write_part(parts, index, future.result())
                bar.advance(task, cost)
                if bar.disable and not quiet and time.monotonic() - last >= 10:
                    last = time.monotonic()
                    _say(f"{bar.tasks[0].completed / 1e6:.0f} of {total / 1e6:.0f} MB of input")
    if reused and not quiet:
        _say(f"{reused} of {count} shards were finished by an earlier run")
    return count


def _join_parts(parts: Path, shards: int, split: str, dtype: type) -> dict[str, Any]:
    """Join one split's parts into ``parts``/joined.bin and .idx; returns its counts or raises ValueError."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder, total, top = IndexedDatasetBuilder(f"{parts}/joined{split}.bin", dtype=dtype), Counter[str](), 0
    gc.freeze()  # add_index collects garbage each time: let it not walk through all of torch
    for index in range(shards):
        record = _read_json(parts / f"{index}.json")[SPLITS.index(split)]
        top = max(top, record.pop("max_token_id"))
        total.update(record)
        if record["bytes"]:
            builder.add_index(f"{parts}/{index}{split}")
    gc.unfreeze()
    lengths = np.array(builder.sequence_lengths, dtype=np.int64)
    if not lengths.size:
        left_out = ", ".join(f"{total[key]} {key}" for key in ("empty", "binary"))
        raise ValueError(f"no document in the {'held-out' if split else 'training'} split ({left_out})")
    builder.finalize(f"{parts}/joined{split}.idx")
    size = os.path.getsize(f"{parts}/joined{split}.bin")
    if not lengths.sum() * np.dtype(dtype).itemsize == size == total["bytes"]:
        raise ValueError(f"{parts} is damaged ({size} bytes, not {total['bytes']}): delete it, run again")
    counts = {"documents": lengths.size, "tokens": int(lengths.sum()), "longest_document": int(lengths.max())}
    counts |= {f"length_p{q}": int(np.percentile(lengths, q, method="nearest")) for q in (50, 90, 99)}
    return counts | {"max_token_id": top, "bytes": size} | {f"{key}_documents": total[key] for key in COUNTED}


def _is_current(prefix: Path, splits: Sequence[str], digest: str) -> bool:
    """Whether PREFIX is whole, was made from these settings, and its tokenizer is unchanged."""
    for path in (f"{prefix}{split}" for split in splits):
        meta = _read_json(f"{path}.json")
        if meta.get("settings") != digest or not os.path.exists(f"{path}.idx"):
            return False
        tokenizer = _tokenizer_file(prefix.parent / meta["tokenizer"])
        if not tokenizer.exists() or _sha256(tokenizer) != meta["tokenizer_sha256"]:
            return False
        if not os.path.exists(f"{path}.bin") or os.path.getsize(f"{path}.bin") != meta["bytes"]:
            return False
    return True


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
    Raises ValueError or OSError with a message for the user.
    """
    if (train_tokenizer is None) == (tokenizer is None):
        raise ValueError("give either a vocabulary size to train a tokenizer or an existing tokenizer")
    if train_tokenizer is not None and (train_tokenizer < 257 or eod is not None):
        raise ValueError(f"a trained tokenizer has 257 entries or more, not {train_tokenizer}, and EOD {EOD}")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction {valid_fraction} is not in [0, 1)")
    files = _list_files(inputs := [str(source) for source in inputs], globs or GLOBS.split())
    size = sum(file.size for file in files)
    shard_bytes = shard_bytes or min(max(size // 256, 1 << 20), 32 << 20)
    prefix, parts = Path(output).absolute(), Path(f"{output}.parts").absolute()
    splits = SPLITS if valid_fraction else SPLITS[:1]
    file, origin = parts / "tokenizer" / "tokenizer.json", [train_tokenizer, tokenizer_bytes]
    if tokenizer is not None:
        file = _tokenizer_file(tokenizer).absolute()
        origin = [*_find_eod(_load_tokenizer(file), file, eod), _sha256(file)]
    facts = [FORMAT, [f[:1] + f[2:] for f in files], origin, text_key, valid_fraction, seed, shard_bytes]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if not overwrite and _is_current(prefix, splits, digest):
        if not quiet:
            _say(f"{output} is up to date")
        return _read_json(f"{prefix}.json")
    resumed = _read_json(parts / "settings.json") == digest
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
            if (parts / "settings.json").exists() and not quiet:
                _say(f"discarding {parts}: it holds an unfinished run with other settings or inputs")
            for path in [path for path in parts.iterdir() if path.name != "lock"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            _write_json(parts / "settings.json", digest)
        job, final = _Job(str(file), 0, "", text_key, valid_fraction, seed), file
        if tokenizer is None:
            if not file.exists():
                _train_tokenizer(files, file.parent, train_tokenizer, tokenizer_bytes, job)
            final = prefix.parent / "tokenizer" / "tokenizer.json"
            if final.exists() and not overwrite and _sha256(final) != _sha256(file):
                raise FileExistsError(f"{final} is another dataset's: change the folder or --overwrite")
        loaded, checksum = _load_tokenizer(file), _sha256(file)
        token, number = _find_eod(loaded, file, eod)
        vocab_size = max(loaded.get_vocab().values()) + 1
        dtype = DType.optimal_dtype(vocab_size)
        job = job._replace(eod=number, dtype=dtype.__name__)
        workers = workers or len(os.sched_getaffinity(0))
        context = multiprocessing.get_context(start_method)
        pool = ProcessPoolExecutor(workers, context, _start_worker, (job,))
        try:
            shards = _encode_all(_shards(files, shard_bytes), parts, pool, workers + 1, size, quiet)
        finally:
            pool.shutdown(cancel_futures=True)
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
            "eod_token": token,
            "eod_id": number,
            "dtype": dtype.__name__,
            "vocab_size": vocab_size,
        }
        metas = [{"split": s[1:] or "train"} | made | _join_parts(parts, shards, s, dtype) for s in splits]

        for path in existing:
            path.unlink(missing_ok=True)
        if tokenizer is None:
            final.parent.mkdir(exist_ok=True)
            for name in ("tokenizer_config.json", "tokenizer.json"):
                os.replace(file.with_name(name), final.with_name(name))
        for split, meta in zip(splits, metas, strict=True):
            os.replace(parts / f"joined{split}.bin", f"{prefix}{split}.bin")
            _write_json(f"{prefix}{split}.json", meta)
        for split in reversed(splits):
            os.replace(parts / f"joined{split}.idx", f"{prefix}{split}.idx")
        shutil.rmtree(parts)
    return metas[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``exact-megatron prepare``."""
    add, which = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("inputs", nargs="+", help="text file, folder, .jsonl[.gz|.zst], or stdlib: Python's own library")
    add("--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx and PREFIX.json")
    which.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or a folder that holds one")
    text = "train a byte-level BPE of this size and save it in tokenizer/ beside PREFIX"
    which.add_argument("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help=text)
    add("--tokenizer-bytes", type=int, default=32 << 20, help="text to train on (default: %(default)s)")
    add("--eod", metavar="TOKEN", help="end of document (default: eos_token of tokenizer_config.json)")
    add("--text-key", default="text", help="key of the text in a JSONL line (default: %(default)s)")
    add("--glob", action="append", dest="globs", help=f"files of a folder, repeatable (default: {GLOBS})")
    add("--valid-fraction", type=float, default=0.0, help="share of documents held out in PREFIX_valid")
    add("--seed", type=int, default=0, help="picks held-out documents and the sample for the tokenizer")
    add("--workers", type=int, help="processes (default: the CPUs at hand); the output does not depend on it")
    add("--shard-bytes", type=int, help="input per unit of work and resume (default: 1 to 32 MiB, by size)")
    add("--overwrite", action="store_true", help="replace PREFIX, even if it is up to date")


def run(args: argparse.Namespace) -> int:
    """Run ``exact-megatron prepare``: 0 done or up to date, 2 an error (printed), 130 interrupted."""
    from rich.console import Console
    from rich.table import Table

    options = {key: value for key, value in vars(args).items() if key in prepare.__kwdefaults__}
    try:
        metas = [prepare(args.inputs, args.output, **options)]
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the finished shards")
        return 130
    except (OSError, ValueError, BrokenProcessPool) as error:  # the last: a worker was killed, for memory say
        _say(f"error: {error}")
        return 2
    metas += [_read_json(f"{args.output}_valid.json")] if args.valid_fraction else []
    table = Table(args.output, *(meta["split"] for meta in metas))
    shown = itertools.dropwhile(lambda key: key != "dtype", metas[0])  # from there on facts and counts
    for key in shown:
        table.add_row(key, *(f"{v:,}" if isinstance(v := meta[key], int) else str(v) for meta in metas))
    Console().print(table)
    return 0
