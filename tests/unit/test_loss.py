import functools

import numpy as np
import pytest
import torch

from exact_megatron import ExactConfig, WeightTable
from exact_megatron.loss import ExactLoss, bucket_of, gpt_loss

S = 64


@pytest.fixture
def table():
    counts = np.random.default_rng(0).integers(1, 1000, S + 1)
    return WeightTable.from_counts(counts, S, tau=16, alpha=0.4)


def hooked(table, **settings):
    loss = ExactLoss(ExactConfig(enabled=True, **settings))
    function = loss.wrap(gpt_loss)
    loss.bind(table)
    return function


def batch(table, seed=0, b=3):
    rng = np.random.default_rng(seed)
    context = rng.integers(0, S + 1, (b, S))
    mask = torch.from_numpy(rng.random((b, S)) < 0.8)
    weights = torch.from_numpy(table.lookup[context]) * mask
    losses = torch.rand((b, S), generator=torch.Generator().manual_seed(seed)) * 5
    return context, mask, weights, losses.requires_grad_()


def test_weighted_sum_count_report_and_gradient(table):
    context, mask, weights, losses = batch(table)
    total, count, report = hooked(table)(weights, losses)
    total.backward()

    plain = losses.detach().double().numpy()
    w = weights.double().numpy()
    assert total.item() == pytest.approx((plain * w).sum(), rel=1e-6)
    assert count.dtype == torch.int32 and count.item() == int(mask.sum())
    torch.testing.assert_close(losses.grad, weights, rtol=0, atol=0)

    def check(name, chosen):
        expected = [(plain * chosen).sum(), chosen.sum()]
        np.testing.assert_allclose(report[name].numpy(), expected, rtol=1e-6)

    supervised = mask.numpy()
    check("lm loss", supervised)
    np.testing.assert_allclose(report["exact loss"].numpy(), [(plain * w).sum(), supervised.sum()], rtol=1e-6)
    check("lm loss 0-15", supervised & (context < 16))
    check("lm loss 16-31", supervised & (context >= 16) & (context < 32))
    check("lm loss 32-64", supervised & (context >= 32))
    assert len(report) == 5


@pytest.mark.parametrize("log_buckets", [True, False])
def test_names_are_known_without_a_loss(table, log_buckets):
    hook = hooked(table, log_buckets=log_buckets)
    _, _, weights, losses = batch(table)
    names = hook.exact_loss.names
    assert names == list(hook(weights, losses)[2])
    assert [bucket_of(name) for name in names] == [None, None, *(table.part_names if log_buckets else [])]
    assert ExactLoss(ExactConfig(enabled=True)).names == []


def test_log_buckets_off(table):
    _, _, weights, losses = batch(table)
    assert set(hooked(table, log_buckets=False)(weights, losses)[2]) == {"lm loss", "exact loss"}


def test_alpha_0_is_bitwise_the_plain_loss():
    table = WeightTable.from_counts(np.ones(S + 1, int), S, tau=16, alpha=0.0)
    _, mask, weights, losses = batch(table)
    assert torch.equal(weights, mask.float())
    with_hook = hooked(table)(weights, losses)
    gradient = torch.autograd.grad(with_hook[0], losses)[0]
    plain = gpt_loss(mask.float(), losses)
    assert torch.equal(with_hook[0], plain[0]) and torch.equal(with_hook[1], plain[1])
    assert torch.equal(gradient, torch.autograd.grad(plain[0], losses)[0])
    assert torch.equal(with_hook[2]["lm loss"], plain[2]["lm loss"])


def test_fully_masked_micro_batch_is_zero_not_nan(table):
    total, count, report = hooked(table)(torch.zeros(2, S), torch.rand(2, S))
    assert total.item() == 0 and count.item() == 0 and report["exact loss"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda w: (w != 0).float(), id="unweighted data"),
        pytest.param(lambda w: w.bfloat16(), id="cast to bf16"),
        pytest.param(lambda w: w * 2, id="scaled"),
    ],
)
def test_weights_that_are_not_the_tables_are_refused(table, spoil):
    _, _, weights, losses = batch(table)
    with pytest.raises(RuntimeError, match=f"not in the weight table {table.digest}"):
        hooked(table)(spoil(weights), losses)


def calls_until_stopped(function, batches, limit=2000):
    """(micro-batches until the run is stopped, the message)."""
    for number, weights in zip(range(1, limit), batches):
        try:
            function(weights, torch.ones_like(weights))
        except RuntimeError as error:
            return number, str(error)
    return None, ""


def repeated(*first, then):
    yield from first
    while True:
        yield then


def test_ones_that_the_table_has_too_are_found(table):
    raw = WeightTable.from_counts(table.counts, S, tau=16, alpha=0.4, normalization="none")
    assert raw.lookup[0] == 1
    _, mask, weights, _ = batch(raw)
    ones = mask.float()
    for settings in ({}, {"log_buckets": False}):
        number, message = calls_until_stopped(hooked(raw, **settings), repeated(then=ones))
        assert number <= 64 and "no weight of the tail in the last" in message and raw.digest in message
        number, _ = calls_until_stopped(hooked(raw, **settings), repeated(*[weights] * 70, then=ones))
        assert 70 < number <= 256
    assert calls_until_stopped(hooked(raw), repeated(then=weights), limit=300)[0] is None
    assert calls_until_stopped(hooked(raw), repeated(then=weights * 0), limit=300)[0] is None, "no target, no promise"


