import numpy as np
import pytest

from exact_megatron.study.statistics import holm, paired

pytest.importorskip("scipy", reason="pip install exact-megatron[report]")


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [abs((found := paired(rng.normal(0.3, 2.0, 6))).mean - 0.3) <= found.half_width for _ in range(4000)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_of_known_differences():
    found = paired([-1.0, -2.0, -3.0, 0.5])  # t_3(.975) = 3.18245, sd 1.49304
    assert (found.mean, found.pairs, found.same_sign) == (-1.375, 4, 3)
    assert found.half_width == pytest.approx(3.182446 * 1.493039 / 2, rel=1e-5)
    angle = np.arctan(1.375 / (1.493039 / 2) / 3**0.5)  # Student's t of 3 degrees of freedom in closed form
    assert (
        found.p == pytest.approx(1 - 2 / np.pi * (angle + np.sin(angle) * np.cos(angle)), abs=1e-5)
        and not found.differs
    )
    assert paired([0.1, 0.11, 0.09]).differs
    one = paired([0.7])
    assert (one.half_width, one.p, one.differs) == (None, None, False)
    assert paired([0.2, 0.2]).p is None
    for bad in ([], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="finite numbers"):
            paired(bad)


def test_holm():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06], abs=1e-12)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
