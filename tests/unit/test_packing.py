"""A .idx that does not describe its .bin is refused everywhere, or makes no difference."""

import json
import os
import struct

import numpy as np
import pytest

from exact_megatron import ExactConfig, ExposureCensus, packing
from exact_megatron.cli import main
from exact_megatron.packing import check_index, read_index
from tests.unit.test_dataset import ON, S, build, dataset_config

HEADER = 34


def write(prefix, lengths, dtype=np.uint16, documents=None, modes=b""):
    """A sound pair, of tokens 1.. with 0 as the last of each document; returns its bytes."""
    lengths = np.asarray(lengths, np.int32)
    codes = {np.uint8: 1, np.int8: 2, np.int16: 3, np.int32: 4, np.int64: 5, np.uint16: 8}
    documents = np.arange(len(lengths) + 1) if documents is None else np.asarray(documents)
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = np.ones(int(ends[-1]), dtype)
    tokens[ends[lengths > 0] - 1] = 0
    tokens.tofile(f"{prefix}.bin")
    pointers = (ends - lengths) * tokens.itemsize
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, codes[dtype], len(lengths), len(documents))
    index += lengths.tobytes() + pointers.astype(np.int64).tobytes() + documents.astype(np.int64).tobytes() + modes
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(index)
    with open(f"{prefix}.json", "w") as stream:
        json.dump({"vocab_size": 2, "eod_id": 0}, stream)
    return index


def damaged(rng, index, count):
    """One random fault in the bytes of a .idx of `count` sequences."""
    data = bytearray(index)
    parts = {
        "header": (9, HEADER, 1),
        "lengths": (HEADER, HEADER + 4 * count, 4),
        "pointers": (HEADER + 4 * count, HEADER + 12 * count, 8),
        "documents": (HEADER + 12 * count, len(index), 8),
    }
    start, end, width = parts[str(rng.choice(list(parts)))]
    entries = (end - start) // width
    one, two = (start + width * int(i) for i in rng.integers(0, entries, 2))
    match rng.choice(["bit", "swap", "zeros", "ones", "copy", "random", "cut", "append", "drop"]):
        case "bit":
            data[int(rng.integers(start, end))] ^= 1 << int(rng.integers(8))
        case "swap":
            data[one : one + width], data[two : two + width] = data[two : two + width], data[one : one + width]
        case "zeros":
            low, high = sorted((one, two + width))
            data[low:high] = bytes(high - low)
        case "ones":
            data[one : one + width] = b"\xff" * width
        case "copy":
            data[one : one + width] = data[two : two + width]
        case "random":
            data[one : one + width] = rng.bytes(width)
        case "cut":
            del data[int(rng.integers(len(data))) :]
        case "append":
            data += rng.bytes(int(rng.integers(1, 2 * count)))
        case "drop":
            del data[one : one + width]
    return bytes(data)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_a_damaged_index_is_refused_or_counts_as_the_sound_one(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(check_index, "__defaults__", (True, 7))  # entries at once: faults at the ends of a chunk too
    refused = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0 if seed % 3 else 1, 60, int(rng.integers(3, 30))).astype(np.int32)
        lengths[0] = 40
        index = write(tmp_path / "x", lengths, dtype)
        right = ExposureCensus.from_document_lengths(read_index(tmp_path / "x").lengths, 16)
        (tmp_path / "x.idx").write_bytes(damaged(rng, index, len(lengths)))
        try:
            found = read_index(tmp_path / "x")
        except ValueError as error:
            assert "x.idx" in str(error) and len(str(error)) < 600
            refused += 1
            continue
        np.testing.assert_array_equal(found.lengths, lengths)
        np.testing.assert_array_equal(ExposureCensus.from_document_lengths(found.lengths, 16).counts, right.counts)
    assert refused > 60


@pytest.mark.parametrize(
    ("array", "entry", "value", "message"),
    [
        ("lengths", 5, 0, "entry 6 of its sequence pointers, counted from 0, is 600, expected 500"),
        ("lengths", 5, -7, "entry 5 of its sequence lengths, counted from 0, is -7, expected 0 or more"),
        ("lengths", 99, 0, "x.bin has 10000 bytes where .*x.idx describes 9900"),
        ("pointers", 0, 100, "entry 0 of its sequence pointers, counted from 0, is 100, expected 0,"),
        (
            "pointers",
            7,
            -(2**63),
            "entry 7 of its sequence pointers, counted from 0, is -9223372036854775808, expected 700",
        ),
        ("documents", 0, 1, "entry 0 of its document index, counted from 0, is 1, expected 0"),
        ("documents", 9, 3, "entry 9 of its document index, counted from 0, is 3, expected 8 or more"),
        ("documents", 100, 99, "entry 100 of its document index, counted from 0, is 99, expected 100, the number"),
        ("documents", 4, 5, r"100 sequences in 100 documents \(document 3 is sequences 3 to 4\)"),
    ],
)
def test_the_first_wrong_entry_is_named(tmp_path, array, entry, value, message):
    index = bytearray(write(tmp_path / "x", [50] * 100))
    start, code = {"lengths": (0, "<i"), "pointers": (400, "<q"), "documents": (1200, "<q")}[array]
    struct.pack_into(code, index, HEADER + start + entry * struct.calcsize(code), value)
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(ValueError, match=message) as error:
        read_index(tmp_path / "x")
    assert "again" in str(error.value) or "one sequence a document" in str(error.value)


