"""NeMo without NeMo: versions, settings, refusals, and the Hydra plugin where Hydra is installed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import yaml

from exact_megatron import ExactConfig
from exact_megatron.config import ExactError, QKTimingConfig
from exact_megatron.integrations.checkpoint_guard import check_resumed, refuse_unweighted
from exact_megatron.integrations.nemo_arguments import check_version, refusals, said, settings

ROOT = Path(__file__).parents[3]
MODEL = {"mcore_gpt": True, "data": {"data_prefix": [1.0, "x"], "reset_attention_mask": True}}


@pytest.mark.parametrize("version", ["1.23.0", "2.0.0", "2.4.0", "2.5.0"])
def test_versions_with_the_yaml_model(version):
    check_version(version)


@pytest.mark.parametrize("version", ["2.5.1", "2.5.3", "2.7.3"])
def test_versions_without_the_yaml_model_point_to_recipes_and_bridge(version):
    check_version(version, recipes=True)
    with pytest.raises(
        ExactError, match=rf"nemo_toolkit {version} has no MegatronGPTModel.*nemo_recipes.*Megatron-Bridge"
    ):
        check_version(version)


@pytest.mark.parametrize("recipes", [False, True])
def test_nemo_3_has_no_megatron(recipes):
    with pytest.raises(ExactError, match="nemo_toolkit 3.0.0 has no Megatron.*Megatron-Bridge"):
        check_version("3.0.0", recipes=recipes)


@pytest.mark.parametrize("version", ["2.0.0", "2.2.1", "2.3.1"])
def test_recipes_that_count_by_the_sum_of_the_mask_are_refused(version):
    check_version(version)
    with pytest.raises(ExactError, match=rf"{version} counts a recipe's targets by the sum of loss_mask.*2.4 to 2.7"):
        check_version(version, recipes=True)


def test_recipes_from_2_4_on():
    check_version("2.4.0", recipes=True)


def test_nemo_1_has_no_recipes():
    with pytest.raises(ExactError, match="1.23.0 has no nemo.collections.llm: use its YAML"):
        check_version("1.23.0", recipes=True)


@pytest.mark.parametrize("module", ["nemo", "nemo_recipes"])
def test_importing_the_integration_says_what_is_missing(module, tmp_path, monkeypatch):
    """A stub of the distribution that holds speech only."""
    (tmp_path / "nemo").mkdir()
    (tmp_path / "nemo" / "__init__.py").write_text('__version__ = "3.0.0"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name == "nemo" or name.startswith("nemo.")]:
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip("omegaconf")
    with pytest.raises(ExactError, match="3.0.0 has no Megatron.*exact_megatron.integrations.bridge"):
        importlib.import_module(f"exact_megatron.integrations.{module}")
    sys.modules.pop("nemo", None)


def test_settings_in_the_order_of_who_wins(tmp_path):
    file = tmp_path / "exact.yaml"
    file.write_text("exact: {alpha: 0.3, gamma: 0.3, eps: 1e-6}\n")
    environment = {"EXACT_CONFIG": str(file), "EXACT_ALPHA": "0.4", "EXACT_GAMMA": "0.4"}
    block = {"enabled": True, "alpha": 0.2, "gamma": "???", "eps": "???", "tau": "64"}
    assert settings(block, environment) == ExactConfig(enabled=True, alpha=0.2, gamma=0.4, eps=1e-6, tau=64)
    assert settings(None, {}) == settings({}, {}) == ExactConfig()
    with pytest.raises(ValueError, match="unknown key model.exact.alhpa: did you mean model.exact.alpha?"):
        settings({"alhpa": 0.2}, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mcore_gpt": False}, "model.mcore_gpt=false"),
        ({"fsdp": True}, "model.fsdp=true"),
        ({"virtual_pipeline_model_parallel_size": 2}, "model.virtual_pipeline_model_parallel_size"),
        ({"data": {**MODEL["data"], "legacy_dataset": True}}, "model.data.legacy_dataset=true"),
        ({"data": {**MODEL["data"], "data_impl": "mock"}}, "model.data.data_impl=mock"),
        ({"data": {**MODEL["data"], "add_fim": True}}, "model.data.add_fim=true"),
        ({"data": {"reset_attention_mask": True}}, "model.data.data_prefix is missing"),
        ({"data": {"data_prefix": ["x"]}}, "model.data.reset_attention_mask=true"),
    ],
)
def test_refusals(change, reason):
    assert refusals(MODEL, ExactConfig(enabled=True)) == []
    (found,) = refusals({**MODEL, **change}, ExactConfig(enabled=True))
    assert reason in found


def test_unmasked_documents_can_be_accepted():
    model = {"mcore_gpt": True, "data": {"data_prefix": ["x"]}}
    assert refusals(model, ExactConfig(enabled=True, allow_unmasked_documents=True)) == []


def test_resuming_under_other_weights():
    config = ExactConfig(enabled=True)
    before = {**config.to_dict(), "table": "a", "census": "b"}
    check_resumed(None, before, config, "")  # of a run without EXACT
    check_resumed({**before, "log_buckets": False}, before, config, "")
    with pytest.raises(ValueError, match="alpha: 0.15 in the checkpoint, now 0.2\n  table: a in the checkpoint, now c"):
        check_resumed(before, {**before, "alpha": 0.2, "table": "c"}, config, "")
    accepted = dataclasses.replace(config, allow_changed_weights=True)
    check_resumed(before, {**before, "table": "c"}, accepted, "")


def test_a_weighted_checkpoint_is_not_continued_without_weights():
    off = ExactConfig()
    refuse_unweighted(None, off, "")
    refuse_unweighted({}, off, "")
    refuse_unweighted({"table": "a"}, ExactConfig(enabled=True), "")
    refuse_unweighted({"table": "a"}, ExactConfig(allow_changed_weights=True), "")
    with pytest.raises(ValueError, match="add model.exact.enabled=true, start anew, or go on without weights"):
        refuse_unweighted({"table": "a"}, off, "start anew")


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(module, {name: attributes}) imports one of the integrations where NeMo's modules are these."""
    pytest.importorskip("omegaconf")
    pytest.importorskip("megatron.core")
    for name in (
        "dataset",
        "loss",
        "qk_timing",
        "integrations.documents",
        "integrations.loss_sums",
    ):  # these stay imported
        importlib.import_module(f"exact_megatron.{name}")
    ours = {f"exact_megatron.integrations.{name}" for name in ("nemo", "nemo_recipes")}

    def load(module, modules):
        for name in [name for name in sys.modules if name.split(".")[0] in ("nemo", "lightning") or name in ours]:
            monkeypatch.delitem(sys.modules, name)
        for name, attributes in modules.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                part = ".".join(parts[:end])
                if part not in sys.modules:
                    stub = types.ModuleType(part)
                    stub.__path__ = []
                    monkeypatch.setitem(sys.modules, part, stub)
                    if end > 1:
                        setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], stub)
            vars(sys.modules[name]).update(attributes)
        found = importlib.import_module(f"exact_megatron.integrations.{module}")
        monkeypatch.delitem(sys.modules, found.__name__)
        return found

    return load


