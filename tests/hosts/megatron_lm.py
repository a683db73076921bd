"""Checkouts of Megatron-LM and tiny runs of their pretrain_gpt.py, for test_megatron_lm.py."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers import jobs, ranks, tiny
from tests.helpers.tiny import SEQ_LENGTH

HERE = Path(__file__).parent
EOD = 95
ABSENT = (
    "needs a checkout of Megatron-LM: MEGATRON_LM=/path/to/Megatron-LM (a git clone with its tags, or one unpacked version that "
    "fits the installed megatron-core)"
)
RUNS_WITH = {"0.16": ["core_v0.16.1"], "0.19": ["core_v0.19.0", "main"]}  # by version of the installed megatron-core


def repository() -> Path | None:
    where = os.environ.get("MEGATRON_LM")
    return Path(where) if where else None


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(repository()), *arguments], capture_output=True)


def refs() -> list[str]:
    """What of MEGATRON_LM can run here: the tags for the installed core, or "as it is" for a folder without git."""
    if repository() is None:
        return ["absent"]
    if os.environ.get("MEGATRON_LM_REFS"):
        return os.environ["MEGATRON_LM_REFS"].split()
    if git("rev-parse", "--verify", "-q", "core_v0.16.1").returncode:
        return ["as it is"]
    from importlib.metadata import version

    return RUNS_WITH.get(".".join(version("megatron-core").split(".")[:2]), [])


def read(ref: str, path: str) -> bytes | None:
    """A file at a tag, None where either is missing."""
    for name in (ref, f"origin/{ref}"):
        shown = git("show", f"{name}:{path}")
        if shown.returncode == 0:
            return shown.stdout
    return None


def copy_checkout(ref: str, folder: Path) -> Path:
    """A copy of Megatron-LM with the compiled helpers of the installed megatron-core; the user's checkout is not touched."""
    where = folder / "Megatron-LM"
    if ref == "as it is":
        shutil.copytree(repository(), where, ignore=shutil.ignore_patterns(".git", "tests", "docs"))
    else:
        known = [name for name in (ref, f"origin/{ref}") if git("rev-parse", "-q", "--verify", name).returncode == 0]
        names = git("ls-tree", "--name-only", known[0]).stdout.decode().split()
        wanted = [n for n in names if n == "megatron" or n.endswith(".py")]
        with tarfile.open(fileobj=io.BytesIO(git("archive", known[0], *wanted).stdout)) as archive:
            archive.extractall(where, filter="data")
    import megatron.core.datasets

    for helper in Path(next(iter(megatron.core.datasets.__path__))).glob("helpers_cpp*.so"):
        shutil.copy(helper, where / "megatron" / "core" / "datasets")
    return where


def write_data(folder: Path, name: str, seed: int) -> str:
    return tiny.write_data(folder, name, seed, (0, EOD), EOD)


def arguments(checkout: Path, folder: Path) -> list[str]:
    """pretrain_gpt.py's arguments for a tiny Llama."""
    # NullTokenizer's EOD is vocab_size up to 0.18, vocab_size - 1 from 0.19 on
    tokenizer = checkout / "megatron/core/tokenizers/text/libraries/null_tokenizer.py"
    vocabulary = EOD + 1 if tokenizer.is_file() and "_vocab_size - 1" in tokenizer.read_text() else EOD
    text = f"""
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} --position-embedding-type rope --normalization RMSNorm
    --disable-bias-linear --swiglu --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --init-method-std 0.2 --seed 7 --transformer-impl local --use-cpu-initialization --distributed-backend gloo
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --no-gradient-accumulation-fusion --no-persist-layer-norm
    --micro-batch-size 2 --global-batch-size 8 --train-iters 8 --lr 5e-3 --min-lr 1e-3 --lr-decay-style constant
    --weight-decay 0.1 --clip-grad 1.0 --calculate-per-token-loss --eod-mask-loss
    --tokenizer-type NullTokenizer --vocab-size {vocabulary} --make-vocab-size-divisible-by 64
    --data-cache-path {folder}/cache --num-workers 0
    --log-interval 1 --eval-iters 1 --eval-interval 100 --ckpt-format torch_dist --save-interval 3
    """
    return text.split()


def run_jobs(checkout: Path, folder: Path, world: int, table: list[dict]) -> None:
    """Run jobs of cpu_train.py."""
    ranks.run_jobs([str(HERE / "cpu_train.py"), str(checkout)], folder, world, table, [HERE, HERE.parent.parent])


class Log(jobs.Log):
    """With what Megatron-LM and Megatron-Bridge print."""

    def steps(self) -> dict[int, dict[str, str]]:
        """By iteration what the log line says of losses and gradient norm, as printed."""
        assert self.ok, f"{self.name}: {self.text[-4000:]}"
        found = {}
        for line in re.findall(r"iteration +\d+/.*", self.text):
            pairs = re.findall(r"\| +((?:lm|exact) loss[\w -]*|grad norm): (\S+)", line)
            found[int(re.match(r"iteration +(\d+)/", line)[1])] = dict(pairs)
        return found

    def validation(self) -> dict[str, str]:
        line = re.search(r"validation loss at iteration \d+ on validation set.*", self.text)[0]
        return dict(re.findall(r"\| ((?:lm|exact) loss[\d -]*?) value: (\S+)", line))


def assert_close(log: Log, reference: Log, steps: Iterable[int] = range(1, 9), rel: float = 1e-6) -> None:
    """Printed losses and gradient norms agree to a unit or two of the last digit; nothing is printed by one alone."""
    mine, theirs = log.steps(), reference.steps()
    for step in steps:
        assert mine[step].keys() == theirs[step].keys()
        for key, value in theirs[step].items():
            tolerance = 1e-3 if key == "grad norm" else rel
            assert float(mine[step][key]) == pytest.approx(float(value), rel=tolerance), (step, key)


PATCHES = HERE.parent.parent / "patches"


def apply(patch: Path, folder: Path, *options: str) -> bool:
    """git apply in a folder that need not be a repository."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(patch)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode == 0


def patched(checkout: Path, folder: Path) -> str:
    """Name of a patched copy of pretrain_gpt.py, in the checkout's copy beside it."""
    work = folder / "patched"
    work.mkdir()
    shutil.copy(checkout / "pretrain_gpt.py", work)
    fitting = [patch for patch in sorted(PATCHES.glob("*.patch")) if apply(patch, work)]
    assert len(fitting) == 1, f"patches that apply: {fitting}"
    shutil.copy(work / "pretrain_gpt.py", checkout / "patched.py")
    return "patched.py"