@pytest.mark.parametrize(
    ("sequences", "documents", "message"),
    [
        (2**62, 101, "cut short"),
        (100, 2**60, "cut short"),
        (0, 101, "header does not account for"),
        (100, 0, "header does not account for"),
        (99, 101, "header does not account for"),
        (98, 104, "is damaged"),
    ],
)
def test_counts_that_the_file_does_not_have(tmp_path, sequences, documents, message):
    index = bytearray(write(tmp_path / "x", [50] * 100))
    struct.pack_into("<QQ", index, 18, sequences, documents)
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path / "x")


def test_no_document_index(tmp_path):
    index = bytearray(write(tmp_path / "x", [50] * 100, documents=[]))
    assert struct.unpack_from("<QQ", index, 18) == (100, 0)
    with pytest.raises(ValueError, match="document index has 0 entries"):
        read_index(tmp_path / "x")


def test_what_megatrons_own_tools_write_is_accepted(tmp_path):
    """Empty sequences; documents without a sequence (preprocess_data.py on an empty text); modes of multimodal data."""
    lengths = [0, 5, 0, 7, 3, 0]
    write(tmp_path / "x", lengths, documents=[0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6], modes=b"\1" * 6)
    assert read_index(tmp_path / "x").lengths.tolist() == lengths


SENTENCES = "holds 200 sequences in 50 documents"


@pytest.fixture
def sentences(tmp_path):
    write(tmp_path / "x", [60] * 200, documents=range(0, 201, 4))
    return str(tmp_path / "x")


def test_documents_of_several_sequences_are_refused_where_they_are_masked_or_weighted(sentences, tmp_path, capsys):
    from exact_megatron.training.config import load_config
    from exact_megatron.training.data_files import read_vocabulary
    from tests.helpers.tiny import config_file

    assert main(["census", sentences, "--seq-length", "48"]) == 2
    assert SENTENCES in capsys.readouterr().err
    config = config_file(tmp_path, sentences)
    off = ["model.exact.enabled=false", "model.data.document_masking=false"]
    unmasked = [off[1], "model.exact.allow_unmasked_documents=true"]
    for overrides, refused in (([], True), (off[:1], True), (unmasked, True), (off, False)):
        run = load_config(config, overrides)
        if refused:
            with pytest.raises(ValueError, match=SENTENCES):
                read_vocabulary(run)
        else:
            assert read_vocabulary(run).vocab_size == 96
        assert main(["plan", "--config", str(config), *overrides]) == (2 if refused else 0)
        printed = capsys.readouterr()
        assert (SENTENCES in printed.out + printed.err) == refused

    config = dataset_config(tmp_path, ([sentences], None))
    off = ExactConfig()
    for exact, masked, refused in ((ON, False, True), (ON, True, True), (off, True, True), (off, False, False)):
        if refused:
            with pytest.raises(ValueError, match=SENTENCES):
                build(config, [30, 0, 0], exact, emit_cu_seqlens=masked)
        else:
            assert len(build(config, [30, 0, 0], exact, emit_cu_seqlens=masked)[0][0]) >= 30


def test_every_path_refuses_a_damaged_index_before_megatron_packs_by_it(tmp_path, capsys):
    """Negative lengths would let megatron.core look for enough tokens for ever."""
    from tests.helpers.tiny import config_file

    index = bytearray(write(tmp_path / "x", [60] * 200))
    prefix = str(tmp_path / "x")
    build(dataset_config(tmp_path, ([prefix], None)), [30, 0, 0])  # caches of the sound data
    struct.pack_into("<i", index, HEADER + 4 * 11, -60)
    (tmp_path / "x.idx").write_bytes(index)
    message = "entry 11 of its sequence lengths"
    for exact in (ON, ExactConfig()):
        for blend in ({"blend": ([prefix], None)}, {"blend_per_split": [([prefix], None), None, None], "split": None}):
            with pytest.raises(ValueError, match=message):
                build(dataset_config(tmp_path, **blend), [30, 0, 0], exact)
    config = str(config_file(tmp_path, prefix))
    for command in (
        ["census", prefix, "--seq-length", str(S)],
        ["train", "--config", config],
        ["plan", "--config", config],
        ["doctor", "--config", config],
    ):
        main(command)
        printed = capsys.readouterr()
        assert message in printed.out + printed.err, command


@pytest.fixture
def checked(monkeypatch):
    """The prefixes that are checked from now on; files count as settled when they were written just now."""
    monkeypatch.setattr(packing, "SETTLED_SECONDS", -1e9)
    seen = []

    def check(prefix, *rest, **more):
        seen.append(os.path.basename(prefix))
        return check_index(prefix, *rest, **more)

    monkeypatch.setattr(packing, "check_index", check)
    return seen


