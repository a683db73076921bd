import dataclasses
import errno
import os

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

from exact_megatron import ExactConfig, ExposureCensus, WeightTable
from exact_megatron.dataset import ExactDatasetBuilder, members
from exact_megatron.loss import ExactLoss, gpt_loss
from tests.helpers.references import PositionTokenizer, context_of_targets, uneven_lengths

S = 48
ON = ExactConfig(enabled=True, tau=8, allow_unmasked_documents=True)


def dataset_config(tmp_path, blend=None, **changes):
    settings = {
        "random_seed": 3,
        "sequence_length": S,
        "blend": blend,
        "split": "1" if blend else None,
        "path_to_cache": str(tmp_path / "cache"),
        "tokenizer": PositionTokenizer(),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "mid_level_dataset_surplus": 0.2,
    }
    return GPTDatasetConfig(**{**settings, **changes})


def build(config, sizes, exact=ON, **arguments):
    loss = ExactLoss(exact)
    loss.wrap(gpt_loss)
    builder = ExactDatasetBuilder(GPTDataset, sizes, lambda: True, config, exact=exact, loss=loss, **arguments)
    return builder.build(), builder


def count_over_tokens(dataset, lengths_of):
    """Census by reading every sample; `lengths_of(sample)` gives the corpus of a sample."""
    counts = np.zeros(S + 1, np.int64)
    for i in range(len(dataset)):
        sample = dataset[i]
        supervised = sample["loss_mask"].numpy() > 0
        context = context_of_targets(lengths_of(sample), sample["tokens"].numpy(), sample["labels"].numpy())
        counts += np.bincount(context[supervised], minlength=S + 1)
    return counts


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_census_equals_reading_the_samples(tmp_path, write_corpus, extra, epochs):
    lengths = uneven_lengths(np.random.default_rng(epochs), S, 60)
    prefix = write_corpus(lengths)
    samples = int(epochs * lengths.sum() * 0.9) // S
    (train, _, _), builder = build(
        dataset_config(tmp_path, ([prefix], None), add_extra_token_to_sequence=extra), [samples, 0, 0]
    )
    np.testing.assert_array_equal(builder.census.counts, count_over_tokens(train, lambda s: lengths))
    assert builder.census.samples == len(train)


