"""Query/key timing: against separate projections in torch parameter groups, in every layout, over a resume; off is off."""

from __future__ import annotations

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from exact_megatron.config import ExactError, QKTimingConfig
from exact_megatron.integrations.settings import read_settings, take_settings, take_timing
from exact_megatron.integrations.timing import before_nemo_step, bridge_progress, timed_train_step
from exact_megatron.qk_timing import _parts, _query_key_rows, kept_spans
from tests.distributed.test_layouts import FAMILIES, GPT, LAYOUTS, PLAIN
from tests.helpers.ranks import launch
from tests.helpers.tiny import config_file, write_data

STEPS = 6
ON = [
    f"trainer.max_steps={STEPS}",
    "model.qk_timing.enabled=true",
    "model.qk_timing.hold=0.34",
    "model.qk_timing.anneal=0.34",
]
FACTORS = [0.25, 0.25, 0.25, 0.25 + 0.75 * (3 / 6 - 0.34) / 0.34, 0.25 + 0.75 * (4 / 6 - 0.34) / 0.34, 1.0]
SHARP = [
    "model.init_method_std=0.2"
]  # else attention is flat at first, and its update changes the loss by less than 1e-5
BF16 = ["trainer.precision=bf16"]
# The first of two data-parallel shards then ends inside a row of the only layer's linear_qkv.
ODD = ["model.num_layers=1", "model.hidden_size=36", "model.kv_channels=10", "model.ffn_hidden_size=16"]
FAST = {
    1: ["gpt-one_rank", "one_rank"],
    2: ["tp2", "gpt-sp", "pp2_vpp2", "dp2_distributed_optimizer_overlap", "cp2"],
}
CASES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts if "one_rank" not in name]


def timed(folder, names, more):
    """Results by name of layouts of the core's matrix and of more jobs, {ranks: [...]}, in one launch for each number of ranks."""
    config = config_file(folder, write_data(folder))
    families = {name.split("-")[0] for world in names for name in names[world] if "-" in name}
    bases = {"": [], **{name: FAMILIES[name] for name in families}}
    jobs = {world: [] for world in sorted({1, *names})}
    jobs[1] += [{"name": f"base-{n}", "overrides": [*SHARP, *o], "steps": 2, "save": True} for n, o in bases.items()]
    for world in names:
        for name in names[world]:
            start = f"restore_from_path={folder}/runs/base-{name.split('-')[0] if '-' in name else ''}"
            overrides = [start, *ON, *SHARP, f"trainer.devices={world}", *LAYOUTS[world][name]]
            jobs[world].append({"name": name, "steps": STEPS, "first": True, "overrides": overrides})
        jobs[world] += more.get(world, [])
    found = {}
    for world in jobs:
        table = folder / f"jobs{world}.json"
        table.write_text(json.dumps(jobs[world]))
        launch(
            "distributed/run_qk_timing.py",
            [str(config), str(table), str(folder)],
            world,
            timeout=30 * len(jobs[world]) + 120,
        )
        found.update({job["name"]: json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs[world]})
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Some layouts, the reference with separate projections, resumed runs, and runs that timing must leave alone."""
    folder = tmp_path_factory.mktemp("timing")
    # A larger eps: single gradients near 0 would have Adam turn the last bit of a sum into a step.
    rates = ["model.optim.lr=1e-3", "model.optim.sched.min_lr=1e-4", "model.optim.eps=1e-5"]
    plain = [*ON, *SHARP, *GPT, *rates, *PLAIN, "model.exact.enabled=false"]
    one = [
        {"name": "reference", "steps": STEPS, "reference": True, "factors": FACTORS, "overrides": plain},
        {"name": "straight", "steps": STEPS, "overrides": [*ON, *SHARP]},
        {"name": "straight_bf16", "steps": STEPS, "overrides": [*ON, *SHARP, *BF16, *PLAIN], "first": True},
        {"name": "off", "steps": STEPS, "overrides": [*SHARP, ON[0]]},
        {"name": "scale_1", "steps": STEPS, "overrides": [*ON, *SHARP, "model.qk_timing.scale=1"]},
    ]
    for name, steps, overrides in (
        ("hold", 2, [*ON, *SHARP]),
        ("anneal", 4, [*ON, *SHARP]),
        ("anneal_bf16", 4, [*ON, *SHARP, *BF16, *PLAIN]),
    ):
        one.append({"name": name, "steps": steps, "save": True, "overrides": overrides})
        again = [*overrides, f"exp_manager.exp_dir={folder}/runs/{name}"]
        one.append({"name": f"{name}_resumed", "steps": STEPS - steps, "overrides": again})
    two = ["trainer.devices=2", *ON, *SHARP, *ODD]
    cut = [
        {"name": "cut", "steps": 1, "first": True, "overrides": two},
        {"name": "cut_bf16", "steps": 1, "first": True, "overrides": [*two, *BF16]},
    ]
    return timed(folder, FAST, {1: one, 2: cut})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return timed(
        tmp_path_factory.mktemp("timing_whole"), {world: list(layouts) for world, layouts in LAYOUTS.items()}, {}
    )


def test_equal_to_separate_projections_in_parameter_groups(results):
    """Weights and biases of query, key and value as parameters of their own, torch's AdamW, rates times the factor."""
    (result,) = results["reference"]["ranks"]
    assert max(result["difference"]) <= 1e-6 and len(result["difference"]) == STEPS
    assert [line["qk_factor"] for line in results["reference"]["lines"]] == pytest.approx(FACTORS, rel=1e-12)


