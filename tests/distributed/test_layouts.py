"""The plugin's main promise: loss, gradient norm and bucket losses do not depend on the parallel layout."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from tests.helpers.ranks import launch
from tests.helpers.tiny import config_file, write_data

STEPS = 3

TP2 = ["model.tensor_model_parallel_size=2"]
SP = [*TP2, "model.sequence_parallel=true"]
PP2 = ["model.pipeline_model_parallel_size=2"]
PP4 = ["model.pipeline_model_parallel_size=4"]
CP2 = ["model.context_parallel_size=2"]
CP4 = ["model.context_parallel_size=4"]
A2A = ["model.cp_comm_type=a2a"]
GATHER = ["model.cp_comm_type=all_gather"]
ASKED = {A2A[0]: "ulysses", GATHER[0]: "gather"}
PLAIN = ["model.optim.name=adam"]
MBS2 = ["model.micro_batch_size=2"]
FULL = [
    "model.activations_checkpoint_granularity=full",
    "model.activations_checkpoint_method=uniform",
    "model.activations_checkpoint_num_layers=1",
]
SELECTIVE = ["model.activations_checkpoint_granularity=selective"]
EVEN = ["model.data.eod_mask_loss=false"]  # every micro-batch supervises the same number of targets
OVERLAP = ["model.optim.overlap_grad_sync=true", "model.optim.overlap_param_sync=true"]

TIED = ["model.share_embeddings_and_output_weights=true"]
QWEN = ["model.qk_layernorm=true", "model.qkv_bias=true"]
GPT = ["model.normalization=layernorm", "model.activation=gelu", "model.bias=true"]
# Other architectures, each with a base checkpoint and a one-rank reference of its own.
FAMILIES = {"tied": TIED, "qwen": QWEN, "gpt": GPT, "mha": ["model.num_query_groups=4"]}

LAYOUTS = {
    1: {
        **{f"{name}-one_rank": [*settings, *PLAIN] for name, settings in FAMILIES.items()},
        "one_rank": PLAIN,
        "mbs2": [*PLAIN, *MBS2],
        "full": [*PLAIN, *FULL],
        "selective": [*PLAIN, *SELECTIVE],
        "distributed_optimizer": [],
    },
    2: {
        "tp2": [*TP2, *PLAIN],
        "tp2_mbs2": [*TP2, *MBS2],
        "sp": SP,
        "sp_full": [*SP, *FULL, *MBS2],
        "pp2": [*PP2, *PLAIN],
        "pp2_mbs2_selective": [*PP2, *MBS2, *SELECTIVE],
        "pp2_vpp2": [*PP2, "model.virtual_pipeline_model_parallel_size=2"],
        "dp2": PLAIN,
        "dp2_mbs2": [*PLAIN, *MBS2],
        "dp2_distributed_optimizer_overlap": OVERLAP,
        "cp2": [*CP2, *A2A],
        "cp2_gather": [*CP2, *GATHER],
        "cp2_mbs2_full": [*CP2, *MBS2, *FULL],
        "cp2_plain": [*CP2, *PLAIN],
        "tied-pp2": [*TIED, *PP2],
        "tied-tp2": [*TIED, *TP2, *PLAIN],
        "qwen-sp": [*QWEN, *SP],
        "qwen-tp2": [*QWEN, *TP2],
        "gpt-sp": [*GPT, *SP],
        "gpt-cp2": [*GPT, *CP2],
    },
    4: {
        "tp2_pp2": [*SP, *PP2],
        "tp2_cp2": [*SP, *CP2],
        "tp2_cp2_mbs2": [*TP2, *CP2, *MBS2, *PLAIN],
        "pp2_cp2": [*PP2, *CP2, *A2A, *MBS2],
        "pp2_cp2_gather_full": [*PP2, *CP2, *GATHER, *FULL],
        "cp4": CP4,
        "mha-cp4": [*FAMILIES["mha"], *CP4, *A2A],
        "mha-sp_cp2": [*FAMILIES["mha"], *SP, *CP2, *A2A],
    },
}
# How documents are attended across context-parallel ranks where the layout leaves it open: two KV heads.
CHOSEN = {"cp2_plain": "ulysses", "tp2_cp2": "gather", "cp4": "gather"}
CASES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts if "one_rank" not in name]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All layouts from one shared checkpoint, one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    config = config_file(folder, write_data(folder))
    jobs = folder / "jobs.json"

    def run(world, entries):
        jobs.write_text(json.dumps(entries))
        launch("distributed/run_layouts.py", [str(config), str(jobs), str(folder)], world)
        return {e["name"]: json.loads((folder / f"{e['name']}.json").read_text()) for e in entries}

    bases = {"base": [], **FAMILIES}
    off = "model.exact.enabled=false"
    found = run(1, [{"name": n, "overrides": [off, *o], "steps": 2, "save": True} for n, o in bases.items()])
    start = f"restore_from_path={folder}/runs/base"
    for world, layouts in LAYOUTS.items():
        entries = [
            {
                "name": name,
                "steps": STEPS,
                "attention": CHOSEN.get(name, next((mode for key, mode in ASKED.items() if key in overrides), None)),
                "overrides": [
                    f"restore_from_path={folder}/runs/{name.split('-')[0]}" if "-" in name else start,
                    f"trainer.devices={world}",
                    "trainer.limit_val_batches=1",
                    *overrides,
                ],
            }
            for name, overrides in layouts.items()
        ]
        if world == 1:
            entries += [
                {"name": "off", "steps": STEPS, "overrides": [start, "model.exact.enabled=false"]},
                {"name": "alpha0", "steps": STEPS, "overrides": [start, "model.exact.alpha=0"]},
                {
                    "name": "not_per_token",
                    "steps": STEPS,
                    "overrides": [start, *EVEN, "model.calculate_per_token_loss=false"],
                },
                {"name": "even", "steps": STEPS, "overrides": [start, *EVEN]},
                {"name": "bf16", "steps": STEPS, "overrides": [start, "trainer.precision=bf16"]},
                {
                    "name": "wsd",
                    "steps": 4,
                    "overrides": [
                        start,
                        "model.optim.sched.name=WSD",
                        "model.optim.sched.warmup_steps=1",
                        "model.optim.sched.wsd_decay_steps=2",
                    ],
                },
            ]
        if world == 2:
            entries += [
                {
                    "name": "not_per_token_cp2",
                    "steps": STEPS,
                    "overrides": [start, "trainer.devices=2", *CP2, *EVEN, "model.calculate_per_token_loss=false"],
                },
                {
                    "name": "not_per_token_dp2",
                    "steps": STEPS,
                    "overrides": [start, "trainer.devices=2", *EVEN, "model.calculate_per_token_loss=false"],
                },
                {"name": "straight", "steps": 4, "overrides": [start, "trainer.devices=2", *TP2]},
                {"name": "saved", "steps": 2, "save": True, "overrides": [start, "trainer.devices=2", *TP2]},
                {
                    "name": "saved_overlapping",
                    "steps": 2,
                    "save": True,
                    "overrides": [start, "trainer.devices=2", *OVERLAP, "model.optim.bucket_cap_mb=1"],
                },
            ]
        if world == 4:
            entries.append(
                {"name": "fresh_pp4", "steps": 0, "save": True, "overrides": ["trainer.devices=4", *PP4, *PLAIN]}
            )
        found.update(run(world, entries))
    for name in ("pp2", "one", "cp2"):
        shutil.copytree(folder / "runs" / "saved", folder / "runs" / f"resumed_{name}")
    found.update(
        run(
            2,
            [
                {"name": "resumed_pp2", "steps": 2, "overrides": ["trainer.devices=2", *PP2]},
                {"name": "resumed_cp2", "steps": 2, "overrides": ["trainer.devices=2", *CP2]},
            ],
        )
    )
    weights = [f"restore_from_path={folder}/runs/{name}" for name in ("saved", "saved_overlapping")]
    found.update(
        run(
            1,
            [
                {"name": "resumed_one", "steps": 2, "overrides": []},
                {"name": "from_saved", "steps": 1, "overrides": weights[:1]},
                {"name": "from_saved_overlapping", "steps": 1, "overrides": weights[1:]},
            ],
        )
    )
    found["folder"] = folder
    return found


def assert_same(lines, reference, rel=1e-5):
    assert len(lines) == len(reference)
    for line, expected in zip(lines, reference):
        for key in ("lm_loss", "exact_loss", "grad_norm", "validation_loss"):
            if key in expected:
                assert line[key] == pytest.approx(expected[key], rel=rel), key
        assert line.get("targets") == expected.get("targets")
        assert line["buckets"].keys() == expected["buckets"].keys()
        for name, bucket in expected["buckets"].items():
            assert line["buckets"][name]["targets"] == bucket["targets"]
            assert line["buckets"][name]["loss"] == pytest.approx(bucket["loss"], rel=rel)


@pytest.mark.parametrize(("world", "name"), CASES)
def test_layout_equals_one_rank(results, world, name):
    family = name.split("-")[0] + "-" if "-" in name else ""
    assert_same(results[name], results[f"{family}one_rank"])


def test_the_reference_is_worth_comparing_to(results):
    """Weights are fractional, targets are masked unevenly, three parts are told apart, and training moves."""
    steps = results["one_rank"][:STEPS]
    assert len({line["targets"] for line in steps}) > 1 and all(line["targets"] < 8 * 64 for line in steps)
    assert all(line["lm_loss"] != line["exact_loss"] for line in steps)
    assert list(steps[0]["buckets"]) == ["0-15", "16-31", "32-64"]
    assert len(results["one_rank"][-1]["buckets"]) == 4  # validation: 0-7, 8-15, 16-31, 32-64
    assert steps[-1]["lm_loss"] != pytest.approx(steps[0]["lm_loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["resumed_pp2", "resumed_cp2", "resumed_one"])
def test_a_tp2_checkpoint_goes_on_in_another_layout(results, name):
    assert_same(results[name], results["straight"][2:])


def test_alpha_0_is_bitwise_the_baseline(results):
    for line, expected in zip(results["alpha0"], results["off"], strict=True):
        for key in ("lm_loss", "exact_loss", "grad_norm", "targets"):
            assert line[key] == expected[key]


@pytest.mark.parametrize("name", ["not_per_token", "not_per_token_cp2", "not_per_token_dp2"])
def test_mean_of_means_is_the_same_where_counts_are_even(results, name):
    assert_same(results[name], results["even"])


def test_bf16_stays_close(results):
    for line, expected in zip(results["bf16"], results["one_rank"]):
        assert line["lm_loss"] == pytest.approx(expected["lm_loss"], rel=0.01)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
        assert line["targets"] == expected["targets"]


def test_schedules(results):
    """Rates of steps 0..3 between lr 5e-3 and min_lr 1e-3, as OptimizerParamScheduler has them."""
    rates = [line["learning_rate"] for line in results["wsd"]]
    assert rates == pytest.approx([0, 5e-3, 5e-3, 3e-3])
    cosine = [line["learning_rate"] for line in results["one_rank"][:STEPS]]
    assert cosine == pytest.approx([1e-3 + 4e-3 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(STEPS)])


def test_overlapping_the_parameter_gather_saves_the_steps_own_weights(results):
    assert_same(results["from_saved_overlapping"], results["from_saved"])


def test_pipeline_stages_start_with_layers_of_their_own(results):
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(str(results["folder"] / "runs/fresh_pp4/checkpoints/step_00000000"))
    key = "decoder.layers.self_attention.linear_qkv.weight"
    entry = reader.read_metadata().state_dict_metadata[key]
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
    load(state, storage_reader=reader, no_dist=True)
    layers = state[key]
    assert len(layers) == 4 and all(not torch.equal(layers[i], layers[j]) for i in range(4) for j in range(i))
