"""exact_megatron.prepare.prepare against the stock reader: what goes in comes out, whatever happens on the way."""

import argparse
import bz2
import codecs
import errno
import gzip
import json
import lzma
import multiprocessing
import os
import shutil
import signal
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from exact_megatron.prepare import command as options
from exact_megatron.prepare import encode, formats
from exact_megatron.prepare import files as input_files
from exact_megatron.prepare import prepare as room
from exact_megatron.prepare import shards as input_shards
from exact_megatron.prepare import tokenizer as tokenizer_module
from exact_megatron.utils.tokenizer import identity, load_tokenizer

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


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.ZstdCompressor().compress}


def write_jsonl(path, texts, key="text", **more):
    data = "".join(json.dumps({key: text, **more}) + "\n" for text in texts).encode()
    half = data.index(b"\n", len(data) // 2) + 1 if texts else 0
    pack = PACK.get(path.suffix.lower())
    # two members, as parallel compressors write them
    path.write_bytes(pack(data[:half]) + pack(data[half:]) if pack else data)
    return path


def read_all(prefix):
    paths = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}*.*"))
    return {path.name: path.read_bytes() for path in paths if path.suffix in (".bin", ".idx")}


def raises(error, *words):
    return pytest.raises(error, match=".*".join(map(str, words)))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson.gz", "a.Jsonl.XZ", "a.jsonl.bz2", "a.jsonl.zst", "a.json.gz"]
)
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