@pytest.mark.parametrize(
    ("weights", "samples"), [([0.7, 0.3], 70), (None, 20), (None, 200)], ids=["weights", "once", "repeated"]
)
def test_blend_counts_each_member_by_what_is_drawn(tmp_path, write_corpus, one_rank, weights, samples):
    """Without weights members are drawn by their size, and repeated alike where one epoch does not suffice."""
    rng = np.random.default_rng(5)
    a, b = uneven_lengths(rng, S, 50), uneven_lengths(rng, S, 20)
    shift = 1 << 20  # tells the members' tokens apart
    prefixes = [write_corpus(a, "a"), write_corpus(b, "b", tokens=np.arange(b.sum()) + shift)]
    (train, _, _), builder = build(dataset_config(tmp_path, (prefixes, weights)), [samples, 0, 0])
    assert isinstance(train, BlendedDataset) and len(train) == samples
    once = [(int(member.sum()) - 1) // S for member in (a, b)]
    if samples == 200:
        assert sum(once) < 200
        drawn = np.bincount(train.dataset_index)
        np.testing.assert_allclose(drawn / 200, np.array([a.sum(), b.sum()]) / (a.sum() + b.sum()), atol=0.01)
    if samples == 20:
        stock = BlendedMegatronDatasetBuilder(
            GPTDataset, [20, 0, 0], lambda: True, dataset_config(tmp_path, (prefixes, None))
        )
        stock = stock.build()[0]
        assert [len(member) for member in train.datasets] == once == [len(member) for member in stock.datasets]
        np.testing.assert_array_equal(train.dataset_index, stock.dataset_index)
        np.testing.assert_array_equal(train.datasets[0].shuffle_index, stock.datasets[0].shuffle_index)

    counts = np.zeros(S + 1, np.int64)
    for i in range(len(train)):
        tokens, labels = (train[i][k].numpy() for k in ("tokens", "labels"))
        second = tokens[0] >= shift
        context = context_of_targets(b if second else a, tokens - shift * second, labels - shift * second)
        counts += np.bincount(context, minlength=S + 1)
        expected = builder.table.lookup[context]
        np.testing.assert_array_equal(train[i]["loss_mask"].numpy(), expected)
    np.testing.assert_array_equal(builder.census.counts, counts)
    assert {m.weight_table.digest for m in members([train])} == {builder.table.digest}


def test_weights_and_boundaries_of_every_sample(tmp_path, write_corpus):
    lengths = uneven_lengths(np.random.default_rng(0), S, 60)
    (train, valid, _), builder = build(
        dataset_config(tmp_path, ([write_corpus(lengths)], None), split="80,20,0", eod_mask_loss=True),
        [40, 5, 0],
        emit_cu_seqlens=True,
    )
    for dataset in (train, valid):
        for i in range(len(dataset)):
            sample = dataset[i]
            tokens = sample["tokens"].numpy()
            context = context_of_targets(lengths, tokens, sample["labels"].numpy())
            np.testing.assert_array_equal(sample["loss_mask"].numpy(), builder.table.lookup[context])
            assert sample["loss_mask"].dtype == torch.float32
            inside = context_of_targets(lengths, tokens[:-1], tokens[1:])
            starts = [0, *(np.flatnonzero(inside == 0) + 1).tolist(), S]
            assert np.unique(sample["cu_seqlens"].numpy()).tolist() == sorted(set(starts))
            assert sample["cu_seqlens"].dtype == torch.int32 and len(sample["cu_seqlens"]) == S + 1
    assert abs(builder.table.mean - 1) < 1e-7


@pytest.mark.parametrize("exact", [ExactConfig(), dataclasses.replace(ON, alpha=0.0)], ids=["off", "alpha0"])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_off_and_alpha_0_are_bitwise_stock(tmp_path, write_corpus, exact, eod_mask_loss):
    lengths = uneven_lengths(np.random.default_rng(1), S, 40)

    class Tokenizer(PositionTokenizer):
        eod = 7

    config = dataset_config(
        tmp_path,
        ([write_corpus(lengths)], None),
        eod_mask_loss=eod_mask_loss,
        tokenizer=Tokenizer(),
        create_attention_mask=True,
    )
    stock = BlendedMegatronDatasetBuilder(GPTDataset, [30, 0, 0], lambda: True, config).build()[0]
    ours = build(config, [30, 0, 0], exact)[0][0]
    for i in (*range(30), None):
        left, right = stock[i], ours[i]
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key])


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_a_placebo_gives_a_samples_weights_to_its_targets_at_random(tmp_path, write_corpus, eod_mask_loss):
    prefix = write_corpus(uneven_lengths(np.random.default_rng(2), S, 80))

    def samples(seed=3, **exact):
        config = dataset_config(tmp_path, ([prefix], None), random_seed=seed, eod_mask_loss=eod_mask_loss)
        (train, _, _), builder = build(config, [None, 0, 0], dataclasses.replace(ON, **exact))
        return [train[i]["loss_mask"].numpy() for i in range(len(train))], builder

    exact, real = samples()
    placebo, builder = samples(placebo=True)
    assert len(exact) == len(placebo) > 20
    for a, b in zip(exact, placebo):
        assert np.array_equal(a != 0, b != 0)
        assert np.array_equal(np.sort(a), np.sort(b))
    moved = np.mean([(a != b).any() for a, b in zip(exact, placebo)])
    assert moved > 0.5  # not those whose targets weigh the same
    assert all(np.array_equal(a, b) for a, b in zip(placebo, samples(placebo=True)[0]))  # a sample's own seed
    assert np.array_equal(real.table.lookup, builder.table.lookup) and real.table.digest != builder.table.digest
    context = np.concatenate([np.flatnonzero(a > a[a > 0].min()) for a in exact])
    permuted = np.concatenate([np.flatnonzero(b > b[b > 0].min()) for b in placebo])
    assert (
        abs(np.mean(permuted) - np.mean(context)) > 1
    )  # the tail is at the end of samples, the placebo's weights are anywhere


