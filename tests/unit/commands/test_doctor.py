"""`exact-megatron doctor` says "would start" of a Megatron-LM command line for what would start."""

from __future__ import annotations

import numpy as np
import pytest

from exact_megatron.cli import main
from exact_megatron.commands.doctor import megatron_line
from tests.helpers.small_host import MODEL, SCRIPT

ON = "model.exact.enabled=true"
PARSER = """
def add(parser):
    group.add_argument('--num-layers', type=int)
    {flags}
    ArgumentGroupFactory(TrainingConfig)
"""
FLAGS = (
    [flag for flag in MODEL.split() if flag.startswith("--")]
    + """
    --data-path --seq-length --attention-dropout --reset-attention-mask --tensor-model-parallel-size --context-parallel-size
    --pipeline-model-parallel-size --sequence-parallel --global-batch-size --group-query-attention --num-query-groups --bf16
    --num-layers-per-virtual-pipeline-stage --train-samples --no-rope-fusion
""".split()
)


@pytest.fixture
def line(tmp_path, write_corpus, monkeypatch):
    """The arguments of a run that starts, after a script in a checkout."""
    monkeypatch.delenv("MEGATRON_LM", raising=False)
    (tmp_path / "pretrain_gpt.py").write_text(SCRIPT.replace("provider(", "train_valid_test_datasets_provider("))
    training, core = tmp_path / "megatron/training", tmp_path / "megatron/core"
    (training / "config").mkdir(parents=True)
    core.mkdir()
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 16\n")
    flags = "\n    ".join(f"group.add_argument('{flag}')" for flag in FLAGS)
    (training / "arguments.py").write_text(PARSER.format(flags=flags))
    (training / "config" / "training_config.py").write_text(
        "@dataclass\nclass TrainingConfig:\n    rampup_speed: int = 1\n"
    )
    prefix = write_corpus(np.array([50, 30, 64] * 8, np.int32))
    flags = f"{MODEL} --data-path {prefix} --seq-length 64 --attention-dropout 0 --reset-attention-mask"
    return [str(tmp_path / "pretrain_gpt.py"), *flags.split()]


@pytest.fixture
def doctor(capsys):
    def run(*words):
        code = main(["doctor", *words])
        out = capsys.readouterr().out
        assert code == ("refused             nothing" not in out), out
        return out.partition("\nrefused")[2], out

    return run


def without(line, flag):
    at = line.index(flag)
    return line[:at] + line[at + 2 :]


def test_a_good_line_starts(line, doctor):
    assert "nothing: EXACT would start this run" in doctor(ON, *line)[0]
    assert "nothing: EXACT" in doctor(ON, *line, "--rampup-speed", "2", "--no-rope-fusion")[0]


@pytest.mark.parametrize(
    "before",
    [
        ["torchrun", "--nproc-per-node", "8", "-m", "exact_megatron.launch", ON],
        [
            "CUDA_DEVICE_MAX_CONNECTIONS=1",
            "torchrun",
            "--nproc_per_node=8",
            "--nnodes",
            "1",
            "-m",
            "exact_megatron.launch",
            ON,
        ],
        ["EXACT_ENABLED=true", "torchrun", "--nproc-per-node", "4", "-m", "exact_megatron.launch"],
        ["exact-megatron", "launch", "--exact-enabled"],
        ["python3.11", "-m", "torch.distributed.run", "--nproc-per-node=4", "-m", "exact_megatron.launch", ON],
        ["srun", "-N", "2", "/opt/venv/bin/python", "-m", "exact_megatron.launch", ON],
        [ON, "torchrun", "--nproc-per-node", "8"],
    ],
)
def test_pasted_lines_are_read(line, doctor, before):
    assert "nothing: EXACT would start this run" in doctor(*before, *line)[0]


def test_a_pasted_line_that_starts_the_script_without_exact(line, doctor):
    stock = ["torchrun", "--nproc-per-node", "8", *line]
    said, out = doctor(*stock)
    assert "nothing: the run would start without EXACT's weights" in said and "nothing would be weighted" in out
    assert "without EXACT: put -m exact_megatron.launch before it" in doctor(*stock, ON)[0]
    assert "without EXACT" in doctor("EXACT_ENABLED=true", *stock)[0]
    script = line[0]
    with open(script, "a") as file:
        file.write(
            "from exact_megatron.integrations import megatron_lm as exact\npretrain = exact.from_command_line(pretrain)\n"
        )
    assert "nothing: EXACT" in doctor(*stock, ON)[0]


def test_without_enabled_nothing_would_be_weighted(line, doctor):
    said, out = doctor(*line)
    assert "without EXACT's weights" in said and "EXACT would start" not in out
    assert "--lr is not on the line" in doctor(*without(line, "--lr"))[0]  # nor would the plain script start


@pytest.mark.parametrize(
    "flag",
    [
        "--train-iters",
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--micro-batch-size",
        "--lr",
        "--seq-length",
    ],
)
def test_what_megatron_needs_is_asked_for(line, doctor, flag):
    assert f"{flag} is not on the line" in doctor(ON, *without(line, flag))[0]


