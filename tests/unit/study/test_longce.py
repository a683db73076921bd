import numpy as np
import pytest
import torch

from exact_megatron import effective_context
from exact_megatron.attention.boundaries import document_boundaries
from exact_megatron.study.longce import CAP, cut_documents, importance

S, K = 64, 8
CUTS = [0, 1, 30, 64, 64 + 7, 64 + 8, 128]  # two samples; documents of 1, 29, 34, 7, 1 and 56 tokens


def seen(boundaries):
    """Tokens of its own part that every position has before it, itself counted."""
    return torch.tensor(np.concatenate([np.arange(1, b - a + 1) for a, b in zip(boundaries, boundaries[1:])]))


def test_every_target_that_sees_more_than_k_is_scored_with_half_k_to_k():
    whole = seen(CUTS)
    counted = torch.zeros(128, dtype=torch.int)
    for shift in (0, K // 2):
        cuts, counts = cut_documents(tuple(CUTS), K, shift)
        assert set(CUTS) <= set(cuts) and cuts == sorted(set(cuts))
        here = torch.tensor(counts)
        counted += here
        short = seen(cuts)[here]
        assert short.min() > K // 2 and short.max() <= K
        assert (short < whole[here]).all()
    assert torch.equal(counted.bool(), whole > K) and counted.max() == 1


def test_weights_are_the_papers_with_mean_1():
    boundaries = document_boundaries(CUTS, S, 2)

    def losses_with(given):
        return (8.0 / seen(given.boundaries)).float().view(2, S)

    losses = losses_with(boundaries)
    supervised = torch.ones(2, S, dtype=torch.bool)
    supervised[0, :5] = False
    weights = importance(losses, boundaries, K, losses_with, supervised)
    expected = torch.ones(128)
    for document in zip(CUTS, CUTS[1:]):
        for at in range(document[0] + K, document[1]):
            inside = at - document[0]
            short = (
                inside % (K // 2) + K // 2 + 1
            )  # of two parts that hold a position the one where it is in the second half
            expected[at] = min(np.exp(8.0 / short - 8.0 / (inside + 1)), CAP)
    expected = expected.view(2, S)
    torch.testing.assert_close(weights, expected / expected[supervised].mean())
    assert weights[supervised].mean() == pytest.approx(1, abs=1e-6)


def test_effective_context_is_what_is_meant():
    context = effective_context(np.array(CUTS[:4]))
    assert (context[:-1] <= seen(CUTS[:4])[:-1].numpy()).all()