def test_a_placebo_reports_no_buckets(tmp_path, write_corpus):
    prefix = write_corpus(uneven_lengths(np.random.default_rng(2), S, 80))
    _, builder = build(dataset_config(tmp_path, ([prefix], None)), [None, 0, 0], dataclasses.replace(ON, placebo=True))
    assert builder.loss.names == ["lm loss", "exact loss"]
    weights = torch.from_numpy(builder.table.lookup[[1, 1, S, 0]])
    report = builder.loss.report(torch.ones(4), weights, torch.ones(4))
    assert list(report) == builder.loss.names and report["lm loss"].tolist() == [4, 4]


def test_pads_and_batch_padding_stay_unsupervised(tmp_path, write_corpus):
    """The last validation sample is padded; index None asks for a sample that is all padding."""
    lengths = np.array([S + 30] * 20, np.int32)
    (_, valid, _), builder = build(
        dataset_config(
            tmp_path, ([write_corpus(lengths)], None), split="50,50,0", drop_last_partial_validation_sequence=False
        ),
        [10, 16, 0],
    )
    sample = valid[int(np.flatnonzero(valid.shuffle_index == len(valid) - 1)[0])]
    real = sample["labels"].numpy() != 0
    assert 0 < real.sum() < S
    assert (sample["loss_mask"].numpy()[~real] == 0).all() and (sample["loss_mask"].numpy()[real] > 0).all()
    assert (valid[None]["loss_mask"] == 0).all()


def test_a_mask_kept_by_the_stock_dataset_does_not_reach_the_next_sample(tmp_path, write_corpus):
    """Up to megatron-core 0.14 pads of one sample are masked in a tensor that all later samples share."""
    prefix = write_corpus(np.full(20, S + 30, np.int32))
    (train, _, _), _ = build(dataset_config(tmp_path, ([prefix], None)), [20, 0, 0])
    before = train[0]["loss_mask"].clone()
    train.cached_loss_mask.zero_()
    assert torch.equal(train[0]["loss_mask"], before) and before.all()


@pytest.mark.parametrize("last", [1, 2, 7])
def test_a_short_last_sample_keeps_the_boundary_of_a_short_last_document(tmp_path, write_corpus, last):
    lengths = np.array([S + 5] * 10 + [S, S - 9, last], np.int32)
    config = dataset_config(
        tmp_path,
        None,
        blend_per_split=[([write_corpus(lengths)], None), ([write_corpus(lengths[-3:], "v")], None), None],
        drop_last_partial_validation_sequence=False,
    )
    (_, valid, _), builder = build(config, [10, 2, 0])
    for i in range(len(valid)):
        sample, supervised = valid[i], valid[i]["loss_mask"].numpy() > 0
        context = context_of_targets(lengths[-3:], sample["tokens"].numpy(), sample["labels"].numpy())
        expected = builder.table.lookup[context]
        np.testing.assert_array_equal(sample["loss_mask"].numpy()[supervised], expected[supervised])


def test_cache_is_reused_and_follows_the_data(tmp_path, write_corpus, monkeypatch):
    lengths = uneven_lengths(np.random.default_rng(2), S, 40)
    blend = ([write_corpus(lengths)], None)
    first = build(dataset_config(tmp_path, blend), [30, 0, 0])[1]
    cached = [f for f in os.listdir(tmp_path / "cache") if f.endswith("census.json")]
    assert len(cached) == 1

    with monkeypatch.context() as patch:
        patch.setattr(ExposureCensus, "from_dataset", None)  # counting again would fail
        again = build(dataset_config(tmp_path, blend, num_dataset_builder_threads=2), [30, 0, 0])[1]
        assert again.census.digest == first.census.digest
        other_alpha = build(dataset_config(tmp_path, blend), [30, 0, 0], dataclasses.replace(ON, alpha=0.3))[1]
        assert other_alpha.census.digest == first.census.digest != other_alpha.table.digest != first.table.digest

    build(dataset_config(tmp_path, blend, eod_mask_loss=True), [30, 0, 0])
    build(dataset_config(tmp_path, blend, add_extra_token_to_sequence=False, random_seed=4), [30, 0, 0])
    assert len([f for f in os.listdir(tmp_path / "cache") if f.endswith("census.json")]) == 3


