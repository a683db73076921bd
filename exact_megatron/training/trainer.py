"""The training loop of the native runner: megatron.core's schedules, DDP, optimizer and checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from rich.console import Console

from ..allocation import WeightTable
from ..config import ExactConfig, ExactError
from ..dataset import from_rank_0, members
from ..loss import EXACT_LOSS, LM_LOSS, ExactLoss, bucket_of, gpt_loss
from ..qk_timing import QKTiming
from . import checkpoint, checkpoint_files, checkpoint_state
from .auxiliary_losses import read_auxiliary_losses
from .data import STOP_SIGNALS, build_datasets, build_loader, get_batch
from .data_files import Vocabulary, read_vocabulary
from .lengths import check_lengths
from .memory_record import record_memory
from .metrics_log import RunLog
from .model import build_model, build_optimizer
from .process_groups import init_distributed, runs_on_cpu, seed_all, shutdown
from .processes import end_forks_with_this_process
from .schema import RunConfig
from .start import find_start

__all__ = ["MeanLoss", "Trainer", "init_distributed", "runs_on_cpu", "shutdown"]


class MeanLoss(NamedTuple):
    """A loss in nats a target, None without `targets`."""

    loss: float | None
    targets: int

    @classmethod
    def of(cls, total: float, targets: int) -> MeanLoss:
        return cls(total / targets if targets else None, targets)


class Trainer:
    """One run. Build it on every rank, then call `fit`.

    Attributes:
        start: what it begins with.
        step: optimizer steps done.
        model, optimizer, scheduler: megatron.core's.
        builder: the dataset builder, with the census and the weight table.
    """

    def __init__(self, run: RunConfig, progress: bool = True) -> None:
        self.run = run
        end_forks_with_this_process()
        self.device = init_distributed(run)
        self.is_first = torch.distributed.get_rank() == 0
        self.console = Console(stderr=True, quiet=not (self.is_first and progress))
        self.run_dir = Path(run.exp_manager.exp_dir)
        self.vocabulary = from_rank_0(partial(_look_at_data, run))
        self.loss = ExactLoss(run.model.exact)
        self.loss_func = self.loss.wrap(gpt_loss) if run.model.exact.enabled else gpt_loss
        (self.train_data, self.valid_data, _), self.builder = build_datasets(run, self.vocabulary, self.loss)
        # Validation reports unweighted losses in every log2 bucket, in both arms of a comparison.
        self.measure = ExactLoss(ExactConfig(enabled=True))
        self.measure_func = self.measure.wrap(gpt_loss)
        if self.valid_data is not None:
            table = WeightTable.measuring(run.model.data.seq_length)
            self.measure.bind(table)
            for member in members([self.valid_data]):
                member.attach(table, self.measure)

        self.start = find_start(run, self.vocabulary, self.builder.digests)
        self.step = self.start.step
        for remark in self.start.remarks:
            self.console.print(remark, highlight=False, soft_wrap=True)
        self.model = build_model(run, self.vocabulary.vocab_size, self.device)
        self.optimizer, self.scheduler = build_optimizer(run, self.model)
        self._load()
        self._signalled = False  # this rank got a stop signal
        self._stop = False  # all ranks know that one of them did
        self.timing: QKTiming | None = None
        if run.model.qk_timing.enabled:
            self.timing = QKTiming(run.model.qk_timing, self.model, self.optimizer, run.trainer.max_steps)
            self.console.print(self.timing.describe(), highlight=False, soft_wrap=True)

    @property
    def table(self) -> WeightTable | None:
        return self.builder.table

    def state(self) -> dict[str, Any]:
        digests, tokenizer = self.builder.digests, self.start.tokenizer
        return checkpoint_state.describe(
            self.run, self.step, self.vocabulary.vocab_size, **digests, tokenizer=tokenizer
        )

    def _load(self) -> None:
        """Load what `start` names into model, optimizer and schedule."""
        path = self.start.checkpoint
        if path is None:
            return
        if self.start.resumes:
            checkpoint.load(path, self.model, self.optimizer, self.scheduler)
            self.console.print(f"resumed from {path}", highlight=False, soft_wrap=True)
        else:
            checkpoint.load_weights(path, self.model)
            self.optimizer.reload_model_params()
            self.console.print(f"started from the weights of {path}", highlight=False, soft_wrap=True)

    def save(self) -> Path:
        params = self.run.exp_manager.checkpoint_callback_params
        return checkpoint.save(
            self.run_dir, self.step, self.model, self.optimizer, self.scheduler, self.state(), params.save_top_k
        )

    def forward_step(self, loss_func: Any, iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        batch, packed = get_batch(iterator, self.device, self.run.model.data.document_masking)
        # multi-token prediction weights the targets of its depths by it
        mask = {"loss_mask": batch["loss_mask"]} if self.run.model.mtp_num_layers else {}
        losses = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed, **mask
        )
        return losses, partial(loss_func, batch["loss_mask"])

    def run_schedule(self, loader: Iterator[Any], loss_func: Any, forward_only: bool) -> dict[str, MeanLoss]:
        """One global batch through megatron.core's schedule; returns the losses over all ranks, by name."""
        m = self.run.model
        micro_batches = [next(loader) for _ in range(self.run.num_microbatches)]
        iterators: list[Iterator[Any]] = [iter(micro_batches) for _ in self.model]
        reports = get_forward_backward_func()(
            forward_step_func=partial(self.forward_step, loss_func),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=self.run.num_microbatches,
            seq_length=m.data.seq_length,
            micro_batch_size=m.micro_batch_size,
            decoder_seq_length=m.data.seq_length,
            forward_only=forward_only,
        )
        return self._reduce(reports, loss_func)

    def _reduce(self, reports: list[dict[str, torch.Tensor]], loss_func: Any) -> dict[str, MeanLoss]:
        """Means of the reported losses over micro-batches and ranks; also agrees on stopping. One all-reduce."""
        hook: ExactLoss | None = getattr(loss_func, "exact_loss", None)
        names = (hook.names if hook is not None else []) or [LM_LOSS]
        sums = torch.zeros(2 * len(names) + 1, dtype=torch.float64, device=self.device)
        if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
            parts = [torch.stack([report[name].double() for name in names]) for report in reports]
            sums[:-1] = torch.stack(parts).sum(0).flatten()
        sums[-1] = float(self._signalled)
        torch.distributed.all_reduce(sums)
        values = sums.tolist()
        self._stop = values[-1] > 0
        pairs = zip(values[:-1:2], values[1:-1:2])
        return {name: MeanLoss.of(total, int(count)) for name, (total, count) in zip(names, pairs)}

    def train_step(self, loader: Iterator[Any]) -> dict[str, Any]:
        """One optimizer step; returns the line for metrics.jsonl.

        Raises:
            ExactError: the loss or the gradient is not finite, before anything is saved.
        """
        m = self.run.model
        if m.hidden_dropout or m.attention_dropout:  # a resumed run draws the same masks
            seed_all(m.seed + self.step)
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        report = self.run_schedule(loader, self.loss_func, forward_only=False)
        self.loss.check()
        _refuse_not_finite("loss", report[LM_LOSS].loss, self.step + 1)
        if self.timing is not None:
            self.timing.before_step(self.step)
        _, grad_norm, _ = self.optimizer.step()
        _refuse_not_finite("gradient's norm", grad_norm, self.step + 1)
        self.scheduler.step(1)  # after the step, as in Megatron-LM: the first step of a warm-up has a rate of 0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self.step += 1
        line = {
            "step": self.step,
            "lm_loss": report[LM_LOSS].loss,
            "exact_loss": report.get(EXACT_LOSS, report[LM_LOSS]).loss,
            "grad_norm": float(grad_norm) if grad_norm is not None else None,
            "learning_rate": learning_rate,
            "tokens": self.step * self.run.tokens_per_step,
            "targets": report[LM_LOSS].targets,
            "tokens_per_s": self.run.tokens_per_step / seconds,
            "buckets": _buckets(report),
            **read_auxiliary_losses(self.run, self.device),
        }
        if self.timing is not None:
            line["qk_factor"] = self.timing.factor
        return line

    @torch.no_grad()
    def validate(self) -> dict[str, Any] | None:
        """Unweighted loss on the validation data, whole and in every log2 bucket; the same samples at every call.

        Returns:
            The line for validation.jsonl; None where a stop signal came before its last batch.
        """
        loader = iter(build_loader(self.run, self.valid_data, self.vocabulary, consumed=0))
        for chunk in self.model:
            chunk.eval()
        total: dict[str, list[Any]] = {}
        for left in reversed(range(self.run.trainer.limit_val_batches)):
            report = self.run_schedule(loader, self.measure_func, forward_only=True)
            for name, mean in report.items():
                entry = total.setdefault(name, [0.0, 0])
                entry[0] += mean.loss * mean.targets if mean.loss is not None else 0.0
                entry[1] += mean.targets
            if self._stop and left:
                return None
        self.measure.check()
        merged = {name: MeanLoss.of(loss, count) for name, (loss, count) in total.items()}
        return {"step": self.step, "validation_loss": merged[LM_LOSS].loss, "buckets": _buckets(merged)}

    def fit(self) -> str:
        """Train to trainer.max_steps, or until a stop signal; returns "finished" or "stopped".

        A step is saved before it is validated. A run that was ended between the two validates first when it goes on.
        """
        run = self.run
        trainer = self.run.trainer
        params = run.exp_manager.checkpoint_callback_params
        if self.is_first:
            for path in self.start.damaged:
                checkpoint_files.set_aside(path)
        log = RunLog(run, self.step, self.table, self.builder.census, self.console) if self.is_first else None
        loader = iter(build_loader(run, self.train_data, self.vocabulary, self.step * run.model.global_batch_size))
        # A signal that whoever started this rank has it ignore stays ignored, by the checkpoint's helper processes too.
        heard = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        previous = {s: signal.signal(s, self._on_signal) for s in heard}
        saved = self.step
        first = self.step + 1
        try:
            done = self._validated_before(log)
            while True:
                if self._validation_due() and not done and not self._stop:
                    result = self.validate()
                    done = result is not None
                    if log and result is not None:
                        log.validation(result)
                if self._stop and (self.step < trainer.max_steps or (self._validation_due() and not done)):
                    if saved != self.step:
                        saved = self._save(log)
                    if log:
                        log.message(f"stopped by a signal after step {saved}; the same command goes on from there")
                    return "stopped"
                if self.step >= trainer.max_steps:
                    return "finished"
                line = self.train_step(loader)
                done = False
                if log:
                    log.step(line)
                last = self.step == trainer.max_steps
                if last or self._stop or self.step == first:
                    memory = self.run_dir / "memory.json"
                    record_memory(
                        memory, self.step, self.vocabulary.vocab_size, self.model, self.optimizer, self.device
                    )
                every = params.every_n_train_steps
                if self._stop or (last and params.save_last) or (every and self.step % every == 0):
                    saved = self._save(log)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if log:
                log.close()

    def _save(self, log: RunLog | None) -> int:
        path = self.save()
        if log:
            log.message(f"saved {path}")
        return self.step

    def _validation_due(self) -> bool:
        """Whether the step that is done is one after which the run validates."""
        trainer = self.run.trainer
        regular = trainer.val_check_interval and self.step % trainer.val_check_interval == 0
        return self.valid_data is not None and self.step > 0 and bool(self.step == trainer.max_steps or regular)

    def _validated_before(self, log: RunLog | None) -> bool:
        """Whether validation.jsonl has the step that the run goes on from, on all ranks."""
        found = [log is not None and log.validated == self.step]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signalled and number == signal.SIGINT:  # a second Ctrl-C does not wait for the checkpoint
            raise KeyboardInterrupt
        self._signalled = True


def _look_at_data(run: RunConfig) -> Vocabulary:
    vocabulary = read_vocabulary(run)
    check_lengths(run)
    return vocabulary


def _refuse_not_finite(what: str, value: float | None, step: int) -> None:
    if value is not None and not math.isfinite(value):
        raise ExactError(
            f"the {what} of step {step} is {value}: the run ends here, the last checkpoint is from before. Lower the learning rate or "
            "look at the data"
        )


def _buckets(report: dict[str, MeanLoss]) -> dict[str, dict[str, Any]]:
    """As metrics.jsonl and validation.jsonl have it: {"1024-2047": {"loss", "targets"}}."""
    return {part: mean._asdict() for name, mean in report.items() if (part := bucket_of(name))}
