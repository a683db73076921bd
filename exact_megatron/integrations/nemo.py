"""NeMo: `model.exact.*` for the YAML-configured MegatronGPTModel (nemo_toolkit up to 2.5.0; recipes: nemo_recipes.py).

`install()` is the one call. It makes every MegatronGPTModel whose configuration has `model.exact.enabled=true` an
ExactGPTModel, before its constructor runs; all others stay NeMo's. With this package installed, the Hydra plugin (hydra_plugins/)
calls it for scripts that import MegatronGPTModel, such as NeMo's own megatron_gpt_pretraining.py.

What NeMo 2.4.0 does with a weighted loss_mask, and what is done here (nemo/collections/nlp/models/language_modeling/
megatron_gpt_model.py):

* :1245 divides by the sum of loss_mask, so that weights cancel: here by the whole number of targets.
* :1628 averages averages of micro-batches: the gradient here is divided once, by the count of the global batch.
* :1468 multiplies by the context-parallel size, and megatron-core does so again from 0.12 on (core/pipeline_parallel/
  schedules.py 0.13.1:313), so that gradients are cp times too large, and clipping cuts: here once.
* `reduced_train_loss` and `val_loss` stay NeMo's own unweighted numbers, computed by NeMo.

Imports NeMo, which takes seconds; refuses a nemo_toolkit without this model.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import nemo
import torch
from omegaconf import OmegaConf, open_dict

from ..config import ExactConfig, ExactError, QKTimingConfig
from ..loss import gpt_loss
from ..refusals import reasons, refuse
from .checkpoint_guard import refuse_unweighted
from .documents import MaskAttention, feed_documents
from .hooks import replaced
from .host import Host, HostBuilder, Words, say
from .loss_sums import LossSums
from .megatron_lm_arguments import core_version
from .nemo_arguments import BUILT, check_version, masked, refusals, said, settings
from .settings import take_timing
from .timing import before_nemo_step

check_version(nemo.__version__)

import nemo.collections.nlp.models.language_modeling.megatron_gpt_model as host  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from nemo.collections.nlp.models.language_modeling.megatron_base_model import MegatronBaseModel  # noqa: E402

WORDS = Words(
    hooked="data, loss and attention of MegatronGPTModel",
    anew="start anew with another exp_manager.exp_dir",
    ask="model.data.reset_attention_mask",
    masked="masked by DocumentAttention, in place of the dense masks of model.data.reset_attention_mask",
)


def install() -> None:
    """Hook EXACT into NeMo's Megatron models; calling it again does nothing.

    Afterwards a model whose configuration enables EXACT raises ValueError or ExactError where it is built, if EXACT cannot
    weight it, and one that does not enable EXACT raises ValueError where it resumes a weighted run. What checkpoints and .nemo
    files say of the model names NeMo's class and no `model.exact`, so that it loads for inference and without this package.
    """
    gpt, base = host.MegatronGPTModel, MegatronBaseModel
    if getattr(gpt.__init__, "exact", False):
        return
    built = _gpt_built(gpt.__init__)
    built.exact = True  # type: ignore[attr-defined]
    gpt.__init__, base.__init__ = built, _any_built(base.__init__)
    gpt.fwd_bwd_step, gpt.on_load_checkpoint = _stepped(gpt.fwd_bwd_step), _loaded(gpt.on_load_checkpoint)


def _gpt_built(build: Callable[..., None]) -> Callable[..., None]:
    """MegatronGPTModel.__init__ that makes an ExactGPTModel of the model where its configuration says so."""
    gpt = host.MegatronGPTModel

    @functools.wraps(build)
    def built(model: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
        config, timing = _settings(cfg), _timing(cfg)
        if timing.enabled and type(model) is not gpt:
            raise ExactError(
                f"model.qk_timing.enabled=true, but {type(model).__name__} takes its steps in a way of its own. Set it to false"
            )
        if timing.enabled:
            cfg = copy.deepcopy(cfg)
            with open_dict(cfg):
                cfg.pop("qk_timing", None)
        if config.enabled and type(model) is gpt:
            refuse(refusals(cfg, config))
            cfg = copy.deepcopy(cfg)
            with open_dict(cfg):
                cfg.pop("exact", None)
                cfg.setdefault("target", f"{gpt.__module__}.{gpt.__name__}")
            model.__class__ = ExactGPTModel
            model.exact = _Run(config)
        build(model, cfg, *args, **kwargs)
        model.exact_settings, model.qk_timing = config, timing

    return built


def _any_built(build: Callable[..., None]) -> Callable[..., None]:
    """MegatronBaseModel.__init__ that refuses settings for models that are not hooked."""

    @functools.wraps(build)
    def built(model: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, host.MegatronGPTModel) and _timing(cfg).enabled:
            raise ExactError(
                f"model.qk_timing.enabled=true, but {type(model).__name__} is no MegatronGPTModel. Set it to false"
            )
        if not isinstance(model, ExactGPTModel) and _settings(cfg).enabled:
            raise ExactError(
                f"model.exact.enabled=true, but EXACT weights MegatronGPTModel and not {type(model).__name__}, which has data or a "
                "loss of its own. Set model.exact.enabled=false"
            )
        build(model, cfg, *args, **kwargs)

    return built


def _stepped(step: Callable[..., Any]) -> Callable[..., Any]:
    """fwd_bwd_step with query/key timing. Not training_step: Lightning reads that one's arguments."""

    @functools.wraps(step)
    def stepped(model: Any, dataloader_iter: Any, forward_only: bool, *args: Any, **kwargs: Any) -> Any:
        timing = getattr(model, "qk_timing", None)  # none where the model is older than this hook
        if timing is not None and timing.enabled and not forward_only:
            before_nemo_step(timing, model.trainer, model.get_model_module_list(), say)
        return step(model, dataloader_iter, forward_only, *args, **kwargs)

    return stepped