def test_a_start_checks_each_index_once(tmp_path, checked, one_rank):
    from exact_megatron.training.config import load_config
    from exact_megatron.training.data_files import read_vocabulary
    from exact_megatron.training.lengths import check_lengths
    from tests.helpers.tiny import config_file

    prefixes = [str(tmp_path / name) for name in "xy"]
    for prefix in prefixes:
        write(prefix, [60] * 200)
    run = load_config(config_file(tmp_path, prefixes[0]), [f"model.data.data_prefix=[{','.join(prefixes)}]"])
    read_vocabulary(run)
    check_lengths(run)
    build(dataset_config(tmp_path, (prefixes, None)), [30, 0, 0])
    assert checked == ["x", "y"]
    np.testing.assert_array_equal(read_index(prefixes[0]).lengths, [60] * 200)


def test_a_changed_file_is_checked_again(tmp_path, checked):
    prefix = str(tmp_path / "x")
    index = bytearray(write(prefix, [60] * 200))
    for _ in range(2):
        assert read_index(prefix).lengths.sum() == 12000
    assert checked == ["x"]
    os.truncate(f"{prefix}.bin", 100)
    with pytest.raises(ValueError, match="x.bin has 100 bytes"):
        read_index(prefix)
    write(prefix, [30] * 400)
    assert read_index(prefix).lengths.sum() == 12000 and len(read_index(prefix).lengths) == 400
    write(prefix, [60] * 200)
    struct.pack_into("<i", index, HEADER + 4 * 11, -60)
    (tmp_path / "new").write_bytes(index)  # of the same size and time, as a copy that keeps times has them
    facts = os.stat(f"{prefix}.idx")
    os.utime(tmp_path / "new", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert read_index(prefix).lengths[11] == 60
    os.replace(tmp_path / "new", f"{prefix}.idx")
    for whole in (True, False):
        with pytest.raises(ValueError, match="entry 11 of its sequence lengths"):
            read_index(prefix, whole)


def test_what_was_accepted_as_sentences_is_refused_as_documents(tmp_path, checked):
    write(tmp_path / "x", [60] * 200, documents=range(0, 201, 4))
    assert read_index(tmp_path / "x", whole_documents=False).documents == 50
    with pytest.raises(ValueError, match=SENTENCES):
        read_index(tmp_path / "x")
    assert checked == ["x"]


def test_a_file_that_was_written_just_now_is_checked_every_time(tmp_path, checked, monkeypatch):
    """Two writes may have one time."""
    monkeypatch.setattr(packing, "SETTLED_SECONDS", 3600)
    index = bytearray(write(tmp_path / "x", [60] * 200))
    read_index(tmp_path / "x")
    facts = os.stat(tmp_path / "x.idx")
    struct.pack_into("<i", index, HEADER + 4 * 11, -60)
    (tmp_path / "x.idx").write_bytes(index)
    os.utime(tmp_path / "x.idx", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(ValueError, match="entry 11 of its sequence lengths"):
        read_index(tmp_path / "x")


def test_lengths_that_are_not_aligned_are_counted_without_a_copy_for_each_chunk(tmp_path, monkeypatch):
    """Mapped behind a header of 34 bytes, as Megatron has them; each `take` would copy all of them."""
    write(tmp_path / "x", lengths := np.arange(1, 400))
    mapped = np.memmap(tmp_path / "x.idx", np.int32, "r", HEADER, (len(lengths),))
    assert not mapped.flags.aligned and packing.aligned(mapped).flags.aligned
    order = np.random.default_rng(0).permutation(len(lengths)).astype(np.int32)
    seen = []
    stock = packing._chunks

    def chunks(lengths, *rest):
        seen.append(lengths.flags.aligned)
        return stock(lengths, *rest)

    monkeypatch.setattr(packing, "_chunks", chunks)
    found = ExposureCensus.from_document_lengths(mapped, 64, document_index=order)
    assert seen == [True, True]
    np.testing.assert_array_equal(
        found.counts, ExposureCensus.from_document_lengths(lengths, 64, document_index=order).counts
    )


def test_object_storage_is_checked_once_megatron_has_the_index(tmp_path, monkeypatch):
    """No .bin to look at: lengths, pointers and document index alone."""
    index = bytearray(write(tmp_path / "x", [60] * 200, documents=range(0, 201, 4)))
    from exact_megatron.dataset import ExactDatasetBuilder, ExactGPTDataset

    stock = ExactGPTDataset.build_low_level_dataset

    def fetched(path, config):
        dataset = stock(str(tmp_path / "x"), config)
        dataset.path_prefix = path
        return dataset

    monkeypatch.setattr(ExactGPTDataset, "build_low_level_dataset", staticmethod(fetched))
    config = dataset_config(tmp_path, (["s3://bucket/x"], None))
    with pytest.raises(ValueError, match=SENTENCES):
        build(config, [30, 0, 0])
    write(tmp_path / "x", [60] * 200)
    assert ExactDatasetBuilder and build(config, [30, 0, 0])[1].table is not None
    del index
