"""Kinds and ranges of the native runner's settings: every key has them, and nothing else ends in a traceback."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from exact_megatron.ranges import range_of
from exact_megatron.ranges import settings as settings_of
from exact_megatron.training.checks import check
from exact_megatron.training.config import KEYS, load_config
from exact_megatron.training.schema import RunConfig

FIELDS = {key: (field, value) for key, field, value in settings_of(RunConfig)}
WRONG = ["", " ", math.nan, math.inf, -math.inf, -1e30, 10**400, [], [[]], {"a": 1}, b"x", object(), "\0"]


def test_every_setting_has_a_range_that_its_default_lies_in():
    """A setting cannot be added without one; `checks.py` walks the same fields."""
    assert len(FIELDS) > 80 and set(FIELDS) == set(KEYS)
    for key, (field, default) in FIELDS.items():
        assert "range" in field.metadata, f"{key} has no range: declare it with whole, number, choice, switch or text"
        assert range_of(field).accept(key, default) == default
        if field.type == "bool":
            assert default is not None
        if default is None:
            assert "Optional" in field.type or field.type == "Any" or "None" in field.type, key


@pytest.mark.parametrize("key", FIELDS)
def test_what_no_setting_takes_is_refused_with_key_value_and_range(key):
    field, default = FIELDS[key]
    allowed = range_of(field)
    wrong = WRONG
    if allowed.text:  # a number stands for its digits, and data_prefix may be a list or a mapping
        wrong = [value for value in WRONG if not isinstance(value, (int, list, dict)) and value != -1e30]
    for value in wrong if default is None else [*wrong, None]:
        with pytest.raises(ValueError, match=re.escape(key)) as error:
            allowed.accept(key, value)
        assert allowed.words in str(error.value)
    if field.type != "bool" and "bool" not in field.type:
        with pytest.raises(ValueError, match=f"{key}=true is not "):
            allowed.accept(key, True)
    if field.type in ("int", "Optional[int]", "int | None"):
        assert allowed.accept(key, 4.0) == 4 and type(allowed.accept(key, 4.0)) is int
        for value in (4.5, "4", "16k"):
            with pytest.raises(ValueError, match="a whole number"):
                allowed.accept(key, value)


VALUES = st.one_of(
    st.sampled_from(
        ["", " ", "null", "~", "true", "nan", ".nan", "inf", "-.inf", "-1", "0", "1e30", "1e3", "4.0", "4.5"]
    ),
    st.sampled_from(
        ["9" * 30, "9" * 5000, "16k", "''", "[]", "{}", "[1,2]", "{a: 1}", "{a: 1, a: 2}", "${x}", "${model.seed}"]
    ),
    st.sampled_from(
        ["???", "#", "!!binary x", "!!python/object:os.system x", "&a [*a]", "[" * 3000, "{", "2020-01-01", "0x10"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)


@examples(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(key=st.sampled_from(KEYS), value=VALUES)
@example(key="model.activations_checkpoint_num_layers", value="0")
@example(key="model.optim.betas", value="[0.9]")
@example(key="model.data.data_prefix", value="{train: {a: b}}")
def test_a_value_is_taken_or_refused_by_name(key, value):
    try:
        run = load_config(None, ["model.data.data_prefix=[x]", f"{key}={value}"])
    except ValueError as error:
        assert key.rpartition(".")[2] in str(error) or "unknown key" in str(error), error
    else:
        check(run)
        assert load_config_of(run) == run


def load_config_of(run):
    """The run as it is read from the config.yaml that it writes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(run.to_yaml())
        return load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2]", r"model=\[1, 2\] is not a block of keys and values"),
        ("model: 5", "model=5 is not a block"),
        ("model: null", "model=null is not a block"),
        ("model:\n  exact: [1]", r"model.exact=\[1\] is not a block"),
        ("- 1", "holds a list, not keys and values"),
        ("word", "holds a scalar, not keys and values"),
        ("trainer:\n  max_steps: 3\n  devices: 1\n  max_steps: 4", "line 4: max_steps is given twice"),
        ("restore_from_path:", "line 1: restore_from_path has no value: write null for none"),
        ("restore_from_path: ''", "restore_from_path is empty"),
        ("model:\n  exact: {tau: }", "line 2: tau has no value"),
        ("model: &a\n  data: *a", "contain itself"),
        ("trainer:\n  max_steps: ${oc.env:NOT_THERE}", "trainer.max_steps: .*NOT_THERE"),
        ("trainer: {max_steps: 4}\n---\ntrainer: {}", "is not YAML"),
        ("trainer: {max_steps: '16k'}", "max_steps='16k' is not a whole number of at least 1, written in digits"),
        ("1: x", "unknown key 1"),
    ],
)
def test_files_are_read_strictly(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


@pytest.mark.parametrize("data", [b"\xff\xfem\x00", b"model: {seed: \xe4}", "model: {}".encode("utf-16")])
def test_a_file_that_is_not_utf8_is_named(tmp_path, data):
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=r"c\.yaml is not UTF-8 text \(byte \d+"):
        load_config(tmp_path / "c.yaml")


