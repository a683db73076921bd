"""NeMo's own, unedited megatron_gpt_pretraining.py and stock YAML, with and without EXACT, on a CPU. `make test-nemo`.

A tiny GPT, 6 steps a run. Losses and gradient norms are read from TensorBoard, as float32.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.hosts import nemo_runs as nr

pytestmark = [pytest.mark.upstream, pytest.mark.skipif(nr.examples() is None, reason=nr.ABSENT)]

ON = ["model.exact.enabled=true", "model.exact.alpha=0.5", "model.exact.tau=16"]
MASKED = ["model.data.reset_attention_mask=true"]
UNMASKED = ["model.exact.allow_unmasked_documents=true"]
EXACT = [*ON, *MASKED, "model.data.eod_mask_loss=true"]
DISTRIBUTED = ["model.optim.name=mcore_distributed_optim"]
SAVE = [*DISTRIBUTED, "exp_manager.create_checkpoint_callback=True", "trainer.val_check_interval=2"]
SAVE += ["exp_manager.checkpoint_callback_params.filename='at-{step}-{consumed_samples}'"]
LAYOUTS = {
    "tp2": ["model.tensor_model_parallel_size=2"],
    "tp2_sp": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "dp2": [],
    "dp2_mbs1": ["model.micro_batch_size=1"],
    "dp2_distributed_optimizer": DISTRIBUTED,
    "cp2": ["+model.context_parallel_size=2"],
    "cp2_gather": ["+model.context_parallel_size=2", "+model.mcore_customization_config.cp_comm_type=all_gather"],
}
TIMED = [*DISTRIBUTED, "model.qk_timing.enabled=true", "model.qk_timing.hold=0.5", "model.qk_timing.anneal=0.25"]
PP2 = ["model.pipeline_model_parallel_size=2"]
STEPS = range(6)


def own_yaml(folder: Path, name: str, text: str) -> list[str]:
    """A configuration of the user's own, in a folder of their own."""
    (folder / "conf").mkdir(exist_ok=True)
    (folder / "conf" / f"{name}.yaml").write_text(text)
    return [f"--config-path={folder}/conf", f"--config-name={name}"]


def own_yamls(folder: Path) -> dict[str, list[str]]:
    stock = nr.examples() / "conf"
    on_top = f"defaults: [megatron_gpt_config, _self_]\nhydra: {{searchpath: ['file://{stock}']}}\n"
    complete = (stock / "megatron_gpt_config.yaml").read_text()
    block = "exact: {enabled: true, alpha: 0.4, tau: 16}"
    own_yaml(folder, "below", f"defaults: [megatron_gpt_config, _self_]\nmodel:\n  {block}\n")
    layered = on_top.replace("megatron_gpt_config", "below") + "model: {num_layers: 2}\n"
    return {
        "own_on_top": [*own_yaml(folder, "on_top", f"{on_top}model:\n  {block}\n"), "model.exact.alpha=0.5"],
        "own_without_block": [*own_yaml(folder, "without", on_top), *ON],
        "own_complete": [
            *own_yaml(folder, "complete", complete.replace("\nmodel:\n", f"\nmodel:\n  {block}\n", 1)),
            "model.exact.alpha=0.5",
        ],
        "own_layered": [*own_yaml(folder, "layered", layered), "model.exact.alpha=0.5"],
        "own_misspelled": own_yaml(folder, "misspelled", f"{on_top}model:\n  exact: {{enabled: true, alhpa: 0.4}}\n"),
    }


