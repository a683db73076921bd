import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exact_megatron import ExactConfig, ExposureCensus, WeightTable, allocation, log2_bucket_edges


def counts_for(bucket_counts, seq_length):
    """int64[S + 1] with the given number of targets at each bucket's lower edge."""
    counts = np.zeros(seq_length + 1, np.int64)
    counts[log2_bucket_edges(seq_length)[:-1]] = bucket_counts
    return counts


def reference_weights(bucket_counts, edges, alpha, gamma, tau, eps):
    """The paper's formula, one bucket at a time."""
    tail = [b for b in range(len(edges) - 1) if edges[b] >= tau]
    total = sum(bucket_counts[b] for b in tail)
    q = {b: bucket_counts[b] / total for b in tail}
    r = {b: (q[b] + eps) ** -gamma for b in tail if bucket_counts[b]}
    rbar = sum(q[b] * r[b] for b in r)
    return {b: 1 + alpha * r[b] / rbar for b in r}


COUNTS = st.lists(st.integers(0, 10**9), min_size=10, max_size=10).filter(lambda c: sum(c[-2:]) > 0)


@settings(max_examples=150, deadline=None)
@given(
    bucket_counts=COUNTS,
    alpha=st.one_of(st.just(0.0), st.floats(1e-5, 3)),
    gamma=st.floats(0, 2),
    normalization=st.sampled_from(["corpus", "none"]),
)
def test_budget_mean_and_formula(bucket_counts, alpha, gamma, normalization):
    seq_length, tau = 4096, 1024
    counts = counts_for(bucket_counts, seq_length)
    edges = log2_bucket_edges(seq_length)
    expected = reference_weights(bucket_counts, edges, alpha, gamma, tau, 1e-8)
    assume(
        max(expected.values()) < 2**23
    )  # wider ones are rejected, see test_a_budget_that_float32_cannot_carry_is_refused
    table = WeightTable.from_counts(counts, seq_length, alpha=alpha, gamma=gamma, normalization=normalization)
    for bucket, weight in expected.items():
        assert table.bucket_weights[bucket] == pytest.approx(weight, rel=1e-12)
    assert (table.bucket_weights[:8] == 1).all()
    in_tail = np.array(bucket_counts[8:], float)
    assert (in_tail / in_tail.sum()) @ (table.bucket_weights[8:] - 1) == pytest.approx(alpha, abs=1e-9)

    assert table.lookup.dtype == np.float32 and table.lookup.shape == (seq_length + 1,)
    mean = (counts @ table.lookup.astype(float)) / counts.sum()
    assert table.mean == pytest.approx(mean, abs=1e-12)
    if normalization == "corpus":
        assert abs(mean - 1) < 1e-7
    if alpha == 0:
        assert (table.lookup == np.float32(1)).all() and len(table.bucket_markers) == 0 and table.part_names == []
    else:
        filled = [(c, w) for c, w in zip(bucket_counts[8:], table.bucket_markers) if c]
        assert all(a[1] < b[1] for a in filled for b in filled if a[0] > b[0])  # the rarer weighs more
        marked = [*table.bucket_markers, table.lookup[0]]
        assert len(set(marked)) == len(marked) == 3
        assert (table.bucket_markers > table.lookup[0]).all()


def test_rarer_buckets_weigh_more():
    table = WeightTable.from_counts(counts_for([100] * 7 + [1000, 100, 10], 4096), 4096, tau=512)
    weights = table.bucket_weights[-3:]
    assert weights[0] < weights[1] < weights[2]
    flat = WeightTable.from_counts(counts_for([100] * 7 + [1000, 100, 10], 4096), 4096, tau=512, gamma=0.0)
    assert flat.bucket_weights[-3:].tolist() == [1.15, 1.15, 1.15]
    assert len(set(flat.bucket_markers)) == 3 and max(flat.bucket_markers) < min(flat.bucket_markers) * (1 + 1e-6)


def test_empty_tail_bucket_takes_its_neighbours_weight():
    table = WeightTable.from_counts(counts_for([100] * 6 + [50, 0, 0, 10], 4096), 4096, tau=256)
    w = table.bucket_weights
    # Edges 256, 512, 1024 and 2048: 512 is nearest to 256, 1024 to 2048.
    assert w[7] == w[6] and w[8] == w[9] and w[6] < w[9]
    one_between = WeightTable.from_counts(counts_for([100] * 7 + [50, 0, 10], 4096), 4096, tau=512).bucket_weights
    assert one_between[8] == one_between[7]  # of two equally near, the shorter context


