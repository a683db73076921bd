"""NeMo 2 recipes (nemo.collections.llm, nemo_toolkit 2.4 to 2.7): a dataset class for PreTrainingDataModule and a callback.

    recipe.data = run.Config(PreTrainingDataModule, ..., dataset_cls=ExactDataset, reset_attention_mask=True)
    recipe.trainer.callbacks.append(run.Config(ExactCallback, alpha=0.15))

The callback weights what the data module built, before the model is built, and puts ExactLossReduction and, with
reset_attention_mask, DocumentAttention into the model. What a recipe's checkpoint says of the run (context/) names both classes, as it
names every class of a recipe; model weights do not.

`reduced_train_loss` and `val_loss` stay NeMo's own unweighted numbers. Imports NeMo, which takes seconds.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import nemo
import torch

from ..attention.supported import LOSS
from ..config import ExactConfig, ExactError, QKTimingConfig
from ..dataset import ExactGPTDataset, from_rank_0, members
from ..loss import ExactLoss, gpt_loss
from ..packing import read_index
from ..refusals import Row, is_above_1, is_set, reasons, refuse, unmasked
from .documents import MaskAttention, check_masked, join_boundaries, masking_documents
from .host import DENSE_MASKS, Host, HostBuilder, Words, say
from .loss_sums import LossSums
from .nemo_arguments import check_version, settings
from .timing import before_nemo_step

check_version(nemo.__version__, recipes=True)

from lightning.pytorch.callbacks import Callback  # noqa: E402
from nemo.collections.llm.gpt.model.base import GPTModel, gpt_data_step, gpt_forward_step  # noqa: E402
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction  # noqa: E402

WORDS = Words(
    hooked="data, loss and attention of NeMo's GPTModel",
    anew="start anew with another log directory",
    ask="reset_attention_mask",
    unmasked="not masked (allow_unmasked_documents)",
)


def _other(model: Any) -> bool:
    """Whether a kind of GPTModel takes its loss or its batches in a way of its own."""
    names = ("training_loss_reduction", "validation_loss_reduction", "data_step")
    return any(getattr(type(model), name) is not getattr(GPTModel, name) for name in names)


# What would be weighted wrongly: `model` is the module, `config` its GPTConfig, `strategy` and `data` are the trainer's.
OTHER_MODEL = Row(
    "model",
    lambda model: not isinstance(model, GPTModel),
    lambda model: f"the model is {type(model).__name__}: only nemo.collections.llm's GPTModel and its kin are hooked",
)
ROWS = (
    Row("model", _other, lambda model: f"{type(model).__name__} has a loss of its own"),
    Row(
        "config.data_step_fn config.forward_step_fn",
        lambda *steps: steps != (gpt_data_step, gpt_forward_step),
        "the model's config has a data_step_fn or forward_step_fn of its own",
    ),
    Row(
        "config.mtp_num_layers",
        is_set,
        "config.mtp_num_layers: multi-token prediction uses the weights of one depth for another. Unset it",
    ),
    Row(
        "strategy.virtual_pipeline_model_parallel_size",
        is_above_1,
        "virtual_pipeline_model_parallel_size: only one model chunk a rank is hooked. Unset it",
    ),
    Row(
        "strategy.fsdp",
        is_set,
        "fsdp: its gradients are reduced in another way, which nobody has compared. Unset it",
    ),
    Row(
        "strategy.context_parallel_size data.eod_mask_loss config.calculate_per_token_loss",
        lambda cp, eod, per_token: is_above_1(cp) and eod and not per_token,
        lambda cp, *_: (
            f"context_parallel_size={cp} with eod_mask_loss: each rank would divide by its own count of targets. Set "
            "calculate_per_token_loss=True in the model's config"
        ),
    ),
    Row(
        "data.reset_attention_mask exact.allow_unmasked_documents",
        lambda asked, accepted: not asked and not accepted,
        unmasked(
            "PreTrainingDataModule(reset_attention_mask=True) (EXACT does it with an attention of its own)",
            "ExactCallback(allow_unmasked_documents=True)",
        ),
    ),
)


class ExactDataset(ExactGPTDataset):
    """For PreTrainingDataModule(dataset_cls=...). Its samples are refused until an ExactCallback has seen them."""

    seen = False

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
        """NeMo builds the data before any callback can look at the files, and Megatron packs by them."""
        if "://" not in dataset_path:  # object storage is looked at when it is weighted
            read_index(dataset_path, whole_documents=False)
        return ExactGPTDataset.build_low_level_dataset(dataset_path, config)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        if not self.seen:
            raise ExactError(
                "ExactDataset without ExactCallback: add run.Config(ExactCallback) to the trainer's callbacks, or leave out dataset_cls"
            )
        return super().__getitem__(idx)


class ExactLossReduction(MaskedTokenLossReduction):
    """NeMo's reduction on weighted batches: the gradient is the weighted sum's, the log stays NeMo's unweighted loss.

    Args:
        loss: the run's hook.
        validation_step, val_drop_last: as in NeMo.
    """

    def __init__(self, loss: ExactLoss, validation_step: bool = False, val_drop_last: bool = True) -> None:
        super().__init__(validation_step, val_drop_last)
        self.weighted_loss = loss.wrap(gpt_loss)
        self.sums = LossSums(loss)

    def forward(self, batch: dict[str, torch.Tensor], forward_out: torch.Tensor) -> Any:
        """(weighted sum of losses, int32 number of targets, NeMo's {"loss_sum_and_ub_size": unweighted [sum, count]})."""
        total, _, report = self.weighted_loss(batch["loss_mask"], forward_out)
        self.sums.add(report)
        mask = (batch["loss_mask"] != 0).float()
        _, count, logged = super().forward({**batch, "loss_mask": mask}, forward_out.detach())
        return total, count, logged


class _Masking(ExitStack):
    """masking_documents(MaskAttention), which NeMo enters each time it configures a model."""

    def __enter__(self) -> _Masking:
        self.enter_context(masking_documents(MaskAttention))
        return self


class ExactCallback(Callback):
    """EXACT in a NeMo 2 run.

    Args:
        enabled: false trains as without EXACT, on the same ExactDataset.
        settings: the other keys of ExactConfig, `alpha=0.15`.

    Raises (when the trainer sets up):
        ValueError: an unknown setting; a model, data or layout that EXACT would weight wrongly; no tail target in the data.
        ExactError: the data are not ExactDataset's.
        ValueError (when it resumes): the checkpoint has other weights, or has weights and this run does not enable them.
    """

    def __init__(self, enabled: bool = True, **options: Any) -> None:
        self.config = settings({"enabled": enabled, **options})
        self.host = Host(self.config, WORDS)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        data = trainer.datamodule
        splits = [getattr(data, name, None) for name in ("_train_ds", "_validation_ds", "_test_ds")]
        parts = list(members(splits))
        if not self.config.enabled or self.host.weighted:
            for part in parts:
                part.seen = True
            return
        strange = {type(part).__name__ for part in parts if not isinstance(part, ExactDataset)}
        if strange or not parts:
            raise ExactError(
                f"EXACT weights ExactDataset, and the data module built {', '.join(sorted(strange)) or 'nothing'}: give it real data and "
                "PreTrainingDataModule(dataset_cls=ExactDataset)"
            )
        refuse(refusals(trainer, pl_module, self.config))
        host = self.host
        host.masking, host.seq_length = bool(data.reset_attention_mask), data.seq_length
        # wrapped before the builder binds the weights to the loss
        pl_module._training_loss_reduction = ExactLossReduction(host.loss)
        pl_module._validation_loss_reduction = ExactLossReduction(host.loss, validation_step=True)
        builder = HostBuilder(host, ExactDataset, [1, 1, 1], lambda: True, parts[0].config)
        for part in parts:
            part.seen = True
            if host.masking:  # dense masks are not needed
                for name in [name for name in DENSE_MASKS if hasattr(part.config, name)]:
                    setattr(part.config, name, False)
        from_rank_0(builder.check_files)
        builder.weight(splits)
        if host.masking:
            self._mask(pl_module, data.seq_length)

    def _mask(self, pl_module: Any, seq_length: int) -> None:
        """Boundaries go beside the batch, which is cut under context parallelism, and enter the model as attention_mask."""
        config = pl_module.config
        pl_module.model_context_managers = [*pl_module.model_context_managers, _Masking()]

        def data_step(iterator: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            drawn = next(iterator)
            batch = dict(drawn[0] if isinstance(drawn, tuple) else drawn)
            cuts = join_boundaries(batch.pop("cu_seqlens"), seq_length)
            return {**gpt_data_step(iter([batch]), *args, **kwargs), "exact_documents": torch.tensor(cuts)}

        def forward_step(model: Any, batch: dict[str, Any]) -> Any:
            batch = dict(batch)
            batch["attention_mask"] = batch.pop("exact_documents")
            return gpt_forward_step(model, batch)

        config.data_step_fn, config.forward_step_fn = data_step, forward_step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.host.weighted and self.host.masking:
            model = pl_module.module
            while not hasattr(model, "decoder"):
                model = model.module
            check_masked(model, self.host.seq_length)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self.host.weighted:
            for name, value in pl_module._training_loss_reduction.sums.reduced().items():
                pl_module.log(name, value, rank_zero_only=True, batch_size=1)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.host.weighted:
            for name, value in pl_module._validation_loss_reduction.sums.reduced().items():
                pl_module.log(f"val {name}", value, rank_zero_only=True, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.host.loss.check()

    def state_dict(self) -> dict[str, Any]:
        self.host.loss.check()  # a checkpoint is about to be written
        return self.host.entry

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.host.guard(state_dict)


def refusals(trainer: Any, model: Any, config: ExactConfig) -> list[str]:
    """What of a NeMo 2 run EXACT would weight wrongly, in words; empty is a run that can start.

    Args:
        trainer: Lightning's, with NeMo's strategy and data module.
        model: the LightningModule.
        config: the settings.
    """
    found = reasons([OTHER_MODEL], {"model": model})
    if found:
        return found
    parts = {"config": model.config, "strategy": trainer.strategy, "data": trainer.datamodule}
    return reasons(ROWS, {"model": model, "exact": config, **parts}) + reasons(LOSS, model.config)


class QKTimingCallback(Callback):
    """Query/key timing (exact_megatron.qk_timing) for a recipe, with or without ExactCallback.

    Args:
        options: of QKTimingConfig; enabled is true.
    """

    def __init__(self, **options: Any) -> None:
        self.config = QKTimingConfig.from_mapping({"enabled": True, **options})

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.config.enabled:
            before_nemo_step(self.config, trainer, list(trainer.strategy.megatron_parallel), say)
