"""The launcher, its settings, doctor and the Megatron-LM hook on a host of a few lines; no checkout is needed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import MockGPTDataset

from exact_megatron import ExactConfig
from exact_megatron.attention import supported
from exact_megatron.cli import main
from exact_megatron.commands.doctor import installed
from exact_megatron.integrations.documents import feed_documents, join_boundaries
from exact_megatron.integrations.hooks import replaced, script_global
from exact_megatron.integrations.megatron_lm import MegatronLM, from_command_line, whole_intervals
from exact_megatron.integrations.megatron_lm_arguments import NONE, OWN, UPSTREAM, plan_masking, refusals
from exact_megatron.integrations.script import parse
from exact_megatron.integrations.settings import take_settings
from tests.helpers.small_host import ARGS, MODEL, SCRIPT, UNMASKED, Host, training_log

ON = "model.exact.enabled=true"


@pytest.mark.parametrize(
    "line",
    [
        ["model.exact.alpha=0.3", "model.exact.enabled=true", "model.exact.tau=16"],
        ["--exact-alpha", "0.3", "--exact-enabled", "--exact-tau=16"],
        ["+model.exact.alpha=0.3", "++model.exact.enabled=True", "--exact-tau", "16"],
        ["--exact-enabled", "true", "--exact-config", "FILE"],
    ],
)
def test_every_spelling_ends_in_the_same_config(line, tmp_path):
    (tmp_path / "exact.yaml").write_text("model: {exact: {alpha: 0.3, tau: 16, eps: 1e-8}}\n")
    line = [str(tmp_path / "exact.yaml") if a == "FILE" else a for a in line]
    config, rest = take_settings([*line, "pretrain_gpt.py", "--lr", "1e-3"], {})
    assert config == ExactConfig(enabled=True, alpha=0.3, tau=16)
    assert rest == ["pretrain_gpt.py", "--lr", "1e-3"]


def test_the_line_beats_the_environment_beats_the_file(tmp_path):
    file = tmp_path / "exact.json"
    file.write_text(json.dumps({"alpha": 0.1, "gamma": 0.2, "tau": 8}))
    environment = {"EXACT_CONFIG": str(file), "EXACT_GAMMA": "0.3", "EXACT_TAU": "16", "HOME": "/"}
    config, _ = take_settings(["--exact-tau", "32"], environment)
    assert (config.alpha, config.gamma, config.tau) == (0.1, 0.3, 32)


def test_settings_among_the_scripts_arguments_are_taken_out(tmp_path):
    script = tmp_path / "pretrain_gpt.py"
    script.touch()
    config, found, rest = parse([ON, str(script), "--lr", "1", "model.exact.alpha=0.2", "--bf16"], {})
    assert (config.alpha, found, rest) == (0.2, script, ["--lr", "1", "--bf16"])


@pytest.mark.parametrize(
    ("line", "environment", "message"),
    [
        (["model.exact.alhpa=1"], {}, "did you mean model.exact.alpha"),
        (["--exact-alhpa", "1"], {}, "did you mean --exact-alpha"),
        ([], {"EXACT_ALHPA": "1"}, "did you mean EXACT_ALPHA"),
        (["--exact-alpha"], {}, "--exact-alpha needs a value"),
        (["--exact-alpha", "--lr"], {}, "--exact-alpha needs a value"),
        (["model.exact.alpha=much"], {}, "alpha='much' is not a finite number"),
        (["--exact-config", "missing.yaml"], {}, "there is no such file"),
        (["--exact-tau="], {}, "--exact-tau needs a value"),
        (["--exact-tau", ""], {}, "--exact-tau needs a value"),
        (["model.exact.tau="], {}, "model.exact.tau is empty, not a whole number"),
        (["model.exact.alpha=inf"], {}, "alpha=inf is not a finite number of at least 0"),
        (["model.exact.alpha=true"], {}, "alpha=true is not a finite number"),
        (["model.exact.enabled=1"], {}, "enabled=1 is not true or false"),
        ([], {"EXACT_TAU": ""}, "EXACT_TAU is empty"),
        ([], {"EXACT_ALPHA": "-1"}, "EXACT_ALPHA=-1 is not a finite number of at least 0"),
        ([], {"EXACT_CONFIG": ""}, "EXACT_CONFIG is empty"),
    ],
)
def test_wrong_settings_are_refused_by_name(line, environment, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        take_settings(line, environment)


def test_a_file_without_settings_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {num_layers: 2}\n")
    with pytest.raises(ValueError, match="has no model.exact"):
        take_settings(["--exact-config", str(tmp_path / "a.yaml")], {})
    for text, message in (
        ("exact: [1]", r"model.exact=\[1\] is not a block of keys and values"),
        ("model: [1]", r"model=\[1\] is not a block"),
        ("exact: {alpha: 1, alpha: 2}", "alpha is given twice"),
        ("exact: {tau: }", "tau has no value: write null"),
        ("exact: {tau: ''}", "model.exact.tau is empty"),
        ("\xe4", "is not UTF-8"),
    ):
        (tmp_path / "c.yaml").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            take_settings(["--exact-config", str(tmp_path / "c.yaml")], {})
    (tmp_path / "c.json").write_text('{"alpha": 1, "alpha": 2}')
    with pytest.raises(ValueError, match="c.json: alpha is given twice"):
        take_settings(["--exact-config", str(tmp_path / "c.json")], {})
    (tmp_path / "b.yaml").write_text("exact: {alhpa: 2}\n")
    with pytest.raises(ValueError, match="did you mean model.exact.alpha"):
        take_settings(["--exact-config", str(tmp_path / "b.yaml")], {})


@pytest.mark.parametrize("line", [[], [ON], ["--lr", "1"], [ON, "missing.py"]])
def test_the_command_wants_a_script(line, capsys):
    assert main(["launch", *line]) == 2
    assert "exact-megatron launch: " in capsys.readouterr().err


DENSE, THD = {"reset_attention_mask": True}, {"dataloader_inter_document_masking": True}


@pytest.mark.parametrize(
    ("args", "core", "who", "words"),
    [
        (DENSE, (0, 16), OWN, "DocumentAttention"),
        (DENSE | {"context_parallel_size": 4}, (0, 19), OWN, "DocumentAttention"),
        (DENSE | {"transformer_impl": "local"}, (0, 15), UPSTREAM, "dense masks"),
        (THD, (0, 19), UPSTREAM, "--dataloader-inter-document-masking"),
        (THD | {"context_parallel_size": 2}, (0, 19), OWN, "wrong with --context-parallel-size 2"),
        (THD | {"micro_batch_size": 2}, (0, 19), UPSTREAM, "--dataloader-inter-document-masking"),
        (THD | {"micro_batch_size": 2, "tensor_model_parallel_size": 2}, (0, 19), OWN, "micro-batches of 2 samples"),
        (THD | {"eval_micro_batch_size": 4, "pipeline_model_parallel_size": 2}, (0, 19), OWN, "micro-batches of 4"),
    ],
)
def test_who_masks_documents(args, core, who, words):
    found, line = plan_masking(Namespace(**ARGS | args), ExactConfig(), core)
    assert found == who and words in line


def test_nobody_masks():
    with pytest.raises(ValueError, match="--reset-attention-mask"):
        plan_masking(Namespace(**ARGS), ExactConfig(), (0, 16))
    accepted = ExactConfig(allow_unmasked_documents=True)
    assert plan_masking(Namespace(**ARGS), accepted, (0, 16))[0] == NONE


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"transformer_impl": "local", "context_parallel_size": 2},
        {"spec": ["a", "b"]},
        {"transformer_impl": "local", "masked_softmax_fusion": True},
        {"transformer_impl": "local", "create_attention_mask_in_dataloader": False},
    ],
)
def test_old_cores_cannot_mask_all_layers(args):
    with pytest.raises(ValueError, match="before Megatron-LM 0.16"):
        plan_masking(Namespace(**ARGS | DENSE | args), ExactConfig(), (0, 15))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"mtp_hsm": True}, "mtp_hsm=True: it rolls hidden states"),
        ({"data_path": None}, "give --data-path"),
        ({"export_quant_cfg": "fp8"}, "unset --export-quant-cfg"),
        ({"export_num_medusa_heads": 2}, "unset --export-num-medusa-heads"),
        ({"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}, "the weights of others"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: set it to 0.0"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl='local'"),
        ({"window_size": (128, 0)}, "sliding windows"),
        ({"context_parallel_size": 2, "seq_length": 66}, "use a multiple of 4"),
        ({"context_parallel_size": 2, "cp_comm_type": ["a2a+p2p"]}, "cp_comm_type='a2a+p2p'"),
        (
            {"context_parallel_size": 2, "cp_comm_type": ["a2a"], "num_query_groups": 1, "group_query_attention": True},
            "1 KV heads",
        ),
        (
            {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "seq_length": 20, "sequence_parallel": True},
            "multiple of tensor",
        ),
        ({"modelopt_enabled": True}, "modelopt"),
        ({"export_kd_teacher_load": "x"}, "distillation"),
        ({"logits_load_dir": "x"}, "cached logits"),
        ({"sft": True}, "SFT"),
        ({"mock_data": True}, "mock"),
        ({"fim_data": True}, "fill-in-the-middle"),
        ({"use_legacy_models": True}, "legacy"),
        ({"hybrid_context_parallel": True}, "--context-parallel-size alone"),
        ({"context_parallel_size": 2, "eod_mask_loss": True}, "--calculate-per-token-loss"),
        ({"iterations_to_skip": [3]}, "--iterations-to-skip"),
        ({"dataloader_type": "external"}, "--dataloader-type external"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
    ],
)
def test_runs_that_would_be_weighted_wrongly_are_refused(args, words):
    assert refusals(Namespace(**ARGS | DENSE), ExactConfig(), (0, 16)) == []
    (reason,) = refusals(Namespace(**ARGS | DENSE | args), ExactConfig(), (0, 16))
    assert words in reason


@pytest.mark.parametrize(
    ("version", "refused"), [(None, True), ("2.7.0", True), ("2.10.1", True), ("2.11.0", False), ("3.0", False)]
)
def test_the_fused_cross_entropy_of_old_transformer_engines_is_refused(version, refused, monkeypatch):
    monkeypatch.setattr(supported, "transformer_engine_version", lambda: version)
    te = Namespace(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")
    assert bool(supported.unsupported_loss(te)) == refused
    assert not supported.unsupported_loss(Namespace(cross_entropy_loss_fusion=False, cross_entropy_fusion_impl="te"))


def test_unset_modelopt_arguments_are_no_reason():
    unset = {
        "export_real_quant_cfg": "None",
        "export_quant_cfg": None,
        "export_num_medusa_heads": 0,
        "modelopt_enabled": False,
    }
    assert refusals(Namespace(**ARGS | DENSE | unset), ExactConfig(), (0, 13)) != []  # Transformer Engine's layers
    assert refusals(Namespace(**ARGS | DENSE | unset), ExactConfig(), (0, 16)) == []


def test_the_hook_weights_the_loss_and_gives_everything_back(monkeypatch, config, capsys):
    host = Host(monkeypatch, config)
    before = dict(host.script), host.checkpointing.check_checkpoint_args
    exact = MegatronLM(UNMASKED)
    assert host.run(exact) == "trained"
    table = exact.loss.table
    assert table.lookup.max() > 1 > table.lookup.min()
    for weights, (loss, count, report) in host.steps:
        losses = torch.arange(1.0, 33.0)
        assert count == 32 and loss == pytest.approx(float((losses * weights).sum()))
        assert report["lm loss"].tolist() == [float(losses.sum()), 32]
        assert report["exact loss"].tolist() == pytest.approx([float(loss), 32])
    assert (dict(host.script), host.checkpointing.check_checkpoint_args) == before
    printed = capsys.readouterr().out
    assert printed.count("EXACT\n") == 1 and table.digest in printed and "see each other" in printed
    assert host.args.exact["table"] == table.digest


def test_a_resume_with_other_weights_is_refused(monkeypatch, config):
    host = Host(monkeypatch, config)
    host.run(MegatronLM(UNMASKED))
    saved = Namespace(exact=dict(host.args.exact))
    assert host.run(MegatronLM(UNMASKED), resumed=saved) == "trained"
    other = ExactConfig(enabled=True, alpha=0.4, allow_unmasked_documents=True)
    with pytest.raises(ValueError, match="alpha: 0.5 in the checkpoint, now 0.4"):
        host.run(MegatronLM(other), resumed=saved)
    accepted = ExactConfig(enabled=True, alpha=0.4, allow_unmasked_documents=True, allow_changed_weights=True)
    assert host.run(MegatronLM(accepted), resumed=saved) == "trained"
    assert host.run(MegatronLM(other), resumed=Namespace()) == "trained"  # from a run without EXACT


def test_a_weighted_checkpoint_does_not_go_on_unweighted_in_silence(monkeypatch, config):
    host = Host(monkeypatch, config)
    saved = Namespace(exact={"table": "x", "census": "y"})
    check = host.checkpointing.check_checkpoint_args
    off = MegatronLM(ExactConfig())
    monkeypatch.setattr(Host, "pretrain", lambda self, *a, resumed: self.checkpointing.check_checkpoint_args(resumed))

    def call(exact, args):
        return exact.hook(stub(host))(None, None, resumed=args)

    with pytest.raises(ValueError, match="does not enable them"):
        call(off, saved)
    call(off, Namespace())  # from a run without EXACT
    call(MegatronLM(ExactConfig(allow_changed_weights=True)), saved)
    assert host.checkpointing.check_checkpoint_args is check


def stub(host):
    return lambda train_valid_test_dataset_provider, forward_step_func, resumed: host.pretrain(resumed=resumed)


def test_means_over_a_log_interval_leave_out_steps_without_a_target(monkeypatch):
    nan, bucket = float("nan"), "lm loss 32-64"
    monkeypatch.setitem(
        sys.modules, "megatron.training", types.SimpleNamespace(get_args=lambda: Namespace(log_interval=4))
    )
    for values, mean in (
        ([1.0, 2.0, 3.0, 6.0], 3.0),
        ([nan, 2.0, nan, 4.0], 3.0),
        ([2.0, 4.0, 3.0, nan], 3.0),
        ([nan] * 4, None),
        ([nan, None, 5.0, 7.0], 6.0),
        ([5.0, 7.0, nan, None], 6.0),  # None: the step was skipped
    ):
        log, totals = whole_intervals(training_log), {}
        for interval in range(2):  # the second is summed anew
            for step, value in enumerate(values, 1):
                losses = {"lm loss": torch.tensor(5.0), bucket: torch.tensor(nan if value is None else value)}
                printed = log(losses, totals, iteration=4 * interval + step, skipped_iter=value is None)
            assert printed.get(bucket) == mean and printed["lm loss"] == 5.0
    log, totals = whole_intervals(training_log), {}
    first = {"lm loss": torch.tensor(1.0), bucket: torch.tensor(1.0)}
    assert log(first, totals, 1, 0, is_first_iteration=True) == {"lm loss": 1.0, bucket: 1.0}
    for step, value in ((2, nan), (3, 3.0), (4, nan)):
        printed = log({bucket: torch.tensor(value)}, totals, step, 0)
    assert printed[bucket] == 2.0
    with pytest.raises(RuntimeError, match="training_log takes"):
        whole_intervals(lambda losses: None)


def test_a_refused_run_takes_no_step(monkeypatch, config):
    host = Host(monkeypatch, config)
    host.args.sft = True
    with pytest.raises(ValueError, match="refuses this run:\n  SFT data"):
        host.run(MegatronLM(UNMASKED))
    assert host.steps == []


def test_masking_that_reaches_no_model_is_refused(monkeypatch, config):
    host = Host(monkeypatch, config)
    host.args.reset_attention_mask = True
    with pytest.raises(RuntimeError, match="no GPTModel was built"):
        host.run(MegatronLM(UNMASKED))
    assert host.steps == [] and host.args.reset_attention_mask is False


def test_other_data_are_refused(monkeypatch, config):
    with pytest.raises(ValueError, match="not of MockGPTDataset"):
        Host(monkeypatch, config, cls=MockGPTDataset).run(MegatronLM(UNMASKED))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("partial(loss_func", "partial(other_loss", "does not use a global loss_func"),
        (
            "loss_func(loss_mask, output_tensor,",
            "loss_func(output_tensor, loss_mask,",
            "not \\(loss_mask, output_tensor",
        ),
        (
            "    return BlendedMegatronDatasetBuilder",
            "    return Other",
            "does not use a global BlendedMegatronDatasetBuilder",
        ),
        ("from megatron.training", "BlendedMegatronDatasetBuilder = print\nfrom megatron.training", "not Megatron's"),
    ],
)
def test_a_script_of_another_shape_is_refused(monkeypatch, config, old, new, message):
    assert old in SCRIPT
    host = Host(monkeypatch, config, script=SCRIPT.replace(old, new))
    with pytest.raises(RuntimeError, match=message):
        host.run(MegatronLM(UNMASKED))
    assert host.steps == []


def test_hooking_twice_is_refused(monkeypatch, config):
    host = Host(monkeypatch, config)
    hooked = MegatronLM(UNMASKED).hook(host.pretrain)
    with pytest.raises(RuntimeError, match="hooked by EXACT already"):
        MegatronLM(UNMASKED).hook(hooked)
    with pytest.raises(RuntimeError, match="or hooked already"):  # through a wrapper that hides it
        outer = MegatronLM(UNMASKED).hook(
            lambda train_valid_test_dataset_provider, model_type, forward_step_func: hooked(
                train_valid_test_dataset_provider, model_type, forward_step_func
            )
        )
        outer(host.script["provider"], "gpt", host.script["forward_step"])
    with pytest.raises(RuntimeError, match="takes no train_valid_test_dataset_provider"):
        MegatronLM(UNMASKED).hook(lambda data, forward_step_func: None)


def test_a_patched_script_takes_its_settings_from_the_command_line(monkeypatch):
    def pretrain(train_valid_test_dataset_provider, forward_step_func):
        return None

    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--lr", "1", "--exact-alpha", "0.2"])
    assert not from_command_line(pretrain).exact.config.enabled
    assert sys.argv == ["pretrain_gpt.py", "--lr", "1"]
    monkeypatch.setenv("EXACT_ENABLED", "true")
    assert from_command_line(pretrain).exact.config.enabled


def test_replaced_and_script_global():
    module = types.SimpleNamespace(a=1)
    with replaced(module, "a", 2):
        assert module.a == 2
    assert module.a == 1
    with pytest.raises(RuntimeError, match="has no b"), replaced(module, "b", 2):
        pass
    wrapped = functools.wraps(take_settings)(lambda *a: None)
    assert script_global(wrapped, "given_settings").__name__ == "given_settings"


def test_boundaries_reach_the_model_and_not_the_script():
    cu_seqlens = torch.full((2, 9), 8, dtype=torch.int32)
    cu_seqlens[0, :3], cu_seqlens[1, :2] = torch.tensor([0, 3, 8]), torch.tensor([0, 8])
    assert join_boundaries(cu_seqlens, 8) == [0, 3, 8, 16]
    seen = {}

    def forward_step(data_iterator, model):
        seen["batch"] = next(data_iterator)
        return model("tokens", labels=1), None

    def model(*args, **kwargs):
        return seen.update(args=args, **kwargs)

    feed_documents(forward_step, 8)(iter([{"tokens": 0, "cu_seqlens": cu_seqlens}]), model)
    assert seen["batch"] == {"tokens": 0} and seen["args"] == ("tokens",) and seen["labels"] == 1
    assert seen["packed_seq_params"].boundaries == (0, 3, 8, 16)
    for iterator in (None, iter([{"tokens": 0}])):
        with pytest.raises(RuntimeError, match="no document boundaries"):
            feed_documents(forward_step, 8)(iterator, model)


LAUNCHED = """
import sys
from helper import here
print("argv", sys.argv[1:], __name__, here)
if "train" in sys.argv:
    from megatron.training import pretrain