def test_last_bucket_is_closed_at_the_window():
    """The one target with l = S belongs to the last bucket and does not get a weight of its own."""
    counts = counts_for([100] * 10, 4096)
    counts[4096] += 1
    table = WeightTable.from_counts(counts, 4096)
    assert table.lookup[4096] == table.lookup[2048]


def test_no_tail_target_names_window_tau_and_longest():
    counts = np.zeros(4097, np.int64)
    counts[:700] = 5
    with pytest.raises(
        ValueError,
        match="tau=1024 or more in a window of 4096 tokens: the longest seen is 699. Set model.exact.tau to at most 512,",
    ):
        WeightTable.from_counts(counts, 4096)


def test_max_weight_caps_the_raw_weight():
    counts = counts_for([10000] * 8 + [1000, 1], 4096)
    free = WeightTable.from_counts(counts, 4096, normalization="none")
    capped = WeightTable.from_counts(counts, 4096, normalization="none", max_weight=1.5)
    assert free.bucket_weights[-1] > 1.5 == capped.bucket_weights[-1]
    assert capped.bucket_weights[-2] == free.bucket_weights[-2]


def test_digest_follows_the_weights():
    census = ExposureCensus(counts_for([100] * 10, 4096), 4096, 1)
    digest = WeightTable.from_census(census, ExactConfig()).digest
    assert digest == WeightTable.from_census(census, ExactConfig(enabled=True)).digest
    assert digest != WeightTable.from_census(census, ExactConfig(alpha=0.16)).digest
    assert digest != WeightTable.from_census(census, ExactConfig(tau=2048)).digest


def test_measuring_table_marks_every_bucket_and_moves_no_weight():
    table = WeightTable.measuring(4096)
    assert len(table.bucket_markers) == 10 and table.part_names[0] == "0-7" and table.part_names[-1] == "2048-4096"
    assert len(set(table.lookup.tolist())) == 10
    assert table.lookup.max() / table.lookup.min() < 1 + 2e-6


def test_rows_add_up():
    table = WeightTable.from_counts(counts_for(range(1, 11), 4096), 4096)
    rows = table.rows()
    assert [r["low"] for r in rows] == log2_bucket_edges(4096)[:-1].tolist() and rows[-1]["high"] == 4096
    assert sum(r["share"] for r in rows) == pytest.approx(1) == sum(r["weighted_share"] for r in rows)
    tail = [r for r in rows if r["low"] >= 1024]
    assert table.tail_share == pytest.approx(sum(r["targets"] for r in tail) / 55)
    gained = table.weighted_tail_share / (1 - table.weighted_tail_share)
    assert gained == pytest.approx(1.15 * table.tail_share / (1 - table.tail_share), rel=1e-6)


@pytest.mark.parametrize("cap", [1.0, 1.05])
def test_a_binding_cap_keeps_mean_and_order(cap):
    counts = counts_for([1000] * 7 + [300, 200, 100], 4096)
    table = WeightTable.from_counts(counts, 4096, tau=512, alpha=0.3, max_weight=cap)
    assert abs(table.mean - 1) < 1e-7
    if cap == 1:
        assert (table.lookup == 1).all() and not len(table.bucket_markers)
    else:
        assert (
            table.bucket_markers[0]
            < table.bucket_markers[1]
            < table.bucket_markers[2]
            < table.bucket_markers[0] * (1 + 1e-6)
        )


def test_extreme_exponents_and_budgets():
    counts = counts_for([1000] * 8 + [300, 1], 4096)
    steep = WeightTable.from_counts(counts, 4096, gamma=100.0)
    assert np.isfinite(steep.lookup).all() and steep.bucket_weights[-1] == pytest.approx(1 + 0.15 * 301)
    with pytest.raises(
        ValueError, match="alpha=1e[+]39 is not a finite number of at least 0 .float32 holds 3.4e[+]38 at most"
    ):
        WeightTable.from_counts(counts, 4096, alpha=1e39, normalization="none")


