import functools

import numpy as np
import pytest
import torch

from exact_megatron import ExactConfig, WeightTable
from exact_megatron.loss import ExactLoss, gpt_loss

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