def _loaded(load: Callable[..., None]) -> Callable[..., None]:
    """on_load_checkpoint that does not let training go on without the weights of a checkpoint. Evaluation and conversion load
    weighted checkpoints too, and subclasses fine-tune."""

    @functools.wraps(load)
    def loaded(model: Any, checkpoint: dict[str, Any]) -> None:
        trainer = model._trainer
        if type(model) is host.MegatronGPTModel and trainer is not None and trainer.state.fn == "fit":
            config = getattr(model, "exact_settings", None) or settings(None)  # a model older than this hook
            refuse_unweighted(checkpoint.get("exact"), config, WORDS.anew)
        load(model, checkpoint)

    return loaded


def _settings(cfg: Any) -> ExactConfig:
    """Read model.exact, and write what was not said into it."""
    block: Any = OmegaConf.to_container(cfg.exact, resolve=True) if cfg.get("exact") else None
    config = settings(block)
    if block is not None:
        with open_dict(cfg):
            cfg.exact = config.to_dict()
    return config


def _timing(cfg: Any) -> QKTimingConfig:
    """Read model.qk_timing, and write what was not said into it."""
    block: Any = OmegaConf.to_container(cfg.qk_timing, resolve=True) if cfg.get("qk_timing") else None
    file = take_timing([], os.environ)[0]
    timing = QKTimingConfig.from_mapping({**file.to_dict(), **said(block)})
    if block is not None:
        with open_dict(cfg):
            cfg.qk_timing = timing.to_dict()
    return timing


class _Run(Host):
    """EXACT in one model, and what is summed up for the log."""

    def __init__(self, config: ExactConfig) -> None:
        super().__init__(config, WORDS)
        self.weighted_loss = self.loss.wrap(gpt_loss)
        self.divisor: torch.Tensor | float = 1.0
        self.latest: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None
        self.training, self.validation = LossSums(self.loss), LossSums(self.loss)

    def reads_tokens(self, is_built_on_rank: Callable[[], bool]) -> bool:
        return True