@pytest.mark.parametrize("mmap", [True, False])
def test_deferred_and_fast_loading(tmp_path, write_corpus, mmap):
    lengths = uneven_lengths(np.random.default_rng(2), S, 40)
    blends = [([write_corpus(lengths)], None), None, None]
    settings = {"blend_per_split": blends, "split": None, "mmap_bin_files": mmap}
    plain, builder = build(dataset_config(tmp_path, **settings), [30, 0, 0], emit_cu_seqlens=True)
    for extra in ({"defer_npy_index_mmap": True}, {"fast_cache_load": True}):
        lazy, lazy_builder = build(dataset_config(tmp_path, **settings, **extra), [30, 0, 0], emit_cu_seqlens=True)
        assert lazy_builder.census.digest == builder.census.digest
        for i in range(30):
            assert all(torch.equal(plain[0][i][k], lazy[0][i][k]) for k in plain[0][i])


def test_without_path_to_cache(tmp_path, write_corpus):
    lengths = uneven_lengths(np.random.default_rng(2), S, 40)
    prefix = write_corpus(lengths)
    build(dataset_config(tmp_path, ([prefix], None), path_to_cache=None), [30, 0, 0])
    found = os.listdir(os.path.join(prefix, "cache", "ExactGPTDataset_indices"))
    assert sum(f.endswith("census.json") for f in found) == 1


