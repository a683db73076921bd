"""Weights of a training loop's own batches: the same as those that the dataset puts into the loss mask."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install exact-megatron[train]")

from exact_megatron import ExactConfig, ExposureCensus, WeightTable, effective_context  # noqa: E402
from exact_megatron.batch_context import UNSUPERVISED, effective_contexts  # noqa: E402

S = 96
ROWS = [  # boundaries of one row, and whether its last document goes on
    ([0, S], True),
    ([0, S], False),
    ([0, 1, 2, 3, S], True),
    ([0, S - 1, S], False),
    ([0, S - 1, S], True),
    ([0, 7, 40, 41, 90, S], True),
    ([0, *range(1, S + 1)], False),
]
EXPECTED = torch.tensor(np.stack([effective_context(np.array(cu), goes_on) for cu, goes_on in ROWS]))
CONTINUES = torch.tensor([goes_on for _, goes_on in ROWS])
LABELS = torch.ones(len(ROWS), S, dtype=torch.long)


def lengths(cu: list[int]) -> torch.Tensor:
    return torch.tensor(cu).diff()


def positions(cu: list[int], first: int = 0) -> torch.Tensor:
    """Position ids, of a row whose first document began `first` tokens before."""
    begin = torch.repeat_interleave(torch.tensor(cu[:-1]), lengths(cu))
    return torch.arange(cu[-1]) - begin + first * (begin == 0)


def ids(cu: list[int]) -> torch.Tensor:
    numbers = torch.arange(1, len(cu)) % 2 + 5  # neighbours differ, and no more
    return torch.repeat_interleave(numbers, lengths(cu))


def filled_up(cu: list[int], size: int = S + 1) -> torch.Tensor:
    return torch.tensor([*cu, *[cu[-1]] * (size - len(cu))], dtype=torch.int32)


def flat(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([0, *[row * S + end for row, cu in enumerate(rows) for end in cu[1:]]], dtype=torch.int32)


CU = [cu for cu, _ in ROWS]
WAYS = {
    "position_ids": {"position_ids": torch.stack([positions(cu) for cu in CU])},
    "rows_in_the_middle": {"position_ids": torch.stack([positions(cu, 1000) for cu in CU])},
    "document_ids": {"document_ids": torch.stack([ids(cu) for cu in CU])},
    "cu_seqlens_of_rows": {"cu_seqlens": torch.stack([filled_up(cu) for cu in CU])},
    "cu_seqlens": {"cu_seqlens": flat(CU)},
    "cu_seqlens_of_fixed_size": {"cu_seqlens": torch.cat([flat(CU), flat(CU)[-1:].expand(9)])},
    "cu_seqlens_with_empty_documents": {"cu_seqlens": flat(CU).repeat_interleave(2)},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_give_documents_is_effective_context(way):
    assert torch.equal(effective_contexts(LABELS, **WAYS[way], continues=CONTINUES), EXPECTED)
    one_row = effective_contexts(LABELS[5], **_row(WAYS[way], 5), continues=True)
    assert torch.equal(one_row, EXPECTED[5])


def _row(way: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    (name, value), *_ = way.items()
    return {name: torch.tensor(CU[row]) if value.dim() == 1 else value[row]}


@pytest.mark.parametrize("way", WAYS)
def test_hugging_faces_labels_are_one_further(way):
    """labels[t] is input t there: the model drops the first and pairs logits[t] with labels[t + 1]."""
    found = effective_contexts(LABELS, **WAYS[way], shifted=False)
    assert torch.equal(found[:, 1:], EXPECTED[:, :-1])
    assert (found[:, 0] == UNSUPERVISED).all()


def test_labels_that_are_not_supervised_have_no_context():
    labels = torch.where(torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100, 7)
    for way in WAYS.values():
        found = effective_contexts(labels, **way, continues=CONTINUES)
        assert torch.equal(found, torch.where(labels == -100, UNSUPERVISED, EXPECTED))
    assert (effective_contexts(labels, **WAYS["cu_seqlens"], ignore_index=7) == UNSUPERVISED).equal(labels == 7)


def test_padding_between_and_after_documents():
    """Transformer Engine's pair of arrays: documents of 5, 1 and 9 tokens in places of 8, 4 and 12, and 6 tokens after the last."""
    cu = torch.tensor([0, 5, 6, 15, 15], dtype=torch.int32)
    placed = torch.tensor([0, 8, 12, 24, 24], dtype=torch.int32)
    labels = torch.ones(1, 30, dtype=torch.long)
    expected = torch.full((30,), UNSUPERVISED)
    for start, length in ((0, 5), (8, 1), (12, 9)):
        expected[start : start + length] = torch.tensor([*range(1, length), 0])
    assert torch.equal(effective_contexts(labels, cu_seqlens=cu, cu_seqlens_padded=placed)[0], expected)
    alone = effective_contexts(labels, cu_seqlens=cu)[0]  # without padding between them
    assert torch.equal(alone[:15], torch.tensor([1, 2, 3, 4, 0, 0, *range(1, 9), 0])) and (alone[15:] == -1).all()