@pytest.mark.parametrize("normalization", ["corpus", "none"])
@pytest.mark.parametrize("alpha", [1e9, 1e20, 3e38])
def test_a_budget_that_float32_cannot_carry_is_refused(alpha, normalization):
    counts = counts_for([1000] * 8 + [300, 1], 4096)
    with pytest.raises(
        ValueError, match=r"alpha=.* gives the weights .* below tau=1024, .*choose a smaller .*max_weight"
    ):
        WeightTable.from_counts(counts, 4096, alpha=alpha, normalization=normalization)
    capped = WeightTable.from_counts(counts, 4096, alpha=alpha, normalization=normalization, max_weight=2)
    assert capped.lookup.min() > 0 and (normalization == "none" or abs(capped.mean - 1) < 1e-4)


def test_weights_whose_mean_is_off_are_refused(monkeypatch):
    """Whatever rounds them: the loss scale would not be the baseline's."""
    counts = counts_for([1000] * 8 + [300, 1], 4096)
    rounded = allocation._distinct
    for factor, refused in ((1.00005, False), (0.99995, False), (1.0002, True), (0.9998, True)):
        monkeypatch.setattr(allocation, "_distinct", lambda *a, factor=factor: rounded(*a) * np.float32(factor))
        if refused:
            with pytest.raises(
                ValueError, match=r"their mean is (1.000|0.999).*, more than 0.0001 from the 1 that keeps"
            ):
                WeightTable.from_counts(counts, 4096)
        else:
            WeightTable.from_counts(counts, 4096)
        WeightTable.from_counts(counts, 4096, normalization="none")


def test_a_short_part_of_few_targets_keeps_its_weight():
    """It cannot take up the rounding of the tail's millions: its weight became negative."""
    table = WeightTable.from_counts(counts_for([1] + [0] * 7 + [10**7, 10**7], 4096), 4096)
    assert table.lookup[0] == pytest.approx(1 / 1.15, rel=1e-6) and abs(table.mean - 1) < 1e-6


@settings(max_examples=150, deadline=None)
@given(
    bucket_counts=COUNTS,
    share=st.floats(0.01, 0.99),
    gamma=st.floats(0, 2),
    max_weight=st.one_of(st.none(), st.floats(1.001, 1e3)),
)
def test_a_tail_share_is_met_and_is_the_alpha_that_it_means(bucket_counts, share, gamma, max_weight):
    counts = counts_for(bucket_counts, 4096)
    tail, short = sum(bucket_counts[8:]), sum(bucket_counts[:8])
    asked = {"gamma": gamma, "max_weight": max_weight, "normalization": "none"}

    def table(**settings):
        return WeightTable.from_counts(counts, 4096, **asked, **settings)

    if share * (tail + short) < tail * (1 - 1e-9):
        with pytest.raises(ValueError, match="is below .*, the share of the targets that lie in the tail"):
            table(tail_share=share)
    elif max_weight and share * (max_weight * tail + short) > max_weight * tail * (1 + 1e-9):
        with pytest.raises(ValueError, match="cannot be reached with model.exact.max_weight="):
            table(tail_share=share)
    elif abs(share * (tail + short) - tail) > 1e-6 * tail and not (
        max_weight and share * (max_weight * tail + short) > max_weight * tail * (1 - 1e-6)
    ):
        try:
            found = table(tail_share=share)
        except ValueError as error:
            assert "in a float32 sum" in str(error)
            return
        weights = bucket_counts * found.bucket_weights
        assert weights[8:].sum() / weights.sum() == pytest.approx(share, rel=1e-9)
        assert found.config.tail_share is None
        assert table(alpha=found.config.alpha).digest == found.digest


def test_a_tail_share_is_given_instead_of_alpha():
    with pytest.raises(ValueError, match="tail_share=0.35 and model.exact.alpha=0.2 both say"):
        ExactConfig(alpha=0.2, tail_share=0.35)
    with pytest.raises(ValueError, match="tail_share=1"):
        ExactConfig(tail_share=1.0)
    census = ExposureCensus.from_document_lengths(np.array([9, 70, 4000, 300, 5000]), 1024)
    table = WeightTable.from_census(census, ExactConfig(tail_share=0.8))
    assert table.weighted_tail_share == pytest.approx(0.8, abs=1e-6) and abs(table.mean - 1) < 1e-7
