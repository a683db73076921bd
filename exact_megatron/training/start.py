"""How a run starts: anew, from its own newest checkpoint, or from another run's weights. Needs no model and no process group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.tokenizer import UNKNOWN, Identity, refuse_other_tokenizer
from . import checkpoint_files, checkpoint_state
from .data_files import ACCEPT_TOKENIZER, Vocabulary
from .schema import RunConfig


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        checkpoint: the checkpoint; None: the run starts anew.
        resumes: the checkpoint is the run's own: optimizer, schedule and step come with its weights.
        step: optimizer steps done.
        damaged: newer checkpoints of the run that are damaged, with what is wrong with each.
        tokenizer: the data's; where that is unknown, the checkpoint's.
        remarks: what the user is to read.
    """

    checkpoint: Path | None = None
    resumes: bool = False
    step: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)
    tokenizer: Identity = UNKNOWN
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.checkpoint is None:
            return "anew"
        return f"resumes from {self.checkpoint}" if self.resumes else f"from the weights of {self.checkpoint}"


def find_start(run: RunConfig, vocabulary: Vocabulary | None, digests: Mapping[str, str | None]) -> Start:
    """Find what a run begins with, and compare it with the run. In a process group, call it on all ranks.

    Args:
        vocabulary: the data's; None: it cannot be read, and is not compared.
        digests: {"census": ..., "weights": ...} of the run's data, see ExactDatasetBuilder; what is not in it is not compared.

    Raises:
        FileNotFoundError: restore_from_path names no checkpoint.
        ValueError: the folder holds checkpoints that must not be resumed; no checkpoint is whole; the checkpoint is of another
            tokenizer, of other settings (resume) or of another model (restore_from_path).
    """
    folder = Path(run.exp_manager.exp_dir)
    if checkpoint_files.checkpoints(folder) and not run.exp_manager.resume_if_exists:
        raise ValueError(
            f"{folder} holds checkpoints, and exp_manager.resume_if_exists=false: choose another exp_manager.exp_dir or remove them"
        )
    path, damaged = checkpoint_files.newest_whole(folder)
    resumes = path is not None
    remarks = [
        f"WARNING: the checkpoint {broken} is damaged: {problem}. The run resumes from {path}, and keeps the damaged one as "
        f"{broken.name}.damaged"
        for broken, problem in damaged.items()
    ]
    if path is None and run.restore_from_path is not None:
        path = checkpoint_files.find_checkpoint(run.restore_from_path)
        checkpoint_files.refuse_damaged(path)
    state = checkpoint_state.read_state(path) if path else None
    known = dict(vocabulary.tokenizers) if vocabulary else {}
    tokenizer = next((i for i in known.values() if i.digest), UNKNOWN)
    if state is not None:
        theirs = checkpoint_state.tokenizer_of(state)
        known = {str(path): theirs, **known}
        tokenizer = tokenizer if tokenizer.digest else theirs
    if vocabulary is not None:
        remarks += refuse_other_tokenizer(known, ACCEPT_TOKENIZER, run.model.data.accept_other_tokenizer)
    if state is None:
        return Start(tokenizer=tokenizer, remarks=remarks)
    if resumes:
        checkpoint_state.refuse_changed_run(state, run, digests)
    else:
        positions = checkpoint_state.refuse_other_model(state, run, vocabulary.vocab_size if vocabulary else None)
        remarks += [f"{path} has other positions: {line}" for line in positions]
    return Start(path, resumes, state["step"] if resumes else 0, damaged, tokenizer, remarks)
