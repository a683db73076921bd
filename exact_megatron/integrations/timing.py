"""Query/key timing in the training loops of the hosts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..config import TIMING_PREFIX, ExactError, QKTimingConfig
from ..qk_timing import QKTiming, refuse


def timed_train_step(
    train_step: Callable[..., Any],
    config: QKTimingConfig,
    progress: Callable[[dict[str, Any]], tuple[int, int]],
    say: Callable[[str], None],
) -> Callable[..., Any]:
    """Return a host's `train_step(..., model, optimizer, ...)` with the timing before each step.

    Args:
        train_step: of Megatron-LM (megatron/training/training.py) or Megatron-Bridge (megatron/bridge/training/train.py).
        config: with enabled=True.
        progress: from the call's arguments by name to (steps done, steps of the whole run).
        say: gets the line for the log, once, on every rank.

    Raises:
        ExactError: it takes no model or no optimizer.
    """
    signature = inspect.signature(train_step)
    for name in ("model", "optimizer"):
        if name not in signature.parameters:
            raise ExactError(f"{TIMING_PREFIX}enabled=true: this host's train_step takes no {name}")
    timing: list[QKTiming] = []

    @functools.wraps(train_step)
    def timed(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        step, total = progress(given)
        if timing and timing[0].optimizer is not given["optimizer"]:  # built anew
            timing.pop().remove()
        if not timing:
            timing.append(QKTiming(config, given["model"], given["optimizer"], total))
            say(timing[0].describe())
        timing[0].before_step(step)
        return train_step(*args, **kwargs)

    return timed


def bridge_progress(given: dict[str, Any]) -> tuple[int, int]:
    """`progress` for Megatron-Bridge's train_step(..., global_state, ...), read in 0.3.1 and 0.6.0."""
    state = given["global_state"]
    return state.train_state.step, state.cfg.train.train_iters


def before_nemo_step(config: QKTimingConfig, trainer: Any, model: Sequence[Any], say: Callable[[str], None]) -> float:
    """For NeMo (1 and 2), at the start of every training batch: the timing of the step to come; returns its factor.

    Args:
        config: with enabled=True.
        trainer: Lightning's, with one optimizer, NeMo's McoreDistributedOptimizer (nemo/core/optim/mcore_optim.py, read in 2.4.0);
            keeps the timing from step to step.
        model: this rank's chunks.
        say: gets the line for the log, once, on every rank.

    Raises:
        ExactError: another optimizer (distributed_fused_adam, O2's MainParamsOptimizerWrapper), or no trainer.max_steps.
    """
    timing = getattr(trainer, "exact_qk_timing", None)
    (wrapper,) = trainer.optimizers
    if not hasattr(wrapper, "mcore_optimizer"):
        refuse(f"{type(wrapper).__name__} is not Megatron's optimizer: set model.optim.name=mcore_distributed_optim")
    if timing is not None and timing.optimizer is not wrapper.mcore_optimizer:  # built anew
        timing.remove()
        timing = None
    if timing is None:
        if trainer.max_steps < 1:
            refuse(f"trainer.max_steps={trainer.max_steps}, and the phase is a share of the steps")
        timing = QKTiming(config, model, wrapper.mcore_optimizer, trainer.max_steps)
        trainer.exact_qk_timing = timing
        say(timing.describe())
    return timing.before_step(trainer.global_step)
