"""Converted models compute what transformers computes, in any layout, and come back bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from exact_megatron.convert.config_json import FAMILIES as KNOWN
from exact_megatron.convert.config_json import model_settings
from exact_megatron.convert.convert import _whole, hf_to_megatron, megatron_to_hf
from exact_megatron.convert.weights import HuggingFaceWeights
from tests.helpers import hf_models
from tests.helpers.forked import run
from tests.helpers.hf_models import FAMILIES, LLAMA3, TOKENIZER, YARN, edit, make, tensors
from tests.helpers.ranks import launch

pytest.importorskip("transformers", reason="the reference; pip install exact-megatron[hf]")
LENGTH = 64
TOKENS = np.random.default_rng(3).integers(0, 99, (2, LENGTH)).tolist()
PADDED = {"smollm2_padded": ("smollm2", 2, 6), "qwen2.5_padded": ("qwen2.5", 2, 4), "qwen3_padded": ("qwen3", 2, 4)}
# A longer window: settings of the run, and what they must become in config.json.
WINDOWS = {
    "base": (["model.rotary_base=4e6"], {"rope_theta": 4e6, "rope_scaling": None}),
    "linear": (
        ["model.seq_len_interpolation_factor=2"],
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "yarn": (
        [
            "model.rope_scaling={rope_type: yarn, factor: 16, original_max_position_embeddings: 64, attention_factor: 1.5}"
        ],
        {
            "rope_theta": 5e5,
            "rope_scaling": YARN
            | {"factor": 16.0, "attention_factor": 1.5, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
        },
    ),
    "llama3": (
        ["model.rope_scaling={rope_type: llama3, factor: 16, original_max_position_embeddings: 64}"],
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 16.0, "original_max_position_embeddings": 64}},
    ),
}


def reference(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def identical(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """NAME/ of every family, NAME.megatron/, and NAME.pt with transformers' logits."""
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        hf_to_megatron(make(name, root / name), root / f"{name}.megatron", quiet=True)
        torch.save(reference(root / name), root / f"{name}.pt")
    for name, (family, _, wanted) in PADDED.items():
        hf_to_megatron(root / family, root / f"{name}.megatron", wanted, quiet=True)
        torch.save(torch.load(root / f"{family}.pt"), root / f"{name}.pt")
    return root


def run_layout(root: Path, layout: str, world: int, *overrides: str) -> dict[str, torch.Tensor]:
    """Logits of megatron.core by model, in one launch."""
    jobs = [
        {"model": f"{root}/{name}.megatron", "overrides": overrides, "tokens": TOKENS, "out": f"{root}/{name}.{layout}"}
        for name in [*FAMILIES, *PADDED]
    ]
    if world > 1:
        jobs[[*FAMILIES, *PADDED].index("qwen2.5_padded")]["save"] = f"{root}/saved"
    if layout == "one":  # a model that has its norms where Transformer Engine has them, and longer windows
        for name in ("llama3.1", "qwen2.5", "qwen3"):
            jobs.append({**jobs[[*FAMILIES].index(name)], "fused": True, "out": f"{root}/{name}_fused.{layout}"})
        for name, (settings, _) in WINDOWS.items():
            out = f"{root}/llama3_{name}.{layout}"
            jobs.append({**jobs[1], "overrides": settings, "out": out, "other_positions": True})
    (root / "jobs.json").write_text(json.dumps(jobs))
    launch("distributed/run_logits.py", [str(root / "jobs.json")], world)
    return {job["out"]: torch.load(job["out"] + ".pt") for job in jobs}


def assert_close(root: Path, found: dict[str, torch.Tensor], layout: str) -> None:
    for name in [*FAMILIES, *PADDED]:
        expected, logits = torch.load(root / f"{name}.pt"), found[f"{root}/{name}.{layout}"]
        real = expected.shape[-1]
        assert (logits[..., :real] - expected).abs().max() < 1e-4, name
        assert not logits[..., real:].any(), name  # rows that only the layout's padding has


@pytest.fixture(scope="module")
def one_rank(models):
    return run_layout(models, "one", 1)