JSON = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(JSON),
        json.dumps(JSON, indent=1),
        "\n\n".join(json.dumps(record, indent=2) for record in JSON),
        "\ufeff" + "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in JSON),
        "\n \n" + json.dumps(JSON[0]) + "\n" + json.dumps(JSON[1:])[1:-1].replace("}, {", "}\n{"),
    ],
    ids=["array", "indented-array", "objects", "lines-with-a-mark", "lines"],
)
def test_json_is_read_by_what_it_holds(tmp_path, content, block):
    path = tmp_path / "a.json"
    path.write_text(content)
    file = input_files._file("a.json", str(path), "text")
    lines = b"".join(
        line for line, _ in (formats.value_lines if file.kind == "values" else formats.utf8_blocks)(str(path), block)
    )
    shard = input_shards.Shard(1, (file,), lines)
    assert [text for _, text, _, _ in input_shards.read_documents(shard, "text")] == TEXTS
    shards = input_shards.cut_shards([file], 200)
    assert [text for shard in shards for _, text, *_ in input_shards.read_documents(shard, "text")] == TEXTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"}', "object 3: the array has no end"),
        ('[{"text": "a"}, {"text": "b', "object 2: not valid JSON, or cut off"),
        ('[{"text": "a"}, {text: "b"}' + " " * 99 + "]", "object 2: not valid JSON: Expecting property name"),
        ('[{"text": "a"}]  {"text": "b"}' + " " * 99, "object 2: not valid JSON: text after the end"),
        ('{\n"text": "a"}\n{"text"', "object 2: not valid JSON, or cut off"),
        ('["a"]', "object 1: not a JSON object"),
        ("[" * 100_000, "object 1: not valid JSON"),
        ('{"text": "a"}\n{"text": 1e5}', ":2: 'text' .* holds 100000.0"),
    ],
)
def test_json_that_is_not(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with raises(ValueError, "a.json", message):
        for shard in input_shards.cut_shards([input_files._file("a.json", str(path), "text")], 1 << 20):
            list(input_shards.read_documents(shard, "text"))


RECORDS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize(
    "name, data",
    [
        ("x.jsonlines", RECORDS),
        ("x.JL", RECORDS),
        ("x", RECORDS),
        ("x.txt", codecs.BOM_UTF8 + b"\n" + RECORDS),
        ("x.txt.gz", gzip.compress(RECORDS)),
        ("x.gz", gzip.compress(RECORDS)),
        ("x.data", json.dumps([json.loads(line) for line in RECORDS.splitlines()], indent=1).encode()),
    ],
)
def test_json_records_under_another_name_are_records(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    files, _ = input_files.list_files([str(tmp_path / name)])
    assert [
        text
        for shard in input_shards.cut_shards(files, 999)
        for _, text, *_ in input_shards.read_documents(shard, "text")
    ] == TEXTS


@pytest.mark.parametrize(
    "text",
    ["[1] A list\n[2] of references\n", "{} x\n{}\n", '{"a": 1}\nsome words\n{"b": 2}\n', "[1, 2]\n[3]\n", "{", "["]
    + ['{"a": 1}\n\n{"b": 2', '[{"a": 1}, "b"]', '["a", "b"]', "[]", '[{"a": 1}] and more', '{"a": 1} {"b": 2} [3]'],
)
def test_text_that_begins_like_json_is_a_document(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    files, _ = input_files.list_files([str(tmp_path / "a.txt")])
    (shard,) = input_shards.cut_shards(files, 1 << 20)
    assert [found[1] for found in input_shards.read_documents(shard, "text")] == [text]


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md.gz"])
@pytest.mark.parametrize(
    "text",
    ['{"content": "x"}\n{"content": "y"}\n', '{"content": "x"}', '[{"content": "x"}, {"text": "y"}]']
    + ['{\n "content": "x"\n}\n{\n "content": "y"\n}\n', '\ufeff [\n{"content": {"text": "x"}}]\n'],
)
def test_records_of_another_key_are_named(tmp_path, name, text):
    (tmp_path / name).write_bytes(PACK.get(Path(name).suffix, bytes)(text.encode()))
    files, _ = input_files.list_files([str(tmp_path / name)])
    (shard,) = input_shards.cut_shards(files, 1 << 20)
    first, *more = input_shards.read_documents(shard, "text")
    assert first[1:3] == ("", "empty") and first[3].reason == "no 'text' (--text-key)"
    assert first[3].first.endswith("1, which has 'content'") and first[3].path == str(tmp_path / name)
    assert [found[1] for found in more] in ([], [""], ["y"])


def test_records_of_another_key_alone_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_text('{"content": "x"}\n')
    with raises(ValueError, "no 'text' .--text-key.", "which has 'content'"):
        prepare(
            tmp_path / "a.txt",
            tmp_path / "out",
            tokenizer=save_tokenizer(tmp_path / "tok", config={"eos_token": "</s>"}),
        )


def read_lines(path, content):
    path.write_text(content)
    (shard,) = input_shards.cut_shards(input_files.list_files([str(path)])[0], 1 << 20)
    return list(input_shards.read_documents(shard, "text"))


def test_json_texts_are_treated_as_texts_of_files(tmp_path):
    path = tmp_path / "a.jsonl"
    (one, two, three) = read_lines(
        path, '{"text": "\ufeffa"}\n{"text": "b\\u0000"}\n{"x": {"text": 1, "text": 2}, "text": "c"}\n'
    )
    assert one[1:3] == ("a", "") and three[1:3] == ("c", "")
    assert two[1:] == ("", "binary", input_files.LeftOut(str(path), "binary (it holds NUL bytes)", 1, f"{path}:2"))
    with raises(ValueError, f"{path}:1", "'text' .--text-key. is given twice"):
        read_lines(path, '{"text": "a", "m": {"text": 1}, "text": "b"}')


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_under_another_name_is_named_so(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}.bak"
    path.write_bytes(PACK[suffix](b"some text"))
    (shard,) = input_shards.cut_shards(input_files.list_files([str(path)])[0], 1 << 20)
    ((*_, note, left),) = input_shards.read_documents(shard, "text")
    assert note == "binary" and left.reason == f"binary (its content is {suffix}: rename it so)"


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "in.txt").write_text("some text " * 99)
    tokenizer = save_tokenizer(tmp_path / "tok", config={"eos_token": "</s>"})
    builder = "megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder."
    for method, named in (("add_document", ".bin"), ("finalize", ".bin"), ("add_index", "joined.bin")):
        with monkeypatch.context() as patch:
            patch.setattr(builder + method, full)
            with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/out.parts/.*{named}'"):
                prepare(tmp_path / "in.txt", tmp_path / "out", tokenizer=tokenizer)


def test_long_json_values_are_scanned_in_linear_time(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 8_000_000}]))
    started = time.process_time()
    assert sum(1 for _ in formats.value_lines(str(path), 1 << 12)) == 1
    assert time.process_time() - started < 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_byte_order_marks_are_left_out(tmp_path, encoding):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "a.txt").write_bytes(mark + TEXTS[5].encode(encoding))
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in TEXTS)
    (tmp_path / "b.jsonl").write_bytes(mark + lines.encode(encoding))
    meta = prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out", shard_bytes=300)
    assert documents(tmp_path / "out") == [TEXTS[5], *TEXTS]
    assert meta["replaced_documents"] == 0