@pytest.mark.parametrize(
    ("world", "name"),
    [pytest.param(w, n, marks=() if n in FAST.get(w, ()) else pytest.mark.slow, id=f"{w}-{n}") for w, n in CASES],
)
def test_layout_equals_one_rank(request, world, name):
    results = request.getfixturevalue("results" if name in FAST.get(world, ()) else "whole")
    reference = results[name.split("-")[0] + "-one_rank" if "-" in name else "one_rank"]
    for line, expected in zip(results[name]["lines"], reference["lines"], strict=True):
        for key in ("lm_loss", "exact_loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), key
        assert line["qk_factor"] == expected["qk_factor"]
    ranks, (one,) = results[name]["ranks"], reference["ranks"]
    assert all(
        (r["parameters"], r["layers"], r["line"]) == (one["parameters"], one["layers"], one["line"]) for r in ranks
    )
    copies = sum(rank["slowed"] for rank in ranks) / one["parameters"]
    assert copies == (1 if "model.optim.name=adam" not in LAYOUTS[world][name] else round(copies)) and copies >= 1
    assert sum(rank["held_bytes"] for rank in ranks) == 4 * copies * one["parameters"]


def test_timing_changes_what_the_layouts_are_compared_by(results):
    on, off = (results[name]["lines"] for name in ("straight", "off"))
    assert on[0]["lm_loss"] == off[0]["lm_loss"]
    assert on[3]["lm_loss"] != pytest.approx(off[3]["lm_loss"], rel=1e-4)


def test_shards_that_cut_rows(results):
    for name in ("cut", "cut_bf16"):
        ranks = results[name]["ranks"]
        assert sum(rank["cut"] for rank in ranks) > 0
        assert sum(rank["slowed"] for rank in ranks) == ranks[0]["parameters"] == (4 + 2) * 10 * 36


def test_masters_of_bf16(results):
    assert results["straight_bf16"]["ranks"][0]["slowed"] == 2 * (4 + 2) * 8 * 32  # a DistributedOptimizer's: cut_bf16


@pytest.mark.parametrize(
    ("name", "whole_run"), [("hold", "straight"), ("anneal", "straight"), ("anneal_bf16", "straight_bf16")]
)
def test_resume_is_bitwise(results, name, whole_run):
    lines = results[name]["lines"] + results[f"{name}_resumed"]["lines"]
    assert 0.25 <= lines[len(results[name]["lines"])]["qk_factor"] < 1
    for line, expected in zip(lines, results[whole_run]["lines"], strict=True):
        assert {k: v for k, v in line.items() if k != "tokens_per_s"} == {
            k: v for k, v in expected.items() if k != "tokens_per_s"
        }


def test_hooks_stand_during_the_phase_only(results):
    assert results["straight"]["hooks"] == [2] * 5 + [0]
    assert results["scale_1"]["hooks"] == [0] * STEPS and results["off"]["hooks"] == []


def test_scale_1_is_bitwise_off(results):
    for line, expected in zip(results["scale_1"]["lines"], results["off"]["lines"], strict=True):
        for key in ("lm_loss", "exact_loss", "grad_norm"):
            assert line[key] == expected[key]


def test_the_log_says_what_is_slowed(results):
    assert results["straight"]["ranks"][0]["line"] == (
        "query/key timing: layers 3-4 of 4, 3,072 parameters, learning rate x0.25 until step 2.04 of 6, then rising to x1 at step 4.08"
    )


def test_kept_spans_are_those_of_a_brute_force():
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        period, start, length = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(3))
        kept = int(torch.randint(0, period + 1, (), generator=generator))
        expected = [p - start for p in range(start, start + length) if p % period < kept]
        assert [p for a, b in kept_spans(start, start + length, period, kept) for p in range(a, b)] == expected


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's and apex's update (adam_w_mode) and their shape: a step of their own, state made in it."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.95), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            b1, b2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                m, v = (state.setdefault(name, torch.zeros_like(p)) for name in ("exp_avg", "exp_avg_sq"))
                m.lerp_(p.grad, 1 - b1)
                v.lerp_(p.grad**2, 1 - b2)
                m_hat, v_hat = m / (1 - b1 ** group["step"]), v / (1 - b2 ** group["step"])
                p -= group["lr"] * (m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * p)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, FusedAdam])
