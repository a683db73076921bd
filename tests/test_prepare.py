"""exact_megatron.prepare against the stock reader: what goes in comes out, whatever happens on the way."""

import argparse
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from exact_megatron import prepare as room
from exact_megatron import tokenizer as tokenizer_module

IndexedDataset = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDataset
tokenizers = pytest.importorskip("tokenizers")
zstandard = pytest.importorskip("zstandard")

TEXTS = [f"Document {i}: {'naïve café 語 ' * (i % 7)}line\r\n\tend {i * i}\n" for i in range(60)]


def prepare(inputs, output, **options):
    if "tokenizer" not in options:
        options.setdefault("train_tokenizer", 300)
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    return room.prepare(inputs, str(output), **{"workers": 2, "quiet": True, **options})


def documents(prefix):
    """The texts of a dataset, after checking that each sequence is one document and ends in its only EOD."""
    meta = json.loads(Path(f"{prefix}.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(prefix).parent / meta["tokenizer"] / "tokenizer.json"))
    data = IndexedDataset(str(prefix))
    rows = [data[i] for i in range(len(data))]
    assert list(data.document_indices) == list(range(len(data) + 1))
    assert all(row[-1] == meta["eod_id"] and (row == meta["eod_id"]).sum() == 1 for row in rows)
    assert meta["documents"] == len(rows) and meta["tokens"] == sum(map(len, rows))
    assert meta["longest_document"] == max(map(len, rows)) and meta["max_token_id"] == max(map(np.max, rows))
    assert {row.dtype.name for row in rows} == {meta["dtype"]}
    return [tokenizer.decode(row[:-1].tolist(), skip_special_tokens=False) for row in rows]


def write_jsonl(path, texts, key="text", **more):
    data = "".join(json.dumps({key: text, **more}) + "\n" for text in texts).encode()
    half = data.index(b"\n", len(data) // 2) + 1 if texts else 0
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix)
    # two members, as parallel compressors write them
    path.write_bytes(pack(data[:half]) + pack(data[half:]) if pack else data)
    return path


def read_all(prefix):
    paths = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}*.*"))
    return {path.name: path.read_bytes() for path in paths if path.suffix in (".bin", ".idx")}


def raises(error, *words):
    return pytest.raises(error, match=".*".join(map(str, words)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz"])
@pytest.mark.parametrize("shard_bytes", [100, None], ids=["many-shards", "one-shard"])
def test_jsonl_round_trip(tmp_path, name, shard_bytes):
    path = write_jsonl(tmp_path / name, TEXTS, key="content", score=1)
    prepare(path, tmp_path / "out", text_key="content", shard_bytes=shard_bytes)
    assert documents(tmp_path / "out") == TEXTS
    assert not (tmp_path / "out.parts").exists()


def test_folder_and_file(tmp_path):
    folder = tmp_path / "code"
    for name, text in {
        "b.py": "b = 1\n",
        "a/z.md": "# z",
        "a.txt": "a",
        "x.log": "no",
        ".git/c.py": "no",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    prepare([folder, folder / "x.log"], tmp_path / "out")
    assert documents(tmp_path / "out") == ["a", "# z", "b = 1\n", "no"]
    prepare(folder, tmp_path / "logs", globs=["*.log"], overwrite=True)
    assert documents(tmp_path / "logs") == ["no"]
    write_jsonl(folder / "rows.jsonl.zst", TEXTS[:3])
    prepare(folder, tmp_path / "rows", globs=["*.jsonl.zst", "a/*"], overwrite=True)
    assert documents(tmp_path / "rows") == ["# z", *TEXTS[:3]]


def test_stdlib(tmp_path, monkeypatch):
    for name in (
        "os.py",
        "json/tool.py",
        "test/test_os.py",
        "unittest/test/x.py",
        "site-packages/y.py",
        "z.txt",
    ):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.__getitem__)
    meta = prepare("stdlib", tmp_path / "out")
    assert documents(tmp_path / "out") == ["json/tool.py", "os.py"]
    assert meta["sources"] == ["stdlib"]


def test_left_out_and_replaced_documents_are_counted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    files = {"a.txt": b"fine", "b.txt": b"caf\xe9", "c.txt": b"bin\0ary", "d.txt": b"", "e.txt": b" \n"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    meta = prepare(folder, tmp_path / "out")
    assert documents(tmp_path / "out") == ["fine", "caf\ufffd"]
    assert [meta[f"{key}_documents"] for key in ("replaced", "binary", "empty")] == [1, 1, 2]
    lines = b'{"text": "ok"}\n\n  \n{"text": ""}\n{"text": "caf\xe9"}\r\n{"text": "x\\ud800y \\ud83d\\ude00"}'
    (tmp_path / "b.jsonl").write_bytes(lines)
    meta = prepare(tmp_path / "b.jsonl", tmp_path / "out2", overwrite=True)
    assert documents(tmp_path / "out2") == ["ok", "caf\ufffd", "x\ufffdy \U0001f600"]
    assert [meta[f"{key}_documents"] for key in ("replaced", "binary", "empty")] == [2, 0, 1]


def test_special_token_in_a_text_is_text(tmp_path):
    texts = ["before <|endoftext|> after", "<|endoftext|>"]
    meta = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out")
    assert documents(tmp_path / "out") == texts
    assert meta["eod_in_text_documents"] == 0


def test_documents_longer_than_a_shard_and_a_block(tmp_path):
    texts = ["x y " * 100_000, "short", "".join(map(chr, range(0x4E00, 0x9000))) * 8, "end"]
    (tmp_path / "long.txt").write_text(texts[0])
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare([tmp_path / "long.txt", path], tmp_path / "out", shard_bytes=1000)
    assert documents(tmp_path / "out") == [texts[0], *texts]


def test_workers_and_start_method_do_not_change_the_bytes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    runs = [(1, "fork"), (3, "fork"), (3, "fork"), (2, "spawn")]
    results = []
    for number, (workers, start) in enumerate(runs):
        prefix = tmp_path / str(number) / "out"
        options = {"valid_fraction": 0.3, "shard_bytes": 300, "tokenizer_bytes": 1000}
        prepare(path, prefix, workers=workers, start_method=start, **options)
        tokenizer = (prefix.parent / "tokenizer" / "tokenizer.json").read_bytes()
        results.append((read_all(prefix), tokenizer, Path(f"{prefix}.json").read_bytes()))
    assert all(result == results[0] for result in results[1:])
    assert set(results[0][0]) == {"out.bin", "out.idx", "out_valid.bin", "out_valid.idx"}


def kill_after_two_parts(path, output):
    write_part, written = room._write_part, []

    def write_and_kill(*args):
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write_part(*args)
        written.append(args[1])

    room._write_part = write_and_kill
    prepare(path, output, shard_bytes=300)


def test_killed_run_is_resumed(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(path, tmp_path / "whole" / "out", shard_bytes=300)
    output = tmp_path / "killed" / "out"
    process = multiprocessing.get_context("fork").Process(target=kill_after_two_parts, args=(path, output))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(p.name for p in output.parent.iterdir()) == ["out.parts"]
    parts = tmp_path / "killed" / "out.parts"
    assert {p.name for p in parts.glob("[0-9]*.json")} == {"0.json", "1.json"}

    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    write_part, written = room._write_part, []
    monkeypatch.setattr(room, "_write_part", lambda *args: (written.append(args[1]), write_part(*args)))
    prepare(path, output, shard_bytes=300)
    assert written[0] == 2 and written == list(range(2, 2 + len(written)))
    assert read_all(output) == read_all(tmp_path / "whole" / "out")

    written.clear()  # other settings: the parts are of no use
    prepare(path, tmp_path / "other" / "out", shard_bytes=300, train_tokenizer=280)
    assert written[0] == 0
    assert documents(tmp_path / "other" / "out") == TEXTS


@pytest.mark.parametrize("victim", ["out_valid.idx", "out.json", "out.bin"])
def test_kill_while_publishing_leaves_no_index_and_is_resumed(tmp_path, monkeypatch, victim):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options = {"valid_fraction": 0.3}
    replace = os.replace

    def stop(source, target):
        if Path(target).name == victim:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(path, tmp_path / "a" / "out", **options)
    assert not list((tmp_path / "a").glob("*.idx"))
    prepare(path, tmp_path / "a" / "out", **options)
    prepare(path, tmp_path / "b" / "out", **options)
    assert read_all(tmp_path / "a" / "out") == read_all(tmp_path / "b" / "out")


def test_up_to_date_other_settings_and_overwrite(tmp_path, monkeypatch, capsys):
    path, output = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    first = prepare(path, output)
    with monkeypatch.context() as patch:
        patch.setattr(room, "_encode_all", None)  # any work would fail
        assert prepare(path, output, quiet=False, workers=1) == first
        assert "up to date" in capsys.readouterr().err
    with raises(FileExistsError, "out.idx", "--overwrite"):
        prepare(path, output, valid_fraction=0.5)
    prepare(path, output, valid_fraction=0.5, overwrite=True)
    assert sorted(documents(output) + documents(f"{output}_valid")) == sorted(TEXTS)
    prepare(path, output, overwrite=True)
    assert not list(tmp_path.glob("out_valid*"))  # nothing stale beside the new dataset
    write_jsonl(path, TEXTS[:9])
    with raises(FileExistsError, "out.idx"):  # the input has changed
        prepare(path, output)
    prepare(path, output, overwrite=True)
    assert documents(output) == TEXTS[:9]
    (tmp_path / "out.bin").write_bytes(b"cut")
    with raises(FileExistsError, "out.idx"):  # and so has the output
        prepare(path, output)


def test_second_process_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        room.train_bpe = lambda *args, **kwargs: (ready.set(), done.wait(20), os._exit(0))
        prepare(path, tmp_path / "out")

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(20)
    with raises(FileExistsError, "another process", "out.parts"):
        prepare(path, tmp_path / "out")
    done.set()
    process.join()
    prepare(path, tmp_path / "out")
    assert documents(tmp_path / "out") == TEXTS


def test_valid_split_is_disjoint_complete_and_stable(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    splits = []
    for seed, shard_bytes in [(0, 300), (0, None), (1, 300)]:
        output = tmp_path / f"{seed}{shard_bytes}" / "out"
        prepare(path, output, valid_fraction=0.25, seed=seed, shard_bytes=shard_bytes)
        train, valid = documents(output), documents(f"{output}_valid")
        assert sorted(train + valid) == sorted(TEXTS) and 5 <= len(valid) <= 25
        assert train == [text for text in TEXTS if text in train]
        splits.append(valid)
    assert splits[0] == splits[1] != splits[2]
    more = [*TEXTS, "one more"]  # documents keep their side when the corpus grows
    prepare(write_jsonl(path, more), tmp_path / "more" / "out", valid_fraction=0.25)
    assert set(splits[0]) <= set(documents(tmp_path / "more" / "out_valid"))


def save_tokenizer(folder, extra_words=0, config=None, mutate=lambda tokenizer: None):
    words = {word: i for i, word in enumerate(["[UNK]", "</s>", "a", "b", *map(str, range(extra_words))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    mutate(tokenizer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>"}], ids=["string", "object"])
@pytest.mark.parametrize(("size", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_existing_tokenizer_and_dtype(tmp_path, eos, size, dtype):
    def mutate(tokenizer):  # what published tokenizers carry, and what must not reach the data
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=9)
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", 1)]
        )

    folder = save_tokenizer(tmp_path / "tok", size - 4, {"eos_token": eos}, mutate)
    path = write_jsonl(tmp_path / "a.jsonl", ["a b a b", f"b {size - 5}"])
    meta = prepare(path, tmp_path / "data" / "out", tokenizer=folder)
    data = IndexedDataset(str(tmp_path / "data" / "out"))
    assert [data[i].tolist() for i in range(len(data))] == [[2, 3, 2, 3, 1], [3, size - 1, 1]]
    assert meta["dtype"] == dtype == data[0].dtype.name
    assert (meta["vocab_size"], meta["max_token_id"], meta["eod_id"]) == (size, size - 1, 1)
    assert meta["tokenizer"] == os.path.join("..", "tok")
    assert not (tmp_path / "data" / "tokenizer").exists()


def test_eod_option_and_tokenizer_errors(tmp_path):
    path, output = write_jsonl(tmp_path / "a.jsonl", ["a b"]), tmp_path / "out"
    bare = save_tokenizer(tmp_path / "bare")
    with raises(ValueError, "eos_token", "--eod"):
        prepare(path, output, tokenizer=bare)
    with raises(ValueError, "'<eod>'", "not in the vocabulary"):
        prepare(path, output, tokenizer=bare, eod="<eod>")
    with raises(OSError, "no-such"):
        prepare(path, output, tokenizer=tmp_path / "no-such")
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with raises(ValueError, "bad.json", "not a tokenizer.json"):
        prepare(path, output, tokenizer=tmp_path / "bad.json")
    with raises(ValueError, "either"):
        prepare(path, output, tokenizer=bare, train_tokenizer=300)
    assert not list(tmp_path.glob("out*"))
    assert prepare(path, output, tokenizer=bare / "tokenizer.json", eod="b")["eod_in_text_documents"] == 1


def test_input_errors(tmp_path):
    output = tmp_path / "out"
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenizer = save_tokenizer(tmp_path / "tok", config={"eos_token": "</s>"})
    bad = {"{oops": "not valid JSON", '{"body": "x"}': "'text'", "[1]": "'text'", '{"text": null}': "'text'"}
    for line, message in bad.items():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:41]) + line + "\n")
        with raises(ValueError, "a.jsonl:42:", message):  # found by a worker
            prepare(path, output, shard_bytes=300, tokenizer=tokenizer)
        with raises(ValueError, "a.jsonl:42:", message):  # found while sampling for the tokenizer
            prepare(path, output)
    with raises(FileNotFoundError, "nowhere"):
        prepare("nowhere", output)
    (tmp_path / "empty").mkdir()
    with raises(ValueError, "empty", "--glob", "txt"):
        prepare(tmp_path / "empty", output)
    (tmp_path / "empty" / "a.txt").write_text(" ")
    with raises(ValueError, "no text"):
        prepare(tmp_path / "empty", output)
    with raises(ValueError, "held-out split"):
        prepare(write_jsonl(path, TEXTS[:2]), output, valid_fraction=1e-9)
    for name in ("b.jsonl.gz", "b.jsonl.zst"):
        cut = write_jsonl(tmp_path / name, [os.urandom(9999).hex()] * 2)
        cut.write_bytes(cut.read_bytes()[:-5])
        with raises(ValueError, name, "cut off"):
            prepare(cut, output)
        cut.write_bytes(b"not compressed")
        with raises(ValueError, name, "damaged"):
            prepare(cut, output)
    assert not list(tmp_path.glob("out.[bi]*"))


def test_tokenizer_folder_is_not_taken_from_another_dataset(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(path, tmp_path / "one")
    prepare(path, tmp_path / "two", shard_bytes=300)  # the same tokenizer is shared
    with raises(FileExistsError, "tokenizer", "another dataset"):
        prepare(path, tmp_path / "three", train_tokenizer=290)


def test_trained_tokenizer_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    meta = prepare(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert (len(loaded), loaded.eos_token_id) == (meta["vocab_size"], meta["eod_id"])
    data = IndexedDataset(str(tmp_path / "out"))  # kept: its rows are views of a mapping that goes with it
    row = data[7].tolist()
    assert loaded(TEXTS[7], add_special_tokens=False)["input_ids"] == row[:-1]
    assert loaded.decode(row[:-1]) == TEXTS[7]


def test_tokenizer_sample_is_bounded_and_leaves_out_held_out_documents(tmp_path, monkeypatch):
    seen = []
    recorder = argparse.Namespace(sub=lambda _, text: seen.append(text) or text)
    monkeypatch.setattr(tokenizer_module, "LONG_WORD", recorder)  # every training text goes through it
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(path, tmp_path / "out", tokenizer_bytes=1000, valid_fraction=0.25)
    monkeypatch.undo()
    assert sum(len(text.encode()) for text in seen) in range(998, 1001)  # a character may be cut
    prepare(path, tmp_path / "all" / "out", valid_fraction=0.25)
    train_texts = documents(tmp_path / "all" / "out")
    assert set(seen[:-1]) <= set(train_texts) and len(seen) > 10
    assert max(TEXTS.index(text) for text in seen[:-1]) > 40  # from all over the corpus


def test_command_line(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    room.add_arguments(parser)
    path, output = write_jsonl(tmp_path / "a.jsonl", TEXTS), str(tmp_path / "out")
    command = [
        str(path),
        "--output",
        output,
        "--train-tokenizer",
        "300",
        "--valid-fraction",
        "0.2",
        "--workers",
        "1",
    ]
    assert room.run(parser.parse_args(command)) == 0
    assert "documents" in capsys.readouterr().out
    assert room.run(parser.parse_args([*command, "--seed", "3"])) == 2
    assert "out.idx exists" in capsys.readouterr().err
    assert room.run(parser.parse_args([*command, "--seed", "3", "--overwrite"])) == 0
    assert sorted(documents(output) + documents(f"{output}_valid")) == sorted(TEXTS)
    with pytest.raises(SystemExit):
        parser.parse_args([str(path), "--output", output])
