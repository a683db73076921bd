"""Megatron-LM: hooks EXACT into `megatron.training.pretrain` and the script that calls it, whose file stays as it is.

What is replaced while `pretrain` runs, and given back when it returns (paths in Megatron-LM; of a fork with a pretrain of its own,
its module):

    pretrain_gpt.py: loss_func                       ExactLoss.wrap of it, or of what forks.hook marked
    pretrain_gpt.py: BlendedMegatronDatasetBuilder   ExactDatasetBuilder
    pretrain_gpt.py: forward_step                    the same, with documents' boundaries for the model
    megatron/core/models/gpt/gpt_model.py: GPTModel  the same, with DocumentAttention, if EXACT masks the documents
    megatron/training/training.py: initialize_megatron  the same, and the run is refused for its arguments before a model is built
    megatron/training/checkpointing.py: check_checkpoint_args   also compares the weights
    megatron/training/training.py: save_checkpoint   the same, after a look at the weights of the batches so far
    megatron/training/training.py: training_log      the same, with interval means of buckets that some steps lack
    megatron/training/training.py: train_step        the same, with query/key timing, if model.qk_timing.enabled

A run that does not enable EXACT has check_checkpoint_args (and train_step) alone replaced, so that a checkpoint trained with
weights does not go on without them in silence. What EXACT would weight wrongly is refused on every rank before the first step, see
megatron_lm_arguments.py.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ..config import ExactConfig, ExactError, QKTimingConfig
from ..dataset import ExactDatasetBuilder
from ..loss import bucket_of
from ..refusals import refuse
from ..utils.failures import said_once
from .documents import feed_documents
from .forks import HOOK, MARKED, WAY_OUT, followed, hook, name_of
from .hooks import file_of, replaced, script_global, takes_loss
from .host import Host, HostBuilder, Words, averages, say
from .megatron_lm_arguments import ANEW, LEAST_CORE, OWN, core_version, plan_masking, refusals
from .settings import take_settings, take_timing
from .timing import timed_train_step

__all__ = ["MegatronLM", "from_command_line", "hook", "whole_intervals"]
WORDS = Words(
    hooked="loss_func, forward_step and BlendedMegatronDatasetBuilder",
    anew=ANEW,
    ask="--reset-attention-mask",
)
launched: MegatronLM | None = None  # by exact_megatron.launch, in this process


def from_command_line(pretrain: Callable[..., Any]) -> Callable[..., Any]:
    """For scripts that were patched (patches/), and for forks with a `pretrain` of their own: take EXACT's settings out of sys.argv,
    unless the launcher has done so, and hook `pretrain`.

    Call it before Megatron-LM parses its arguments.
    """
    if launched is not None:
        return launched.hook(pretrain)
    timing, rest = take_timing(sys.argv[1:], os.environ)
    config, sys.argv[1:] = take_settings(rest, os.environ)
    hooked = MegatronLM(config, timing).hook(pretrain)

    @functools.wraps(hooked)
    def trained(*args: Any, **kwargs: Any) -> Any:
        with said_once(os.path.basename(sys.argv[0])):
            return hooked(*args, **kwargs)

    return trained


class MegatronLM(Host):
    """EXACT in one Megatron-LM process.

    Attributes:
        hooked: whether the script's `pretrain` was called and its parts replaced.
    """

    def __init__(self, config: ExactConfig, timing: QKTimingConfig | None = None) -> None:
        super().__init__(config, WORDS)
        self.timing = timing or QKTimingConfig()
        self.hooked = False
        self._plan: tuple[str, str] | None = None

    def hook(self, pretrain: Callable[..., Any]) -> Callable[..., Any]:
        """Return `megatron.training.pretrain`, hooked.

        Raises:
            ExactError: it is hooked already, or has another shape than it had from core 0.13 on.
        """
        if getattr(pretrain, "exact", None) is not None:
            raise ExactError(
                "megatron.training.pretrain is hooked by EXACT already: use the launcher or a patch, not both"
            )
        signature = inspect.signature(pretrain)
        for name in ("train_valid_test_dataset_provider", "forward_step_func"):
            if name not in signature.parameters:
                raise ExactError(
                    f"megatron.training.pretrain takes no {name}: this Megatron-LM is not one that EXACT knows"
                )

        @functools.wraps(pretrain)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            with ExitStack() as stack:
                from megatron.training import checkpointing

                compared = self._comparing(checkpointing.check_checkpoint_args)
                stack.enter_context(replaced(checkpointing, "check_checkpoint_args", compared))
                self.hooked = True
                if self.timing.enabled:
                    step = _loop(pretrain, "train_step")
                    timed = timed_train_step(step["train_step"], self.timing, _progress, say)
                    stack.enter_context(replaced(step, "train_step", timed))
                if not self.config.enabled:
                    return pretrain(*args, **kwargs)
                call.arguments["forward_step_func"] = self._replace(
                    stack,
                    pretrain,
                    call.arguments["train_valid_test_dataset_provider"],
                    call.arguments["forward_step_func"],
                )
                try:
                    result = pretrain(*call.args, **call.kwargs)
                except SystemExit:  # Megatron-LM's way out of --exit-interval and the like
                    self.loss.check()
                    raise
                self.loss.check()
                return result

        hooked.exact = self  # type: ignore[attr-defined]
        return hooked

    @property
    def asked(self) -> str:
        """The setting that asks for a hooked run; empty where none does."""
        timing = "model.qk_timing.enabled=true" if self.timing.enabled else ""
        return "model.exact.enabled=true" if self.config.enabled else timing

    def unhooked(self, what: str) -> ExactError:
        """The error of a script that does something without having been hooked."""
        return ExactError(
            f"{what} never called megatron.training.pretrain: {self.asked}, but nothing was hooked. If it has a pretrain of its own: "
            f"pretrain = exact_megatron.integrations.megatron_lm.from_command_line(pretrain) ({WAY_OUT})"
        )

    def may_step(self) -> None:
        """Before any schedule of megatron.core.

        Raises:
            ExactError: nothing was hooked, or see `ready`.
        """
        if not self.hooked:
            raise self.unhooked(f"{os.path.basename(sys.argv[0])} is about to train and")
        if self.config.enabled:
            self.ready()

    def _replace(self, stack: ExitStack, pretrain: Any, provider: Any, forward_step: Any) -> Callable[..., Any]:
        """Replace what the module's table says, and return the forward step that takes the place of the script's."""
        from megatron.core.models.gpt.gpt_model import GPTModel

        loss_func = self._find(provider, forward_step)
        if MARKED:
            hooked = list(MARKED)
            losses: list[tuple[Any, str, Any]] = [(marked, "runs", self.loss.wrap(marked.runs)) for marked in MARKED]
        else:
            hooked = [self.loss.wrap(loss_func)]
            losses = [(inspect.unwrap(forward_step).__globals__, "loss_func", hooked[0])]
        logs, saves = _loop(pretrain, "training_log"), _loop(pretrain, "save_checkpoint")
        for owner, name, new in (
            *losses,
            (
                inspect.unwrap(provider).__globals__,
                "BlendedMegatronDatasetBuilder",
                functools.partial(HostBuilder, self),
            ),
            (GPTModel, "__init__", self.masking_init(GPTModel.__init__)),
            (logs, "training_log", whole_intervals(logs["training_log"])),
            (saves, "save_checkpoint", self.saving(saves["save_checkpoint"])),
        ):
            stack.enter_context(replaced(owner, name, new))
        starts = _loop(pretrain, "initialize_megatron")
        stack.enter_context(replaced(starts, "initialize_megatron", self._planning(starts["initialize_megatron"])))
        self.words = dataclasses.replace(WORDS, hooked=f"{WORDS.hooked} of {file_of(loss_func)}")
        fed: list[Callable[..., Any]] = []

        @functools.wraps(forward_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            if not fed:
                self.ready()
                fed.append(feed_documents(forward_step, self.seq_length) if self.masking else forward_step)
            output, returned = fed[0](*args, **kwargs)
            return output, followed(returned, hooked, self.loss, forward_step)

        return step

    def _planning(self, initialize: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(initialize)
        def initialized(*args: Any, **kwargs: Any) -> Any:
            result = initialize(*args, **kwargs)
            self.plan()
            return result

        return initialized

    def _find(self, provider: Any, forward_step: Any) -> Callable[..., Any]:
        """The script's loss function; raises ExactError for a script that cannot be hooked, see hooks.py."""
        import megatron.core
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

        if core_version() < LEAST_CORE:
            raise ExactError(
                f"Megatron-LM with core {megatron.core.__version__}: its loss_func reduces what it reports, which the hook does not "
                f"follow. Use core {'.'.join(map(str, LEAST_CORE))} or later"
            )
        loss_func = (
            MARKED[0] if MARKED else self._global(forward_step, "loss_func", f"Decorate its loss function with {HOOK}")
        )
        builder = self._global(provider, "BlendedMegatronDatasetBuilder", "Build its data there with that class")
        if builder is not BlendedMegatronDatasetBuilder:
            raise ExactError(
                f"BlendedMegatronDatasetBuilder in {file_of(provider)} is {builder!r}: not Megatron's, or hooked already"
            )
        for function in MARKED or [loss_func]:
            parameters = list(inspect.signature(function).parameters)
            if not takes_loss(parameters):
                raise ExactError(
                    f"the loss function {name_of(function)} takes {parameters}, not (loss_mask, output_tensor, ...)"
                )
        return loss_func  # type: ignore[no-any-return]

    def _global(self, function: Any, name: str, remedy: str) -> Any:
        try:
            return script_global(function, name)
        except ExactError as error:
            raise ExactError(f"{error}. {remedy} ({WAY_OUT})") from error

    def _comparing(self, check: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(check)
        def compared(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
            self.guard(getattr(checkpoint_args, "exact", None))
            return check(checkpoint_args, *args, **kwargs)

        return compared

    def plan(self) -> tuple[str, str]:
        """(who masks the documents, one line that says so), decided once, when Megatron-LM has parsed its arguments.

        Raises:
            ValueError: the run is refused; every reason, one a line.
        """
        if self._plan is None:
            args = _arguments()
            refuse(refusals(args, self.config))
            self.config.validated(args.seq_length)
            self._plan = plan_masking(args, self.config)
            if self._plan[0] == OWN:  # get_batch sizes its broadcasts by these
                args.create_attention_mask_in_dataloader = args.reset_attention_mask = False
                if hasattr(args, "dataloader_inter_document_masking"):
                    args.dataloader_inter_document_masking = False
        return self._plan

    @property
    def masking(self) -> bool:  # type: ignore[override]
        return self.plan()[0] == OWN

    @property
    def seq_length(self) -> int:  # type: ignore[override]
        return int(_arguments().seq_length)

    def masking_line(self) -> str:
        return self.plan()[1]

    def notes(self) -> list[str]:
        args = _arguments()
        eod, per_token = (getattr(args, name, False) for name in ("eod_mask_loss", "calculate_per_token_loss"))
        return [averages("--eod-mask-loss", "--calculate-per-token-loss")] if eod and not per_token else []

    def built(self, builder: ExactDatasetBuilder) -> None:
        super().built(builder)
        _arguments().exact = self.entry  # Megatron-LM stores its arguments in every checkpoint


def whole_intervals(training_log: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron-LM's `training_log(loss_dict, total_loss_dict, ..., iteration, ..., skipped_iter, ...)` for losses of buckets.

    A step without a target in a bucket has no mean for it (0/0), and the stock sum over a log interval would be NaN from there on.
    Here the interval's mean is that of the steps that have one, and an interval without any prints none. A step without one is NaN in
    TensorBoard, which leaves a gap.

    Raises:
        ExactError: its arguments are others.
    """
    signature = inspect.signature(training_log)
    names = ("loss_dict", "total_loss_dict", "iteration", "skipped_iter")
    if not set(names) <= set(signature.parameters):
        raise ExactError(f"megatron.training.training.training_log takes {list(signature.parameters)}, not {names}")
    sums: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    steps = 0

    @functools.wraps(training_log)
    def logged(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        call = signature.bind(*args, **kwargs)
        losses, totals, iteration, skipped = (call.arguments[name] for name in names)
        buckets = {key: value for key, value in losses.items() if bucket_of(key)}
        if skipped:  # not summed, and a bucket without targets would be counted as a NaN of the model
            losses, buckets = {key: value for key, value in losses.items() if key not in buckets}, {}
        steps += not skipped
        for key, value in buckets.items():  # no .item(): the host must not wait for the device
            sums[key] = sums.get(key, 0) + value.nan_to_num(0.0)
            counts[key] = counts.get(key, 0) + ~value.isnan()
        first = call.arguments.get("is_first_iteration", False)  # printed, and counted again in the interval after it
        printed = first or iteration % _arguments().log_interval == 0
        if printed:
            for key in sums:
                here = buckets.get(key)
                if here is not None and bool(here.isnan()):
                    losses = {name: loss for name, loss in losses.items() if name != key}
                    here = None
                totals.pop(key, None)
                if bool(counts[key]):  # else no step had a target, and nothing is printed
                    totals[key] = sums[key] / counts[key] * steps - (0 if here is None else here)
        call.arguments["loss_dict"] = losses
        result = training_log(*call.args, **call.kwargs)
        if printed and not first:
            sums.clear()
            counts.clear()
            steps = 0
        return result

    return logged


def _loop(pretrain: Any, name: str) -> dict[str, Any]:
    """The globals of that name: of the module that `pretrain` is from, else Megatron-LM's."""
    from megatron.training import training

    own: dict[str, Any] = getattr(inspect.unwrap(pretrain), "__globals__", {})
    return own if name in own else vars(training)


def _progress(_: dict[str, Any]) -> tuple[int, int]:
    args = _arguments()
    return args.curr_iteration, args.train_iters


def _arguments() -> Any:
    from megatron.training import get_args

    return get_args()
