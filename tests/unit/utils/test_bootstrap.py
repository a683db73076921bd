import numpy as np
import pytest

from exact_megatron.utils.bootstrap import BLOCK, bootstrap, interval, medians


@pytest.mark.parametrize("resamples", [1, BLOCK, 2 * BLOCK + 50])
def test_units_are_drawn_with_replacement(resamples):
    times = bootstrap(lambda times: times, 7, resamples, np.random.default_rng(0))
    assert times.shape == (resamples, 7) and (times.sum(1) == 7).all() and times.min() >= 0
    assert times.max() > 1


def test_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(3, 2, 400)
    means = bootstrap(lambda times: times @ values / 400, 400, 4000, np.random.default_rng(2))
    half = 1.96 * values.std() / 20
    assert interval(means) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_medians_are_of_the_drawn_values():
    values = np.array([1.0, 2.0, 4.0, 8.0])
    seen = medians(values, 500, np.random.default_rng(3))
    assert set(seen) <= {(a + b) / 2 for a in values for b in values} and len(set(seen)) > 5
    assert interval(medians(np.full(5, 1.5), 500, np.random.default_rng(3))) == (1.5, 1.5)
