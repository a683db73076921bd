"""The command itself: tracebacks on demand, missing extras, closed pipes, and the census of texts without a tail."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exact_megatron import cli
from exact_megatron.cli import main
from exact_megatron.utils import extras

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "line",
    [
        ["census", "nowhere", "--seq-length", "64"],
        ["train", "--config", "nowhere.yaml"],
        ["plan", "--config", "nowhere.yaml"],
        ["convert", "hf-to-megatron", "nowhere", "out"],
        ["launch", "nowhere.py"],
        ["evaluate", "compare", "nowhere", "nowhere2", "--output", "x"],
        ["prepare", "nowhere", "--output", "x", "--train-tokenizer", "300"],
    ],
    ids=lambda line: line[0],
)
def test_a_traceback_before_or_after_the_command(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.removeprefix("exact-megatron ").startswith(line[0]) and "nowhere" in said
    with pytest.raises((ValueError, OSError), match="nowhere"):
        main(["--traceback", *line])
    with pytest.raises((ValueError, OSError), match="nowhere"):
        main([line[0], "--traceback", *line[1:]])


def test_a_scripts_traceback_is_its_own(monkeypatch):
    assert cli._take_traceback(["launch", "a.py", "--traceback"]) == (["launch", "a.py", "--traceback"], False)
    assert cli._take_traceback(["--traceback", "launch", "a.py"]) == (["launch", "a.py"], True)
    assert cli._take_traceback(["doctor", "--traceback", "a.py"]) == (["doctor", "a.py"], True)
    assert cli._take_traceback(["census", "x", "--", "--traceback"]) == (["census", "x", "--", "--traceback"], False)
    assert cli._take_traceback(["census", "x", "--traceback"]) == (["census", "x"], True)
    assert cli._take_traceback([]) == ([], False)


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_a_missing_extra_is_one_line(module, write_corpus, monkeypatch, capsys, tmp_path):
    prefix = write_corpus(np.full(20, 100))
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    line = ["census", prefix, "--seq-length", "64", "--plot", str(tmp_path / "a.png")]
    assert main(line) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"exact-megatron census: {module} cannot be imported")
    assert said.endswith("pip install 'exact-megatron[report]'")
    with pytest.raises(ImportError):
        main([*line, "--traceback"])


@pytest.mark.parametrize(
    "line",
    [["census", "PREFIX", "--seq-length", "64", "--json", "-"], ["files", "--to", "DIR"], ["doctor"], ["--help"]],
)
def test_these_commands_need_numpy_alone(line, write_corpus, tmp_path):
    """Of what an extra brings, only what the command itself uses is imported: a login node has numpy."""
    names = {"PREFIX": write_corpus(np.full(20, 100)), "DIR": str(tmp_path / "files")}
    line = [names.get(word, word) for word in line]
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(extras.MODULES)!r})); "
    code += f"from exact_megatron.cli import main; sys.exit(main({line!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_import_error_of_our_own_is_no_missing_extra():
    assert extras.remedy(ImportError("x", name="exact_megatron.nothing")) is None
    assert extras.remedy(ImportError("x")) is None


def test_every_module_that_is_imported_belongs_to_an_extra():
    source = (ROOT / "setup.py").read_text()
    groups = dict(re.findall(r'^    "(\w+)": \[(.*?)\]', source, re.M | re.S))
    groups["eval"] = re.search(r"^evaluation = \[(.*?)\]$", source, re.M | re.S)[1]
    distributions = {
        "yaml": "pyyaml",
        "megatron": "megatron-core",
        "lm_eval": "lm-eval",
        "nltk": "lm-eval[hf,ruler",
        "datasets": "lm-eval",
    }
    for module, extra in extras.MODULES.items():
        assert f'"{distributions.get(module, module)}' in groups[extra], f"{module} is not in the extra {extra}"
    own = {"exact_megatron", "numpy", *sys.stdlib_module_names}
    hosts = {"nemo", "lightning", "pytorch_lightning", "transformer_engine", "hydra", "amp_C", "apex"}
    hosts |= {"pytest"}  # of which benchmark/outcomes.py is a plugin
    measured = {"liger_kernel", "cut_cross_entropy"}  # by `benchmark ceiling` alone, where they are installed
    for path in (ROOT / "exact_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            unknown = {name.partition(".")[0] for name in names} - own - hosts - measured - extras.MODULES.keys()
            assert not unknown, f"{path.name} imports {unknown}: say in extras.py which extra brings it"


@pytest.mark.parametrize("more", [[], ["--json", "-"]])
@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_reader_that_leaves_early_is_no_error(write_corpus, more, unbuffered):
    reads, writes = os.pipe()
    os.close(reads)
    line = [
        sys.executable,
        "-m",
        "exact_megatron",
        "census",
        write_corpus(np.full(20, 100)),
        "--seq-length",
        "64",
        *more,
    ]
    done = subprocess.run(line, stdout=writes, stderr=subprocess.PIPE, text=True, env={**os.environ, **unbuffered})
    os.close(writes)
    assert (done.returncode, done.stderr) == (cli.READER_GONE, "")


def test_json_on_stdout_and_a_picture(write_corpus, tmp_path, capsys):
    picture = tmp_path / "a.png"
    assert (
        main(["census", write_corpus(np.full(20, 100)), "--seq-length", "64", "--json", "-", "--plot", str(picture)])
        == 0
    )
    out = capsys.readouterr()
    assert json.loads(out.out)["seq_length"] == 64 and str(picture) in out.err and picture.stat().st_size


def test_documents_that_are_too_short_for_a_tail(write_corpus, tmp_path, capsys):
    line = ["census", write_corpus(np.full(40, 10)), "--seq-length", "64", "--plot", str(tmp_path / "a.png")]
    assert main(line) == 0
    out = capsys.readouterr()
    assert "0 - 7" in out.out and "the longest seen is 9" in out.out and (tmp_path / "a.png").stat().st_size
    assert "nan" not in out.out
    (said,) = out.err.strip().splitlines()
    assert "warning: no weights: no target has an effective context of tau=16" in said and "at most 8" in said
    assert main([*line, "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tail_share"] == 0 and {bucket["weight"] for bucket in facts["buckets"]} == {1.0}
    assert main([*line, "--alpha", "0.15"]) == 2  # weights were asked for
    assert main([*line, "--tau", "8", "--alpha", "0.15"]) == 0


@pytest.mark.parametrize(
    ("line", "where"),
    [
        (["census", "x", "--seq-length", "64", "--json", ""], "--json"),
        (["census", "x", "--seq-length", "64", "--plot="], "--plot"),
        (["census", "x", " ", "--seq-length", "64"], "2 of the command line"),
        (["prepare", "", "--tokenizer", "t", "--output", "o"], "1 of the command line"),
        (["prepare", "x", "--tokenizer", "t", "--output", ""], "--output"),
        (["prepare", "x", "--tokenizer=", "--output", "o"], "--tokenizer"),
        (["train", "--config", "x", ""], "3 of the command line"),
        (["convert", "hf-to-megatron", "x", ""], "3 of the command line"),
        (["evaluate", "x", "--suite", "short", "--output", ""], "--output"),
        (["evaluate", "compare", "a", "", "--output", "o"], "3 of the command line"),
        (["--traceback", "files", ""], "1 of the command line"),
        ([""], "0 of the command line"),
    ],
)
def test_an_empty_name_is_refused(line, where, capsys):
    """It would be the folder that the shell is in, or a file without a name."""
    assert main(line) == 2
    assert f"argument {where}: the name is empty: is a variable of the shell unset?" in capsys.readouterr().err


def test_empty_words_of_a_script_are_the_scripts(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "pretrain_gpt.py"), "--tag", ""]) == 1
    assert "the name is empty" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out", "/dev/full", "x.gif"])
def test_a_picture_without_a_known_ending_is_refused_before_the_count(name, capsys):
    assert main(["census", "/nowhere", "--seq-length", "64", "--plot", name]) == 2
    assert f"the picture '{name}' must end in .png, .svg or .pdf" in capsys.readouterr().err


def test_check_prints_what_would_run_or_all_that_is_in_its_way(tmp_path, capsys):
    from tests.helpers.tiny import config_file, write_data

    config = str(config_file(tmp_path, write_data(tmp_path)))
    assert main(["train", "--check", "--config", config]) == 0
    out = capsys.readouterr().out
    assert re.search(r"0-15: 0\.75\d+, 16-31: 1\.17\d+, 32-64: 1\.11", out), out
    assert "96 tokens, EOD 0" in out and "63.7% of the targets" in out
    assert not (tmp_path / "run").exists()
    line = ["train", "--check", "--config", config, "restore_from_path=/nowhere", "model.exact.alpha=1e30"]
    assert main([*line, "trainer.accelerator=gpu"]) == 2
    out = capsys.readouterr().out
    for reason in ("no checkpoint at /nowhere", "model.exact.alpha=1e+30", "torch finds 0 CUDA devices"):
        assert re.search(f"^refused .*{re.escape(reason)}", out, re.M)
    assert main(["train", "--check", "--config", config, "model.exact.tau="]) == 2
