"""The real, unedited pretrain_gpt.py of a Megatron-LM checkout, on a CPU: `make test-upstream MEGATRON_LM=/path/to/checkout`."""

from __future__ import annotations

import json
import re

import pytest

from exact_megatron.attention import supported
from exact_megatron.integrations import megatron_lm_arguments as arguments
from tests.helpers import ranks
from tests.hosts import megatron_lm as lm

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(lm.repository() is None, reason=lm.ABSENT),
]

EXACT = ["model.exact.enabled=true", "model.exact.tau=16", "model.exact.alpha=0.5"]
TP2 = "--tensor-model-parallel-size 2"
LAYOUTS = {
    2: {
        "tp2": TP2,
        "sp": f"{TP2} --sequence-parallel",
        "pp2": "--pipeline-model-parallel-size 2",
        "pp2_vpp2": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        "cp2": "--context-parallel-size 2",
        "dp2": "",
        "dp2_distributed_optimizer": "--use-distributed-optimizer",
    },
    4: {
        "tp2_pp2": f"{TP2} --pipeline-model-parallel-size 2",
        "tp2_cp2": f"{TP2} --sequence-parallel --context-parallel-size 2",
        "pp4": "--pipeline-model-parallel-size 4",  # two stages that Megatron-LM gives no batch
    },
}
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
SMALL = "--micro-batch-size 1 --global-batch-size 1".split()  # some steps then have no target in a bucket
CASES = [name for layouts in LAYOUTS.values() for name in layouts]