def test_scripts_of_other_hosts_are_not_judged_by_megatrons_options(doctor, tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_LM", raising=False)
    (tmp_path / "run.py").touch()
    assert (
        "nothing: the run would start without EXACT's weights" in doctor(str(tmp_path / "run.py"), "--recipe", "x")[0]
    )


def test_samples_count_as_steps(line, doctor):
    samples = [*without(line, "--train-iters"), "--train-samples", "80"]
    assert "nothing: EXACT" in doctor(ON, *samples)[0]
    assert "give one" in doctor(ON, *samples, "--train-iters", "3")[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--trian-iters 10", "--trian-iters is no option of this Megatron-LM: did you mean --train-iters?"),
        ("--global-batchsize=8", "did you mean --global-batch-size?"),
        ("--tensor-model-parallel-size 3", "num_attention_heads=4 is no multiple of tensor_model_parallel_size=3"),
        ("--pipeline-model-parallel-size 3", "num_layers=2 is no multiple of pipeline_model_parallel_size=3"),
        ("--pipeline-model-parallel-size 0", "pipeline_model_parallel_size"),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2",
            "num_layers=2 is no multiple of pipeline_model_parallel_size * num_layers_per_virtual_pipeline_stage=4",
        ),
        ("--context-parallel-size 3", "seq_length=64"),
        ("--hidden-size 65", "hidden_size=65 is no multiple of num_attention_heads=4"),
        ("--max-position-embeddings 32", "max_position_embeddings=32 is less than seq_length=64"),
        ("--group-query-attention --num-query-groups 3", "num_attention_heads=4 is no multiple of num_query_groups=3"),
        ("--micro-batch-size 3 --global-batch-size 8", "global_batch_size=8 is no multiple of micro_batch_size"),
        ("--num-layers two", "invalid int value: 'two'"),
    ],
)
def test_lines_that_megatron_rejects(line, doctor, more, words):
    assert words in doctor(ON, *line, *more.split())[0]


def test_torchruns_ranks_are_divided_too(line, doctor):
    before = ["torchrun", "--nproc-per-node", "6", "-m", "exact_megatron.launch", ON]
    assert "world_size=6 is no multiple" in doctor(*before, *line, *"--tensor-model-parallel-size 4".split())[0]
    assert "data_parallel_size=6" in doctor(*before, *line, *"--global-batch-size 8".split())[0]
    assert "nothing" in doctor(*before, *line, *"--global-batch-size 12".split())[0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "from megatron.training import pretrain",
            "from own.training import pretrain",
            "its pretrain is that of own.training",
        ),
        ("from megatron.training import pretrain", "def pretrain(): pass", "it has a pretrain of its own"),
        ("from megatron.training import pretrain", "", "it calls no pretrain of megatron.training"),
        (
            "from megatron.training import pretrain",
            "from megatron.training import pretrain\nfrom megatron.core.models.mamba import MambaModel",
            "EXACT masks documents in GPTModel only",
        ),
        (
            "from megatron.training import pretrain",
            "from megatron.training import pretrain\nfrom megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset",
            "its samples are those of T5MaskedWordPieceDataset",
        ),
        (
            'partial(loss_func, batch["loss_mask"]',
            'partial(other, batch["loss_mask"]',
            "forward_step uses no loss_func",
        ),
    ],
)
def test_scripts_that_would_not_be_hooked(line, doctor, old, new, words):
    text = open(line[0]).read()
    assert old in text
    with open(line[0], "w") as file:
        file.write(text.replace(old, new))
    said, _ = doctor(ON, *line)
    assert words in said


def test_the_ways_out_of_forks_are_known(line, doctor):
    text = (
        open(line[0])
        .read()
        .replace("def loss_func", "@hook\ndef own_loss")
        .replace("partial(loss_func", "partial(own_loss")
    )
    text = text.replace("from megatron.training import pretrain", "from own.training import pretrain")
    text = f"from exact_megatron.integrations.megatron_lm import from_command_line, hook\n{text}\npretrain = from_command_line(pretrain)\n"
    with open(line[0], "w") as file:
        file.write(text)
    assert "nothing: EXACT" in doctor(ON, *line)[0]


def test_parts_of_a_line():
    assert megatron_line.pasted(["a.py", "--x", "torchrun"]).command == ["a.py", "--x", "torchrun"]
    found = megatron_line.pasted("A=1 torchrun --nproc-per-node gpu -m exact_megatron.launch k=v a.py b.py".split())
    assert found == megatron_line.Line(["k=v", "a.py", "b.py"], {"A": "1"}, None, True)
    assert megatron_line.pasted("torchrun --nnodes=2 --nproc-per-node=4 a.py".split()).world == 8
    assert megatron_line.pasted("torchrun --nnodes=1:4 --nproc-per-node=4 a.py".split()).world is None
