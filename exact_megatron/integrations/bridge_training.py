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

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state

from ..attention.supported import LOSS
from ..config import ExactConfig, ExactError
from ..dataset import ExactDatasetBuilder
from ..refusals import Row, is_above_1, is_set, reasons, refuse, unmasked
from .checkpoint_guard import ANEW
from .documents import feed_documents
from .hooks import replaced, takes_loss
from .host import Host, HostBuilder, Words, averages

WORDS = Words(
    hooked="data builder, loss and forward step of Megatron-Bridge's pretrain",
    anew=ANEW,
    ask="dataset.reset_attention_mask",
)

# What would be weighted wrongly, by the paths of ConfigContainer; `masking` is whether EXACT masks the documents.
OTHER_DATA = Row(
    "packs_documents dataset",
    lambda packs, _: not packs,
    lambda _, dataset: (
        f"the dataset is {type(dataset).__name__}: EXACT weights the packed documents of GPTDatasetConfig, not samples for SFT, "
        "fine-tuning or multimodal models"
    ),
)
ROWS = (
    Row("mock", bool, "mock data have no documents: give dataset.blend"),
    Row("dataset", lambda d: hasattr(d, "fim_data"), "fill-in-the-middle reorders documents: use GPTDatasetConfig"),
    Row(
        "model.mtp_num_layers",
        is_set,
        "multi-token prediction uses the weights of one depth for another: unset model.mtp_num_layers",
    ),
    Row("model.teacher", lambda t: t is not None, "distillation has a loss of its own: train without a teacher"),
    Row(
        "model.restore_modelopt_state",
        is_set,
        "modelopt may have a loss of its own: unset model.restore_modelopt_state",
    ),
    Row(
        "inprocess_restart.enabled",
        is_set,
        "restarts in the process are not hooked: unset inprocess_restart.enabled",
    ),
    Row(
        "dist.use_decentralized_pg",
        is_set,
        "process groups are looked up in Megatron: unset dist.use_decentralized_pg",
    ),
    Row(
        "dataset.dataloader_type",
        lambda kind: kind not in ("single", "cyclic"),
        lambda kind: f"dataset.dataloader_type={kind}: use single or cyclic",
    ),
    Row(
        "model.context_parallel_size dataset.eod_mask_loss model.calculate_per_token_loss",
        lambda cp, eod, per_token: is_above_1(cp) and eod and not per_token,
        lambda cp, *_: (
            f"model.context_parallel_size={cp} with dataset.eod_mask_loss: each rank would divide by its own count of targets. Set "
            "model.calculate_per_token_loss=true (and ddp.average_in_collective=false)"
        ),
    ),
    Row(
        "masking exact.allow_unmasked_documents",
        lambda masking, accepted: not masking and not accepted,
        unmasked(f"{WORDS.ask}=true"),
    ),
)
MASKED = (
    Row(
        "model.overlap_moe_expert_parallel_comm",
        is_set,
        "DocumentAttention gets no boundaries from its schedule: unset model.overlap_moe_expert_parallel_comm",
    ),
    Row(
        "train.iterations_to_skip",
        is_set,
        "skipping draws batches on some ranks only, and the boundaries would be another batch's: unset train.iterations_to_skip",
    ),
    Row(
        "dist.eval_context_parallel_size model.context_parallel_size",
        lambda evaluation, cp: (evaluation or cp or 1) != (cp or 1),
        lambda evaluation, cp: (
            f"dist.eval_context_parallel_size={evaluation}: DocumentAttention keeps the training's {cp or 1}"
        ),
    ),
    Row(
        "dataset.skip_getting_attention_mask_from_dataset",
        lambda skip: skip is False,
        "the dense mask would be built beside DocumentAttention: set dataset.skip_getting_attention_mask_from_dataset=true",
    ),
)


