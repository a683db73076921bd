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
        (
            ["model.data.data_prefix="],
            "data_prefix= has no value: is a variable .* Give it one, or leave the setting out",
        ),
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
        (["model.data.data_prefix=[.nan, x]"], r"data_prefix=\['.nan', 'x'\] is not a prefix"),
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


def read(tmp_path, text, *overrides):
    (tmp_path / "a.yaml").write_text(text)
    return load_config(tmp_path / "a.yaml", ["model.data.data_prefix=x", *overrides])


@pytest.mark.parametrize(
    ("text", "key", "blocks"),
    [
        ("model.optim.lr: 5", "model.optim.lr", "model: {optim: {lr: ...}}"),
        ("model.data: {seq_length: 64}", "model.data", "model: {data: ...}"),
        ("model: {data.seq_length: 64}", "model.data.seq_length", "model: {data: {seq_length: ...}}"),
        ("model: {zzz.y: 64}", "model.zzz.y", "model: {zzz: {y: ...}}"),
    ],
)
def test_a_key_with_dots_in_a_file_is_refused(tmp_path, text, key, blocks):
    with pytest.raises(ValueError, match=re.escape(f"a.yaml: {key} has dots") + ".*" + re.escape(blocks)):
        read(tmp_path, text)
    with pytest.raises(ValueError, match="has dots"):
        load_config(None, ["model={data.seq_length: 64}"])


@pytest.mark.parametrize("written", ["2024_01_01", "010", "1:30", "1e3", "0x10", "2024-01-01", "1.50", "-0"])
def test_text_that_looks_like_a_number_is_kept_as_it_is_written(tmp_path, written):
    run = read(tmp_path, f"exp_manager: {{exp_dir: {written}}}\nmodel: {{data: {{index_mapping_dir: {written}}}}}")
    assert (run.exp_manager.exp_dir, run.model.data.index_mapping_dir) == (written, written)
    run = load_config(None, [f"model.data.data_prefix=[a,b,{written}]", f"exp_manager.exp_dir={written}"])
    assert (run.exp_manager.exp_dir, run.model.data.data_prefix) == (written, ["a", "b", written])
    assert (
        load_config(None, ["model.data.data_prefix=x", "exp_manager.exp_dir=r${model.seed}"]).exp_manager.exp_dir
        == "r1234"
    )


@pytest.mark.parametrize("written", ["010", "08", "1:30", "0x10", "0b1", "0o17"])
def test_numbers_that_yaml_reads_in_another_base_are_refused(tmp_path, written):
    message = f"model.seed='{written}' is not a whole number of at least 0, written in decimal digits"
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, f"model: {{seed: {written}}}")
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, "", f"model.seed={written}")


def test_numbers_and_weights_are_read_as_before(tmp_path):
    run = read(
        tmp_path, "model: {seed: 1_000, optim: {lr: 1e-3, betas: [0.8, .95]}}\ntrainer: {max_steps: 4.0, precision: 32}"
    )
    assert (run.model.seed, run.model.optim.lr, run.model.optim.betas) == (1000, 1e-3, [0.8, 0.95])
    assert (run.trainer.max_steps, run.trainer.precision) == (4, "32")
    blend = load_config(None, ["model.data.data_prefix=[0.7,a,3,b,1e1,2024_01]"]).model.data.data_prefix
    assert blend == [0.7, "a", 3, "b", 10.0, "2024_01"] and [type(w) for w in blend[::2]] == [float, int, float]
    assert (
        load_config(
            None, ["model.data.data_prefix=x", "model.data.index_mapping_dir=null"]
        ).model.data.index_mapping_dir
        is None
    )


@pytest.mark.parametrize("shares", ["1.2.3", "5..", ".", "1,.", "1,,2", "1,2,3,4", "-1", "9" * 400])
def test_shares_that_are_no_numbers_are_refused_by_name(shares):
    with pytest.raises(ValueError, match=re.escape("model.data.splits_string=") + ".* is not up to three shares"):
        load_config(None, ["model.data.data_prefix=x", f"model.data.splits_string='{shares}'"])


@pytest.mark.parametrize("shares", ["1", ".5,5.", "99,1,0", " 8 / 1 / 1 ", "0.9,0.1"])
def test_shares_are_numbers(shares):
    run = load_config(None, ["model.data.data_prefix=x", f"model.data.splits_string='{shares}'"])
    assert [float(part) for part in run.model.data.splits_string.replace("/", ",").split(",")]


def test_a_setting_that_must_be_given_does_not_offer_null():
    with pytest.raises(ValueError, match=r"model.data.data_prefix=true is not a prefix") as error:
        load_config(None, ["model.data.data_prefix=true"])
    assert "null" not in str(error.value)
    with pytest.raises(ValueError, match="data_prefix is empty"):
        load_config(None, ["model.data.data_prefix=null"])


def test_a_file_that_repeats_itself_by_aliases_without_measure_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 40))]
    with pytest.raises(ValueError, match=r"a.yaml, line \d+: more than 100,000 values"):
        read(tmp_path, "\n".join(lines))
    run = read(tmp_path, "trainer: {max_steps: &n 7, val_check_interval: *n}")
    assert (run.trainer.max_steps, run.trainer.val_check_interval) == (7, 7)
    with pytest.raises(ValueError, match="contain itself"):
        read(tmp_path, "model: &m {data: {data_prefix: [*m]}}")


@pytest.mark.parametrize(
    "written", ["!!bool x", "!!int x", "!!float x", "!!timestamp x", "!!binary é", "!!python/none x"]
)
def test_a_tag_that_does_not_fit_is_refused_by_name(tmp_path, written):
    with pytest.raises(ValueError, match="a.yaml is not YAML"):
        read(tmp_path, f"model: {{seed: {written}}}")
    with pytest.raises(ValueError, match="model.seed="):
        load_config(None, [f"model.seed={written}"])