def test_the_yaml_model_refuses_a_weighted_checkpoint_and_a_fused_loss(stand_in, monkeypatch):
    class Base:
        def __init__(self, cfg, trainer):
            self._trainer = trainer

    class MegatronGPTModel(Base):
        def __init__(self, cfg, trainer):
            super().__init__(cfg, trainer)

        def fwd_bwd_step(self, dataloader_iter, forward_only):
            raise AssertionError

        def on_load_checkpoint(self, checkpoint):
            checkpoint["loaded"] = True

    class Tuned(MegatronGPTModel):
        pass

    models = "nemo.collections.nlp.models.language_modeling"
    stubs = {
        "nemo": {"__version__": "2.4.0"},
        f"{models}.megatron_gpt_model": {"MegatronGPTModel": MegatronGPTModel},
        f"{models}.megatron_base_model": {"MegatronBaseModel": Base},
    }
    nemo = stand_in("nemo", stubs)
    nemo.install()
    OmegaConf = pytest.importorskip("omegaconf").OmegaConf

    def doing(what):
        return types.SimpleNamespace(state=types.SimpleNamespace(fn=what))

    def loads(kind, exact, trainer, checkpoint):
        kind(OmegaConf.create({"exact": exact}), trainer).on_load_checkpoint(checkpoint)
        return checkpoint["loaded"]

    with pytest.raises(ValueError, match="does not enable them.*another exp_manager.exp_dir"):
        loads(MegatronGPTModel, {"alpha": 0.2}, doing("fit"), {"exact": {"table": "a"}})
    assert loads(MegatronGPTModel, {"allow_changed_weights": True}, doing("fit"), {"exact": {"table": "a"}})
    assert loads(MegatronGPTModel, {}, doing("fit"), {}) and loads(MegatronGPTModel, {}, doing("fit"), {"exact": {}})
    for trainer in (None, doing(None), doing("validate")):
        assert loads(MegatronGPTModel, {}, trainer, {"exact": {"table": "a"}})
    assert loads(Tuned, {}, doing("fit"), {"exact": {"table": "a"}})
    fused = types.SimpleNamespace(
        calculate_per_token_loss=False, cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te"
    )
    monkeypatch.setattr("exact_megatron.attention.supported.transformer_engine_version", lambda: "2.10.0")
    with pytest.raises(ValueError, match="refuses this run:\n  cross_entropy_fusion_impl='te'"):
        nemo.ExactGPTModel.model_provider_func(types.SimpleNamespace(transformer_config=fused), True, True)


