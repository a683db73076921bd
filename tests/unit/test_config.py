import math

import pytest

from exact_megatron import ExactConfig
from exact_megatron.config import parse_scalar, split_overrides, unknown_key


def test_defaults_are_the_papers_and_off():
    config = ExactConfig()
    assert (config.enabled, config.alpha, config.gamma, config.tau) == (False, 0.15, 0.5, None)
    assert [ExactConfig().validated(s).tau for s in (4096, 8192, 16384)] == [1024, 2048, 4096]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.exact.enabled=true", {"enabled": True}),
        ("+model.exact.enabled=True", {"enabled": True}),
        ("++model.exact.alpha=0.2", {"alpha": 0.2}),
        ("model.exact.tau=null", {"tau": None}),
        ("model.exact.tau=1024", {"tau": 1024}),
        ("model.exact.eps=1e-6", {"eps": 1e-6}),
        ("model.exact.normalization=none", {"normalization": "none"}),
    ],
)
def test_overrides(override, expected):
    config = ExactConfig.from_overrides([override])
    assert {key: getattr(config, key) for key in expected} == expected


def test_overrides_go_over_a_block():
    assert ExactConfig.from_overrides(["model.exact.alpha=0.3"], {"enabled": True, "alpha": 0.1}) == ExactConfig(
        enabled=True, alpha=0.3
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.exact.enable=true", r"unknown key model\.exact\.enable: did you mean model\.exact\.enabled\?"),
        ("model.exact.enabled=yes", "enabled='yes' is not true or false"),
        ("model.exact.alpha=-0.1", "alpha=-0.1 is not a finite number of at least 0"),
        ("model.exact.alpha=nan", "alpha=nan is not a finite number"),
        ("model.exact.alpha=many", "alpha='many' is not a finite number"),
        ("model.exact.gamma=-1", "gamma=-1 is not a finite number of at least 0"),
        ("model.exact.tau=1.5", "tau=1.5 is not a whole number"),
        ("model.exact.normalization=batch", "normalization='batch' is not one of corpus, none"),
        ("model.exact.max_weight=0.5", "max_weight=0.5 is not a finite number of at least 1, or null for none"),
        ("model.exact.alpha", "expected model.exact.key=value"),
        ("exact.alpha=1", "expected model.exact.key=value"),
    ],
)
def test_bad_overrides_name_value_and_remedy(override, message):
    with pytest.raises(ValueError, match=message):
        ExactConfig.from_overrides([override])


@pytest.mark.parametrize("value", [math.inf, True, "0.1", None])
def test_alpha_must_be_a_number(value):
    with pytest.raises(ValueError, match="alpha"):
        ExactConfig(alpha=value)


def test_tau_above_the_last_bucket_is_refused():
    assert ExactConfig(tau=2048).validated(4096).tau == 2048
    with pytest.raises(ValueError, match="tau=2049 lies above the last bucket .* starts at 2048"):
        ExactConfig(tau=2049).validated(4096)
    with pytest.raises(ValueError, match="seq_length"):
        ExactConfig().validated(0)


def test_split_overrides_keeps_the_hosts_arguments():
    ours, rest = split_overrides(["--lr", "1", "model.exact.enabled=true", "+model.exact.tau=8", "model.tp=2"])
    assert ours == ["model.exact.enabled=true", "+model.exact.tau=8"]
    assert rest == ["--lr", "1", "model.tp=2"]


def test_parse_scalar():
    assert [parse_scalar(t) for t in ("true", "null", "3", "1e-8", "'corpus'", "none")] == [
        True,
        None,
        3,
        1e-8,
        "corpus",
        "none",
    ]


def test_public_names_need_no_torch():
    import subprocess
    import sys

    code = "import sys, exact_megatron as e; [getattr(e, n) for n in e.__all__]; "
    code += "assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


KNOWN = [
    "restore_from_path",
    "trainer.max_steps",
    "model.seed",
    "model.exact.eps",
    "model.exact.alpha",
    "model.optim.eps",
]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.max_steps", "did you mean trainer.max_steps?"),
        ("max_steps", "did you mean trainer.max_steps?"),
        ("model.exact.esp", "did you mean model.exact.eps?"),
        ("modl.exact.eps", "did you mean model.exact.eps?"),
        ("modl", "did you mean model?"),
        ("modl.zzz", "did you mean model?"),
        ("seeed", "did you mean model.seed?"),
        ("zzz", "known keys: model, restore_from_path, trainer"),
        ("zzz.zzz", "known keys: model, restore_from_path, trainer"),
        ("model.zzz", "known keys: model.exact, model.optim, model.seed"),
        ("model.exact.zzz", "known keys: model.exact.alpha, model.exact.eps"),
        ("", "known keys: model, restore_from_path, trainer"),
    ],
)
def test_an_unknown_key_is_answered_with_a_near_one_or_its_neighbours(key, hint):
    assert unknown_key(key, KNOWN) == f"unknown key {key}: {hint}"