def test_a_mark_that_is_exactly_1_proves_nothing():
    counts = np.zeros(S + 1, np.int64)
    counts[[0, 8, 16, 32]] = 10_000_000, 20_940_547, 30_000_000, 20_000_000
    table = WeightTable.from_counts(counts, S, tau=0)
    assert table.bucket_markers[1] == 1 and (table.bucket_markers != 1).sum() == 3
    number, message = calls_until_stopped(hooked(table), repeated(then=torch.ones(3, S)))
    assert number <= 64 and "no weight of the tail in the last" in message
    assert calls_until_stopped(hooked(table), repeated(then=batch(table)[2]), limit=300)[0] is None


def test_a_first_batch_without_targets_does_not_spend_the_check(table):
    _, _, weights, _ = batch(table)
    number, message = calls_until_stopped(hooked(table), iter([weights * 0, weights, weights * 1.5]))
    assert number == 3 and "not in the weight table" in message


def test_another_tables_weights_are_found_later(table):
    other = WeightTable.from_counts(table.counts, S, tau=16, alpha=0.41)
    good, bad = batch(table)[2], batch(other)[2]
    number, message = calls_until_stopped(hooked(table), repeated(*[good] * 6, then=bad))
    assert number == 7 and f"not in the weight table {table.digest}" in message
    with torch.no_grad():  # validation
        assert calls_until_stopped(hooked(table), iter([good, bad]))[0] == 2


def test_validation_owes_no_tail_weight(table):
    short = torch.full((2, S), float(table.lookup[0]))
    with torch.no_grad():
        assert calls_until_stopped(hooked(table), repeated(then=short), limit=300)[0] is None
    assert calls_until_stopped(hooked(table), repeated(then=short), limit=300)[0]


def test_nothing_is_asked_of_weights_that_are_all_1():
    for settings in ({"alpha": 0.0}, {"max_weight": 1.0}):
        table = WeightTable.from_counts(np.ones(S + 1, int), S, tau=16, **settings)
        assert calls_until_stopped(hooked(table), repeated(then=torch.ones(2, S)), limit=300)[0] is None
        assert calls_until_stopped(hooked(table), repeated(then=torch.full((2, S), 0.5)), limit=300)[0] == 1


@pytest.mark.parametrize("normalization", ["corpus", "none"])
@pytest.mark.parametrize("tau", [0, 8, 16, 32])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_ones_are_stopped_under_every_table(normalization, tau, gamma):
    """But where all weights are 1: gamma=0 and tau=0 weight every bucket alike, which corpus normalization undoes."""
    counts = np.random.default_rng(tau).integers(1, 1000, S + 1)
    table = WeightTable.from_counts(counts, S, tau=tau, gamma=gamma, normalization=normalization)
    stopped = calls_until_stopped(hooked(table), repeated(then=torch.ones(3, S)))[0]
    assert (stopped is None) == np.allclose(table.lookup, 1, atol=1e-5)
    weights = batch(table)[2]
    assert calls_until_stopped(hooked(table), repeated(then=weights), limit=300)[0] is None


def test_a_known_gap_is_waited_for(table):
    raw = WeightTable.from_counts(table.counts, S, tau=16, alpha=0.4, normalization="none")
    loss = ExactLoss(ExactConfig(enabled=True))
    function = loss.wrap(gpt_loss)
    loss.bind(raw, longest_gap=600)
    assert calls_until_stopped(function, repeated(then=torch.ones(1, S)))[0] == 1216  # the first 64th after 2 * 600


def test_batches_are_no_more_often_out_of_luck_than_derived():
    """Samples with a tail target of probability p: the rarest run of samples without one that may stop training."""
    from exact_megatron.loss import _patience

    counts = np.zeros(S + 1, np.int64)
    counts[:16], counts[16:] = 1000, 1
    table = WeightTable.from_counts(counts, S, tau=16)
    patience = _patience(table, 0)
    samples = counts.sum() / S
    worst = counts[16:].sum() / (S + 1 - 16) / samples  # all tail targets in as few samples as can hold them
    assert (1 - worst) ** (patience / S) <= 1e-12


def test_hooking_twice_and_running_unbound_are_refused(table):
    loss = ExactLoss(ExactConfig(enabled=True))
    with pytest.raises(RuntimeError, match="no loss function is hooked"):
        loss.bind(table)
    function = loss.wrap(gpt_loss)
    with pytest.raises(RuntimeError, match="already hooked"):
        ExactLoss(ExactConfig()).wrap(functools.wraps(function)(lambda *a: function(*a)))
    with pytest.raises(RuntimeError, match="no weight table was bound"):
        function(torch.ones(1, S), torch.ones(1, S))


def test_hook_passes_the_hosts_arguments_and_tuple_on(table):
    def host_loss(loss_mask, output_tensor, model=None):
        assert model == "model" and set(loss_mask.unique().tolist()) <= {0.0, 1.0}
        return (output_tensor * loss_mask).sum() / loss_mask.sum(), {"lm loss": torch.ones(2), "other": torch.zeros(2)}

    loss = ExactLoss(ExactConfig(enabled=True))
    function = loss.wrap(host_loss)
    loss.bind(table)
    _, mask, weights, losses = batch(table)
    value, report = function(weights, losses.view(-1), model="model")
    assert value.item() == pytest.approx(((losses * weights).sum() / mask.sum()).item())
    assert "other" in report and report["lm loss"][1] == mask.sum()