def test_weights_are_the_tables():
    rng = np.random.default_rng(0)
    census = ExposureCensus.from_document_lengths(rng.integers(1, 3 * S, 400), S)
    table = WeightTable.from_census(census, ExactConfig(alpha=0.4))
    labels = torch.where(torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(2)) < 0.2, -100, 7)
    weights = table.weights(labels, **WAYS["position_ids"], continues=CONTINUES)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, torch.from_numpy(table.lookup)[EXPECTED] * (labels != -100))
    longer = table.weights(torch.ones(2 * S, dtype=torch.long), cu_seqlens=torch.tensor([0, 2 * S]))
    assert (longer[S - 1 : -1] == float(table.lookup[S])).all()  # a longer context counts as the window's


def test_census_of_batches_is_that_of_the_samples():
    batches = [{"labels": LABELS[:3], "cu_seqlens": torch.stack([filled_up(cu) for cu in CU[:3]])}]
    batches += [{"labels": row, "position_ids": positions(cu)} for row, cu in zip(LABELS[3:], CU[3:])]
    batches[0]["continues"] = CONTINUES[:3]
    for batch, goes_on in zip(batches[1:], CONTINUES[3:]):
        batch["continues"] = bool(goes_on)
    census = ExposureCensus.from_batches(iter(batches), S)
    assert census.counts.tolist() == np.bincount(EXPECTED.flatten(), minlength=S + 1).tolist()
    assert census.samples == len(ROWS)
    assert (census + census).digest == ExposureCensus.from_batches(batches * 2, S).digest
    with pytest.raises(ValueError, match="no label in 96 tokens of the batches is supervised"):
        ExposureCensus.from_batches([{"labels": LABELS[0] * 0 - 100, "position_ids": positions(CU[0])}], S)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({}, "one of position_ids, cu_seqlens, document_ids, not by none"),
        ({"position_ids": LABELS, "document_ids": LABELS}, "not by position_ids and document_ids"),
        ({"position_ids": LABELS[0]}, r"position_ids has the shape \[96\], labels \[7, 96\]"),
        ({"cu_seqlens": torch.zeros(3, 4)}, r"cu_seqlens must be \[n \+ 1\] or \[7, n \+ 1\], not \[3, 4\]"),
        ({"position_ids": LABELS, "cu_seqlens_padded": LABELS}, "cu_seqlens_padded goes with a cu_seqlens"),
    ],
)
def test_what_does_not_fit_is_named(documents, message):
    with pytest.raises(ValueError, match=message):
        effective_contexts(LABELS, **documents)


def test_it_compiles_without_a_graph_break_and_reads_nothing_back():
    """No value leaves the device: a fake tensor has none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        labels = torch.ones(2, S, dtype=torch.long)
        for documents in (
            {"position_ids": torch.zeros(2, S, dtype=torch.long)},
            {"cu_seqlens": torch.zeros(9, dtype=torch.int32)},
        ):
            assert effective_contexts(labels, **documents).shape == (2, S)