@pytest.fixture(scope="module", params=lm.refs())
def logs(request, tmp_path_factory):
    """Logs by name of every run at one tag; they share a checkpoint of two plain steps."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    checkout = lm.copy_checkout(request.param, folder)
    data, other = lm.write_data(folder, "x", 11), lm.write_data(folder, "y", 12)
    has_masking = b"inter-document-masking" in (checkout / "megatron/training/arguments.py").read_bytes() or any(
        "inter_document_masking" in path.read_text() for path in (checkout / "megatron/training").rglob("*.py")
    )
    stock = [*lm.arguments(checkout, folder)]
    means = [flag for flag in stock if flag not in ("--calculate-per-token-loss", "--eod-mask-loss")]
    usual = ["--data-path", data, "--split", "90,10,0"]
    blend = ["--data-path", "0.3", data, "0.7", other, "--split", "90,10,0", "--dataloader-type", "cyclic"]
    here = ["--load", str(folder / "base"), "--finetune"]
    reset = [*here, "--reset-attention-mask"]
    saved = ["--load", str(folder / "one")]
    splits = ["--train-data-path", data, "--valid-data-path", other]
    wandb = ["--wandb-project", "x", "--wandb-exp-name", "y", "--wandb-save-dir", str(folder)]

    def from_third(name):
        return ["--load", str(folder / name), "--ckpt-step", "3"]

    def plain(name, *more, spec="layer"):
        return {
            "name": name,
            "mode": "plain",
            "arguments": [*stock, "--spec", "cpu_spec", spec, *more],
        }

    def exact(name, settings, *more, spec="layer", stock=stock):
        return {
            "name": name,
            "mode": "launch",
            "arguments": [*settings, str(checkout / "pretrain_gpt.py"), *stock, "--spec", "cpu_spec", spec, *more],
        }

    unmasked = [*EXACT, "model.exact.allow_unmasked_documents=true"]
    thd = "--dataloader-inter-document-masking"
    one = [
        plain("base", *usual, "--train-iters", "2", "--save", str(folder / "base")),
        plain("plain", *usual, *here, "--no-create-attention-mask-in-dataloader"),
        exact("alpha_0", [*unmasked, "model.exact.alpha=0"], *usual, *here),
        exact("disabled", ["model.exact.enabled=false"], *usual, *here),
        plain("dense", *usual, *reset),
        exact("alpha_0_masked", [*EXACT, "model.exact.alpha=0"], *usual, *reset),
        exact("one_rank", EXACT, *usual, *reset, "--save", str(folder / "one")),
        exact("resumed", EXACT, *usual, "--reset-attention-mask", *from_third("one")),
        exact("changed", [*EXACT, "model.exact.alpha=0.4"], *usual, "--reset-attention-mask", *saved),
        exact("unweighted", ["model.exact.enabled=false"], *usual, "--load", str(folder / "one")),
        exact("recomputed", EXACT, *usual, *reset, *RECOMPUTE),
        {**exact("alone", EXACT, *usual, *reset), "alone": True},
        exact("small", EXACT, *usual, *reset, *SMALL),
        exact("small_interval", EXACT, *usual, *reset, *SMALL, "--log-interval", "4"),
        plain("valid_dense", *usual, *reset, "--load", str(folder / "one"), "--skip-train"),
        exact("valid", EXACT, *usual, *reset, "--load", str(folder / "one"), "--skip-train"),
        exact("by_microbatch", EXACT, *usual, *reset, stock=means),
        exact("nobody_masks", EXACT, *usual, *here),
        exact("no_data", EXACT, "--mock-data", *reset),
        exact("blend", EXACT, *blend, *reset),
        exact(
            "splits",
            EXACT,
            *splits,
            *reset,
            "--tensorboard-dir",
            str(folder / "tensorboard"),
            *wandb,
        ),
        {"name": "parsed", "mode": str(lm.HERE / "parsed.py"), "arguments": [*stock, "--data-path", data]},
        {
            "name": "patched",
            "mode": lm.patched(checkout, folder),
            "arguments": [*stock, "--spec", "cpu_spec", "layer", *usual, *reset, *EXACT],
        },
    ]
    if has_masking:
        one.append(plain("stock_thd", *usual, *here, thd, spec="thd_layer"))
        one.append(exact("thd_alpha_0", [*EXACT, "model.exact.alpha=0"], *usual, *here, thd, spec="thd_layer"))
        one.append(exact("thd", EXACT, *usual, *here, thd, spec="thd_layer"))
    lm.run_jobs(checkout, folder, 1, one)
    for world, layouts in LAYOUTS.items():
        jobs = [exact(name, EXACT, *usual, *reset, *flags.split()) for name, flags in layouts.items()]
        if world == 2:
            for name, flags in {"tp2": TP2, "pp2": layouts["pp2"], "cp2": layouts["cp2"]}.items():
                jobs.append(exact(f"blend_{name}", EXACT, *blend, *reset, *flags.split()))
                jobs.append(
                    exact(
                        f"resumed_{name}",
                        EXACT,
                        *usual,
                        *f"--reset-attention-mask {flags}".split(),
                        *from_third("one"),
                    )
                )
                jobs.append(exact(f"recomputed_{name}", EXACT, *usual, *reset, *flags.split(), *RECOMPUTE))
            jobs.append(exact("by_microbatch_cp2", EXACT, *usual, *reset, *layouts["cp2"].split(), stock=means))
            save = ["--save", str(folder / "two")]
            jobs.append(exact("dp2_saved", EXACT, *usual, *reset, "--use-distributed-optimizer", *save))
            jobs.append(
                exact(
                    "dp2_resumed",
                    EXACT,
                    *usual,
                    *"--reset-attention-mask --use-distributed-optimizer".split(),
                    *from_third("two"),
                )
            )
            if has_masking:
                one_sample = ["--pipeline-model-parallel-size", "2", "--micro-batch-size", "1"]
                jobs.append(exact("thd_pp2_mbs1", EXACT, *usual, *here, thd, *one_sample, spec="thd_layer"))
                jobs.append(exact("thd_tp2", EXACT, *usual, *here, thd, *TP2.split()))
                jobs.append(exact("thd_cp2", EXACT, *usual, *here, thd, "--context-parallel-size", "2"))
                jobs.append(
                    exact("thd_pp2", EXACT, *usual, *here, thd, "--pipeline-model-parallel-size", "2", spec="thd_layer")
                )
        lm.run_jobs(checkout, folder, world, jobs)

    native(folder, data)

    def log(name):
        found = lm.Log(folder, name)
        if not found.ranks and "thd" in name:
            pytest.skip("this Megatron-LM has no --dataloader-inter-document-masking")
        return found

    log.folder = folder
    return log


def native(folder, data):
    """The native runner on the same data, from the same weights."""
    config = folder / "native.yaml"
    config.write_text(
        f"""