def test_logits_on_one_rank(models, one_rank):
    assert_close(models, one_rank, "one")
    for name in ("llama3.1", "qwen2.5", "qwen3"):
        expected, logits = torch.load(models / f"{name}.pt"), one_rank[f"{models}/{name}_fused.one"]
        assert (logits - expected).abs().max() < 1e-4, name


def test_logits_in_a_layout(models):
    layout = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", "trainer.devices=4"]
    found = run_layout(models, "tp2pp2", 4, *layout, "model.sequence_parallel=true")
    assert found[f"{models}/llama2.tp2pp2"].shape[-1] == 100  # 99 tokens
    assert_close(models, found, "tp2pp2")
    megatron_to_hf(
        models / "saved", models / "saved.hf", quiet=True
    )  # saved by four ranks, with padded heads and vocabulary
    assert identical(models / "qwen2.5", models / "saved.hf")
    assert read_config(models / "saved.hf") == read_config(models / "qwen2.5")


@pytest.mark.parametrize("name", WINDOWS)
def test_a_longer_window_is_exported(models, one_rank, tmp_path, name):
    settings, expected = WINDOWS[name]
    stage = tmp_path / "stage"
    save_as_stage(models / "llama3.megatron", stage, [*settings, "model.max_position_embeddings=1024"])
    megatron_to_hf(stage, tmp_path / "hf", hf=models / "llama3", quiet=True)
    config = read_config(tmp_path / "hf")
    assert {key: config[key] for key in expected} == expected
    assert config["max_position_embeddings"] == 1024
    changed = {"rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "torch_dtype"}
    before = read_config(models / "llama3")
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    logits = one_rank[f"{models}/llama3_{name}.one"]
    assert (reference(tmp_path / "hf") - logits).abs().max() < 1e-4
    assert (torch.load(models / "llama3.pt") - logits).abs().max() > 1e-2  # the setting has an effect


def save_as_stage(converted: Path, run: Path, overrides: list[str]) -> None:
    """The converted weights as a run with other settings would save them, its start being `converted`."""
    import shutil

    from exact_megatron.training import checkpoint_files
    from exact_megatron.training.config import load_config

    data = ["model.data.data_prefix=[none]", "model.data.seq_length=128"]
    path = run / "checkpoints" / "step_00000007"
    shutil.copytree(checkpoint_files.find_checkpoint(converted), path)
    common = torch.load(path / "common.pt")
    common["state"]["config"] = load_config(converted / "model.yaml", [*data, *overrides]).to_yaml()
    torch.save(common, path / "common.pt")
    checkpoint_files.write_checksums(path)


@pytest.mark.parametrize("name", [*FAMILIES, *PADDED])
def test_round_trip(models, tmp_path, name):
    family = PADDED[name][0] if name in PADDED else name
    made = megatron_to_hf(models / f"{name}.megatron", tmp_path / "back", quiet=True)
    assert identical(models / family, tmp_path / "back")
    assert read_config(tmp_path / "back") == read_config(models / family)
    for file, text in TOKENIZER.items():
        assert (tmp_path / "back" / file).read_text() == text
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in (models / family).iterdir()}
    assert made.parameters == sum(t.numel() for t in tensors(models / family).values())


