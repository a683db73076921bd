import subprocess
import sys

import numpy as np
import pytest

from exact_megatron import ExposureCensus, effective_context, log2_bucket_edges
from exact_megatron import packing as packing_module
from exact_megatron.packing import read_index, segment_histogram
from tests.helpers.references import PositionTokenizer, context_of_targets, uneven_lengths


def reference_context(cu, continues):
    out = []
    for start, end in zip(cu[:-1], cu[1:]):
        out += [t + 1 - start for t in range(start, end - 1)] + [0]
    if continues:
        out[-1] = cu[-1] - cu[-2]
    return np.array(out)


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("cu", [[0, 1], [0, 7], [0, 1, 2, 3], [0, 3, 4, 10], [0, 9, 10]])
def test_effective_context(cu, continues):
    got = effective_context(np.array(cu), continues)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, reference_context(cu, continues))


@pytest.mark.parametrize("cu", [[1, 3], [0], [0, 3, 3], [0, 4, 2], [[0, 1]]])
def test_effective_context_refuses_bad_boundaries(cu):
    with pytest.raises(ValueError, match="cu_seqlens must be increasing"):
        effective_context(np.array(cu))


@pytest.mark.parametrize(
    ("seq_length", "edges"),
    [
        (4096, [0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4097]),
        (100, [0, 8, 16, 32, 64, 101]),
        (9, [0, 8, 10]),
        (8, [0, 9]),
        (1, [0, 2]),
    ],
)
def test_edges_close_the_last_bucket_at_the_window(seq_length, edges):
    assert log2_bucket_edges(seq_length).tolist() == edges