trainer: {{devices: 1, accelerator: cpu, max_steps: 8, log_every_n_steps: 1, gradient_clip_val: 1.0}}
exp_manager: {{exp_dir: {folder}/native, create_tensorboard_logger: false}}
model:
  seed: 7
  micro_batch_size: 2
  global_batch_size: 8
  num_layers: 4
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  make_vocab_size_divisible_by: 64
  override_vocab_size: {lm.EOD + 1}
  data:
    data_prefix: [{data}]
    splits_string: "90,10,0"
    index_mapping_dir: {folder}/native_cache
    seq_length: {lm.SEQ_LENGTH}
    eod_id: {lm.EOD}
    eod_mask_loss: true
    num_workers: 0
  optim:
    lr: 5e-3
    betas: [0.9, 0.999]
    weight_decay: 0.1
    sched: {{name: constant, warmup_steps: 0, min_lr: 1e-3}}
  exact: {{enabled: true, alpha: 0.5, tau: 16}}
"""
    )
    (weights,) = (folder / "base").glob("iter_*")
    ranks.launch("hosts/native.py", [str(config), str(weights), "8", str(folder / "native.json")], 1)


def test_the_native_runner_computes_the_same_losses(logs):
    steps = logs("one_rank").steps()
    native = json.loads((logs.folder / "native.json").read_text())
    for step in (1, 3, 4, 5, 6, 7, 8):
        assert float(steps[step]["lm loss"]) == pytest.approx(native[step - 1]["lm_loss"], rel=1e-6)
        assert float(steps[step]["exact loss"]) == pytest.approx(native[step - 1]["exact_loss"], rel=1e-6)
        assert float(steps[step]["grad norm"]) == pytest.approx(native[step - 1]["grad_norm"], abs=2e-3)


def assert_close(log, reference, steps=range(1, 9)):
    """Tensor parallelism rounds every product otherwise than one rank does, and what rounding does grows from step to step: Adam's first
    update is lr * sign(gradient), also where the gradient is nothing but rounding. Weights of one rank that differ by one ULP of
    float32 give losses that differ by more than 1e-6 a few steps later, so that the bound there is the project's own, 1e-5."""
    lm.assert_close(log, reference, steps, rel=1e-5 if re.search("tp2|sp", log.name) else 1e-6)


def test_alpha_0_is_the_stock_script_to_the_printed_digit(logs):
    stock, exact = logs("plain"), logs("alpha_0")
    assert [line["lm loss"] for line in stock.steps().values()] == [line["lm loss"] for line in exact.steps().values()]
    assert [line["grad norm"] for line in stock.steps().values()] == [
        line["grad norm"] for line in exact.steps().values()
    ]
    assert stock.validation()["lm loss"] == exact.validation()["lm loss"]
    assert len(stock.steps()) == 8


def test_disabled_the_launcher_changes_nothing(logs):
    assert logs("disabled").steps() == logs("plain").steps()
    assert "EXACT" not in logs("disabled").text


def test_our_masking_equals_dense_reset_masks(logs):
    exact, dense = logs("alpha_0_masked").steps(), logs("dense").steps()
    for step in dense:
        assert float(exact[step]["lm loss"]) == pytest.approx(float(dense[step]["lm loss"]), rel=1e-6)
        assert exact[step]["grad norm"] == dense[step]["grad norm"]
    assert dense[8]["lm loss"] != logs("plain").steps()[8]["lm loss"]  # masks matter here


@pytest.mark.parametrize("name", CASES)
def test_layouts_print_the_losses_of_one_rank(logs, name):
    assert_close(logs(name), logs("one_rank"))


def test_the_weights_change_the_run(logs):
    steps = logs("one_rank").steps()
    assert all(line["lm loss"] != line["exact loss"] for line in steps.values())
    assert steps[6]["lm loss"] != logs("alpha_0_masked").steps()[8]["lm loss"]
    assert {"lm loss 0-15", "lm loss 16-31", "lm loss 32-64"} <= steps[1].keys()


def test_the_hooks_are_named_once(logs):
    text = logs("one_rank").text
    assert text.count("\nEXACT\n") == 1
    assert re.search(r"hooked +loss_func, forward_step and BlendedMegatronDatasetBuilder of pretrain_gpt.py", text)
    assert "masked by DocumentAttention" in text and "32-64" in text
    assert logs("tp2_pp2").text.count("\nEXACT\n") == 1


# The second line that Megatron-LM prints after any start is the mean of two iterations.
AFTER_RESUME = (4, 6, 7, 8)


def test_resume_continues(logs):
    straight, resumed = logs("one_rank").steps(), logs("resumed").steps()
    assert sorted(resumed) == [4, 5, 6, 7, 8]
    assert [resumed[step] for step in AFTER_RESUME] == [straight[step] for step in AFTER_RESUME]
    assert resumed[5]["grad norm"] == straight[5]["grad norm"]