def test_the_callback_refuses_a_weighted_checkpoint_and_masks_each_time(stand_in):
    stubs = {
        "nemo": {"__version__": "2.4.0"},
        "lightning.pytorch.callbacks": {"Callback": object},
        "nemo.collections.llm.gpt.model.base": dict.fromkeys(("GPTModel", "gpt_data_step", "gpt_forward_step")),
        "nemo.lightning.megatron_parallel": {"MaskedTokenLossReduction": object},
    }
    recipes = stand_in("nemo_recipes", stubs)
    with pytest.raises(ValueError, match="does not enable them.*another log directory"):
        recipes.ExactCallback(enabled=False).load_state_dict({"table": "a"})
    recipes.ExactCallback(enabled=False, allow_changed_weights=True).load_state_dict({"table": "a"})
    recipes.ExactCallback(enabled=False).load_state_dict({})
    from megatron.core.transformer.attention import SelfAttention

    stock, masking = SelfAttention.__init__, recipes._Masking()
    for _ in range(2):
        with masking:
            assert SelfAttention.__init__ is not stock
        assert SelfAttention.__init__ is stock


def test_the_example_configuration_shows_every_key_with_its_default():
    block = yaml.safe_load((ROOT / "configs/nemo/megatron_gpt_exact.yaml").read_text())["model"]["exact"]
    assert settings(block, {}) == ExactConfig()
    assert list(block) == list(ExactConfig().to_dict())


# The Hydra plugin.

APP = """
import json, sys
import hydra
{before}
@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    schemes = [source["schema"] for source in OmegaConf.to_container(HydraConfig.get().runtime.config_sources)]
    heavy = [name for name in ("torch", "numpy", "exact_megatron") if name in sys.modules]
    print("RESULT", json.dumps([OmegaConf.to_container(cfg), schemes, heavy]))
main()
"""
PRETEND = """
import types
import exact_megatron.integrations
name = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"
sys.modules[name] = types.ModuleType(name)
hook = sys.modules["exact_megatron.integrations.nemo"] = types.ModuleType("nemo")
hook.install = lambda: print("INSTALLED")
"""


@pytest.fixture
def app(tmp_path):
    """app(files, *overrides, nemo=True) runs a Hydra program; nemo: one that has imported MegatronGPTModel."""
    pytest.importorskip("hydra")

    def run(files, *overrides, nemo=True):
        (tmp_path / "conf").mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / "conf" / name).write_text(textwrap.dedent(text))
        (tmp_path / "app.py").write_text(APP.format(before=PRETEND if nemo else ""))
        command = [sys.executable, "app.py", "hydra.run.dir=.", "hydra.output_subdir=null", *overrides]
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        return (*json.loads(lines[0].removeprefix("RESULT ")), done) if lines else (None, None, None, done)

    return run


