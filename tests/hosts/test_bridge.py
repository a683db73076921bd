"""The real, unedited pretrain() of Megatron-Bridge on a CPU: `make test-bridge`.

Bridge's own scripts are run too where MEGATRON_BRIDGE names a git clone of it.
"""

from __future__ import annotations

import re

import pytest

from tests.hosts import megatron_bridge as mb
from tests.hosts.megatron_lm import assert_close, write_data

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(mb.version() is None, reason="needs megatron-bridge: make test-bridge"),
]

ON = "model.exact.enabled=true"
EXACT = [ON, "model.exact.tau=16", "model.exact.alpha=0.5"]
MASKED = "dataset.reset_attention_mask=true"
ACCEPT = "model.exact.allow_unmasked_documents=true"
PP, TP, CP = (f"model.{name}_parallel_size" for name in ("pipeline_model", "tensor_model", "context"))
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true", "ddp.use_distributed_optimizer=true"]
VIRTUAL = ["model.virtual_pipeline_model_parallel_size=2", "model.overlap_p2p_comm=true", "model.batch_p2p_comm=false"]
LAYOUTS = {
    2: {
        "tp2": [f"{TP}=2"],
        "sp": [f"{TP}=2", "model.sequence_parallel=true"],
        "pp2": [f"{PP}=2"],
        "pp2_vpp2": [f"{PP}=2", *VIRTUAL],
        "cp2": [f"{CP}=2"],
        "dp2": [],
        "dp2_distributed_optimizer": DISTRIBUTED,
    },
    4: {
        "tp2_pp2": [f"{TP}=2", f"{PP}=2"],
        "tp2_cp2": [f"{TP}=2", "model.sequence_parallel=true", f"{CP}=2"],
        "pp4": [f"{PP}=4"],  # two stages that Bridge gives no batch
    },
}
TIMED = ["model.qk_timing.enabled=true", "model.qk_timing.hold=0.5", "model.qk_timing.anneal=0.25"]
CASES = [name for layouts in LAYOUTS.values() for name in layouts]
FORMS = {
    "bare": [ON, "model.exact.tau=16", "model.exact.alpha=0.5"],
    "plus": ["+model.exact.enabled=true", "+model.exact.tau=16", "+model.exact.alpha=0.5"],
    "plus_plus": ["++model.exact.enabled=true", "++model.exact.tau=16", "++model.exact.alpha=0.5"],
    "yaml": ["--config-file", "exact.yaml"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the logs of every run, by name; all start from one checkpoint of two plain steps."""
    folder = tmp_path_factory.mktemp("bridge")
    data, other = write_data(folder, "x", 11), write_data(folder, "y", 12)
    (folder / "exact.yaml").write_text("model:\n  exact: {enabled: true, tau: 16, alpha: 0.5}\n")
    plain_script, example = str(mb.SCRIPTS / "plain.py"), str(mb.EXAMPLE / "pretrain_llama32_1b.py")
    start = [f"checkpoint.load={folder}/base", "checkpoint.finetune=true"]
    cache = f"dataset.path_to_cache={folder}/cache"
    data_only = [f"dataset.blend=[[{data}],null]", cache]
    usual = [*data_only, *start]
    masked = [*usual, MASKED]

    def save(name):
        return [f"checkpoint.save={folder}/{name}"]

    def resume(name):
        return [*data_only, MASKED, f"checkpoint.load={folder}/{name}", "checkpoint.ckpt_step=3"]

    def plain(name, *more):
        return {"name": name, "mode": "plain", "arguments": [plain_script, *more]}

    def call(name, *more):
        return {"name": name, "mode": "plain", "arguments": [example, *more]}

    def launch(name, *more):
        return {"name": name, "mode": "launch", "arguments": [plain_script, *more]}

    def script(name, *more):
        return {"name": name, "mode": "plain", "arguments": [str(mb.SCRIPTS / f"{name}.py"), *more]}

    one = [
        plain("base", *data_only, "train.train_iters=2", *save("base")),
        plain("plain", *usual, *save("plain_saved")),
        launch("alpha_0", *usual, *EXACT, "model.exact.alpha=0", ACCEPT),
        launch("disabled", *usual, "model.exact.enabled=false"),
        call("disabled_call", *usual),
        plain("stock_reset", *masked),
        plain("dense", *masked, "+dataset.skip_getting_attention_mask_from_dataset=false"),
        launch("alpha_0_masked", *masked, *EXACT, "model.exact.alpha=0"),
        launch("one_rank", *masked, *EXACT, *save("one")),
        launch("resumed", *resume("one"), *EXACT),
        launch("changed", *resume("one"), *EXACT, "model.exact.alpha=0.4"),
        launch("accepted", *resume("one"), *EXACT, "model.exact.alpha=0.4", "model.exact.allow_changed_weights=true"),
        launch("unweighted", *resume("one"), "model.exact.enabled=false"),
        launch("unweighted_stage", *data_only, MASKED, f"checkpoint.load={folder}/one", "checkpoint.finetune=true"),
        plain("taken_over", *resume("one")),
        launch("typo", *masked, "model.exact.alhpa=0.4"),
        call("typo_yaml", "--config-file", str(folder / "typo.yaml"), *masked),
        launch("nobody_masks", *usual, *EXACT),
        script("refused", *masked),
        script("own_data", *usual, *EXACT, ACCEPT),
        launch("timed", *usual, *TIMED),
        launch("timed_scale_1", *usual, *TIMED, "model.qk_timing.scale=1"),
        call("timed_yaml", "--config-file", str(folder / "timed.yaml"), *usual),
        launch("blend", f"dataset.blend=[[{data},{other}],[0.3,0.7]]", cache, *start, MASKED, *EXACT),
        launch("tensorboard", *masked, *EXACT, f"logger.tensorboard_dir={folder}/tensorboard"),
    ]
    (folder / "timed.yaml").write_text("model: {qk_timing: {enabled: true, hold: 0.5, anneal: 0.25}}\n")
    (folder / "typo.yaml").write_text("model: {exact: {enabled: true, gama: 1}}\n")
    for form, arguments in FORMS.items():
        arguments = [str(folder / a) if a == "exact.yaml" else a for a in arguments]
        one.append(call(f"call_{form}", *masked, *arguments))
        one.append(launch(f"launch_{form}", *masked, *arguments))
    scripts = mb.copy_scripts(folder)
    if scripts:
        recipe = ["--recipe", "llama32_1b_pretrain_config", "--mode", "pretrain"]
        arguments = [str(scripts / "run_recipe.py"), *recipe, *masked, *EXACT]
        one.append({"name": "run_recipe", "mode": "launch", "arguments": arguments})
    mb.run_jobs(folder, 1, one)
    for world, layouts in LAYOUTS.items():
        jobs = [launch(name, *masked, *EXACT, *flags) for name, flags in layouts.items()]
        if world == 2:
            jobs.append(launch("timed_dp2", *usual, *TIMED, *DISTRIBUTED))
            jobs.append(launch("dp2_saved", *masked, *EXACT, *DISTRIBUTED, *save("two")))
            jobs.append(launch("dp2_resumed", *resume("two"), *EXACT, *DISTRIBUTED))
        mb.run_jobs(folder, world, jobs)
    anew = [str(mb.SCRIPTS / "anew.py"), *masked, *EXACT]
    launcher = ["-m", "exact_megatron.integrations.bridge_launch"]
    mb.run_command(folder, "anew", [*launcher, *anew])
    if scripts and (scripts / "recipe_runner.py").exists():
        recipe = ["--recipe", "llama3_8b_pretrain_8gpu_h100_bf16_config", "train.global_batch_size=8"]
        more = ["optimizer.use_precision_aware_optimizer=false"]
        mb.run_command(
            folder, "anew_recipe", [*launcher, str(scripts / "run_recipe.py"), *recipe, *more, *masked, *EXACT]
        )
    return folder


@pytest.fixture
def logs(folder):
    return lambda name: mb.log(folder, name)


def weighted_samples(log) -> list[int]:
    return [int(n) for n in re.findall(r"EXACT weighted (\d+) training samples", log.text)]


def test_alpha_0_is_the_stock_run_to_the_printed_digit(logs):
    stock, exact = logs("plain"), logs("alpha_0")
    for key in ("lm loss", "grad norm"):
        assert [line[key] for line in stock.steps().values()] == [line[key] for line in exact.steps().values()]
    assert stock.validation()["lm loss"] == exact.validation()["lm loss"]
    assert len(stock.steps()) == 8 and weighted_samples(exact) == [64] and not weighted_samples(stock)


@pytest.mark.parametrize("name", ["disabled", "disabled_call"])
def test_disabled_nothing_changes(logs, name):
    assert logs(name).steps() == logs("plain").steps()
    assert "EXACT" not in logs(name).text


def test_stock_bridge_masks_nothing_where_only_reset_attention_mask_is_set(logs):
    assert logs("stock_reset").steps() == logs("plain").steps()


def test_our_masking_equals_dense_reset_masks(logs):
    exact, dense = logs("alpha_0_masked").steps(), logs("dense").steps()
    for step in dense:
        assert float(exact[step]["lm loss"]) == pytest.approx(float(dense[step]["lm loss"]), rel=1e-6)
        assert float(exact[step]["grad norm"]) == pytest.approx(float(dense[step]["grad norm"]), rel=1e-3)
    assert dense[8]["lm loss"] != logs("plain").steps()[8]["lm loss"]  # masks matter here


@pytest.mark.parametrize("name", CASES)
def test_layouts_print_the_losses_of_one_rank(logs, name):
    assert_close(logs(name), logs("one_rank"))
    ranks = 2 if name.startswith("dp2") else 1  # 8 steps of 8 samples, shared out
    assert weighted_samples(logs(name)) == [64 // ranks]


def test_the_weights_change_the_run(logs):
    steps = logs("one_rank").steps()
    assert all(line["lm loss"] != line["exact loss"] for line in steps.values())
    assert steps[6]["lm loss"] != logs("alpha_0_masked").steps()[6]["lm loss"]
    assert {"lm loss 0-15", "lm loss 16-31", "lm loss 32-64"} <= steps[1].keys()
    assert steps[1]["lm loss"] == logs("alpha_0_masked").steps()[1]["lm loss"]  # before the first update


def test_the_hooks_are_named_once(logs):
    for name in ("one_rank", "tp2_pp2"):
        assert logs(name).text.count("\nEXACT\n") == 1
    assert "masked by DocumentAttention" in logs("one_rank").text and "32-64" in logs("one_rank").text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["call", "launch"])
def test_every_form_of_override_weights_the_run(logs, way, form):
    log = logs(f"{way}_{form}")
    assert log.steps() == logs("one_rank").steps() and weighted_samples(log) == [64]


@pytest.mark.parametrize("name", ["anew", "anew_recipe"])
def test_a_script_that_starts_anew_keeps_its_weights(logs, name):
    log = logs(name)
    if not log.ranks and name == "anew_recipe":
        pytest.skip("needs MEGATRON_BRIDGE, a clone of Megatron-Bridge, and version 0.6")
    assert log.text.count("CPU runtime in this process") == 2
    assert log.steps() == logs("one_rank").steps() and weighted_samples(log) == [64]


def test_bridges_own_run_recipe(logs):
    if not logs("run_recipe").ranks:
        pytest.skip("needs MEGATRON_BRIDGE, a clone of Megatron-Bridge")
    assert logs("run_recipe").steps() == logs("one_rank").steps()


def test_resume_continues(logs):
    straight, resumed = logs("one_rank").steps(), logs("resumed").steps()
    assert sorted(resumed) == [4, 5, 6, 7, 8]
    assert resumed == {step: straight[step] for step in resumed}


def test_resume_with_the_distributed_optimizer_continues(logs):
    assert sorted(logs("dp2_resumed").steps()) == [4, 5, 6, 7, 8]
    assert_close(logs("dp2_resumed"), logs("dp2_saved"), range(4, 9))


def test_resume_with_other_weights_is_refused_with_both_values(logs):
    log = logs("changed")
    assert not log.ok and "alpha: 0.5 in the checkpoint, now 0.4" in log.text
    assert sorted(logs("accepted").steps()) == [4, 5, 6, 7, 8]


def test_a_weighted_checkpoint_goes_on_unweighted_only_as_a_new_stage(logs):
    log = logs("unweighted")
    assert not log.ok and "trained with EXACT's weights, and this run does not enable them" in log.text
    assert not re.search(r"iteration +\d+/", log.text)
    assert sorted(logs("unweighted_stage").steps()) == list(range(1, 9))


def test_checkpoints_are_those_of_stock_bridge(logs, folder):
    """Nothing of a checkpoint imports EXACT, its configuration is the plain run's, and stock Bridge goes on from it."""
    logs("one_rank").steps()
    iteration = folder / "one" / "iter_0000003"
    files = [path for path in iteration.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        text = path.read_bytes()
        assert b"exact_megatron" not in text and b"DocumentAttention" not in text and b"ExactGPT" not in text, path
    config = (iteration / "run_config.yaml").read_text()
    assert "exact" not in config.replace(str(folder), "")
    plain = (folder / "plain_saved" / "iter_0000003" / "run_config.yaml").read_text()
    assert config.replace(f"{folder}/one", "DIR").replace(
        "reset_attention_mask: true", "reset_attention_mask: false"
    ) == plain.replace(f"{folder}/plain_saved", "DIR")
    assert sorted(logs("taken_over").steps()) == [4, 5, 6, 7, 8] and "EXACT" not in logs("taken_over").text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "nobody_masks",
            "dataset.reset_attention_mask=true, or accept it with model.exact.allow_unmasked_documents=true",
        ),
        ("own_data", "on data that EXACT did not weight"),
        ("typo", "did you mean model.exact.alpha?"),
        ("typo_yaml", "did you mean model.exact.gamma?"),
    ],
)
def test_refused_before_the_first_step(logs, name, words):
    log = logs(name)
    assert not log.ok and words in log.text
    assert not re.search(r"iteration +1/", log.text)