def test_utf_16_that_is_cut_is_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes("ab\ud800c".encode("utf-16", "surrogatepass") + b"x")
    meta = prepare(tmp_path / "a.txt", tmp_path / "out")
    assert documents(tmp_path / "out")[0].startswith("ab\ufffd") and meta["replaced_documents"] == 1


def test_compressed_text_is_a_document(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, (suffix, pack) in enumerate(PACK.items()):
        (folder / f"{i}.TXT{suffix}").write_bytes(pack(TEXTS[i].encode()) + b"\0" * (4 if suffix == ".xz" else 0))
    (folder / "x").write_bytes(gzip.compress(b"x"))  # no suffix: not of a folder's files
    meta = prepare(folder, tmp_path / "out")
    assert documents(tmp_path / "out") == TEXTS[: len(PACK)]
    assert len(meta["left_out"]) == 1 and "x: its suffix" in meta["left_out"][0]


def test_what_a_folder_means(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "b.JSONL.gz", TEXTS[:3])
    write_jsonl(folder / "data" / "c.json", TEXTS[3:5])
    files = {
        "README.md": "# read me",
        "LICENSE.txt": "law",
        "a.txt": "a text",
        "info.json": '{"size": 1}',
        "x.pdf": "%PDF",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a text"))
    (folder / "b.txt").write_text("b text")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"another"))
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "link").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    meta = prepare(folder, tmp_path / "out")
    assert documents(tmp_path / "out") == ["a text", "b text", "another", *TEXTS[:5]]
    reasons = {line.removeprefix(f"{folder}/").partition(": ")[0]: line for line in meta["left_out"]}
    assert reasons.keys() == {
        "README.md",
        "LICENSE.txt",
        "a.txt.gz",
        "gone.txt",
        "info.json",
        "link",
        "pipe.txt",
        "x.pdf",
    }
    for name, reason in [
        ("README.md", "beside data"),
        ("a.txt.gz", "copy of"),
        ("gone.txt", "No such file"),
        ("info.json", "'text'"),
        ("link", "link to a folder"),
        ("pipe.txt", "not a regular file"),
        ("x.pdf", "suffix"),
    ]:
        assert reason in reasons[name]
    prepare([folder / "README.md", folder], tmp_path / "named", overwrite=True)
    assert documents(tmp_path / "named")[0] == "# read me"
    prepare(folder, tmp_path / "globs", globs=["*.MD"], overwrite=True)
    assert documents(tmp_path / "globs") == ["# read me"]
    for given in ("pipe.txt", "gone.txt"):
        with raises(OSError, given, "regular file|link to nothing"):
            prepare(folder / given, tmp_path / "bad")