@pytest.mark.parametrize("name", ["tp2", "pp2", "cp2"])
def test_resume_under_another_layout_continues(logs, name):
    assert sorted(logs(f"resumed_{name}").steps()) == [4, 5, 6, 7, 8]
    assert_close(logs(f"resumed_{name}"), logs("one_rank"), AFTER_RESUME)


def test_a_weighted_checkpoint_does_not_go_on_unweighted_in_silence(logs):
    assert not logs("unweighted").ok and "this run does not enable them" in logs("unweighted").text


@pytest.mark.parametrize("name", ["recomputed", "recomputed_tp2", "recomputed_pp2", "recomputed_cp2"])
def test_recomputed_layers_print_the_same_losses(logs, name):
    assert_close(logs(name), logs("one_rank"))


def test_a_process_alone_needs_no_torchrun(logs):
    assert logs("alone").steps() == logs("one_rank").steps()


def test_means_of_equal_microbatches_are_those_of_one_rank(logs):
    """Without --calculate-per-token-loss, and with every target supervised."""
    assert_close(logs("by_microbatch_cp2"), logs("by_microbatch"))
    assert logs("by_microbatch").steps() != logs("one_rank").steps()


def test_means_over_a_log_interval_leave_out_steps_without_a_target(logs):
    every, fourth = logs("small").steps(), logs("small_interval").steps()
    # The second line is the mean of two iterations; what it lacks had no target in either.
    keys = set().union(*every.values()) - {"grad norm"}
    absent = 0
    for key in keys:
        values = [every[step].get(key) for step in (5, 6, 7, 8)]
        there = [float(value) for value in values if value is not None]
        absent += len(values) - len(there)
        assert (key in fourth[8]) == bool(there)
        if there:
            assert float(fourth[8][key]) == pytest.approx(sum(there) / len(there), rel=2e-6)
    assert absent and not re.search(r"loss[\w -]*: nan", logs("small_interval").text)


def test_validation_prints_the_unweighted_loss_beside_the_weighted(logs):
    dense, exact = logs("valid_dense").validation(), logs("valid").validation()
    assert float(exact["lm loss"]) == pytest.approx(float(dense["lm loss"]), rel=1e-6)
    assert exact["exact loss"] != exact["lm loss"] and "exact loss" not in dense


def test_resume_with_the_distributed_optimizer_continues(logs):
    assert sorted(logs("dp2_resumed").steps()) == [4, 5, 6, 7, 8]
    assert_close(logs("dp2_resumed"), logs("dp2_saved"), AFTER_RESUME)


def test_resume_with_other_weights_is_refused_with_both_values(logs):
    log = logs("changed")
    assert not log.ok and "alpha: 0.5 in the checkpoint, now 0.4" in log.text


def test_documents_without_masking_are_refused(logs):
    log = logs("nobody_masks")
    assert not log.ok and "--reset-attention-mask" in log.text and "allow_unmasked_documents" in log.text
    assert not re.search(r"iteration +1/", log.text)


def test_mock_data_are_refused(logs):
    assert not logs("no_data").ok and "mock data have no documents" in logs("no_data").text


@pytest.mark.parametrize("name", ["blend", "splits"])
def test_blends_cyclic_order_and_data_per_split_keep_working(logs, name):
    steps = logs(name).steps()
    assert len(steps) == 8 and all("exact loss" in line for line in steps.values())


@pytest.mark.parametrize("name", ["tp2", "pp2", "cp2"])
def test_every_rank_draws_the_same_boundaries_in_cyclic_order(logs, name):
    assert_close(logs(f"blend_{name}"), logs("blend"))


def test_tensorboard_has_the_losses_beside_each_other(logs):
    logs("splits").steps()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs.folder / "tensorboard"))
    events.Reload()
    assert {"lm loss", "exact loss", "lm loss 32-64"} <= set(events.Tags()["scalars"])


def test_wandb_has_them_too(logs):
    sent = [json.loads(line.split(" ", 2)[2]) for line in logs("splits").text.splitlines() if line.startswith("wandb ")]
    assert {"lm loss", "exact loss", "lm loss 32-64"} <= set().union(*sent)


