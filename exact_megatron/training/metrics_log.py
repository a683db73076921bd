"""What a run writes and says, on the first rank: metrics.jsonl, validation.jsonl, TensorBoard, the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ..allocation import WeightTable
from ..exposure import ExposureCensus
from ..utils.files import write_text, writing
from .config import RunConfig


class RunLog:
    """metrics.jsonl, validation.jsonl, TensorBoard and the terminal, on the first rank.

    Args:
        run: the settings; all is written under its exp_manager.exp_dir.
        step: optimizer steps done; what an earlier process wrote after it is dropped.
        table, census: of the training stream; None without weights.
        console: the terminal.
    """

    def __init__(
        self, run: RunConfig, step: int, table: WeightTable | None, census: ExposureCensus | None, console: Console
    ) -> None:
        self.run = run
        self.weighted = table is not None
        self.console = console
        self.run_dir = run_dir = Path(run.exp_manager.exp_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", run.to_yaml())
        self.metrics, _ = _truncated(run_dir / "metrics.jsonl", step)
        # The step of the last validation that is kept; None: there was none.
        self.validations, self.validated = _truncated(run_dir / "validation.jsonl", step)
        self.board = None
        if run.exp_manager.create_tensorboard_logger:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        if table is not None:
            assert census is not None
            facts = {"census": census.digest, "digest": table.digest, "buckets": table.rows()}
            write_text(run_dir / "weights.json", json.dumps(facts, indent=1))
        self.started = time.monotonic()
        self.first = step

    def step(self, line: dict[str, Any]) -> None:
        _append(self.metrics, line)
        if self.board:
            with writing(self.run_dir / "tensorboard"):
                for name, value in line.items():
                    if isinstance(value, (int, float)) and name not in ("step", "tokens", "targets"):
                        self.board.add_scalar(name, value, line["step"])
                for name, bucket in line["buckets"].items():
                    if bucket["targets"]:
                        self.board.add_scalar(f"bucket_loss/{name}", bucket["loss"], line["step"])
        run = self.run.trainer
        if line["step"] % run.log_every_n_steps == 0 or line["step"] == run.max_steps:
            rest = (time.monotonic() - self.started) / (line["step"] - self.first) * (run.max_steps - line["step"])
            exact = f"  exact {_digits(line['exact_loss'])}" if self.weighted else ""
            self.message(
                f"step {line['step']:>6}/{run.max_steps}  lm loss {_digits(line['lm_loss'])}{exact}  "
                f"grad norm {line['grad_norm'] or 0:.3f}  "
                f"lr {line['learning_rate']:.2e}  {line['tokens_per_s']:,.0f} tokens/s  {rest:,.0f} s left"
            )

    def validation(self, result: dict[str, Any]) -> None:
        _append(self.validations, result)
        if self.board:
            self.board.add_scalar("validation_loss", result["validation_loss"], result["step"])
        self.message(f"validation after step {result['step']}: lm loss {result['validation_loss']:.4f}")

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        for file in (self.metrics, self.validations):
            with writing(file.name):
                file.close()
        if self.board:
            self.board.close()
        sys.stderr.flush()


def _append(file: Any, line: dict[str, Any]) -> None:
    with writing(file.name):
        file.write(json.dumps(line) + "\n")
        file.flush()


def _digits(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"  # a step may have no supervised target


def _truncated(path: Path, step: int) -> tuple[Any, int | None]:
    """Open for appending, without the lines after `step` that a killed run wrote behind its last checkpoint; and the last line's step.

    Raises:
        ValueError: a line is damaged; names it. One without an end was cut off by a kill, and is dropped.
    """
    kept, last = list[str](), None
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode()
            found = json.loads(text)["step"]
            if type(found) is not int:
                raise TypeError(f"step {found!r}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}, is no record of a step ({error}): mend it, or move the file away to begin a new one"
            ) from None
        if found <= step:
            kept.append(text)
            last = found
    write_text(path, "".join(line + "\n" for line in kept))
    return path.open("a"), last