def test_null_and_missing_texts_are_empty(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", None, " ", "two", None])
    path.write_text(path.read_text() + '{"body": "x"}\n')
    meta = prepare(path, tmp_path / "out")
    assert documents(tmp_path / "out") == ["one", "two"] and meta["empty_documents"] == 4
    assert meta["left_out"] == [
        f"{path}: 2 records, null under 'text' (first: {path}:2)",
        f"{path}: 1 record, empty (first: {path}:3)",
        f"{path}: 1 record, no 'text' (--text-key) (first: {path}:6, which has 'body')",
    ]
    tokenizer = save_tokenizer(tmp_path / "tok", config={"eos_token": "</s>"})
    with raises(ValueError, "4 empty", "no 'key'", "which has 'text'"):
        prepare(write_jsonl(path, TEXTS[:4]), tmp_path / "none", text_key="key", tokenizer=tokenizer)


def test_many_files_of_one_reason_are_named_once(tmp_path):
    for i in range(25):
        (tmp_path / f"{i}.txt").write_text("" if i else "text")
    meta = prepare(tmp_path, tmp_path / "out")
    assert len(meta["left_out"]) == room.NAMED + 1 and meta["left_out"][-1] == "14 more files: empty"
    assert meta["empty_documents"] == 24


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
    write_part, written = encode.write_part, []

    def write_and_kill(*args):
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write_part(*args)
        written.append(args[1])

    encode.write_part = write_and_kill
    prepare(path, output, shard_bytes=300)


def test_killed_run_is_resumed(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = []
    with monkeypatch.context() as patch:
        patch.setattr(
            encode, "write_part", lambda *args, write=encode.write_part: (whole.append(args[1]), write(*args))
        )
        prepare(path, tmp_path / "whole" / "out", shard_bytes=300)
    shards = len(whole)
    output = tmp_path / "killed" / "out"
    process = multiprocessing.get_context("fork").Process(target=kill_after_two_parts, args=(path, output))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(p.name for p in output.parent.iterdir()) == ["out.parts"]
    parts = tmp_path / "killed" / "out.parts"
    assert len([p for p in parts.glob("*.json") if p.name != "settings.json"]) == 2

    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    write_part, written = encode.write_part, []
    monkeypatch.setattr(encode, "write_part", lambda *args: (written.append(args[1]), write_part(*args)))
    prepare(path, output, shard_bytes=300)
    assert len(written) == shards - 2
    assert read_all(output) == read_all(tmp_path / "whole" / "out")

    written.clear()  # other settings: the parts are of no use
    prepare(path, tmp_path / "other" / "out", shard_bytes=300, train_tokenizer=280)
    assert len(written) == shards and not set(written) & set(whole)
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
        patch.setattr(room, "encode_all", None)  # any work would fail
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


def parts_of(monkeypatch):
    """The names of the parts that are written from here on."""
    written, write = [], encode.write_part
    monkeypatch.setattr(encode, "write_part", lambda *args: (written.append(args[1]), write(*args)))
    return written


def test_mending_one_file_keeps_the_parts_of_the_others(tmp_path, monkeypatch, capsys):
    tokenizer = save_tokenizer(tmp_path / "tok", 99, {"eos_token": "</s>"})
    words = [" ".join(str((i * k) % 90) for i in range(40)) for k in range(60)]
    paths = [write_jsonl(tmp_path / f"s{i}.jsonl", words) for i in range(3)]
    folder = tmp_path / "code"
    folder.mkdir()
    for i, text in enumerate(words):
        (folder / f"{i:02}.txt").write_text(text)
    broken = paths[2].read_text() + '{"text": "1 2'
    paths[2].write_text(broken)
    options = {"tokenizer": tokenizer, "shard_bytes": 500, "quiet": False}
    written = parts_of(monkeypatch)
    with raises(ValueError, "s2.jsonl:61", "not valid JSON"):
        prepare([folder, *paths], tmp_path / "out", **options)
    first = list(written)
    paths[2].write_text(broken + ' 3"}\n')
    (folder / "30.txt").write_text("1 2 3")
    written.clear()
    prepare([folder, *paths], tmp_path / "out", **options)
    assert len(written) <= 3  # the end of s2, and the text files around 30.txt
    assert len(first) > 40 and "finished by an earlier run" in capsys.readouterr().err
    written.clear()
    prepare([folder, *paths], tmp_path / "once" / "out", **options)
    assert read_all(tmp_path / "out") == read_all(tmp_path / "once" / "out")


def test_parts_of_other_files_with_the_same_names_and_times_are_not_taken(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tok", config={"eos_token": "</s>"})
    for folder, text in (("one", "a a"), ("two", "b b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(text)
        os.utime(tmp_path / folder / "x.txt", (1, 1))
    inputs = [tmp_path / "one" / "x.txt", tmp_path / "two" / "x.txt"]
    prepare(inputs, tmp_path / "out", tokenizer=tokenizer, shard_bytes=1)
    assert documents_of(tmp_path / "out") == [[2, 2, 1], [3, 3, 1]]
    with raises(FileExistsError, "out.idx"):
        prepare(inputs[::-1], tmp_path / "out", tokenizer=tokenizer, shard_bytes=1)


def documents_of(prefix):
    data = IndexedDataset(str(prefix))
    return [data[i].tolist() for i in range(len(data))]


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

    folder = save_tokenizer(tmp_path / "tok", size - 4, {"eos_token": eos}, mutate)
    path = write_jsonl(tmp_path / "a.jsonl", ["a b a b", f"b {size - 5}"])
    meta = prepare(path, tmp_path / "data" / "out", tokenizer=folder)
    data = IndexedDataset(str(tmp_path / "data" / "out"))
    assert [data[i].tolist() for i in range(len(data))] == [[2, 3, 2, 3, 1], [3, size - 1, 1]]
    assert meta["dtype"] == dtype == data[0].dtype.name
    assert (meta["vocab_size"], meta["max_token_id"], meta["eod_id"]) == (size, size - 1, 1)
    assert meta["tokenizer"] == os.path.join("..", "tok")
    assert not (tmp_path / "data" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        ("$A", True, [2, 3, 1]),
        ("<s> $A", True, [0, 2, 3, 1]),
        ("<s> $A", False, [2, 3, 1]),
        ("<s> $A </s>", True, [0, 2, 3, 1]),  # its own EOD is not doubled
        ("$A <s>", True, [2, 3, 0, 1]),
        ("</s> $A", True, [1, 2, 3, 1]),
    ],
)
def test_what_the_tokenizer_adds_is_kept(tmp_path, template, bos, expected):
    transformers = pytest.importorskip("transformers")

    def mutate(tokenizer):
        tokenizer.add_special_tokens(["<s>"])
        specials = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", 1)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=specials)

    folder = save_tokenizer(
        tmp_path / "tok", config={"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}, mutate=mutate
    )
    bos_id = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<s>")
    expected = [bos_id if i == 0 else i for i in expected]
    meta = prepare(write_jsonl(tmp_path / "a.jsonl", ["a b"]), tmp_path / "out", tokenizer=folder, bos=bos)
    assert documents_of(tmp_path / "out") == [expected]
    assert (
        meta["before_text"] == {"<s> $A": ["<s>"], "<s> $A </s>": ["<s>"], "</s> $A": ["</s>"]}.get(template, []) * bos
    )
    assert meta["eod_in_text_documents"] == (template == "</s> $A")
    if bos:  # Megatron's preprocess_data.py: self._tokenizer(text).input_ids, then EOD
        stock = transformers.AutoTokenizer.from_pretrained(str(folder))("a b").input_ids
        assert expected == stock + [1] * (stock[-1] != 1)


def test_identity_is_of_what_gives_ids(tmp_path):
    def made(name, mutate=lambda tokenizer: None, words=0):
        return identity(load_tokenizer(save_tokenizer(tmp_path / name, words, mutate=mutate) / "tokenizer.json"))

    def template(tokenizer):
        tokenizer.enable_padding(length=9)
        tokenizer.enable_truncation(2)
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", 1)]
        )

    def lower(tokenizer):
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()

    def split(tokenizer):
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()

    plain = made("plain")
    assert made("template", template) == plain
    others = [
        made("lower", lower),
        made("split", split),
        made("more", words=1),
        made("added", lambda t: t.add_tokens(["c"])),
    ]
    assert len({plain, *others}) == 5
    model = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    new = json.loads(tokenizers.Tokenizer(model).to_str())
    old = json.loads(json.dumps(new))  # as tokenizers before 0.20 wrote it
    old["model"]["merges"] = ["a b"]
    del old["model"]["ignore_merges"]
    assert len({identity(tokenizers.Tokenizer.from_str(json.dumps(spec))) for spec in (old, new)}) == 1


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
    bad = {"{oops": "not valid JSON", '{"text": ["x"]}': "'text'", "[1]": "'text'", '{"text": 7}': "'text'.* holds 7"}
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
    for option in ("workers", "shard_bytes", "tokenizer_bytes"):
        for value in (0, -1):
            with raises(ValueError, f"{option} {value} must be at least 1"):
                prepare(path, output, **{option: value})
    with raises(ValueError, "held-out split"):
        prepare(write_jsonl(path, TEXTS[:2]), output, valid_fraction=1e-9)
    for name in ("b.jsonl.gz", "b.jsonl.xz", "b.jsonl.bz2", "b.jsonl.zst"):
        cut = write_jsonl(tmp_path / name, [os.urandom(9999).hex()] * 2)
        cut.write_bytes(cut.read_bytes()[:-5])
        with raises(ValueError, name, "cut off"):
            prepare(cut, output)
        cut.write_bytes(b"not compressed")
        with raises(ValueError, name, "damaged"):
            prepare(cut, output)
    assert not list(tmp_path.glob("out.[bi]*"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": "x"', "\xff"])
def test_a_damaged_description_names_a_remedy_that_works(tmp_path, content):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = prepare(path, tmp_path / "out", valid_fraction=0.3)
    for name in ("out.json", "out_valid.json"):
        (tmp_path / name).write_text(content, "latin-1")
        with raises(ValueError, f"{tmp_path}/{name} ", f"--overwrite prepares {tmp_path}/out again"):
            prepare(path, tmp_path / "out", valid_fraction=0.3)
        assert prepare(path, tmp_path / "out", valid_fraction=0.3, overwrite=True) == first
    (tmp_path / "out.json").write_text(json.dumps({"settings": first["settings"]}))
    with raises(FileExistsError, "--overwrite"):
        prepare(path, tmp_path / "out", valid_fraction=0.3)


def test_damaged_parts_name_the_folder_to_remove(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    parts = tmp_path / "out.parts"
    with monkeypatch.context() as patch:
        patch.setattr(room, "join_parts", None)
        with pytest.raises(TypeError):
            prepare(path, tmp_path / "out")
    damaged = [parts / "settings.json", next(p for p in parts.glob("*.json") if p.name != "settings.json")]
    for file in damaged:
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        with raises(ValueError, f"{file} is not JSON", f"remove {parts} and run again"):
            prepare(path, tmp_path / "out")
        file.write_bytes(whole)
    shutil.rmtree(parts)
    prepare(path, tmp_path / "out")
    assert documents(tmp_path / "out") == TEXTS


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
    options.add_arguments(parser)
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
    assert options.run(parser.parse_args(command)) == 0
    assert "documents" in capsys.readouterr().out
    assert options.run(parser.parse_args([*command, "--seed", "3"])) == 2
    assert "out.idx exists" in capsys.readouterr().err
    assert options.run(parser.parse_args([*command, "--seed", "3", "--overwrite"])) == 0
    assert sorted(documents(output) + documents(f"{output}_valid")) == sorted(TEXTS)
    with pytest.raises(SystemExit):
        parser.parse_args([str(path), "--output", output])


def test_strict_says_by_its_exit_code_that_something_was_left_out(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    path, binary = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "b.txt"
    binary.write_bytes(b"\0")
    command = ["--output", str(tmp_path / "out"), "--train-tokenizer", "300", "--workers", "1"]
    assert options.run(parser.parse_args([str(path), *command, "--strict"])) == 0
    command = [str(path), str(binary), *command, "--overwrite"]
    assert options.run(parser.parse_args(command)) == 0
    assert f"left out: {binary}: binary" in capsys.readouterr().err
    assert options.run(parser.parse_args([*command, "--strict"])) == 3
    assert options.run(parser.parse_args([*command[:-1], "--strict"])) == 3  # up to date
    assert f"left out: {binary}: binary" in capsys.readouterr().err


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files.importlib.util, "find_spec", lambda name: None)
    for name in ("p.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
        with raises(ValueError, name, "pip install"):
            prepare(tmp_path / name, tmp_path / "out")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, of the extra [prepare], is not installed")
    from pyarrow import parquet

    texts, path = [*TEXTS, None, " "], tmp_path / "set" / "p.Parquet"
    path.parent.mkdir()
    kinds = {
        "string": pyarrow.string(),
        "large": pyarrow.large_string(),
        "bytes": pyarrow.binary(),
        "words": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }
    columns = {name: pyarrow.array(texts, pyarrow.string()).cast(kind) for name, kind in kinds.items()}
    parquet.write_table(pyarrow.table({**columns, "n": list(range(len(texts)))}), path, row_group_size=7)
    (path.parent / "README.md").write_text("# not data")
    for name in kinds:
        meta = prepare(path.parent, tmp_path / name / "out", text_key=name, shard_bytes=300)
        assert documents(tmp_path / name / "out") == TEXTS and meta["empty_documents"] == 2
        assert f"{path}: row {len(TEXTS) + 1}" in meta["left_out"][1]
    parquet.write_table(pyarrow.table({"raw": [b"caf\xe9"]}), path)
    assert prepare(path, tmp_path / "raw" / "out", text_key="raw")["replaced_documents"] == 1
    parquet.write_table(pyarrow.table({"n": [1, 2]}), path)
    with raises(ValueError, "p.Parquet", "'n'", "int64"):
        prepare(path, tmp_path / "bad", text_key="n")
    tokenizer = save_tokenizer(tmp_path / "tok", config={"eos_token": "</s>"})
    with raises(ValueError, "2 records", "no 'text'", "which has 'n'"):
        prepare(path, tmp_path / "bad", tokenizer=tokenizer)
    path.write_bytes(path.read_bytes()[:-9])
    with raises(ValueError, "p.Parquet", "not a Parquet file"):
        prepare(path, tmp_path / "bad", text_key="n")
