"""One run of Megatron-Bridge's `_pretrain` with EXACT: weighted data, weighted loss, masked documents.

What is replaced while it runs, and given back when it returns:

    megatron/bridge/data/utils.py: BlendedMegatronDatasetBuilder    ExactDatasetBuilder
    the forward step                                                the same, with documents' boundaries for the model; the loss
                                                                    function that it returns is wrapped by ExactLoss
    megatron/core/models/gpt/gpt_model.py: GPTModel                 the same, with DocumentAttention, if EXACT masks the documents
    megatron/bridge/training/checkpointing.py: save_checkpoint      the same, after a look at the weights of the batches so far
    megatron/bridge/training/state.py: TrainState.state_dict, load_state_dict    also hold what the weights were made of

The user's ConfigContainer is read and not written, so that a saved run_config.yaml is the one of a run without EXACT; a checkpoint
holds one entry more, `exact` in train_state.pt, of plain numbers and strings, which stock Bridge passes over.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state

from ..attention.supported import unsupported_loss
from ..config import ExactConfig, ExactError
from ..dataset import ExactDatasetBuilder, members
from ..loss import ExactLoss
from .checkpoint_guard import ANEW, check_resumed, table_lines
from .documents import check_masked, feed_documents, masking_documents
from .hooks import replaced

ASK = "dataset.reset_attention_mask=true"


class MegatronBridge:
    """EXACT in one run of `_pretrain`.

    Attributes:
        masking: whether EXACT masks the documents.
        weighted: whether weighted data were built.
        masked: whether a GPTModel with DocumentAttention was built.
        samples: training samples whose loss was weighted on this rank; 0 but on last pipeline stages.
    """

    def __init__(self, config: ExactConfig) -> None:
        self.config = config
        self.loss = ExactLoss(config)
        self.masking = False
        self.weighted = False
        self.masked = False
        self.samples = 0
        self.state: Any = None
        self._mine: dict[str, Any] | None = None
        self._losses: dict[Callable[..., Any], Callable[..., Any]] = {}

    def pretrain(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `_pretrain(state, forward_step_func, ...)` with EXACT in it.

        Raises:
            ValueError: the run is refused; every reason, one a line.
            ExactError: the data that it trains on are not weighted, or the model does not mask documents.
        """
        from megatron.bridge.utils.common_utils import get_rank_safe, get_world_size_safe

        call = inspect.signature(stock).bind(*args, **kwargs)
        self.state = call.arguments["state"]
        reasons = refusals(self.state.cfg, self.config)
        if reasons:
            raise ValueError("EXACT refuses this run:\n  " + "\n  ".join(reasons))
        self.masking = asks_for_masking(self.state.cfg.dataset)
        with ExitStack() as stack:
            call.arguments["forward_step_func"] = self._replace(stack, call.arguments["forward_step_func"])
            result = stock(*call.args, **call.kwargs)
            self.loss.check()
        if get_rank_safe() == get_world_size_safe() - 1:  # a last stage
            print(f"EXACT weighted {self.samples} training samples on this rank", flush=True)
        return result

    def _replace(self, stack: ExitStack, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        import megatron.bridge.data.utils as data
        from megatron.bridge.training import checkpointing, pretrain, train
        from megatron.bridge.training.losses import masked_next_token_loss
        from megatron.bridge.training.state import TrainState
        from megatron.bridge.training.utils.train_utils import prepare_forward_step_func
        from megatron.core.models.gpt.gpt_model import GPTModel

        self._weigh(masked_next_token_loss)  # before the data are built: ExactLoss.bind asks for it
        seq_length = self.state.cfg.dataset.seq_length
        build_model, save, load = GPTModel.__init__, TrainState.state_dict, TrainState.load_state_dict

        @functools.wraps(build_model)
        def built(model: Any, *args: Any, **kwargs: Any) -> None:
            with masking_documents():
                build_model(model, *args, **kwargs)
            check_masked(model, seq_length)
            self.masked = True

        @functools.wraps(save)
        def state_dict(train_state: Any) -> dict[str, Any]:
            return save(train_state) | ({} if self._mine is None else {"exact": self._mine})

        @functools.wraps(load)
        def load_state_dict(train_state: Any, values: dict[str, Any]) -> None:
            load(train_state, values)
            train_state.exact = values.get(
                "exact"
            )  # an attribute: rank 0 reads the file and sends the object to the others

        new = [
            (data, "BlendedMegatronDatasetBuilder", functools.partial(_Builder, self)),
            (TrainState, "state_dict", state_dict),
            (TrainState, "load_state_dict", load_state_dict),
        ]
        for module in (checkpointing, pretrain, train):  # which of them calls it by that name depends on the version
            if hasattr(module, "save_checkpoint"):
                new.append((module, "save_checkpoint", self._checked(module.save_checkpoint)))
        if self.masking:
            new.append((GPTModel, "__init__", built))
        for replacement in new:
            stack.enter_context(replaced(*replacement))
        # Bridge's own way to hand its GlobalState to the functions that want it
        prepared = prepare_forward_step_func(forward_step, self.state)
        run = feed_documents(prepared, seq_length) if self.masking else prepared

        def step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.weighted:
                raise ExactError("training is about to start on data that EXACT did not weight")
            if self.masking and not self.masked:
                raise ExactError(
                    "documents were to be masked, but no GPTModel was built: EXACT masks documents in GPTModel only. Accept unmasked "
                    "documents with model.exact.allow_unmasked_documents=true and without dataset.reset_attention_mask"
                )
            output, loss_func = run(data_iterator, model, *args, **kwargs)
            if not isinstance(loss_func, functools.partial):
                raise ExactError(f"the forward step returned {loss_func!r}: EXACT weights a partial of a loss function")
            return output, functools.partial(self._weigh(loss_func.func), *loss_func.args, **loss_func.keywords)

        return step

    def _checked(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(save_checkpoint)
        def saved(*args: Any, **kwargs: Any) -> Any:
            self.loss.check()
            return save_checkpoint(*args, **kwargs)

        return saved

    def _weigh(self, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        """The loss function with EXACT's weights, and a count of the samples that it sees."""
        if loss_func not in self._losses:
            parameters = list(inspect.signature(loss_func).parameters)
            if parameters[:2] != ["loss_mask", "output_tensor"]:
                raise ExactError(
                    f"the forward step uses the loss {loss_func.__name__}({', '.join(parameters)}), and EXACT weights losses that take "
                    "(loss_mask, output_tensor, ...), as megatron.bridge.training.losses.masked_next_token_loss does: use gpt_step's "
                    "forward_step, without distillation"
                )
            weighted = self.loss.wrap(loss_func)

            @functools.wraps(weighted)
            def counted(loss_mask: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if torch.is_grad_enabled():  # not evaluation
                    self.samples += len(loss_mask)
                return weighted(loss_mask, *args, **kwargs)

            self._losses[loss_func] = counted
        return self._losses[loss_func]

    def built(self, builder: ExactDatasetBuilder) -> None:
        """Called with the builder when the data are built: compare with the checkpoint, and say once what is hooked."""
        assert builder.table is not None and builder.census is not None
        mine = {**self.config.to_dict(), "table": builder.table.digest, "census": builder.census.digest}
        before = getattr(self.state.train_state, "exact", None)
        check_resumed(before, mine, self.config, ANEW)
        self._mine = mine
        if not self.weighted and torch.distributed.get_rank() == 0:
            lines = [
                "hooked      data builder, loss and forward step of Megatron-Bridge's pretrain",
                "masking     masked by DocumentAttention"
                if self.masking
                else "masking     not masked: documents in a sample see each other (model.exact.allow_unmasked_documents=true)",
                *table_lines(builder.table),
            ]
            cfg = self.state.cfg
            if cfg.dataset.eod_mask_loss and not cfg.model.calculate_per_token_loss:
                lines.append(
                    "note        dataset.eod_mask_loss without model.calculate_per_token_loss averages over micro-batches, not targets"
                )
            print("\n  ".join(["EXACT", *lines]), flush=True)
        self.weighted = True


class _Builder(ExactDatasetBuilder):
    """What Bridge's provider calls in place of BlendedMegatronDatasetBuilder."""

    def __init__(
        self, host: MegatronBridge, cls: Any, sizes: Any, is_built_on_rank: Callable[[], bool], config: Any
    ) -> None:
        self.host = host
        if host.masking:
            config = copy.copy(config)  # the user's own is saved with checkpoints
            for name in ("reset_attention_mask", "create_attention_mask", "inter_document_masking"):
                if hasattr(config, name):
                    setattr(config, name, False)
        super().__init__(
            cls, sizes, is_built_on_rank, config, exact=host.config, loss=host.loss, emit_cu_seqlens=host.masking
        )

    def build(self) -> list[Any]:
        datasets = super().build()
        middle = not (
            parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            or parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        )
        for member in members(datasets):
            member.boundaries_only = middle and self.host.masking
        self.host.built(self)
        return datasets


def asks_for_masking(dataset: Any) -> bool:
    """Whether the user's own GPTDatasetConfig asks for masked documents; both ways are answered by DocumentAttention.

    The stock dense mask of reset_attention_mask is quadratic, ignored by Transformer Engine and dropped by Bridge unless
    skip_getting_attention_mask_from_dataset=false; megatron-core 0.19's inter_document_masking makes batches that Bridge's get_batch
    does not read.
    """
    return bool(dataset.reset_attention_mask or getattr(dataset, "inter_document_masking", False))


def refusals(cfg: Any, config: ExactConfig) -> list[str]:
    """What of a Bridge run EXACT would weight wrongly, in words; empty is a run that can start.

    Args:
        cfg: ConfigContainer, finalized, of any version; a field that it lacks counts as unset.
        config: the settings.
    """
    from megatron.bridge.training.config import GPTDatasetConfig, MockGPTDatasetConfig

    model, dataset, dist = cfg.model, cfg.dataset, getattr(cfg, "dist", None)
    if not isinstance(dataset, GPTDatasetConfig):
        return [
            f"the dataset is {type(dataset).__name__}: EXACT weights the packed documents of GPTDatasetConfig, not samples for SFT, "
            "fine-tuning or multimodal models"
        ]
    cp = getattr(model, "context_parallel_size", 1) or 1
    evaluation_cp = getattr(dist, "eval_context_parallel_size", None) or cp
    restart = getattr(cfg, "inprocess_restart", None)
    masking = asks_for_masking(dataset)
    checks = [
        (
            isinstance(dataset, MockGPTDatasetConfig) or getattr(dataset, "mock", False),
            "mock data have no documents: give dataset.blend",
        ),
        (hasattr(dataset, "fim_data"), "fill-in-the-middle reorders documents: use GPTDatasetConfig"),
        (
            getattr(model, "mtp_num_layers", None),
            "multi-token prediction uses the weights of one depth for another: unset model.mtp_num_layers",
        ),
        (getattr(model, "teacher", None) is not None, "distillation has a loss of its own: train without a teacher"),
        (
            getattr(model, "restore_modelopt_state", False),
            "modelopt may have a loss of its own: unset model.restore_modelopt_state",
        ),
        (getattr(restart, "enabled", False), "restarts in the process are not hooked: unset inprocess_restart.enabled"),
        (
            getattr(dist, "use_decentralized_pg", False),
            "process groups are looked up in Megatron: unset dist.use_decentralized_pg",
        ),
        (
            dataset.dataloader_type not in ("single", "cyclic"),
            f"dataset.dataloader_type={dataset.dataloader_type}: use single or cyclic",
        ),
        (
            cp > 1 and dataset.eod_mask_loss and not getattr(model, "calculate_per_token_loss", False),
            f"model.context_parallel_size={cp} with dataset.eod_mask_loss: each rank would divide by its own count of targets. Set "
            "model.calculate_per_token_loss=true (and ddp.average_in_collective=false)",
        ),
        (
            not masking and not config.allow_unmasked_documents,
            "documents in a sample would see each other, and the weights would not measure what a target sees. Ask for masking with "
            f"{ASK}, or accept it with model.exact.allow_unmasked_documents=true",
        ),
        (
            masking and getattr(model, "overlap_moe_expert_parallel_comm", False),
            "DocumentAttention gets no boundaries from its schedule: unset model.overlap_moe_expert_parallel_comm",
        ),
        (
            masking and getattr(cfg.train, "iterations_to_skip", None),
            "skipping draws batches on some ranks only, and the boundaries would be another batch's: unset train.iterations_to_skip",
        ),
        (
            masking and evaluation_cp != cp,
            f"dist.eval_context_parallel_size={evaluation_cp}: DocumentAttention keeps the training's {cp}",
        ),
        (
            masking and not getattr(dataset, "skip_getting_attention_mask_from_dataset", True),
            "the dense mask would be built beside DocumentAttention: set dataset.skip_getting_attention_mask_from_dataset=true",
        ),
    ]
    return [text for refused, text in checks if refused] + unsupported_loss(model)
