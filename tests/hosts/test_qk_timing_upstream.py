"""Query/key timing in the real, unedited pretrain_gpt.py, on a CPU: `make test-upstream MEGATRON_LM=/path/to/checkout`."""

from __future__ import annotations

import pytest

from tests.hosts import megatron_lm as lm

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(lm.repository() is None, reason=lm.ABSENT),
]

ON = ["model.qk_timing.enabled=true", "model.qk_timing.hold=0.5", "model.qk_timing.anneal=0.25"]  # of 8 steps
LINE = "query/key timing: layers 3-4 of 4, 3,072 parameters, learning rate x0.25 until step 4 of 8, then rising to x1 at step 6"
LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2_vpp2": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "dp2_distributed_optimizer": "--use-distributed-optimizer",
}


@pytest.fixture(scope="module", params=lm.refs())
def logs(request, tmp_path_factory):
    """Logs by name at one tag; all runs start from the weights of two plain steps."""
    folder = tmp_path_factory.mktemp("qk_timing")
    checkout = lm.copy_checkout(request.param, folder)
    stock = [*lm.arguments(checkout, folder), "--data-path", lm.write_data(folder, "x", 11), "--split", "90,10,0"]
    stock += ["--spec", "cpu_spec", "layer", "--no-create-attention-mask-in-dataloader"]
    here = ["--load", str(folder / "base"), "--finetune"]
    script = str(checkout / "pretrain_gpt.py")

    def run(name, settings, *more):
        return {
            "name": name,
            "mode": "launch",
            "arguments": [*settings, script, *stock, *more],
        }

    one = [
        {"name": "base", "mode": "plain", "arguments": [*stock, "--train-iters", "2", "--save", str(folder / "base")]},
        {"name": "off", "mode": "plain", "arguments": [*stock, *here]},
        run("scale_1", [*ON, "model.qk_timing.scale=1"], *here),
        run("one_rank", ON, *here, "--save", str(folder / "one")),
        run("resumed", ON, "--load", str(folder / "one"), "--ckpt-step", "3"),
        run("bf16", ON, *here, "--bf16"),
        {"name": "patched", "mode": lm.patched(checkout, folder), "arguments": [*stock, *here, *ON]},
    ]
    lm.run_jobs(checkout, folder, 1, one)
    lm.run_jobs(checkout, folder, 2, [run(name, ON, *here, *flags.split()) for name, flags in LAYOUTS.items()])
    return lambda name: lm.Log(folder, name)


@pytest.mark.parametrize("name", [*LAYOUTS, "patched"])
def test_every_layout_trains_alike(logs, name):
    found, expected = logs(name), logs("one_rank")
    assert found.steps().keys() == expected.steps().keys() and len(expected.steps()) == 8
    for step, line in expected.steps().items():
        for key, value in line.items():
            assert float(found.steps()[step][key]) == pytest.approx(float(value), rel=1e-5), (step, key)
    assert found.text.count(LINE) == 1


def test_timing_changes_the_run_and_scale_1_does_not(logs):
    off = logs("off").steps()
    assert logs("scale_1").steps() == off
    assert logs("one_rank").steps()[1] == off[1] and logs("one_rank").steps()[8] != off[8]


def test_resume_inside_the_phase(logs):
    resumed, expected = logs("resumed").steps(), logs("one_rank").steps()
    assert resumed.keys() == {4, 5, 6, 7, 8}
    for step, line in resumed.items():
        assert line["grad norm"] == expected[step]["grad norm"]
        if step != 5:  # Megatron-LM prints the mean of two losses for the second step after a start
            assert line == expected[step]


def test_bf16(logs):
    assert LINE in logs("bf16").text and len(logs("bf16").steps()) == 8
