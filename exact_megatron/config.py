"""The configuration schemas `model.exact` and `model.qk_timing`, shared by every host. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

PREFIX = "model.exact."
TIMING_PREFIX = "model.qk_timing."


class ExactError(RuntimeError):
    """A run that cannot go on, in words for the user; other RuntimeErrors (torch's, NCCL's) keep their traceback."""


Block = TypeVar("Block", bound="_Block")


class _Block:
    """What the two blocks of settings have in common; they are frozen dataclasses."""

    prefix: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_mapping(cls: type[Block], mapping: Mapping[str, Any] | None) -> Block:
        """Build from a block of YAML, JSON or a checkpoint.

        Raises:
            ValueError: an unknown key, named with the nearest known one, or a value of the wrong kind.
        """
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in mapping or {}:
            if key not in known:
                raise ValueError(unknown_key(f"{cls.prefix}{key}", [cls.prefix + k for k in known]))
        return cls(**dict(mapping or {}))

    @classmethod
    def from_overrides(cls: type[Block], overrides: Iterable[str], base: Mapping[str, Any] | None = None) -> Block:
        """Build from `model.exact.key=value` strings (a leading + or ++, as Hydra has it, is accepted) over `base`.

        Raises:
            ValueError: an override that is not of this form, an unknown key or a value of the wrong kind.
        """
        values = dict(base or {})
        for override in overrides:
            key, equals, text = override.lstrip("+").partition("=")
            if not equals or not key.startswith(cls.prefix):
                raise ValueError(f"expected {cls.prefix}key=value, got {override!r}")
            values[key.removeprefix(cls.prefix)] = parse_scalar(text)
        return cls.from_mapping(values)


@dataclass(frozen=True)
class ExactConfig(_Block):
    """Settings of the EXACT weighting (arXiv 2605.10544), `model.exact.*` in every host.

    Attributes:
        enabled: weight the targets. Off is bitwise the stock dataset and loss.
        alpha: extra supervision given to the tail, as a fraction of the tail's targets: sum_T q_b (w_b - 1) = alpha.
            Paper: 0.15. 0 makes every weight exactly 1.
        gamma: exponent of the inverse frequency, r_b = (q_b + eps)^-gamma. Paper: 0.5. 0 shares out evenly.
        tau: lower edge of the tail in tokens of effective context; None is a quarter of the window (paper:
            1K, 2K, 4K at windows of 4K, 8K, 16K). A bucket is in the tail when its lower edge is >= tau.
        eps: added to q_b before the power. Not published; ours is 1e-8.
        normalization: "corpus" divides by the corpus mean so that the mean weight is 1 and learning rates stay
            comparable with the baseline; "none" keeps the raw weights.
        max_weight: cap on a bucket's raw weight, None for no cap. A cap that binds makes the budget less than alpha.
        log_buckets: report loss and target count of the short part and of each tail bucket.
        allow_unmasked_documents: train weighted although documents in a sample see each other. The weights then do
            not measure what a target can see.
        allow_changed_weights: resume from a checkpoint that was trained with other weights.
    """

    prefix = PREFIX

    enabled: bool = False
    alpha: float = 0.15
    gamma: float = 0.5
    tau: int | None = None
    eps: float = 1e-8
    normalization: str = "corpus"
    max_weight: float | None = None
    log_buckets: bool = True
    allow_unmasked_documents: bool = False
    allow_changed_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("enabled", "log_buckets", "allow_unmasked_documents", "allow_changed_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{PREFIX}{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("alpha", "gamma", "eps", "tau", "max_weight"):
            value = getattr(self, name)
            if value is None and name in ("tau", "max_weight"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{PREFIX}{name} must be a finite number, not {value!r}")
            if value < 0:
                raise ValueError(f"{PREFIX}{name} must not be negative, but is {value!r}")
        if self.tau is not None and self.tau != int(self.tau):
            raise ValueError(f"{PREFIX}tau counts tokens and must be whole, not {self.tau!r}")
        if self.max_weight is not None and self.max_weight < 1:
            raise ValueError(
                f"{PREFIX}max_weight must be at least 1 (the weight of short contexts), not {self.max_weight!r}"
            )
        if self.normalization not in ("corpus", "none"):
            raise ValueError(f"{PREFIX}normalization must be 'corpus' or 'none', not {self.normalization!r}")

    def validated(self, seq_length: int) -> ExactConfig:
        """Return a copy for windows of `seq_length` tokens, with tau resolved to seq_length // 4 where it is None.

        Raises:
            ValueError: the window is too short to have a tail, or no bucket starts at or above tau.
        """
        if isinstance(seq_length, bool) or seq_length != int(seq_length) or seq_length < 1:
            raise ValueError(f"seq_length must be a positive number of tokens, not {seq_length!r}")
        tau = seq_length // 4 if self.tau is None else int(self.tau)
        last_edge = 1 << max(seq_length - 1, 1).bit_length() - 1  # the largest power of two below the window
        if last_edge < 8:
            raise ValueError(
                f"a window of {seq_length} tokens has no tail: its targets fill one bucket. Use a longer window"
            )
        if tau > last_edge:
            raise ValueError(
                f"{PREFIX}tau={tau} lies above the last bucket of a window of {seq_length} tokens, which starts at "
                f"{last_edge}: choose tau <= {last_edge} (default: a quarter of the window, {seq_length // 4})"
            )
        return dataclasses.replace(self, tau=tau)


@dataclass(frozen=True)
class QKTimingConfig(_Block):
    """Settings of the upper-layer query/key timing (arXiv 2605.10504), `model.qk_timing.*` in every host.

    Attributes:
        enabled: slow the query and key projections early in training. Off hooks nothing.
        scale: factor on their learning rate while held. Paper: 0.25. 1 is off, 0 freezes them.
        hold: share of the training steps with `scale`. Paper: about 0.04.
        anneal: share of the training steps after that over which the factor rises linearly to 1. Paper: about 0.01.
        layers: "upper_half" (2 * layer_number > num_layers, counted from 1; of an odd number the middle one too) or "all".
    """

    prefix = TIMING_PREFIX

    enabled: bool = False
    scale: float = 0.25
    hold: float = 0.04
    anneal: float = 0.01
    layers: str = "upper_half"

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise ValueError(f"{TIMING_PREFIX}enabled must be true or false, not {self.enabled!r}")
        for name in ("scale", "hold", "anneal"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{TIMING_PREFIX}{name} must be a number from 0 to 1, not {value!r}")
        if self.hold + self.anneal > 1:
            raise ValueError(
                f"{TIMING_PREFIX}hold={self.hold} and anneal={self.anneal} are shares of the training steps, and together above 1"
            )
        if self.layers not in ("upper_half", "all"):
            raise ValueError(f"{TIMING_PREFIX}layers must be 'upper_half' or 'all', not {self.layers!r}")

    def factor(self, step: int, total_steps: int) -> float:
        """Factor on the learning rate for the step after `step` done ones of `total_steps`; exactly 1.0 outside the phase."""
        done = step / total_steps
        if not self.enabled or done >= self.hold + self.anneal:
            return 1.0
        if done <= self.hold:
            return float(self.scale)
        return self.scale + (1 - self.scale) * (done - self.hold) / self.anneal

    def touches(self, layer_number: int, num_layers: int) -> bool:
        """Whether the layer, counted from 1 over all pipeline stages, is slowed."""
        return self.layers == "all" or 2 * layer_number > num_layers


def split_overrides(arguments: Iterable[str], prefix: str = PREFIX) -> tuple[list[str], list[str]]:
    """Part a command line into (`model.exact.*` overrides, or another prefix's, and everything else), both in order."""
    ours: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        (ours if argument.lstrip("+").startswith(prefix) else rest).append(argument)
    return ours, rest


def parse_scalar(text: str) -> Any:
    """Read a YAML scalar as far as this schema needs it: booleans, null, numbers (1e-8 too), else the text itself."""
    words = {
        "true": True,
        "True": True,
        "false": False,
        "False": False,
        "null": None,
        "None": None,
        "~": None,
        "": None,
    }
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        try:
            return float(text)
        except ValueError:
            return text.strip("'\"")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Message for a key nobody knows, with the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    section = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]] or known
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(section))}"
    return f"unknown key {key}: {hint}"
