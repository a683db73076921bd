"""The part of the Megatron-Bridge integration that needs no Bridge: settings, hooks at import, scripts that start anew."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exact_megatron import ExactConfig
from exact_megatron.config import ExactError
from exact_megatron.integrations import bridge
from exact_megatron.integrations.hooks import when_imported
from exact_megatron.integrations.settings import take_settings, take_timing

LAUNCHER = "exact_megatron.integrations.bridge_launch"

# Megatron-Bridge as far as it is hooked: the same names in the same places, with its silent drop of unknown keys.
FAKE = {
    "megatron/__init__.py": "",
    "megatron/bridge/__init__.py": "",
    "megatron/bridge/training/__init__.py": "",
    "megatron/bridge/training/utils/__init__.py": "",
    "megatron/bridge/training/utils/omegaconf_utils.py": """
def _apply_overrides(config, overrides):
    for key, value in overrides.items():
        if isinstance(value, dict):
            _apply_overrides(config[key], value)
        elif key in config:
            config[key] = value

def apply_overrides(config, overrides, excluded):
    _apply_overrides(config, overrides)
""",
    "megatron/bridge/training/utils/config_utils.py": """
class Inherited:  # as in 0.6
    @classmethod
    def from_dict(cls, config_dict, mode=None):
        return config_dict

class _ConfigContainerBase(Inherited):
    pass
""",
    "megatron/bridge/training/state.py": """
class TrainState:
    def load_state_dict(self, values):
        print("loaded", values)
""",
    "megatron/bridge/training/pretrain.py": """
import os
def pretrain(config, forward_step_func):
    _pretrain(state=config, forward_step_func=forward_step_func)

def _pretrain(state, forward_step_func, callback_manager=None):
    if "CHECKPOINT" in os.environ:
        from megatron.bridge.training.state import TrainState
        TrainState().load_state_dict({"step": 3, "exact": {"table": "a"}})
    print("stock training", state)
""",
    # The true one needs Bridge: here it says what it was given.
    "exact_megatron_run.py": """
import dataclasses, json, sys, types
class MegatronBridge:
    def __init__(self, config):
        self.config = config
    def pretrain(self, stock, *args, **kwargs):
        print("EXACT", json.dumps(dataclasses.asdict(self.config)), kwargs["state"])
sys.modules["exact_megatron.integrations.bridge_training"] = types.ModuleType("bridge_training")
sys.modules["exact_megatron.integrations.bridge_training"].MegatronBridge = MegatronBridge
""",
    "user.py": """
import sys
import exact_megatron_run
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import apply_overrides
print("arguments", sys.argv[1:])
class Config(dict):  # GlobalState and ConfigContainer in one
    @property
    def cfg(self):
        import os, types
        return types.SimpleNamespace(checkpoint=types.SimpleNamespace(finetune=os.environ["CHECKPOINT"] == "finetune"))
config = Config({"model": {"layers": 2}})
if "--whole" in sys.argv:
    from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
    config = type("C", (_ConfigContainerBase,), {}).from_dict({"model": {"layers": 4, "exact": {"enabled": True}}})
if "--yaml" in sys.argv:
    apply_overrides(config, {"model": {"layers": 3, "exact": {"enabled": True, "eps": "1e-7"}}}, {})
pretrain(config, print)
""",
    "caller.py": """
from exact_megatron.integrations import bridge
from megatron.bridge.training.pretrain import pretrain  # by name, before the call
bridge.install(alpha=0.3)
exec(open("user.py").read())
bridge.install()
""",
    "anew.py": """
import os, sys
import exact_megatron_run
if "--call" in sys.argv:
    from exact_megatron.integrations import bridge
    bridge.install()
if os.environ.get("MARKER") != str(os.getpid()):
    print("starting anew", flush=True)
    os.chdir("/")
    os.execvpe(sys.executable, [sys.executable, os.path.abspath(__file__), *sys.argv[1:]], {**os.environ, "MARKER": str(os.getpid())})
from megatron.bridge.training.pretrain import pretrain
pretrain("config", print)
""",
    "other.py": """