@pytest.mark.parametrize(
    ("dtype", "precision"), [("bfloat16", "bf16"), ("float16", "bf16"), ("float32", "32")], ids=lambda x: x
)
def test_dtypes_and_many_files(tmp_path, dtype, precision):
    source = make("llama3", tmp_path / "source", dtype, max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    hf_to_megatron(source, tmp_path / "megatron", quiet=True)
    assert OmegaConf.load(tmp_path / "megatron" / "model.yaml").trainer.precision == precision
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size="60KB", quiet=True)
    assert identical(source, tmp_path / "back")
    index = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (source, tmp_path / "back")]
    assert index[0]["metadata"]["total_size"] == index[1]["metadata"]["total_size"]
    assert index[0]["weight_map"].keys() == index[1]["weight_map"].keys()
    assert read_config(source) == read_config(tmp_path / "back")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "bf16", dtype="bf16", quiet=True)
    assert {t.dtype for t in tensors(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert read_config(tmp_path / "bf16")["dtype"] == "bfloat16"


@pytest.mark.slow
def test_train_and_export_through_the_command_line(models, tmp_path):
    """TP2 x PP2 ranks start from the converted weights; with a learning rate of 0 the exported ones are the published ones, the
    vocabulary's padding left out and the tokenizer found by the chain of runs."""
    from tests.helpers.tiny import write_data

    def command(*words: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "exact_megatron", *words], capture_output=True, text=True, timeout=200, env=env
        )
        assert done.returncode == 0, done.stderr[-4000:]

    megatron = models / "qwen2.5_padded.megatron"
    command(
        *("train", "--config", str(megatron / "model.yaml"), "trainer.accelerator=cpu", "trainer.devices=4"),
        *(
            "trainer.max_steps=1",
            f"exp_manager.exp_dir={tmp_path}/run",
            f"model.data.data_prefix=[{write_data(tmp_path)}]",
        ),
        *(
            "model.data.splits_string='100,0,0'",
            f"model.data.index_mapping_dir={tmp_path}/cache",
            "model.data.eod_id=0",
        ),
        *("model.data.seq_length=64", "model.data.num_workers=0", "model.exact.enabled=true", "model.exact.tau=16"),
        *("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", "model.optim.lr=0"),
    )
    command("convert", "megatron-to-hf", f"{tmp_path}/run", f"{tmp_path}/hf")
    assert identical(models / "qwen2.5", tmp_path / "hf")
    assert read_config(tmp_path / "hf") == read_config(models / "qwen2.5")
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == TOKENIZER["tokenizer.json"]


def test_a_model_from_scratch_is_exported(models, tmp_path):
    """No model to take config.json from: one of the family with these layers is written."""
    from exact_megatron.training import checkpoint_files

    source = models / "qwen3_tied"
    megatron = tmp_path / "run"
    save_as_stage(models / "qwen3_tied.megatron", megatron, ["restore_from_path=null"])
    assert not (megatron / "hf").exists() and checkpoint_files.find_checkpoint(megatron)
    made = megatron_to_hf(megatron, tmp_path / "hf", quiet=True)
    assert "no tokenizer" in made.remarks[0]
    assert identical(source, tmp_path / "hf")
    assert torch.equal(reference(tmp_path / "hf"), reference(source))


def test_nothing_of_ours_is_exported(models, tmp_path):
    megatron_to_hf(models / "smollm2.megatron", tmp_path / "hf", quiet=True)
    text = (tmp_path / "hf" / "config.json").read_text().lower()
    assert "exact" not in text and "megatron" not in text
    from safetensors import safe_open

    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_tokenizer_is_recorded_and_compared(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from exact_megatron.evaluation.model import Model
    from exact_megatron.training import checkpoint_files, checkpoint_state
    from exact_megatron.utils.tokenizer import RECORD, identity

    source = make("llama3", tmp_path / "source", "float32")
    one, two = (Tokenizer(WordLevel({"a": 0, word: 1}, unk_token="a")) for word in "bc")
    one.save(str(source / "tokenizer.json"))
    made = hf_to_megatron(source, tmp_path / "megatron", quiet=True)
    state = checkpoint_state.read_state(checkpoint_files.find_checkpoint(tmp_path / "megatron"))
    assert not made.remarks and state["tokenizer"]["digest"] == identity(one)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", quiet=True)
    assert json.loads((tmp_path / "back" / RECORD).read_text()) == {"tokenizer_identity": identity(one)}
    for model in ("source", "megatron", "back"):
        assert Model.at(tmp_path / model).tokenizer.digest == identity(one)

    other = tmp_path / "other"
    other.mkdir()
    two.save(str(other / "tokenizer.json"))
    (other / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"{identity(one)}.*{identity(two)}.*--accept-other-tokenizer"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "new", other, quiet=True)
    made = megatron_to_hf(tmp_path / "megatron", tmp_path / "new", other, quiet=True, accept_other_tokenizer=True)
    assert "accepted" in made.remarks[0]
    assert Model.at(tmp_path / "new").tokenizer.digest == identity(one)  # whose ids the weights know


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3", {"model_type": "mixtral"}, r'model_type="mixtral" is not supported: the dense models'),
        ("qwen3", {"model_type": "qwen3_moe"}, r'model_type="qwen3_moe".*mixtures of experts'),
        ("qwen3", {"num_experts": 64}, "num_experts=64"),
        ("llama3", {"architectures": ["LlamaForSequenceClassification"]}, "architectures=.*Sequence"),
        ("llama3", {"hidden_act": "gelu"}, 'hidden_act="gelu" .* "silu"'),
        ("llama3", {"attention_bias": True}, "attention_bias=true"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true"),
        ("llama3", {"mlp_bias": True}, "mlp_bias=true"),
        ("llama3", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama3", {"sliding_window": 4096}, "sliding_window=4096"),
        ("qwen2.5", {"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window=true"),
        ("qwen2.5", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("llama3", {"quantization_config": {"quant_method": "fp8"}}, r'quantization_config=\{"quant_method": "fp8"\}'),
        ("llama3", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map="),
        (
            "llama3",
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "rope_scaling=.*longrope.* can be default, linear, llama3 or yarn",
        ),
        ("llama3", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling=.*dynamic"),
        ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "llama3 needs low_freq_factor, high"),
        ("llama3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "the same in all layers"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama3", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("llama3", {"hidden_size": None}, "hidden_size=null is not a number"),
        (
            "llama3",
            {"intermediate_size": 100},
            r"gate_proj.weight has the shape \[96, 64\], config.json asks for \[100, 64\]",
        ),
        ("llama3", {"num_hidden_layers": 3}, "holds unknown tensors: model.layers.3"),
        ("llama3", {"num_hidden_layers": 5}, "lacks tensors: model.layers.4"),
        ("llama3", {"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ("qwen2.5", {"tie_word_embeddings": False}, "lacks tensors: lm_head.weight"),
        ("qwen2.5", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "unknown tensors: .*k_proj.bias"),
    ],
)
def test_unsupported_models_are_refused_by_key_and_value(models, tmp_path, name, changes, message):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(models / name, source)
    edit(source, **changes)
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(source, tmp_path / "out", quiet=True)
    assert not list(tmp_path.glob("out*"))


def test_files_that_are_not_there(models, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        hf_to_megatron(tmp_path, tmp_path / "out")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((models / "llama3" / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist: weights are read from safetensors"):
        hf_to_megatron(tmp_path / "bin", tmp_path / "out")
    with pytest.raises(FileExistsError, match="remove it, or choose another"):
        hf_to_megatron(models / "llama3", models / "llama3.megatron")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        megatron_to_hf(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="the model has 2 KV heads"):
        hf_to_megatron(models / "llama3", tmp_path / "out", pad_kv_heads=1)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json .*: fetch the model again"):
        HuggingFaceWeights(tmp_path, {})


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors is damaged"):
        HuggingFaceWeights(tmp_path, {})


def test_one_conversion_writes_an_output(tmp_path):
    """Record locks are of a process: the other conversion is one."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "left").write_text("by a conversion that was killed")
    imports = "from exact_megatron.convert.convert import _whole\nfrom pathlib import Path\n"
    script = f"{imports}with _whole(Path({str(tmp_path / 'out')!r})): pass"
    with _whole(tmp_path / "out") as folder:
        assert [path.name for path in folder.iterdir()] == ["run.lock"]
        (folder / "config.json").write_text("{}")
        other = run(["-c", script, str(tmp_path / "out")])
        assert "is in use: a run on host" in other.stderr and "another OUTPUT" in other.stderr
        assert (folder / "config.json").is_file()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/config.json"]


def test_shards_without_their_index_are_read_when_all_are_there(tmp_path):
    from safetensors.torch import save_file

    tensors = {name: torch.arange(4.0) for name in ("a", "b", "c")}
    for number, name in enumerate(tensors, 1):
        save_file({name: tensors[name]}, tmp_path / f"model-{number:05d}-of-00003.safetensors")
    weights = HuggingFaceWeights(tmp_path, {name: (4,) for name in tensors})
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="lacks tensors: d"):
        HuggingFaceWeights(tmp_path, {name: (4,) for name in "abcd"})
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors.index.json, and no shard 2 of 3"):
        HuggingFaceWeights(tmp_path, {name: (4,) for name in tensors})


def test_inactive_sliding_windows_and_old_buffers_are_accepted(models, tmp_path):
    import shutil

    from safetensors.torch import save_file

    qwen = read_config(models / "qwen2.5")
    model_settings(qwen | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2})
    model_settings(qwen | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4})
    source = tmp_path / "old"
    shutil.copytree(models / "llama2", source)
    held = tensors(source)
    (source / "model.safetensors").unlink()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(held, source / "model.safetensors")
    hf_to_megatron(source, tmp_path / "out", quiet=True)


def test_exporting_with_another_models_config_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="model.kv_channels: config.json 16, checkpoint 32"):
        megatron_to_hf(models / "llama3.2.megatron", tmp_path / "hf", hf=models / "llama3")
    stage = tmp_path / "stage"
    save_as_stage(models / "llama3.megatron", stage, ["restore_from_path=/nowhere"])
    with pytest.raises(FileNotFoundError, match="no checkpoint at /nowhere.*--hf gives config.json"):
        megatron_to_hf(stage, tmp_path / "hf")


def test_starting_another_model_from_the_weights_is_refused(models):
    from exact_megatron.training import checkpoint_files, checkpoint_state
    from exact_megatron.training.config import load_config

    path = checkpoint_files.find_checkpoint(models / "llama3.megatron")

    def start(*overrides: str, vocab_size: int = 99) -> list[str]:
        settings = ["model.data.data_prefix=[none]", "model.data.seq_length=64", *overrides]
        run = load_config(models / "llama3.megatron" / "model.yaml", settings)
        return checkpoint_state.refuse_other_model(checkpoint_state.read_state(path), run, vocab_size)

    assert start() == [] and start("model.kv_channels=null") == []
    assert start("model.rotary_base=7e6") == ["model.rotary_base: 500000.0 there, now 7000000.0"]
    for setting, message in (
        ("model.layernorm_epsilon=1e-6", "model.layernorm_epsilon: checkpoint 1e-05, now 1e-06"),
        ("model.num_query_groups=1", "model.num_query_groups: checkpoint 2, now 1"),
        ("model.activation=gelu", "model.activation: checkpoint fast-swiglu, now gelu"),
    ):
        with pytest.raises(ValueError, match=message):
            start(setting)
    with pytest.raises(ValueError, match="model.override_vocab_size: checkpoint 99, now 98"):
        start(vocab_size=98)
    with pytest.raises(ValueError, match="seq_length=64 is above model.max_position_embeddings=32"):
        start("model.max_position_embeddings=32")
    with pytest.raises(ValueError, match="both scale the positions"):
        start("model.seq_len_interpolation_factor=2", "model.rope_scaling.rope_type=llama3")


@pytest.mark.parametrize("kind", KNOWN)
def test_defaults_are_those_of_transformers(kind):
    """A config.json may leave out what is at its class's default."""
    from transformers import AutoConfig

    full = AutoConfig.for_model(kind).to_dict()
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert model_settings({key: full[key] for key in sizes}) == model_settings(full)


def test_settings_of_transformers_4_and_5_are_read_alike():
    sizes = {**hf_models.SIZES, "model_type": "llama"}
    four = model_settings({**sizes, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    five = model_settings({**sizes, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert four == five
    assert four["rotary_base"] == 5e5 and four["rope_scaling"] == LLAMA3
    original = {key: YARN[key] for key in YARN if key != "original_max_position_embeddings"}
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    for given in (
        YARN,
        YARN | {"beta_fast": None, "attention_factor": None},
        YARN | {"mscale": 0.5},
    ):  # as transformers reads them
        assert model_settings({**sizes, "rope_scaling": given})["rope_scaling"] == YARN | defaults
    window = sizes["max_position_embeddings"]
    assert (
        model_settings({**sizes, "rope_scaling": original})["rope_scaling"]["original_max_position_embeddings"]
        == window
    )
    old = {"type": "linear", "factor": 2}
    assert model_settings({**sizes, "rope_scaling": old})["seq_len_interpolation_factor"] == 2.0


def test_a_conversion_holds_a_layer_not_the_model(tmp_path):
    """The most that a conversion of 289 MB of weights adds to the process's own memory, both ways."""
    script = Path(__file__).parents[2] / "distributed" / "run_convert_memory.py"
    done = run([str(script), str(tmp_path)], timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 280e6
    assert max(found["to_megatron"], found["to_hf"]) < 0.35 * found["weights"], found
