"""Where experts and multi-token prediction are refused, and what a checkpoint of another expert-parallel size is good for."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from exact_megatron.convert.config_json import config_json
from exact_megatron.planning.memory import memory
from exact_megatron.training.checkpoint_state import describe, refuse_changed_run, refuse_other_model
from exact_megatron.training.config import load_config
from exact_megatron.training.model import transformer_config

EXPERTS = ["model.num_moe_experts=4"]
DEPTHS = ["model.mtp_num_layers=1"]
EP2 = ["trainer.devices=2", "model.expert_model_parallel_size=2"]


def run_of(*overrides):
    return load_config(None, ["model.data.data_prefix=[x]", "trainer.accelerator=cpu", *overrides])


@pytest.mark.parametrize(("overrides", "words"), [(EXPERTS, "num_moe_experts=4: "), (DEPTHS, "mtp_num_layers=1: ")])
def test_plan_and_conversion_refuse_them_by_name(overrides, words):
    run = run_of(*overrides)
    with pytest.raises(ValueError, match=f"model.{words}only dense layers .* memory.json"):
        memory(run, 96)
    with pytest.raises(ValueError, match=f"model.{words}only dense models"):
        config_json(run.model, 64, 96, None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.moe_token_dispatcher_type=alltoall", "alltoall needs a GPU, .* use allgather"),
        ("model.moe_grouped_gemm=true", "moe_grouped_gemm=true needs a GPU and Transformer Engine"),
    ],
)
def test_what_needs_a_gpu_says_so_on_a_cpu(override, words):
    with pytest.raises(ValueError, match=words):
        transformer_config(run_of(*EXPERTS, override))


def state_of(run):
    return describe(run, 1, 96, None, None)


def test_a_checkpoint_goes_on_only_while_experts_are_shared_out_or_not():
    digests = {"census": None, "weights": None}
    for saved, now in ((EP2, []), ([], EP2)):
        with pytest.raises(ValueError, match="expert_model_parallel_size is .* restore_from_path"):
            refuse_changed_run(state_of(run_of(*EXPERTS, *saved)), run_of(*EXPERTS, *now), digests)
    refuse_changed_run(
        state_of(run_of(*EXPERTS, *EP2)),
        run_of(*EXPERTS, "trainer.devices=4", "model.expert_model_parallel_size=4"),
        digests,
    )


def test_a_checkpoint_from_before_a_setting_was_there_has_its_default():
    run = run_of()
    state = state_of(run)
    config = yaml.safe_load(state["config"])
    for field in dataclasses.fields(run.model):
        if field.name.startswith(("moe_", "num_moe", "expert_", "mtp_")):
            config["model"].pop(field.name)
    state["config"] = yaml.safe_dump(config)
    refuse_changed_run(state, run, {"census": None, "weights": None})
    assert refuse_other_model(state, run, 96) == []
    with pytest.raises(ValueError, match="holds another model .model.num_moe_experts: checkpoint None, now 4"):
        refuse_other_model(state, run_of(*EXPERTS), 96)