import os, sys
os.execv(sys.executable, [sys.executable, "-c", "print('trained elsewhere')"])
""",
    "never.py": "print('no training here')",
}


@pytest.fixture
def run(tmp_path):
    for name, text in FAKE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("EXACT_")}
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
        return subprocess.run(
            [sys.executable, *arguments],
            env={**clean, "PYTHONPATH": path, **environment},
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=60,
        )

    return run


def trained(done: subprocess.CompletedProcess) -> ExactConfig:
    """The settings that the one training in this output had."""
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("EXACT ")]
    settings, _ = json.JSONDecoder().raw_decode(line.removeprefix("EXACT "))
    assert "stock training" not in done.stdout
    return ExactConfig(**settings)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_overrides_are_taken_from_the_command_line(run, prefix):
    done = run("-m", LAUNCHER, "user.py", "--recipe", "x", f"{prefix}model.exact.enabled=true", "train.train_iters=5")
    assert trained(done) == ExactConfig(enabled=True)
    assert "arguments ['--recipe', 'x', 'train.train_iters=5']" in done.stdout


def test_yaml_is_taken_before_it_is_dropped(run):
    done = run("-m", LAUNCHER, "user.py", "--yaml", "model.exact.alpha=0.2")
    assert trained(done) == ExactConfig(enabled=True, alpha=0.2, eps=1e-7)
    assert "{'model': {'layers': 3}}" in done.stdout  # the rest went where it belongs


def test_a_whole_configuration_is_parted_too(run):
    done = run("-m", LAUNCHER, "user.py", "--whole")
    assert trained(done) == ExactConfig(enabled=True) and "{'model': {'layers': 4}}" in done.stdout


def test_later_wins(run):
    done = run("caller.py", "--yaml", "model.exact.gamma=0.1", EXACT_GAMMA="0.2", EXACT_EPS="1e-6")
    assert trained(done) == ExactConfig(enabled=True, alpha=0.3, gamma=0.1, eps=1e-6)


def test_the_call_works_after_bridge_was_imported(run):
    done = run("caller.py", "--lr", "1", "model.exact.enabled=true")
    assert trained(done) == ExactConfig(enabled=True, alpha=0.3) and "arguments ['--lr', '1']" in done.stdout


def test_without_enabled_bridge_trains_as_it_is(run):
    done = run("-m", LAUNCHER, "user.py", "model.exact.alpha=0.2")
    assert done.returncode == 0 and "stock training" in done.stdout and "EXACT" not in done.stdout


def test_a_weighted_checkpoint_is_not_continued_without_weights(run):
    done = run("-m", LAUNCHER, "user.py", CHECKPOINT="resume")
    assert done.returncode and "stock training" not in done.stdout
    assert "this run does not enable them" in done.stderr and "checkpoint.finetune=true" in done.stderr
    for arguments, checkpoint in (["model.exact.allow_changed_weights=true"], "resume"), ([], "finetune"):
        done = run("-m", LAUNCHER, "user.py", *arguments, CHECKPOINT=checkpoint)
        assert "loaded {'step': 3" in done.stdout and "stock training" in done.stdout, done.stderr


@pytest.mark.parametrize("launch", [True, False])
def test_a_script_that_starts_anew_is_hooked_again(run, launch):
    way = ["-m", LAUNCHER, "anew.py"] if launch else ["anew.py", "--call"]
    done = run(*way, "model.exact.enabled=true", "model.exact.normalization=none", "--exact-alpha", "0.25")
    assert trained(done) == ExactConfig(enabled=True, alpha=0.25, normalization="none")
    assert done.stdout.count("starting anew") == 1


def test_a_script_that_becomes_another_program_is_refused(run):
    done = run("-m", LAUNCHER, "other.py", "model.exact.enabled=true")
    assert done.returncode and "about to replace its process" in done.stderr and "elsewhere" not in done.stdout
    assert "elsewhere" in run("-m", LAUNCHER, "other.py", "model.exact.enabled=false").stdout


def test_a_script_that_never_trains_is_an_error(run):
    done = run("-m", LAUNCHER, "never.py", "model.exact.enabled=true")
    assert done.returncode and "never called Megatron-Bridge's pretrain" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["user.py", "model.exact.alhpa=1"], "did you mean model.exact.alpha?"),
        (["missing.py", "model.exact.enabled=true"], "there is no such script"),
        (["model.exact.enabled=true"], "expected the training script"),
    ],
)
def test_a_wrong_command_line_is_one_line(run, arguments, words):
    done = run("-m", LAUNCHER, *arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_block_is_taken_out_of_a_copy():
    installed = bridge.Installation(["script.py"], {}, {})
    config = {"_target_": "ConfigContainer", "model": {"layers": 2, "exact": {"enabled": True}}}
    assert installed.take_block(config) == {"_target_": "ConfigContainer", "model": {"layers": 2}}
    assert config["model"]["exact"] and installed.config.enabled  # the caller's own is left alone
    assert installed.take_block({"train": 1}) == {"train": 1}
    with pytest.raises(ValueError, match=r"did you mean model\.exact\.gamma\?"):
        installed.take_block({"model": {"exact": {"gama": 1}}})
    with pytest.raises(ValueError, match="must hold settings"):
        installed.take_block({"model": {"exact": True}})


def test_a_bridge_without_the_hooked_names_is_refused():
    module = type(os)("megatron.bridge.training.pretrain")
    with pytest.raises(ExactError, match="has no _pretrain"):
        bridge.Installation(["script.py"], {}, {})._hook_pretrain(module)


def test_when_imported_acts_once_before_anyone_uses_the_module(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("value = 1\nseen = __spec__.name")
    monkeypatch.syspath_prepend(str(tmp_path))
    acted = []
    when_imported("late_module", lambda module: (acted.append(module), setattr(module, "value", 2)))
    assert not acted and "late_module" not in sys.modules
    from late_module import seen, value

    assert (value, seen, len(acted)) == (2, "late_module", 1)
    when_imported("late_module", acted.append)
    assert len(acted) == 2
    monkeypatch.delitem(sys.modules, "late_module")


def test_when_imported_acts_after_a_spec_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "asked_module.py").write_text("import sys\nif 'fail' in sys.argv: raise OSError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before, acted = list(sys.meta_path), []
    when_imported("asked_module", acted.append)
    for _ in range(2):
        assert importlib.util.find_spec("asked_module").name == "asked_module"
    monkeypatch.setattr(sys, "argv", ["fail"])
    with pytest.raises(OSError):
        importlib.import_module("asked_module")
    assert not acted
    monkeypatch.setattr(sys, "argv", [])
    module = importlib.import_module("asked_module")
    importlib.reload(module)
    assert acted == [module] and sys.meta_path == before
    monkeypatch.delitem(sys.modules, "asked_module")


def test_a_file_with_query_key_timing_only_has_no_settings_of_the_weights(tmp_path):
    for text in ("qk_timing: {enabled: true}\n", "model: {qk_timing: {enabled: true}}\n"):
        (tmp_path / "timing.yaml").write_text(text)
        environment = {"EXACT_CONFIG": str(tmp_path / "timing.yaml"), "EXACT_SLURM": "existing"}
        assert take_settings([], environment)[0] == ExactConfig()
        assert take_timing([], environment)[0].enabled


def test_a_core_attention_of_bridges_own_is_not_replaced(monkeypatch):
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from exact_megatron.attention import DocumentAttention
    from exact_megatron.integrations.documents import masking_documents

    built = []
    monkeypatch.setattr(SelfAttention, "__init__", lambda self, config, submodules: built.append(submodules))
    softcap = type("Gemma2DotProductAttention", (), {"__module__": "megatron.bridge.models.gemma.gemma2_provider"})
    with masking_documents():
        SelfAttention(None, SelfAttentionSubmodules(linear_qkv=None, core_attention=DotProductAttention))
        with pytest.raises(
            ValueError, match="gemma2_provider.Gemma2DotProductAttention, which DocumentAttention would replace"
        ):
            SelfAttention(None, SelfAttentionSubmodules(linear_qkv=None, core_attention=softcap))
    assert [submodules.core_attention for submodules in built] == [DocumentAttention]


def test_losses_of_another_form_are_refused():
    import torch

    from exact_megatron.integrations.bridge_training import MegatronBridge

    run = MegatronBridge(ExactConfig(enabled=True))

    def loss_func_kd(output_tensor, loss_mask, original_loss_fn, model):  # Megatron-Bridge's for distillation
        raise AssertionError

    with pytest.raises(ExactError, match=r"the loss loss_func_kd\(output_tensor, .* without distillation"):
        run._weigh(loss_func_kd)

    def loss_func(loss_mask, output_tensor, check_for_nan_in_loss=True):
        return (output_tensor * loss_mask).sum(), loss_mask.sum().int(), {}

    weighted = run._weigh(loss_func)
    assert run.loss.wrapped and run._weigh(loss_func) is weighted
    with torch.no_grad(), pytest.raises(ExactError, match="no weight table was bound"):
        weighted(torch.ones(2, 4), torch.ones(2, 4))
    assert run.samples == 0  # evaluation is not counted