"""


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """python -m exact_megatron.launch beside a megatron.training of two lines."""
    (folder / "checkout").mkdir(exist_ok=True)
    (folder / "checkout" / "script.py").write_text(LAUNCHED)
    (folder / "checkout" / "helper.py").write_text("here = 'beside the script'\n")
    package = folder / "checkout" / "megatron" / "training"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("from .training import pretrain\n")
    (package / "training.py").write_text("def pretrain(train_valid_test_dataset_provider, forward_step_func): pass\n")
    command = [sys.executable, "-m", "exact_megatron.launch", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_STEP_NUM_TASKS")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)


def test_launch_runs_the_script_as_python_would(tmp_path):
    ran = launch(tmp_path, "checkout/script.py", "a", "--b")
    assert ran.returncode == 0, ran.stderr
    assert "argv ['a', '--b'] __main__ beside the script" in ran.stdout


def test_enabled_but_never_hooked_fails(tmp_path):
    ran = launch(tmp_path, ON, "checkout/script.py", "train")
    assert ran.returncode == 1 and "never called megatron.training.pretrain" in ran.stderr


def checkout(folder: Path, version: str = "0.16") -> None:
    """What doctor reads of a checkout of Megatron-LM."""
    (folder / "pretrain_gpt.py").write_text(SCRIPT.replace("provider(", "train_valid_test_datasets_provider("))
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    major, minor = version.split(".")
    (core / "package_info.py").write_text(f"MAJOR = {major}\nMINOR = {minor}\n")


def test_doctor_looks_at_the_script_that_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_LM", raising=False)
    checkout(tmp_path)
    (tmp_path / "pretrain_other.py").write_text("from megatron.training import pretrain\n")
    assert main(["doctor", ON, str(tmp_path / "pretrain_other.py"), "--seq-length", "64"]) == 1
    assert "forward_step uses no loss_func" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "own.py").touch()
    assert main(["doctor", ON, str(tmp_path / "elsewhere" / "own.py")]) == 1
    assert "is in no checkout of Megatron-LM" in capsys.readouterr().out
    assert main(["doctor", "--exact-enabled", str(tmp_path / "pretrain_gpt.py")]) == 1
    assert "--seq-length is not on the line" in capsys.readouterr().out


def test_doctor_takes_several_files(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("model: {num_layers: 3}\n")
    (tmp_path / "b.yaml").write_text("model: {num_layerss: 4}\n")
    assert main(["doctor", "--config", str(tmp_path / "b.yaml"), "--config", str(tmp_path / "a.yaml")]) == 1
    assert "num_layerss" in capsys.readouterr().out


def test_doctor_fits_a_screen_and_fails_for_a_run_that_would(capsys, write_corpus, tmp_path):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 24
    for name in (
        "python",
        "torch",
        "CUDA",
        "NCCL",
        "megatron-core",
        "transformer-engine",
        "apex",
        "nemo",
        "bridge",
        "FP8",
    ):
        assert name in text
    prefix = write_corpus(np.array([100, 300, 64], np.int32))
    checkout(tmp_path)
    script = str(tmp_path / "pretrain_gpt.py")
    line = [
        "doctor",
        ON,
        script,
        "--data-path",
        prefix,
        *f"{MODEL} --seq-length 64 --bf16 --attention-dropout 0".split(),
    ]
    assert main([*line, "--reset-attention-mask", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["run"]["tau"] == 16 and 0 < report["run"]["tail_share"] < report["run"]["weighted_tail_share"] < 1
    assert "DocumentAttention" in report["run"]["documents"] and report["run"]["refused"] == []
    assert report["hosts"]["Megatron-LM"].startswith("hookable")
    assert main(line) == 1
    assert "would see each other" in capsys.readouterr().out
    assert main(["doctor", ON, str(tmp_path / "missing" / "pretrain_gpt.py")]) == 1
    assert main(["doctor", "model.exact.alhpa=1"]) == 1
    assert "did you mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--attention-dropout", "0.1"], "attention_dropout=0.1"),
        (["--multi-latent-attention"], "multi_latent_attention"),
        (["--context-parallel-size", "4", "--seq-length", "60"], "use a multiple of 8"),
        (["--context-parallel-size", "2", "--cp-comm-type", "a2a+p2p"], "a2a+p2p"),
        (
            "--context-parallel-size 2 --cp-comm-type a2a --group-query-attention --num-query-groups 1".split(),
            "1 KV heads",
        ),
        (["--window-size", "(128,0)"], "sliding windows"),
        (["--fp8-dot-product-attention"], "fp8_dot_product_attention"),
        (["--cuda-graph-impl", "local"], "cuda_graph_impl"),
        (["--qk-clip"], "qk_clip"),
        (["--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te"], "cross_entropy_fusion_impl"),
        (["--softmax-type", "learnable"], "softmax_type"),
        (["--iterations-to-skip", "3", "4"], "--iterations-to-skip"),
        (["--mtp-hsm"], "mtp_hsm"),
        (["--mock-data"], "mock"),
        (["--export-quant-cfg", "fp8"], "modelopt"),
        (["--seq-length", "abc"], "invalid int value: 'abc'"),
        (["--yaml-cfg", "a.yaml"], "--yaml-cfg"),
        (["--data-path", "missing"], "missing"),
        (["--data-args-path", "missing.txt"], "missing.txt"),
        (["model.exact.tau=256", "--seq-length", "512"], "no target has an effective context of tau=256"),
    ],
)
def test_doctor_fails_for_what_the_launcher_refuses(more, words, capsys, write_corpus, tmp_path):
    prefix = write_corpus(np.array([50, 30, 64] * 8, np.int32))
    checkout(tmp_path)
    script = str(tmp_path / "pretrain_gpt.py")
    flags = f"{MODEL} --seq-length 64 --attention-dropout 0 --reset-attention-mask".split()
    line = ["doctor", ON, script, "--data-path", prefix, *flags]
    assert main(line) == 0
    assert "nothing: EXACT would start this run" in capsys.readouterr().out
    assert main([*line, *more]) == 1
    assert words in capsys.readouterr().out.partition("refused")[2]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("model.fp8=true", "model.fp8=true needs a GPU and Transformer Engine"),
        ("model.transformer_engine=true", "needs a GPU and the package transformer-engine"),
        ("trainer.accelerator=gpu", "torch finds 0 CUDA devices"),
        ("restore_from_path=missing", "no checkpoint at missing"),
        ("model.data.data_prefix=missing", "missing"),
        ("model.data.eod_id=99", "model.data.eod_id=99"),
        ("model.exact.tau=63", "tau"),
        ("model.attention_dropout=0.1", "model.attention_dropout=0.1"),
        ("model.typo=1", "model.typo"),
    ],
)
def test_doctor_fails_for_what_the_native_runner_refuses(more, words, capsys, write_corpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lengths = np.array([50, 30, 40], np.int32)
    prefix = write_corpus(lengths, tokens=np.arange(lengths.sum()) % 64)
    line = [
        "doctor",
        ON,
        f"model.data.data_prefix={prefix}",
        "model.data.seq_length=64",
        "model.override_vocab_size=64",
        "model.data.eod_id=0",
        "trainer.devices=1",
        "trainer.accelerator=auto",
        "model.num_layers=2",
    ]
    assert main(line) == 0, capsys.readouterr().out
    assert main([*line, more]) == 1
    assert words in capsys.readouterr().out.partition("refused")[2]


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("1.23.0", "hookable: 1.23.0, YAML (Hydra plugin)"),
        ("2.4.0", "hookable: 2.4.0, YAML (Hydra plugin) and recipes"),
        ("2.7.0", "hookable: 2.7.0, recipes"),
        ("3.0.0", "no: nemo_toolkit 3.0.0 has no Megatron"),
    ],
)
def test_doctor_says_which_of_nemos_models_can_be_hooked(version, words):
    assert installed.nemo_toolkit(version).startswith(words)


def test_doctor_tells_nvidias_apex_from_the_other(monkeypatch, tmp_path):
    assert installed.apex() == "not installed"
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    assert "unrelated" in installed.apex()
    sys.modules.pop("apex", None)
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    (tmp_path / "apex" / "multi_tensor_apply" / "__init__.py").touch()
    assert installed.apex().startswith("NVIDIA's")
    sys.modules.pop("apex", None)


@pytest.mark.parametrize(
    ("capability", "recipes"),
    [
        (None, "none"),
        ((8, 0), "none"),
        ((8, 9), "delayed, tensorwise"),
        ((9, 0), "delayed, tensorwise, blockwise"),
        ((10, 0), "delayed, tensorwise, blockwise, mxfp8"),
    ],
)
def test_doctor_names_fp8_recipes(capability, recipes):
    assert installed.fp8_recipes(capability, "2.9.0").startswith(recipes)
    assert installed.fp8_recipes(capability, "not installed").startswith("none")