REFUSED = {
    "mock": "mock data have no documents",
    "mock_class": "mock data have no documents",
    "fim": "fill-in-the-middle reorders documents",
    "sft": "not samples for SFT",
    "mtp": "multi-token prediction",
    "teacher": "distillation has a loss of its own",
    "unmasked": "documents in a sample would see each other",
    "dense": "skip_getting_attention_mask_from_dataset=true",
    "skipped": "unset train.iterations_to_skip",
    "cp": "each rank would divide by its own count",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_weighted_wrongly_is_refused_in_words(logs, case):
    said = re.search(rf"CASE {case}: (.*)", logs("refused").text)
    assert said, logs("refused").text[-3000:]
    assert said[1].startswith("ValueError: EXACT refuses this run") and REFUSED[case] in said[1]


def test_blends_keep_working(logs):
    steps = logs("blend").steps()
    assert len(steps) == 8 and all("exact loss" in line for line in steps.values())


def test_tensorboard_has_the_losses_beside_each_other(logs, folder):
    logs("tensorboard").steps()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {"lm loss", "exact loss", "lm loss 32-64"} <= set(events.Tags()["scalars"])


def test_query_key_timing_slows_the_first_steps_with_or_without_exact(logs):
    timed, plain = logs("timed"), logs("plain")
    assert timed.text.count("query/key timing: layers") == 1 and "EXACT" not in timed.text
    assert timed.steps()[1] == plain.steps()[1] and timed.steps()[8] != plain.steps()[8]
    assert logs("timed_scale_1").steps() == plain.steps()
    assert logs("timed_yaml").steps() == timed.steps()
    assert_close(logs("timed_dp2"), timed)