REFUSED = {
    "typo": (["model.exact.alhpa=0.2"], "Key 'alhpa' is not in struct"),
    "typo_plus": (["+model.exact.alhpa=0.2"], "unknown key model.exact.alhpa: did you mean model.exact.alpha?"),
    "typo_block": (["model.exakt.enabled=true"], "Key 'exakt' is not in struct"),
    "wrong_kind": (["model.exact.alpha=much"], "model.exact.alpha='much' is not a finite number"),
    "nobody_masks": (["model.exact.enabled=true"], "Ask for masking with model.data.reset_attention_mask=true"),
    "mock": ([*EXACT, "model.data.data_impl=mock"], "mock data have no documents"),
    "fim": ([*EXACT, "+model.data.add_fim=true"], "fill-in-the-middle reorders documents"),
    "legacy": ([*EXACT, "+model.data.legacy_dataset=true"], "only megatron-core's GPTDataset is weighted"),
    "old_model": ([*EXACT, "model.mcore_gpt=false"], "the model from before megatron-core is not hooked"),
    "fsdp": ([*EXACT, "model.fsdp=true"], "its gradients are reduced in another way"),
    "dropout": ([*EXACT, "model.attention_dropout=0.1"], "attention_dropout=0.1: set it to 0.0"),
    "own_misspelled": ([], "unknown key model.exact.alhpa: did you mean model.exact.alpha?"),
    "changed": ([], "alpha: 0.5 in the checkpoint, now 0.4"),
    "unweighted": ([], "trained with EXACT's weights, and this run does not enable them"),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = Path(os.environ["NEMO_RUNS"]) if os.environ.get("NEMO_RUNS") else tmp_path_factory.mktemp("nemo")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    plain, padded = nr.write_data(folder, "plain", 1, least=2), nr.write_data(folder, "padded", 2, least=1)
    yamls = own_yamls(folder)

    def job(name, more, data=padded, world=1, **others):
        ours = [word for word in more if word.startswith("--")]
        hydras = [word for word in more if not word.startswith("--")]
        return {"name": name, "arguments": [*ours, *nr.arguments(folder, name, data, world), *hydras], **others}

    checkpoint = f"model.resume_from_checkpoint='{folder}/exp/saved/checkpoints/at-step=2-consumed_samples=16.0'"
    one = [
        job("plain", [], plain, plugin=False),
        job("off", [], plain),
        job("alpha_0", [*ON, "model.exact.alpha=0", *UNMASKED], plain),
        job("dense", [*MASKED, "model.get_attention_mask_from_fusion=false"], plain, plugin=False),
        job("alpha_0_masked", [*ON, "model.exact.alpha=0", *MASKED], plain),
        job("no_plugin", ["model.exact.enabled=true"], plugin=False),
        job("one_rank", EXACT),
        job("mbs1", [*EXACT, "model.micro_batch_size=1"]),
        job(
            "recomputed",
            [
                *EXACT,
                "model.activations_checkpoint_granularity=full",
                "model.activations_checkpoint_method=uniform",
                "model.activations_checkpoint_num_layers=1",
            ],
        ),
        job("pads", [*ON, *MASKED]),
        job("pads_mbs1", [*ON, *MASKED, "model.micro_batch_size=1"]),
        job("rope", [*EXACT, "model.position_embedding_type=rope"]),
        job("distributed", DISTRIBUTED, plain, plugin=False),
        job("timed", TIMED, plain),
        job("timed_scale_1", [*TIMED, "model.qk_timing.scale=1"], plain),
        job("saved", [*EXACT, *SAVE]),
        job("resumed", [*EXACT, *SAVE, checkpoint]),
        job("changed", [*EXACT, *SAVE, checkpoint, "model.exact.alpha=0.4"]),
        job("unweighted", [*MASKED, "model.data.eod_mask_loss=true", *SAVE, checkpoint]),
        job("accepted", [*EXACT, *SAVE, checkpoint, "model.exact.alpha=0.4", "model.exact.allow_changed_weights=true"]),
        job(
            "environment",
            [*MASKED, "model.data.eod_mask_loss=true"],
            environment={"EXACT_ENABLED": "true", "EXACT_ALPHA": "0.5", "EXACT_TAU": "16"},
        ),
        job("own_script", EXACT, script=str(own_script(folder)), plugin=False),
        *(job(name, [*MASKED, "model.data.eod_mask_loss=true", *more]) for name, more in yamls.items()),
        *(job(name, more) for name, (more, _) in REFUSED.items() if more),
    ]
    nr.run_jobs(folder, 1, one)
    two = [job(name, [*EXACT, *more], world=2) for name, more in LAYOUTS.items()]
    two += [
        job("timed_tp2", [*TIMED, *LAYOUTS["tp2"]], plain, world=2),
        job("cp2_rope", [*EXACT, "+model.context_parallel_size=2", "model.position_embedding_type=rope"], world=2),
        job("dp2_alpha_0", [*ON, "model.exact.alpha=0", *UNMASKED], plain, world=2),
        job("pp2", [*EXACT, *PP2], world=2),
        job("pp2_resumed", [*EXACT, *SAVE, *PP2, checkpoint], world=2),
        job("dp2_saved", [*EXACT, *SAVE], world=2),
        job("dp2_resumed", [*EXACT, *SAVE, checkpoint.replace("/saved/", "/dp2_saved/")], world=2),
    ]
    nr.run_jobs(folder, 2, two)

    def log(name):
        return nr.Log(folder, name)

    log.folder = folder
    return log


def own_script(folder: Path) -> Path:
    """A script of the user's own, on NeMo's YAML and one that has a block of its own; the one call is in it."""
    script = folder / "own_script.py"
    text = (nr.examples() / "megatron_gpt_pretraining.py").read_text()
    text = text.replace('config_path="conf"', f'config_path="{folder}/conf_own"')
    text = text.replace(
        "\n\n@hydra_runner", "\nfrom exact_megatron.integrations.nemo import install\n\ninstall()\n\n@hydra_runner"
    )
    (folder / "conf_own").mkdir()
    stock = (nr.examples() / "conf" / "megatron_gpt_config.yaml").read_text()
    block = "  exact: {enabled: false, alpha: 0.15, tau: null}\n"
    (folder / "conf_own" / "megatron_gpt_config.yaml").write_text(stock.replace("\nmodel:\n", f"\nmodel:\n{block}", 1))
    script.write_text(text)
    return script


LOSSES = ("reduced_train_loss", "grad_norm", "val_loss")


def assert_same(mine, theirs, tags, steps=STEPS, rel=0.0):
    mine, theirs = mine.steps(), theirs.steps()
    for tag in tags:
        wanted = [step for step in theirs[tag] if step in steps]
        assert wanted
        for step in wanted:
            assert mine[tag][step] == pytest.approx(theirs[tag][step], rel=rel, abs=0), (tag, step)


def exact_tags(log):
    return [tag for tag in log.steps() if "exact loss" in tag or "lm loss" in tag]


def training_tags(log):
    return ["reduced_train_loss", *(tag for tag in exact_tags(log) if not tag.startswith("val"))]


def test_off_the_plugin_changes_no_digit(logs):
    assert_same(logs("off"), logs("plain"), LOSSES)
    assert len(logs("off").steps()["grad_norm"]) == 6
    assert "exact:" in logs("off").text and "exact:" not in logs("plain").text
    assert not exact_tags(logs("off")) and "EXACT" not in logs("off").text


def test_without_the_plugin_the_stock_yaml_refuses_the_key(logs):
    assert "Key 'exact' is not in struct" in logs("no_plugin").error()


def test_alpha_0_is_the_stock_run_to_the_last_bit(logs):
    assert_same(logs("alpha_0"), logs("plain"), LOSSES)


def test_our_masking_equals_dense_reset_masks(logs):
    assert_same(logs("alpha_0_masked"), logs("dense"), LOSSES, rel=2e-6)
    assert logs("dense").steps()["grad_norm"] != logs("plain").steps()["grad_norm"]  # masks matter here


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_rank(logs, name):
    distributed = name == "dp2_distributed_optimizer"  # another Adam; NeMo does not log the norm that it clips with
    one, log = logs("saved" if distributed else "one_rank"), logs(name)
    tags = {*LOSSES, *exact_tags(one)}
    if distributed:
        tags = training_tags(one)
    if "mbs1" in name:  # NeMo's own averages of micro-batches' averages
        tags -= {"reduced_train_loss", "val_loss"}
    assert_same(log, one, tags, rel=1e-5)


def test_pipeline_stages_from_a_checkpoint_of_one_rank(logs):
    """Each stage draws its initial weights from a seed of its own, so that two layouts start alike from a checkpoint only."""
    assert_same(logs("pp2_resumed"), logs("resumed"), training_tags(logs("resumed")), RESUMED, 1e-5)
    assert len(logs("pp2").steps()["exact loss"]) == 6


def test_micro_batches_of_another_size_give_the_same_gradient(logs):
    one = logs("one_rank")
    assert_same(logs("mbs1"), one, {"grad_norm", *exact_tags(one)}, rel=1e-5)
    assert logs("mbs1").steps()["reduced_train_loss"] != pytest.approx(one.steps()["reduced_train_loss"], rel=1e-5)


def test_recomputed_layers_get_the_boundaries(logs):
    assert_same(logs("recomputed"), logs("one_rank"), {*LOSSES, *exact_tags(logs("one_rank"))}, rel=1e-6)


def test_rope_runs_through_the_whole_sample_under_context_parallelism(logs):
    assert_same(logs("cp2_rope"), logs("rope"), {*LOSSES, *exact_tags(logs("rope"))}, rel=1e-5)


def test_the_weights_change_the_run_and_counts_are_whole(logs):
    steps = logs("one_rank").steps()
    assert {"exact loss", "lm loss", "lm loss 0-15", "lm loss 16-31", "lm loss 32-64"} <= steps.keys()
    assert all(steps["exact loss"][step] != steps["lm loss"][step] for step in STEPS)
    assert {f"val {tag}" for tag in exact_tags(logs("one_rank")) if not tag.startswith("val")} <= steps.keys()
    for step in STEPS:  # uneven micro-batches: NeMo's average of averages, and the average over targets
        assert steps["reduced_train_loss"][step] == pytest.approx(steps["lm loss"][step], rel=2e-3)


def test_a_pad_does_not_mask_other_samples(logs):
    """Token 1 is the pad; up to core 0.14 a masked place stays masked in all later samples of the stock dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokens = IndexedDataset(str(logs.folder / "padded"))
    pads = sum(int((tokens[i] == 1).sum()) for i in range(len(tokens)))
    assert pads > 20
    # A micro-batch size of 1 draws the same samples one by one, and loses no more targets.
    assert_same(logs("pads"), logs("pads_mbs1"), {"grad_norm", *exact_tags(logs("pads"))}, rel=1e-5)


def test_the_hooks_are_named_once(logs):
    for name in ("one_rank", "tp2", "pp2"):
        text = logs(name).text
        assert text.count("\nEXACT\n") == 1 and "masked by DocumentAttention" in text and "32-64" in text


# Steps after the resume at 2 that NeMo takes from the same samples: with or without EXACT its loop ends the epoch one step early.
RESUMED = range(2, 5)


def test_resume_continues(logs):
    saved, resumed = logs("saved"), logs("resumed")
    assert min(resumed.steps()["reduced_train_loss"]) == 2
    assert_same(resumed, saved, training_tags(saved), RESUMED)
    assert_same(logs("dp2_resumed"), logs("dp2_saved"), training_tags(saved), RESUMED, 1e-6)


def test_changed_weights_are_accepted_when_told(logs):
    assert "resumed with other weights" in logs("accepted").text
    assert len(logs("accepted").steps()["exact loss"]) >= 3


def test_checkpoints_name_nothing_of_ours_but_plain_values(logs):
    logs("saved").steps()
    import torch

    (common,) = (logs.folder / "exp" / "saved" / "checkpoints" / "at-step=2-consumed_samples=16.0").glob("common.pt")
    state = torch.load(common, weights_only=False)
    assert state["exact"]["alpha"] == 0.5 and all(
        isinstance(v, (str, int, float, type(None))) for v in state["exact"].values()
    )
    assert b"exact_megatron" not in common.read_bytes()
    model = state["hyper_parameters"]["cfg"]
    assert model["target"].endswith("megatron_gpt_model.MegatronGPTModel") and "exact" not in model


@pytest.mark.parametrize(
    "name", ["own_on_top", "own_layered", "own_without_block", "own_complete", "own_script", "environment"]
)
def test_the_users_own_yaml_script_and_environment(logs, name):
    assert_same(logs(name), logs("one_rank"), {*LOSSES, *exact_tags(logs("one_rank"))})


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(logs, name):
    assert REFUSED[name][1] in logs(name).error()


def test_the_census_is_in_the_cache_folder(logs):
    logs("one_rank").steps()
    found = list((logs.folder / "cache").glob("*-ExactGPTDataset-train-census.json"))
    assert found and all(json.loads(path.read_text())["seq_length"] == nr.SEQ_LENGTH for path in found)


def test_query_key_timing_slows_the_first_steps_with_or_without_exact(logs):
    timed, plain = logs("timed").steps(), logs("distributed").steps()
    assert logs("timed").text.count("query/key timing: layers") == 1
    assert timed["reduced_train_loss"][0] == plain["reduced_train_loss"][0]
    assert timed["reduced_train_loss"][5] != plain["reduced_train_loss"][5]
    assert_same(logs("timed_scale_1"), logs("distributed"), ["reduced_train_loss", "val_loss"])
    assert_same(logs("timed_tp2"), logs("timed"), ["reduced_train_loss", "val_loss"], rel=1e-5)