class MegatronBridge(Host):
    """EXACT in one run of `_pretrain`.

    Attributes:
        samples: training samples whose loss was weighted on this rank; 0 but on last pipeline stages.
    """

    def __init__(self, config: ExactConfig) -> None:
        super().__init__(config, WORDS)
        self.masking = False
        self.samples = 0
        self.state: Any = None
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
        refuse(refusals(self.state.cfg, self.config))
        dataset = self.state.cfg.dataset
        self.masking, self.seq_length = asks_for_masking(dataset), dataset.seq_length
        with ExitStack() as stack:
            call.arguments["forward_step_func"] = self._replace(stack, call.arguments["forward_step_func"])
            result = stock(*call.args, **call.kwargs)
            self.loss.check()
        if get_rank_safe() == get_world_size_safe() - 1:  # a last stage
            print(f"EXACT weighted {self.samples} training samples on this rank", flush=True)
        return result

    def _replace(self, stack: ExitStack, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Replace what the module's table says, and return the forward step that takes the place of the run's."""
        import megatron.bridge.data.utils as data
        from megatron.bridge.training import checkpointing, pretrain, train
        from megatron.bridge.training.losses import masked_next_token_loss
        from megatron.bridge.training.state import TrainState
        from megatron.bridge.training.utils.train_utils import prepare_forward_step_func
        from megatron.core.models.gpt.gpt_model import GPTModel

        self._weigh(masked_next_token_loss)  # before the data are built: ExactLoss.bind asks for it
        new = [
            (data, "BlendedMegatronDatasetBuilder", functools.partial(HostBuilder, self)),
            (TrainState, "state_dict", self._storing(TrainState.state_dict)),
            (TrainState, "load_state_dict", _keeping(TrainState.load_state_dict)),
            (GPTModel, "__init__", self.masking_init(GPTModel.__init__)),
        ]
        for module in (checkpointing, pretrain, train):  # which of them calls it by that name depends on the version
            if hasattr(module, "save_checkpoint"):
                new.append((module, "save_checkpoint", self.saving(module.save_checkpoint)))
        for replacement in new:
            stack.enter_context(replaced(*replacement))
        # Bridge's own way to hand its GlobalState to the functions that want it
        prepared = prepare_forward_step_func(forward_step, self.state)
        run = feed_documents(prepared, self.seq_length) if self.masking else prepared

        def step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            self.ready()
            output, loss_func = run(data_iterator, model, *args, **kwargs)
            if not isinstance(loss_func, functools.partial):
                raise ExactError(f"the forward step returned {loss_func!r}: EXACT weights a partial of a loss function")
            return output, functools.partial(self._weigh(loss_func.func), *loss_func.args, **loss_func.keywords)

        return step

    def _weigh(self, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        """The loss function with EXACT's weights, and a count of the samples that it sees."""
        if loss_func not in self._losses:
            parameters = list(inspect.signature(loss_func).parameters)
            if not takes_loss(parameters):
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

    def _storing(self, save: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(save)
        def state_dict(train_state: Any) -> dict[str, Any]:
            return save(train_state) | ({"exact": self.entry} if self.entry else {})

        return state_dict

    def reads_tokens(self, is_built_on_rank: Callable[[], bool]) -> bool:
        """Bridge gives middle stages no batch; all other ranks read their own."""
        return bool(
            parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            or parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        )

    def notes(self) -> list[str]:
        cfg = self.state.cfg
        uneven = cfg.dataset.eod_mask_loss and not cfg.model.calculate_per_token_loss
        return [averages("dataset.eod_mask_loss", "model.calculate_per_token_loss")] if uneven else []

    def built(self, builder: ExactDatasetBuilder) -> None:
        self.guard(getattr(self.state.train_state, "exact", None))
        super().built(builder)


def _keeping(load: Callable[..., None]) -> Callable[..., None]:
    """TrainState.load_state_dict that keeps the entry as an attribute: rank 0 reads the file and sends the object to the others."""

    @functools.wraps(load)
    def load_state_dict(train_state: Any, values: dict[str, Any]) -> None:
        load(train_state, values)
        train_state.exact = values.get("exact")

    return load_state_dict


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

    dataset = cfg.dataset
    known = {
        "exact": config,
        "packs_documents": isinstance(dataset, GPTDatasetConfig),
        "mock": isinstance(dataset, MockGPTDatasetConfig) or getattr(dataset, "mock", False),
    }
    other = reasons([OTHER_DATA], known, cfg)
    if other:  # whose settings are others, too
        return other
    masking = asks_for_masking(dataset)
    found = reasons(ROWS, {**known, "masking": masking}, cfg)
    return found + (reasons(MASKED, cfg) if masking else []) + reasons(LOSS, cfg.model)
