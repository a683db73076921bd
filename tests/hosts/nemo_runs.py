"""A checkout's megatron_gpt_pretraining.py, and tiny runs of it, for test_nemo.py."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.helpers import jobs, ranks, tiny
from tests.helpers.tiny import SEQ_LENGTH
from tests.hosts.megatron_lm import HERE

FOLDER = Path("examples/nlp/language_modeling")
ABSENT = "needs a checkout of NeMo at tag v2.4.0: make test-nemo NEMO=/path/to/NeMo"
ROOT = HERE.parent.parent


def examples() -> Path | None:
    where = os.environ.get("NEMO")
    return Path(where, FOLDER) if where and Path(where, FOLDER, "megatron_gpt_pretraining.py").is_file() else None


def write_data(folder: Path, name: str, seed: int, least: int) -> str:
    """Tokens are `least` and above; 1 is the byte-level tokenizer's pad."""
    return tiny.write_data(folder, name, seed, (least, 95))


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


def run_jobs(folder: Path, world: int, table: list[dict], recipes: bool = False) -> None:
    """Run jobs of nemo_train.py, or of nemo_recipe_train.py."""
    script = ["nemo_recipe_train.py"] if recipes else ["nemo_train.py", str(examples())]
    ranks.run_jobs([str(HERE / script[0]), *script[1:]], folder, world, table, [ROOT])


class Log(jobs.Log):
    """With what NeMo wrote for TensorBoard."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self.folder = folder / "exp" / name

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
