"""The configuration schemas `model.exact` and `model.qk_timing`, shared by every host. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .ranges import LONGEST_WINDOW, choice, number, range_of, shown, switch, whole

PREFIX = "model.exact."
TIMING_PREFIX = "model.qk_timing."


class ExactError(RuntimeError):
    """A run that cannot go on, in words for the user; other RuntimeErrors (torch's, NCCL's) keep their traceback."""


Block = TypeVar("Block", bound="_Block")


class _Block:
    """What the two blocks of settings have in common; they are frozen dataclasses."""

    prefix: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = range_of(field).accept(self.prefix + field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_mapping(cls: type[Block], mapping: Mapping[str, Any] | None) -> Block:
        """Build from a block of YAML, JSON or a checkpoint.

        Raises:
            ValueError: an unknown key, named with the nearest known one, a value out of its range, or no mapping.
        """
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = as_mapping(cls.prefix.rstrip("."), mapping)
        for key in values:
            if key not in known:
                raise ValueError(unknown_key(f"{cls.prefix}{key}", [cls.prefix + k for k in known]))
        return cls(**values)

    @classmethod
    def from_overrides(cls: type[Block], overrides: Iterable[str], base: Mapping[str, Any] | None = None) -> Block:
        """Build from `model.exact.key=value` strings (a leading + or ++, as Hydra has it, is accepted) over `base`.

        Raises:
            ValueError: an override that is not of this form, an unknown key or a value out of its range.
        """
        values = as_mapping(cls.prefix.rstrip("."), base)
        for override in overrides:
            key, equals, text = override.lstrip("+").partition("=")
            if not equals or not key.startswith(cls.prefix):
                raise ValueError(f"expected {cls.prefix}key=value, got {override!r}")
            values[key.removeprefix(cls.prefix)] = parse_scalar(text)
        return cls.from_mapping(values)


_WINDOW = range_of(whole(4096, least=1, most=LONGEST_WINDOW))


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
        tail_share: in place of alpha, the share of the loss weight that the tail gets, for example 0.35. On another corpus the same
            share means another alpha; the weight table holds it.
        placebo: give each sample's weights to its supervised targets in a random order, as a control: the loss has the same weights,
            which no longer tell who sees much context. Bucket losses of training are left out, since a weight no longer tells its bucket.
    """

    prefix = PREFIX

    enabled: bool = switch(False)
    alpha: float = number(0.15, least=0)
    gamma: float = number(0.5, least=0)
    tau: int | None = whole(None, least=0, most=LONGEST_WINDOW)
    eps: float = number(1e-8, least=0)
    normalization: str = choice("corpus", ["corpus", "none"])
    max_weight: float | None = number(None, least=1)  # 1 is the weight of short contexts
    log_buckets: bool = switch(True)
    allow_unmasked_documents: bool = switch(False)
    allow_changed_weights: bool = switch(False)
    tail_share: float | None = number(None, above=0, below=1)
    placebo: bool = switch(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail_share is not None and self.alpha != type(self).alpha:
            raise ValueError(
                f"{PREFIX}tail_share={self.tail_share:g} and {PREFIX}alpha={self.alpha:g} both say how much the tail gets: give one"
            )

    def validated(self, seq_length: int) -> ExactConfig:
        """Return a copy for windows of `seq_length` tokens, with tau resolved to seq_length // 4 where it is None.

        Raises:
            ValueError: the window is too short to have a tail, or no bucket starts at or above tau.
        """
        seq_length = _WINDOW.accept("seq_length", seq_length)
        tau = seq_length // 4 if self.tau is None else self.tau
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

    enabled: bool = switch(False)
    scale: float = number(0.25, least=0, most=1)
    hold: float = number(0.04, least=0, most=1)
    anneal: float = number(0.01, least=0, most=1)
    layers: str = choice("upper_half", ["upper_half", "all"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hold + self.anneal > 1:
            raise ValueError(
                f"{TIMING_PREFIX}hold={self.hold} and {TIMING_PREFIX}anneal={self.anneal} are shares of the training steps, and "
                "together above 1"
            )

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
    """Read a YAML scalar as far as this schema needs it: true, false, null, numbers (1e-8 too), else the text itself.

    Empty text stays empty text, which no setting takes: null means none. So does 010, which is 8 in YAML 1.1 and 10 elsewhere.
    """
    words = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None, "~": None}
    text = text.strip()
    if text in words:
        return words[text]
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip("'\"")


def parse_scalars(value: Any) -> Any:
    """`parse_scalar` of a text, and of every text in a list or the values of a mapping."""
    if isinstance(value, str):
        return parse_scalar(value)
    if isinstance(value, list):
        return [parse_scalars(entry) for entry in value]
    return {key: parse_scalars(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def as_mapping(key: str, block: Any) -> dict[str, Any]:
    """A block of settings as a dict; none is an empty one.

    Raises:
        ValueError: it is a list, a word or a number.
    """
    if block is None:
        return {}
    if not isinstance(block, Mapping):
        raise ValueError(f"{key}={shown(parse_scalars(block))} is not a block of keys and values")
    return {str(name): value for name, value in block.items()}


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Message for a key nobody knows, with a known one: of this name in another block, of a near name in its own or anywhere; or all
    of its own block."""
    known = list(known)
    block = key.rpartition(".")[0]
    while block and not any(k.startswith(block + ".") for k in known):
        block = block.rpartition(".")[0]
    prefix = f"{block}." if block else ""
    own = sorted({k[len(prefix) :].partition(".")[0] for k in known if k.startswith(prefix)})
    by_name: dict[str, list[str]] = {}
    for k in known:
        by_name.setdefault(k.rpartition(".")[2], []).append(k)
    name, misspelt = key.rpartition(".")[2], key[len(prefix) :].partition(".")[0]
    near = by_name.get(name, [])
    near = near or [prefix + k for k in difflib.get_close_matches(misspelt, own, n=1, cutoff=0.6)]
    near = near or [k for close in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75) for k in by_name[close]]
    nearest = difflib.get_close_matches(key, near, n=1, cutoff=0)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(prefix + k for k in own)}"
    return f"unknown key {key}: {hint}"