def test_taking_a_step_back_in_part_is_a_scaled_rate(cls):
    """For rows of one parameter, over a whole phase, decoupled or not: the states do not see the rate."""
    from exact_megatron.qk_timing import QKTiming

    torch.manual_seed(0)
    start, target = torch.randn(2, 12, 5, dtype=torch.float64)
    more = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    whole = torch.nn.Parameter(start.clone())
    one = cls([whole], lr=0.05, weight_decay=0.1, **more)
    slow, rest = torch.nn.Parameter(start[:8].clone()), torch.nn.Parameter(start[8:].clone())
    two = cls([{"params": [slow]}, {"params": [rest]}], lr=0.05, weight_decay=0.1, **more)
    timing = object.__new__(QKTiming)
    timing.config, timing.total_steps, timing._handles = QKTimingConfig(enabled=True, hold=0.4, anneal=0.4), 20, []
    timing._parts = [(one, whole, [(0, 40)])]
    for step in range(20):
        two.param_groups[0]["lr"] = 0.05 * timing.before_step(step)
        for p, goal in ((whole, target), (slow, target[:8]), (rest, target[8:])):
            p.grad = (p - goal).detach() ** 3
        one.step()
        two.step()
        torch.testing.assert_close(whole, torch.cat([slow, rest]), rtol=1e-9, atol=1e-9)
    assert not timing._handles