def test_the_index_caches_and_the_census_are_in_the_cache_folder(logs):
    logs("one_rank").steps()
    names = [path.name for path in (logs.folder / "cache").iterdir()]
    assert any(name.endswith("-ExactGPTDataset-train-census.json") for name in names)
    census = next(path for path in (logs.folder / "cache").iterdir() if path.name.endswith("census.json"))
    assert json.loads(census.read_text())["seq_length"] == lm.SEQ_LENGTH


def test_upstreams_masking_equals_dense_reset_masks(logs):
    """Upstream's thd batches, ours and the dense masks are three ways to one loss."""
    stock, dense = logs("stock_thd").steps(), logs("dense").steps()
    for step in dense:
        assert float(stock[step]["lm loss"]) == pytest.approx(float(dense[step]["lm loss"]), rel=1e-6)
    assert [s["lm loss"] for s in logs("thd_alpha_0").steps().values()] == [s["lm loss"] for s in stock.values()]


@pytest.mark.parametrize("name", ["thd", "thd_pp2_mbs1", "thd_tp2", "thd_pp2", "thd_cp2"])
def test_upstreams_masking_is_used_or_replaced_where_it_is_wrong(logs, name):
    assert_close(logs(name), logs("one_rank"))
    theirs = "masked by --dataloader-inter-document-masking (Megatron-LM's)" in logs(name).text
    assert theirs == (name in ("thd", "thd_pp2_mbs1"))


def test_doctor_reads_command_lines_as_megatrons_parser_does(logs):
    assert logs("parsed").ok, logs("parsed").text[-3000:]
    assert re.findall("^UNKNOWN (.*)", logs("parsed").text, re.M) == ["[]"]  # else doctor would call an option misspelt
    found = [json.loads(line) for line in re.findall("^LINE (.*)", logs("parsed").text, re.M)]
    assert len(found) > 12
    for line, theirs, doctors in found:
        assert doctors == theirs, line
    assert len({json.dumps(theirs) for _, theirs, _ in found}) > 12  # each line says something of its own


def test_every_argument_that_is_looked_at_is_one_of_megatrons():
    """A misspelled name in a table would be a row that never rejects."""
    rows = [*arguments.ROWS, *arguments.NOBODY, *arguments.MASKED, *supported.ATTENTION]
    names = {name for row in rows for name in row.looks_at.split()} | {*arguments.DEFAULTS, *arguments.WHOLE}
    tags = [tag for tag in ("core_v0.13.1", "core_v0.16.1", "core_v0.19.0") if not lm.git("rev-parse", tag).returncode]
    if len(tags) < 3:
        pytest.skip("MEGATRON_LM is a folder without these tags: make it a git clone")
    for name in names - {"window", "masks", "dense", "exact.allow_unmasked_documents"}:  # ours
        words = ["-e", name, "-e", name.replace("_", "-")]
        assert any(not lm.git("grep", "-qw", *words, tag, "--", "megatron").returncode for tag in tags), name


def test_a_patched_script_is_a_launched_one(logs):
    assert logs("patched").steps() == logs("one_rank").steps()


def test_one_patch_fits_each_tag_and_reverts(tmp_path):
    """Every release and candidate of a clone; what is said in patches/README.md."""
    tags = lm.git("tag", "-l", "core_v0.1[2-9].*", "core_v0.[2-9][0-9].*").stdout.decode().split()
    if not tags:
        pytest.skip("MEGATRON_LM is a folder without tags: make it a git clone")
    for tag in [*tags, "main"]:
        before = lm.read(tag, "pretrain_gpt.py")
        assert before is not None, tag
        script = tmp_path / "pretrain_gpt.py"
        script.write_bytes(before)
        fitting = [patch.name for patch in sorted(lm.PATCHES.glob("*.patch")) if lm.apply(patch, tmp_path, "--check")]
        minor = 99 if tag == "main" else int(tag.split(".")[1])
        assert fitting == patches_for(minor, tag), tag
        for name in fitting:
            assert lm.apply(lm.PATCHES / name, tmp_path)
            after = script.read_text()
            assert after.index("exact.from_command_line(pretrain)") < after.rindex("    pretrain(")
            compile(after, "pretrain_gpt.py", "exec")
            assert lm.apply(lm.PATCHES / name, tmp_path, "--reverse") and script.read_bytes() == before


def patches_for(minor, tag):
    if minor < 13:
        return []
    return ["megatron-lm-0.13-to-0.17.patch" if minor < 18 else "megatron-lm-0.18-to-main.patch"]