def test_spellings_that_mean_a_value(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfmodel: {optim: {lr: '3e-4'}, data: {data_prefix: x}, seed: '${oc.env:SEED}'}\ntrainer: {precision: 32}\n"
    )
    monkeypatch.setenv("SEED", "7")
    run = load_config(
        path, ["trainer.max_steps=1e3", "++model.num_layers=4.0", "+restore_from_path=null", "trainer.max_steps=9"]
    )
    assert (run.trainer.max_steps, run.model.num_layers, run.model.optim.lr, run.model.seed) == (9, 4, 3e-4, 7)
    assert run.restore_from_path is None and run.trainer.precision == "32" and run.model.data.data_prefix == "x"
    by_split = load_config(path, ["model.data.data_prefix={train: [x]}", "model.data.data_prefix.validation=[y]"])
    assert by_split.model.data.data_prefix == {"train": ["x"], "validation": ["y"]}
    monkeypatch.setenv("SEED", "")
    with pytest.raises(ValueError, match="model.seed is empty, not a whole number of at least 0"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["restore_from_path="],
            "restore_from_path= has no value: is a variable .* Write restore_from_path=null for none",
        ),
        (["model.exact.tau= "], "model.exact.tau= has no value"),
        (["model.data.data_prefix="], "data_prefix= has no value"),
        (["exp_manager.exp_dir=#1"], "exp_manager.exp_dir=#1 has no value"),
        (["=5"], "expected key=value"),
        (["model.exact.tau[0]=3"], "unknown key model.exact.tau"),
        (["model..seed=1"], "unknown key"),
        (["model.seed.x=1"], "model.seed={'x': 1} is not a whole number"),
        (["model.optim.betas=[0.9]"], r"betas=\[0.9\] is not two numbers from 0 to below 1"),
        (["model.optim.betas=[0.9,1]"], "is not two numbers from 0 to below 1"),
        (["model.optim.lr=inf"], "model.optim.lr=inf is not a finite number of at least 0"),
        (["model.optim.sched.warmup_steps=-1"], "warmup_steps=-1 is not a whole number of at least 0"),
        (["model.hidden_dropout=2"], "hidden_dropout=2 is not a finite number of at least 0 and below 1"),
        (["model.rotary_percentage=2"], "rotary_percentage=2 is not a finite number above 0 and at most 1"),
        (["model.num_query_groups=0"], "num_query_groups=0 is not a whole number of at least 1, or null for none"),
        (
            ["model.kv_channels=7"],
            "a head has 7 channels .* of which model.rotary_percentage=1 rotates 7: .* even number",
        ),
        (["model.hidden_size=130"], "hidden_size=130 must be a multiple of model.num_attention_heads=4"),
        (["trainer.checkpoint=1"], "unknown key trainer.checkpoint"),
        (
            ["exp_manager.checkpoint_callback_params.save_top_k=0"],
            "save_top_k=0 is not -1 or a whole number of at least 1",
        ),
        (["model.virtual_pipeline_model_parallel_size=1"], "is not a whole number of at least 2, or null"),
        (["model.activations_checkpoint_num_layers=0"], "activations_checkpoint_num_layers=0 is not a whole number"),
        (
            ["model.activations_checkpoint_granularity=full", "model.activations_checkpoint_method=uniform"]
            + ["model.num_layers=4", "model.activations_checkpoint_num_layers=3"],
            "activations_checkpoint_num_layers=3 must divide the 4 layers",
        ),
        (
            [
                "trainer.devices=3",
                "model.tensor_model_parallel_size=3",
                "model.num_attention_heads=3",
                "model.hidden_size=96",
            ]
            + ["model.global_batch_size=1"],
            "ffn_hidden_size=352 must be a multiple of model.tensor_model_parallel_size=3",
        ),
        (
            ["model.rope_scaling.rope_type=llama3", "model.rope_scaling.low_freq_factor=4"],
            "high_freq_factor=4 must be above model.rope_scaling.low_freq_factor=4",
        ),
        (["model.data.data_prefix=[x, '']"], r"data_prefix=\['x', ''\] is not a prefix"),
        (["model.data.data_prefix=[.nan, x]"], r"data_prefix=\[nan, 'x'\] is not a prefix"),
    ],
)
def test_overrides_are_refused_by_name(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, ["model.data.data_prefix=[x]", *overrides])


def test_a_run_that_is_put_together_in_python_is_checked_as_a_file_is():
    run = load_config(None, ["model.data.data_prefix=[x]"])
    broken = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, max_steps=0))
    with pytest.raises(ValueError, match="trainer.max_steps=0 is not"):
        check(broken)
