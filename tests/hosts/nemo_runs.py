"""A checkout's megatron_gpt_pretraining.py, and tiny runs of it, for test_nemo.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.helpers.ranks import end
from tests.hosts.megatron_lm import HERE, SEQ_LENGTH, free_port

FOLDER = Path("examples/nlp/language_modeling")
ABSENT = "needs a checkout of NeMo at tag v2.4.0: make test-nemo NEMO=/path/to/NeMo"
ROOT = HERE.parent.parent


def examples() -> Path | None:
    where = os.environ.get("NEMO")
    return Path(where, FOLDER) if where and Path(where, FOLDER, "megatron_gpt_pretraining.py").is_file() else None


def write_data(folder: Path, name: str, seed: int, least: int) -> str:
    """Documents of 1, 2, S - 1, S, S + 1 and 10 S tokens among ordinary ones, each closed by its only EOD, 0.

    Tokens are `least` and above; 1 is the byte-level tokenizer's pad.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    s = SEQ_LENGTH
    lengths = [1, 2, s - 1, s, s + 1, 10 * s, *rng.integers(1, 12, 60), *rng.integers(1, 3 * s, 60)]
    rng.shuffle(lengths)
    prefix = str(folder / name)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for n in lengths:
        builder.add_document(torch.from_numpy(np.append(rng.integers(least, 95, n - 1), 0)), [int(n)])
    builder.finalize(prefix + ".idx")
    return prefix


def arguments(folder: Path, name: str, data: str, world: int) -> list[str]:
    """Overrides of the stock YAML that make the model tiny and the trainer a CPU's."""
    text = f"""
    trainer.accelerator=cpu trainer.devices={world} trainer.precision=32 trainer.max_steps=6 trainer.log_every_n_steps=1
    trainer.val_check_interval=6 trainer.limit_val_batches=2 trainer.limit_test_batches=1 +trainer.num_sanity_val_steps=0
    exp_manager.explicit_log_dir={folder}/exp/{name} exp_manager.create_checkpoint_callback=False exp_manager.resume_if_exists=False
    model.megatron_amp_O2=False model.use_cpu_initialization=True model.micro_batch_size=2 model.global_batch_size=8
    model.encoder_seq_length={SEQ_LENGTH} model.num_layers=2 model.hidden_size=32 model.ffn_hidden_size=64
    model.num_attention_heads=4 model.hidden_dropout=0 model.attention_dropout=0 model.init_method_std=0.2
    model.bias_activation_fusion=False model.bias_dropout_add_fusion=False model.masked_softmax_fusion=False
    model.persist_layer_norm=False model.grad_div_ar_fusion=False model.tokenizer.library=byte-level
    model.optim.name=adam model.optim.sched.warmup_steps=1 model.optim.lr=1e-3 model.optim.sched.min_lr=1e-4
    model.data.data_prefix=[1.0,{data}] model.data.splits_string='90,10,0' model.data.index_mapping_dir={folder}/cache
    model.data.num_workers=0
    """
    return text.split()


def run_jobs(folder: Path, world: int, jobs: list[dict], seconds: int = 120, recipes: bool = False) -> None:
    """Run jobs of nemo_train.py, or of nemo_recipe_train.py, one after another as `world` ranks; afterwards nothing of them is left."""
    for job in jobs:
        job.update(port=free_port(), seconds=seconds)
    table = folder / f"jobs{world}.json"
    table.write_text(json.dumps(jobs))
    ranks = []
    for rank in range(world):
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("EXACT_")},
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"},
            **{"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONWARNINGS": "ignore"},
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "PYTHONPATH": str(ROOT),
        }
        script = ["nemo_recipe_train.py"] if recipes else ["nemo_train.py", str(examples())]
        command = [sys.executable, str(HERE / script[0]), *script[1:], str(table), str(folder)]
        with open(folder / f"ranks{world}.{rank}", "w") as log:
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True))
    deadline = time.monotonic() + 120 + seconds * len(jobs)
    try:
        for rank in ranks:
            rank.wait(timeout=max(1, deadline - time.monotonic()))
    finally:
        end(ranks)
    for number, rank in enumerate(ranks):
        assert rank.returncode == 0, (folder / f"ranks{world}.{number}").read_text()[-4000:]


class Log:
    """What a job printed, all ranks together, and what it wrote for TensorBoard."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder / "exp" / name
        self.ranks = [path.read_text() for path in sorted(folder.glob(f"{name}.[0-9]"))]
        self.text = "\n".join(self.ranks)

    @property
    def ok(self) -> bool:
        return bool(self.ranks) and all(text.rstrip().endswith("exit status 0") for text in self.ranks)

    def steps(self) -> dict[str, dict[int, float]]:
        """{tag: {step: value}} from TensorBoard, float32 as written; step is the trainer's, also after a resume."""
        assert self.ok, f"{self.name}: {self.text[-5000:]}"
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found: dict[str, dict[int, float]] = {}
        for file in sorted(self.folder.rglob("events.out.tfevents.*")):
            events = EventAccumulator(str(file), size_guidance={"scalars": 0})
            events.Reload()
            for tag in events.Tags()["scalars"]:
                found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        trainers = {logged: int(value) for logged, value in found["global_step"].items()}
        return {
            tag: {trainers[logged]: value for logged, value in values.items() if logged in trainers}
            for tag, values in found.items()
        }

    def error(self) -> str:
        """The end of a run that must fail before its first step."""
        assert self.ranks and not any(text.rstrip().endswith("exit status 0") for text in self.ranks), self.name
        assert "reduced_train_loss" not in self.text
        return re.sub(r"\s+", " ", self.text)