def test_stale_index_caches_are_refused(tmp_path, write_corpus):
    """Megatron's caches are named by the path: data prepared again at the same place meet the old indices."""
    rng = np.random.default_rng(3)
    first = uneven_lengths(rng, S, 40)
    build(dataset_config(tmp_path, ([write_corpus(first)], None)), [30, 0, 0])
    for lengths in (uneven_lengths(rng, S, 80) * 2, first[::-1], first[: len(first) // 2]):
        config = dataset_config(tmp_path, ([write_corpus(lengths)], None))
        for exact in (ON, ExactConfig()):
            with pytest.raises(ValueError, match="index caches of .* were built from other data"):
                build(config, [30, 0, 0], exact)


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage"])
def test_a_damaged_index_cache_is_named(tmp_path, write_corpus, one_rank, kind):
    rng = np.random.default_rng(3)
    prefixes = [write_corpus(uneven_lengths(rng, S, 40), name) for name in "ab"]
    config = dataset_config(tmp_path, (prefixes, None))
    build(config, [30, 0, 0])
    files = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(files) == 8, "three of each member and two of the blend"
    for file in files:
        whole = file.read_bytes()
        broken = {"truncated": whole[:-9], "empty": b"", "garbage": b"\x80\x04" + whole[::-1]}[kind]
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=f"the index cache {file} is damaged .*: remove it"):
            build(config, [30, 0, 0], ExactConfig())
        file.write_bytes(whole)
    build(config, [30, 0, 0])


def test_an_index_cache_with_other_numbers_is_named(tmp_path, write_corpus, one_rank):
    rng = np.random.default_rng(3)
    config = dataset_config(tmp_path, ([write_corpus(uneven_lengths(rng, S, 40), name) for name in "ab"], None))
    datasets, _ = build(config, [30, 0, 0])
    name = datasets[0].datasets[1].unique_description_hash
    for pattern in (f"{name}-*-shuffle_index.npy", f"{name}-*-sample_index.npy", "*-Blended*-dataset_sample_index.npy"):
        (file,) = (tmp_path / "cache").glob(pattern)
        whole = file.read_bytes()
        for at in (len(whole) - 8, len(whole) - 7):
            flipped = bytearray(whole)
            flipped[at] ^= 2
            file.write_bytes(flipped)
            with pytest.raises(ValueError, match=rf"damaged.*: remove {file.parent}/{file.name[:32]}-\*"):
                build(config, [30, 0, 0], ExactConfig())
        file.write_bytes(whole)
    (file,) = (tmp_path / "cache").glob("*-census.json")
    for broken in (b"", b"\xff\xfe", b"[]", b"{", file.read_bytes().replace(b": [", b": [1", 1)):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{file} is not a census .* remove it"):
            build(config, [30, 0, 0])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_caches_that_cannot_be_written_name_the_setting(tmp_path, write_corpus, one_rank, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    config = dataset_config(tmp_path, ([write_corpus(uneven_lengths(np.random.default_rng(3), S, 40))], None))
    monkeypatch.setattr(np, "save", refuse)
    message = f"cannot be written to {tmp_path}/cache: {os.strerror(code)}.*model.data.index_mapping_dir=FOLDER"
    with pytest.raises(RuntimeError, match=message):
        build(config, [30, 0, 0])


def test_a_member_shorter_than_a_window_is_named(tmp_path, write_corpus):
    prefixes = [write_corpus(np.array([500] * 9, np.int32), "long"), write_corpus(np.array([5, 6], np.int32), "short")]
    with pytest.raises(ValueError, match=r"short has no sample in the train split .*: 11 tokens, .* needs 49"):
        build(dataset_config(tmp_path, (prefixes, None)), [30, 0, 0])


def test_a_weighted_dataset_needs_the_hook(tmp_path, write_corpus):
    config = dataset_config(tmp_path, ([write_corpus(uneven_lengths(np.random.default_rng(0), S, 40))], None))
    loss = ExactLoss(ON)
    builder = ExactDatasetBuilder(GPTDataset, [30, 0, 0], lambda: True, config, exact=ON, loss=loss)
    with pytest.raises(RuntimeError, match="no loss function is hooked"):
        builder.build()
    train = build(config, [30, 0, 0])[0][0]
    with pytest.raises(RuntimeError, match="needs its loss hook"):
        train.attach(train.weight_table, ExactLoss(ON))
    with pytest.raises(ValueError, match="window of 64, the dataset has 48"):
        train.attach(WeightTable.measuring(64), ExactLoss(ON))


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("tau", [8, 32])
def test_the_longest_wait_for_a_tail_weight_is_that_of_the_samples(
    tmp_path, write_corpus, one_rank, monkeypatch, extra, tau
):
    rng = np.random.default_rng(tau)
    gaps = []
    monkeypatch.setattr(
        ExactLoss, "bind", lambda self, table, gap, bind=ExactLoss.bind: (gaps.append(gap), bind(self, table, gap))
    )
    lengths = np.concatenate([rng.integers(1, 9, 600), uneven_lengths(rng, S, 12)]).astype(np.int32)
    long = uneven_lengths(rng, S, 10)
    prefixes = [write_corpus(lengths, "a"), write_corpus(long, "b")]
    exact = dataclasses.replace(ON, tau=tau, alpha=1.0)
    for blend, samples in (((prefixes[:1], None), 70), ((prefixes, [0.9, 0.1]), 40)):
        for _ in range(2):  # the second time with a census from the cache
            (train, _, _), builder = build(
                dataset_config(tmp_path, blend, add_extra_token_to_sequence=extra), [samples, 0, 0], exact
            )
            tail = [
                bool(np.isin(train[i]["loss_mask"].numpy(), builder.table.bucket_markers).any())
                for i in range(len(train))
            ]
            runs = "".join("x" if t else "." for t in tail).split("x")
            assert gaps.pop() == max(map(len, runs)) > 0


def test_unmasked_documents_are_refused(tmp_path, write_corpus):
    config = dataset_config(tmp_path, ([write_corpus(np.array([99] * 50, np.int32))], None))
    strict = dataclasses.replace(ON, allow_unmasked_documents=False)
    with pytest.raises(ValueError, match="documents of a sample would see each other"):
        build(config, [30, 0, 0], strict)
    assert build(config, [30, 0, 0], strict, emit_cu_seqlens=True)[1].table is not None


def test_mock_data_and_too_long_tau_are_refused(tmp_path, write_corpus):
    loss = ExactLoss(ON)
    with pytest.raises(ValueError, match="not of MockGPTDataset"):
        ExactDatasetBuilder(MockGPTDataset, [1, 1, 1], lambda: True, dataset_config(tmp_path), exact=ON, loss=loss)
    config = dataset_config(tmp_path, ([write_corpus(np.array([9] * 200, np.int32))], None))
    with pytest.raises(ValueError, match="tau=16 or more in a window of 48 tokens: the longest seen is 8"):
        build(config, [30, 0, 0], dataclasses.replace(ON, tau=16))


def test_an_empty_split_is_refused_where_megatron_would_hang(tmp_path, write_corpus):
    config = dataset_config(tmp_path, ([write_corpus(np.array([500] * 20, np.int32))], None), split="99,1,0")
    with pytest.raises(ValueError, match=r"the valid split of .* holds no token \(0 of 20 documents, split '99,1,0'\)"):
        build(config, [30, 0, 0])