def test_factor_over_a_run():
    config = QKTimingConfig(enabled=True)
    factors = [config.factor(step, 1000) for step in range(1000)]
    assert factors[:41] == [0.25] * 41 and set(factors[50:]) == {1.0}
    assert factors[41:50] == pytest.approx([0.25 + 0.075 * i for i in range(1, 10)])
    assert [QKTimingConfig(enabled=True, hold=0.5, anneal=0).factor(step, 4) for step in range(4)] == [0.25, 0.25, 1, 1]
    assert QKTimingConfig().factor(0, 10) == 1.0
    assert QKTimingConfig(enabled=True, hold=1, anneal=0).factor(9, 10) == 0.25
    assert [n for n in range(1, 6) if config.touches(n, 5)] == [3, 4, 5]
    assert [n for n in range(1, 5) if config.touches(n, 4)] == [3, 4]
    assert QKTimingConfig(layers="all").touches(1, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enabled": "yes"}, "enabled='yes' is not true or false"),
        ({"scale": 1.5}, "scale=1.5 is not a finite number of at least 0 and at most 1"),
        ({"hold": float("nan")}, "hold=nan is not a finite number"),
        ({"hold": 0.7, "anneal": 0.4}, "hold=0.7 and model.qk_timing.anneal=0.4 are shares"),
        ({"layers": "upper"}, "layers='upper' is not one of upper_half, all"),
        ({"scal": 0.5}, r"unknown key model.qk_timing.scal: did you mean model.qk_timing.scale\?"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QKTimingConfig.from_mapping(settings)


def test_settings_on_a_line_and_in_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  qk_timing: {enabled: true, scale: 0.5}\n  exact: {alpha: 0.3}\n")
    line = ["++model.qk_timing.scale=0.125", "pretrain_gpt.py", "--exact-config", str(file), "--lr", "1"]
    timing, rest = take_timing(line, {})
    assert timing == QKTimingConfig(enabled=True, scale=0.125)
    exact, rest = take_settings(rest, {})
    assert exact.alpha == 0.3 and rest == ["pretrain_gpt.py", "--lr", "1"]
    assert take_timing([], {"EXACT_CONFIG": str(file)})[0].scale == 0.5
    assert take_timing([], {}, {"hold": 0.1})[0].hold == 0.1
    file.write_text("model:\n  qk_timing: {enabled: true}\n")
    assert read_settings(file) == {}
    with pytest.raises(ValueError, match="did you mean model.qk_timing.anneal"):
        take_timing(["model.qk_timing.aneal=1"], {})


def decoder(linear=None, **config):
    settings = {"num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 3, "hidden_size": 5}
    config = Namespace(**{**settings, "tensor_model_parallel_size": 1, **config})
    weight = torch.nn.Parameter(torch.zeros(24, 5))
    linear = SimpleNamespace(weight=weight, bias=torch.empty(0)) if linear is None else linear
    layer = SimpleNamespace(layer_number=2, self_attention=SimpleNamespace(linear_qkv=linear))
    return SimpleNamespace(config=config, layers=[SimpleNamespace(layer_number=1), layer])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (decoder(multi_latent_attention=True), "multi-latent attention has no fused query, key and value projection"),
        (decoder(attention_output_gate=True), "attention_output_gate puts gates between"),
        (
            decoder(tensor_model_parallel_size=4),
            "num_query_groups=2 over tensor_model_parallel_size=4 cuts query groups",
        ),
        (decoder(SimpleNamespace(to_wrap=1)), r"layer 2 \(SimpleNamespace\) has no self_attention.linear_qkv.weight"),
        (
            decoder(kv_channels=4),
            r"linear_qkv.weight of layer 2 has the shape \(24, 5\), not that of 2 whole query groups",
        ),
        (decoder(SimpleNamespace(weight=torch.nn.Parameter(torch.zeros(24, 5), False))), "layer 2 is frozen"),
    ],
)
def test_models_whose_rows_cannot_be_found_are_refused(model, message):
    with pytest.raises(ExactError, match=message):
        list(_query_key_rows([model], QKTimingConfig(enabled=True)))


class FP32Optimizer:
    def __init__(self, inner, **config):
        self.optimizer, self.config = inner, Namespace(**config)


class Lion(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload is not supported"),
        ({"optimizer_cuda_graph": True}, "optimizer_cuda_graph is not supported"),
        ({"inner": Lion}, "FP32Optimizer with Lion is not supported"),
        ({"master_weights": True}, "keeps the masters in its own state, unset use_precision_aware_optimizer"),
        ({"ddp": "use_megatron_fsdp"}, "Megatron-FSDP is not supported"),
    ],
)
def test_optimizers_that_update_otherwise_are_refused(change, message):
    model = decoder()
    rows = dict(_query_key_rows([model], QKTimingConfig(enabled=True)))
    inner = change.pop("inner", torch.optim.SGD)(list(rows), lr=1)
    inner.master_weights = change.pop("master_weights", False)
    ddp = Namespace(**{change.pop("ddp", "nothing"): True})
    part = FP32Optimizer(inner, **change)
    part.ddp_config = ddp
    with pytest.raises(ExactError, match=message):
        list(_parts(part, rows))


def test_other_optimizers_of_nemo_are_refused_and_bridge_tells_its_progress():
    trainer = Namespace(optimizers=[Lion([torch.nn.Parameter(torch.zeros(1))], lr=1)], max_steps=10, global_step=0)
    with pytest.raises(ExactError, match="Lion is not Megatron's optimizer: set model.optim.name=mcore"):
        before_nemo_step(QKTimingConfig(enabled=True), trainer, [SimpleNamespace(decoder=decoder())], print)
    trainer.max_steps, trainer.optimizers = -1, [SimpleNamespace(mcore_optimizer=None)]
    with pytest.raises(ExactError, match="trainer.max_steps=-1, and the phase is a share of the steps"):
        before_nemo_step(QKTimingConfig(enabled=True), trainer, [], print)
    state = Namespace(train_state=Namespace(step=3), cfg=Namespace(train=Namespace(train_iters=8)))
    assert bridge_progress({"global_state": state}) == (3, 8)


def test_a_train_step_of_another_shape_is_refused():
    with pytest.raises(ExactError, match="this host's train_step takes no optimizer"):
        timed_train_step(lambda model: None, QKTimingConfig(enabled=True), lambda _: (0, 1), print)