def brute_census(lengths, seq_length, order, extra, eod_mask_loss, chosen=None):
    """Count over the token stream, one target at a time."""
    order = np.arange(len(lengths)) if order is None else order
    starts = np.concatenate([[0], np.cumsum(lengths)])
    stream = np.concatenate([np.arange(starts[d], starts[d + 1]) for d in order])
    counts = np.zeros(seq_length + 1, np.int64)
    for i in range((len(stream) - extra) // seq_length):
        if chosen is not None and not chosen[i]:
            continue
        end = (i + 1) * seq_length
        tokens = stream[i * seq_length : end]
        labels = stream[i * seq_length + 1 : end + 1] if extra else tokens[1:]
        context = context_of_targets(lengths, tokens[: len(labels)], labels)
        counts += np.bincount(context[context > 0] if eod_mask_loss else context, minlength=seq_length + 1)
    return counts


@pytest.mark.parametrize("seed", range(60))
def test_census_equals_counting_over_tokens(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    seq_length = int(rng.choice([4, 7, 16, 33, 48]))
    lengths = uneven_lengths(rng, seq_length, int(rng.integers(3, 25)))
    if seed % 4 == 0:
        lengths = np.append(lengths, [0, 0]).astype(np.int32)
    epochs = int(rng.integers(1, 4))
    order = None if seed % 3 == 0 else rng.permutation(np.tile(np.arange(len(lengths)), epochs)).astype(np.int32)
    extra, eod_mask_loss = seed % 5 != 0, seed % 7 == 0
    total = int((lengths if order is None else lengths[order]).sum())
    chosen = rng.random((total - extra) // seq_length) < 0.5 if seed % 2 else None
    chunk = int(rng.choice([1, 3, 1000]))  # documents may be cut at chunk ends
    monkeypatch.setitem(segment_histogram.__kwdefaults__, "chunk", chunk)
    census = ExposureCensus.from_document_lengths(
        lengths,
        seq_length,
        document_index=order,
        add_extra_token=extra,
        eod_mask_loss=eod_mask_loss,
        chosen=chosen,
    )
    np.testing.assert_array_equal(
        census.counts, brute_census(lengths, seq_length, order, int(extra), eod_mask_loss, chosen)
    )


def test_census_of_one_document():
    census = ExposureCensus.from_document_lengths(np.array([10]), 4)
    # Samples [0..3 -> 4] and [4..7 -> 8]: contexts 1, 2, 3, 4 twice; the document's end fills no third sample.
    assert census.counts.tolist() == [0, 2, 2, 2, 2]
    assert (census.samples, census.targets, census.tokens) == (2, 8, 8)
    assert census.share_below(3) == 0.5
    assert census.bucket_counts().tolist() == [8]


def test_census_adds_saves_and_loads(tmp_path):
    a = ExposureCensus.from_document_lengths(np.array([10, 3, 50]), 8)
    b = ExposureCensus.from_document_lengths(np.array([17] * 9), 8)
    both = a + b
    np.testing.assert_array_equal(both.counts, a.counts + b.counts)
    assert both.samples == a.samples + b.samples
    path = tmp_path / "deep" / "census.json"
    both.save(path)
    loaded = ExposureCensus.load(path)
    np.testing.assert_array_equal(loaded.counts, both.counts)
    assert loaded.digest == both.digest != a.digest
    assert [p.name for p in path.parent.iterdir()] == ["census.json"]
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a census"):
        ExposureCensus.load(path)
    with pytest.raises(ValueError, match="window of 8 .* at 4"):
        a + ExposureCensus.from_document_lengths(np.array([10]), 4)


def test_census_refuses_too_little_text():
    with pytest.raises(ValueError, match="4 tokens do not fill one sample of 4"):
        ExposureCensus.from_document_lengths(np.array([4]), 4)


@pytest.fixture
def prefix(write_corpus):
    return write_corpus(np.array([5, 1, 9], np.int32))


def test_read_index(prefix):
    index = read_index(prefix)
    assert index.lengths.tolist() == [5, 1, 9] and index.dtype == np.int32
    assert read_index(prefix + ".idx").prefix == prefix


def test_read_index_names_what_is_wrong(prefix, tmp_path):
    idx, bin_ = tmp_path / "x.idx", tmp_path / "x.bin"
    whole = idx.read_bytes()

    def refused(error, message):
        with pytest.raises(error, match=message):
            read_index(prefix)

    bin_.write_bytes(bin_.read_bytes()[:-3])
    refused(ValueError, "x.bin has 57 bytes where .* describes 60")
    bin_.unlink()
    refused(FileNotFoundError, "x.bin does not exist although .*x.idx is there")
    bin_.write_bytes(b"\0" * 60)
    idx.write_bytes(whole[:40])
    refused(ValueError, "cut short: 40 bytes where 3 sequences need")
    idx.write_bytes(b"hello" + whole[5:])
    refused(ValueError, "is not a Megatron index")
    idx.write_bytes(whole[:17] + b"\x07" + whole[18:])
    refused(ValueError, "tokens are float32")
    idx.write_bytes(whole[:17] + b"\x08" + whole[18:])
    refused(
        ValueError,
        "entry 1 of its sequence pointers, counted from 0, is 20, expected 10, the bytes of the uint16 tokens",
    )
    idx.unlink()
    bin_.unlink()
    refused(FileNotFoundError, "x.idx does not exist: give the common prefix")


def test_read_index_refuses_an_empty_one(write_corpus):
    with pytest.raises(ValueError, match="holds no sequence"):
        read_index(write_corpus(np.array([], np.int32)))


def test_position_tokenizer_reference_sees_document_starts():
    """The reference itself: lengths 2, 3 stored one after another, sample of 5 tokens."""
    context = context_of_targets(np.array([2, 3]), np.arange(4), np.arange(1, 5))
    assert context.tolist() == [1, 0, 1, 2]
    assert PositionTokenizer.pad == -1 and packing_module.read_index


def test_the_census_needs_numpy_and_rich_alone(write_corpus, tmp_path):
    """On a login node: what `pip install exact-megatron[report]` brings, and no more, for the whole command."""
    prefix = write_corpus(np.array([50, 30, 64, 200], np.int32))
    absent = (
        "torch megatron omegaconf tokenizers transformers tensorboard yaml tqdm safetensors lm_eval hydra zstandard"
    )
    code = f"import sys; sys.modules.update(dict.fromkeys({absent.split()}))\n"
    code += f"from exact_megatron.cli import main; sys.exit(main(['census', {prefix!r}, '--seq-length', '64']))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "5 samples, 320 tokens" in ran.stdout, ran.stderr