class ExactGPTModel(host.MegatronGPTModel):
    """MegatronGPTModel on weighted data; see the module. Built by MegatronGPTModel(...) after `install()`."""

    exact: _Run

    def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
        refuse(reasons(BUILT, self.transformer_config))
        self.exact.masking, self.exact.seq_length = masked(self.cfg), self.cfg.data.seq_length
        build = functools.partial(super().model_provider_func, pre_process, post_process)
        return self.exact.build_masked(build, MaskAttention)

    def build_train_valid_test_datasets(self) -> Any:
        builder = functools.partial(HostBuilder, self.exact)
        with replaced(vars(host), "BlendedMegatronDatasetBuilder", builder):
            return super().build_train_valid_test_datasets()

    def get_batch_on_this_context_parallel_rank(self, batch: dict[str, Any]) -> dict[str, Any]:
        weights = batch.get("loss_mask")
        batch = super().get_batch_on_this_context_parallel_rank(batch)
        if weights is not None:
            batch["num_valid_tokens_in_ub"] = (weights != 0).to(weights.dtype).sum()
        return batch

    def loss_func(self, loss_mask: torch.Tensor, num_valid_tokens_in_ub: Any, output_tensor: torch.Tensor) -> Any:
        """NeMo's unweighted loss, for the log; the weighted one is left to `get_forward_output_and_loss_func`."""
        total, _, report = self.exact.weighted_loss(loss_mask, output_tensor)
        self.exact.latest = total, report
        mask = (loss_mask != 0).to(loss_mask.dtype)
        return super().loss_func(mask, num_valid_tokens_in_ub, output_tensor.detach())

    def get_forward_output_and_loss_func(
        self, validation_step: bool = False, tuning: bool = False
    ) -> Callable[..., Any]:
        stock, run = super().get_forward_output_and_loss_func(validation_step, tuning), self.exact
        cp = 1 if core_version() >= (0, 12) else parallel_state.get_context_parallel_world_size()

        def forward_step(data_iterator: Any, model: Any, *args: Any) -> Any:
            output, loss_func = stock(data_iterator, model, *args)

            def weighted(output_tensor: torch.Tensor) -> Any:
                run.latest = None
                _, logged = loss_func(output_tensor)
                if run.latest is None:
                    raise ExactError(
                        "NeMo's step did not call MegatronGPTModel.loss_func: this is not a NeMo that EXACT knows"
                    )
                total, report = run.latest
                (run.validation if validation_step else run.training).add(report)
                return total / run.divisor * cp, logged

            return output, weighted

        return feed_documents(forward_step, run.seq_length, in_mask=True) if run.masking else forward_step

    def fwd_bwd_step(self, dataloader_iter: Any, forward_only: bool, first_val_step: Any = None) -> Any:
        run = self.exact
        batches = map(lambda drawn: drawn[0] if isinstance(drawn, tuple) else drawn, dataloader_iter)
        if forward_only:
            return super().fwd_bwd_step(batches, forward_only, first_val_step)
        # One divisor for the global batch: its micro-batches are read ahead, and their targets counted.
        ahead = list(itertools.islice(batches, host.get_num_microbatches()))
        if len(ahead) < host.get_num_microbatches():
            raise StopIteration  # ends Lightning's epoch; from within the schedule, later stages would wait for ever
        count = torch.tensor(sum(int(batch["loss_mask"].count_nonzero()) for batch in ahead)).cuda()
        torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group())
        shares = len(ahead) * parallel_state.get_data_parallel_world_size()
        run.divisor = (count.clamp(min=1).double() / shares).float()
        loss = super().fwd_bwd_step(iter(ahead), forward_only, first_val_step)
        run.divisor = 1.0
        for name, value in run.training.reduced().items():
            self.log(name, value, rank_zero_only=True, batch_size=1)
        return loss

    def on_validation_epoch_end(self) -> Any:
        for name, value in self.exact.validation.reduced().items():
            self.log(f"val {name}", value, rank_zero_only=True, batch_size=1)
        return super().on_validation_epoch_end()

    def on_train_end(self) -> None:
        self.exact.loss.check()
        super().on_train_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.exact.loss.check()
        super().on_save_checkpoint(checkpoint)
        checkpoint["exact"] = self.exact.entry

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.exact.guard(checkpoint.get("exact"))
        super().on_load_checkpoint(checkpoint)