STOCK = {"config.yaml": "model: {mcore_gpt: true, data: {seq_length: 64}}\ntrainer: {devices: 1}\n"}


def test_other_hydra_programs_are_left_alone(app):
    config, schemes, imported, done = app(STOCK, nemo=False)
    assert config == {"model": {"mcore_gpt": True, "data": {"seq_length": 64}}, "trainer": {"devices": 1}}
    assert schemes == ["pkg", "file", "structured"] and imported == [] and not done.stderr
    _, _, _, done = app(STOCK, "model.exact.enabled=true", nemo=False)
    assert "Key 'exact' is not in struct" in done.stderr


def test_the_plugin_imports_nothing_that_hydra_has_not(app):
    code = "import sys, hydra.core.plugins, omegaconf; a = set(sys.modules)\n"
    code += "import hydra_plugins.exact_megatron; print(set(sys.modules) - a)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    added = {name for name in eval(done.stdout) if not name.startswith(("hydra", "omegaconf", "yaml"))}
    assert added == set()


def test_keys_are_known_and_the_model_is_hooked(app):
    config, schemes, _, done = app(STOCK, "model.exact.enabled=true", "model.exact.alpha=0.2")
    assert settings(config["model"]["exact"], {}) == ExactConfig(enabled=True, alpha=0.2)
    assert "INSTALLED" in done.stdout and "exact" in schemes
    config, *_ = app(STOCK)
    assert settings(config["model"].pop("exact"), {}) == ExactConfig()
    assert not QKTimingConfig.from_mapping(said(config["model"].pop("qk_timing"))).enabled
    assert config == {"model": {"mcore_gpt": True, "data": {"seq_length": 64}}, "trainer": {"devices": 1}}


@pytest.mark.parametrize("override", ["model.exact.alhpa=0.2", "model.exakt.enabled=true"])
def test_misspelled_keys_are_refused(app, override):
    config, _, _, done = app(STOCK, override)
    assert config is None and "is not in struct" in done.stderr


def test_files_laid_over_each_other_keep_what_was_said(app):
    """A file that says nothing of model.exact changes nothing of what a file below it says, in any order."""
    base = "model: {mcore_gpt: true, num_layers: 2, exact: {enabled: true, alpha: 0.3}}\n"
    for order in ("[base, _self_]", "[_self_, base]"):
        files = {"base.yaml": base, "config.yaml": f"defaults: {order}\nmodel: {{hidden_size: 8}}\n"}
        config, *_ = app(files, "model.exact.gamma=0.7")
        assert settings(config["model"]["exact"], {}) == ExactConfig(enabled=True, alpha=0.3, gamma=0.7)
    files = {"base.yaml": base, "config.yaml": "defaults: [base, _self_]\nmodel: {exact: {alpha: 0.4}}\n"}
    config, *_ = app(files)
    assert settings(config["model"]["exact"], {}) == ExactConfig(enabled=True, alpha=0.4)


def test_a_base_from_another_folder_of_the_search_path(app, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "base.yaml").write_text("model: {mcore_gpt: true}\n")
    files = {"config.yaml": f"defaults: [base, _self_]\nhydra: {{searchpath: ['file://{tmp_path}/theirs']}}\n"}
    config, *_ = app(files, "model.exact.enabled=true")
    assert settings(config["model"]["exact"], {}) == ExactConfig(enabled=True)


def test_groups_and_packages_keep_their_place(app, tmp_path):
    (tmp_path / "conf" / "overlap").mkdir(parents=True)
    (tmp_path / "conf" / "overlap" / "a.yaml").write_text("x: 1\n")
    files = {"config.yaml": "defaults: [_self_, overlap@model.ub: a]\nmodel: {mcore_gpt: true}\n"}
    config, *_ = app(files)
    assert config["model"]["ub"] == {"x": 1} and set(config) == {"model"}
