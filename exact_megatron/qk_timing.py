"""Upper-layer query/key timing (arXiv 2605.10504): the query and key projections of some layers learn more slowly at first.

Megatron fuses the three projections in `linear_qkv`, whose rows are, for each query group, its queries, then its key, then its
value (megatron/core/transformer/attention.py, SelfAttention.get_query_key_value_tensors, core 0.16.1:1375). A parameter group can
not hold rows, and Adam does not see the scale of a gradient. So the step of the inner torch optimizer is left as it is and then
taken back in part, for just these rows of its parameters (the fp32 masters where there are some):

    new = old + factor * (new - old)

This is the step with `factor` times the learning rate, exactly but for rounding, for every optimizer whose update is the learning
rate times something that does not depend on it, decay included: SGD, Adam and AdamW of torch, Transformer Engine (2.9:
transformer_engine/pytorch/optimizers/fused_adam.py) and apex (apex/optimizers/fused_adam.py). Their states (momentum, second
moment, step) see gradients and parameters, never the rate. It would not be so where the rate enters a state, or where decay is not
times the rate, as in p *= 1 - decay (then decay is scaled too). Other inner optimizers are refused.

Projections are slowed and nothing else: weights and biases of queries and keys, not the norms of model.qk_layernorm, which are
no projections, nor the norm that Transformer Engine fuses into linear_qkv. The gradient's norm and its clipping do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .config import TIMING_PREFIX, ExactError, QKTimingConfig

_LINEAR_IN_THE_RATE = ("Adam", "AdamW", "FusedAdam", "SGD")
_KNOWN = ("FP32Optimizer", "Float16OptimizerWithFloat16Params", "DistributedOptimizer")


def kept_spans(start: int, stop: int, period: int, kept: int) -> list[tuple[int, int]]:
    """Where positions start..stop-1 have p % period < kept: half-open spans, counted from `start`."""
    spans = []
    for first in range(start // period * period, stop, period):
        low = max(first, start)
        high = min(first + kept, stop)
        if low < high:
            spans.append((low - start, high - start))
    return spans


class QKTiming:
    """Slows the query and key projections of a model during the phase that `config` gives.

    Hooks stand on the inner torch optimizers from the first step of the phase to its last; they hold one copy of the rows, from
    before to after the inner step. No state: what a step does follows from its number, so a resumed run goes on bitwise.

    Args:
        config: with enabled=True.
        model: this rank's chunks, as Megatron's get_model returns them (wrapped or not).
        optimizer: Megatron's optimizer of this model.
        total_steps: steps of the whole run.

    Attributes:
        layers: global numbers of the slowed layers, all stages together.
        parameters: number of slowed parameters of the whole model.
        held_bytes: memory that this rank needs during the inner step.

    Raises:
        ExactError: a model or optimizer whose query and key rows cannot be found or updated so, in words. On every rank, and
            before the first step. Collective: one all-reduce over all ranks.
    """

    def __init__(self, config: QKTimingConfig, model: Sequence[Any], optimizer: Any, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self.factor = 1.0
        self._handles: list[Any] = []
        chunks = [_decoder(chunk) for chunk in model]
        self.num_layers = chunks[0].config.num_layers
        self.layers = [n for n in range(1, self.num_layers + 1) if config.touches(n, self.num_layers)]
        self.optimizer = optimizer
        rows: dict[Tensor, tuple[int, int]] = {}
        self._parts: list[tuple[Any, Tensor, list[tuple[int, int]]]] = []
        problem: ExactError | None = None
        try:
            rows = dict(_query_key_rows(chunks, config))
            self._parts = list(_parts(optimizer, rows))
        except ExactError as error:  # raised by all ranks together, below: the others would wait for this one
            problem = error
        self.held_bytes = sum(main.element_size() * (b - a) for _, main, spans in self._parts for a, b in spans)
        device = next(chunks[0].parameters()).device
        self.parameters = _check_everything_found(
            chunks[0].config, self.layers, optimizer, rows, self._parts, problem, device
        )

    def before_step(self, step: int) -> float:
        """Call before every optimizer step, with the number of steps done; returns the factor of the step to come."""
        self.factor = self.config.factor(step, self.total_steps)
        if self.factor < 1 and not self._handles:
            for inner in {id(inner): inner for inner, _, _ in self._parts}.values():
                parts = [(main, spans) for owner, main, spans in self._parts if owner is inner]
                self._hook(inner, parts)
        elif self.factor == 1:
            self.remove()
        return self.factor

    @property
    def active(self) -> bool:
        """Whether the optimizer's next step is slowed."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks out of the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, inner: torch.optim.Optimizer, parts: list[tuple[Tensor, list[tuple[int, int]]]]) -> None:
        held: list[Tensor] = []

        def rows() -> list[Tensor]:
            flat = [(main.detach().view(-1), spans) for main, spans in parts]
            return [main[a:b] for main, spans in flat for a, b in spans]

        def hold(*_: Any) -> None:
            held[:] = [torch.cat(rows())]

        def interpolate(*_: Any) -> None:
            new = rows()
            old = held.pop().split([len(part) for part in new])
            torch._foreach_lerp_(new, list(old), 1 - self.factor)

        self._handles += [inner.register_step_pre_hook(hold), inner.register_step_post_hook(interpolate)]

    def describe(self) -> str:
        """One line for the log."""
        c, n = self.config, self.total_steps
        end = (c.hold + c.anneal) * n
        return (
            f"query/key timing: layers {self.layers[0]}-{self.layers[-1]} of {self.num_layers}, {self.parameters:,} parameters, learning "
            f"rate x{c.scale:g} until step {c.hold * n:g} of {n}, then rising to x1 at step {end:g}"
        )


def refuse(problem: str) -> None:
    raise ExactError(f"{TIMING_PREFIX}enabled=true: {problem}")


def _decoder(chunk: Any) -> Any:
    while not hasattr(chunk, "decoder"):
        if not hasattr(chunk, "module"):
            refuse(f"{type(chunk).__name__} has no decoder, as megatron.core's GPTModel has")
        chunk = chunk.module
    return chunk.decoder


def _query_key_rows(decoders: list[Any], config: QKTimingConfig) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """(parameter, (period, kept)) of this rank's slowed layers: flat element e is a query's or a key's if e % period < kept."""
    c = decoders[0].config
    tp = c.tensor_model_parallel_size
    groups = c.num_query_groups or c.num_attention_heads
    if getattr(c, "multi_latent_attention", False):
        refuse("multi-latent attention has no fused query, key and value projection, unset multi_latent_attention")
    if getattr(c, "attention_output_gate", False):
        refuse("attention_output_gate puts gates between the queries and keys of linear_qkv, which is not supported")
    if groups % tp:
        refuse(
            f"num_query_groups={groups} over tensor_model_parallel_size={tp} cuts query groups, use whole groups per rank"
        )
    heads = c.num_attention_heads // groups
    for layer in chain.from_iterable(decoder.layers for decoder in decoders):
        if not config.touches(layer.layer_number, c.num_layers):
            continue
        linear = getattr(getattr(layer, "self_attention", None), "linear_qkv", None)
        if not isinstance(getattr(linear, "weight", None), torch.nn.Parameter):
            refuse(f"layer {layer.layer_number} ({type(layer).__name__}) has no self_attention.linear_qkv.weight")
        for name in ("weight", "bias"):
            parameter = getattr(linear, name, None)
            if not isinstance(parameter, torch.nn.Parameter) or not parameter.numel():
                continue  # no bias; Transformer Engine has an empty tensor then
            where = f"self_attention.linear_qkv.{name} of layer {layer.layer_number}"
            if not parameter.requires_grad:
                refuse(f"{where} is frozen")
            if type(parameter).__name__ == "DTensor" or getattr(parameter, "__fsdp_param__", False):
                refuse(f"{where} is sharded by FSDP, which is not supported")
            head = c.kv_channels * (parameter.shape[1] if parameter.dim() > 1 else 1)
            if parameter.numel() != (heads + 2) * head * groups // tp:
                refuse(f"{where} has the shape {tuple(parameter.shape)}, not that of {groups // tp} whole query groups")
            yield parameter, ((heads + 2) * head, (heads + 1) * head)


def _parts(optimizer: Any, rows: dict[Tensor, tuple[int, int]]) -> Iterator[tuple[Any, Tensor, list[tuple[int, int]]]]:
    """(inner optimizer, its parameter, spans of the flat parameter that hold query and key rows)."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        kind = type(part).__name__
        inner = getattr(part, "optimizer", None)
        if kind not in _KNOWN:
            refuse(f"{kind} is not supported, use Megatron's Adam or SGD, with or without its distributed optimizer")
        if inner is None or getattr(part, "is_stub_optimizer", False):
            continue  # nothing to train on this rank
        ddp = getattr(part, "ddp_config", None)
        settings = {
            "Megatron-FSDP": any(getattr(ddp, f"use_{name}_fsdp", False) for name in ("megatron", "custom")),
            "optimizer_cpu_offload": getattr(part.config, "optimizer_cpu_offload", False),
            "optimizer_cuda_graph": getattr(part.config, "optimizer_cuda_graph", False),
        }
        for name, on in settings.items():
            if on:
                refuse(f"{name} is not supported")
        if type(inner).__name__ not in _LINEAR_IN_THE_RATE:
            refuse(f"{kind} with {type(inner).__name__} is not supported, use Adam or SGD")
        for parameter, main, start in _mains(part):
            if parameter not in rows:
                continue
            if main is None or getattr(inner, "master_weights", False):
                refuse(
                    "the precision-aware optimizer keeps the masters in its own state, unset use_precision_aware_optimizer"
                )
            if not main.is_contiguous():
                refuse(f"a master parameter of {kind} is not contiguous")
            spans = kept_spans(start, start + main.numel(), *rows[parameter])
            if spans:
                yield inner, main, spans


def _mains(optimizer: Any) -> Iterator[tuple[Tensor, Any, int]]:
    """(model parameter, what the inner optimizer updates for it, where that starts in the flat model parameter).

    DistributedOptimizer: megatron/core/optimizer/distrib_optimizer.py, _build_model_and_main_param_groups and
    _get_model_param_range_map; Float16OptimizerWithFloat16Params: optimizer.py, alike from core 0.13 to 0.19.
    """
    flat = chain.from_iterable
    if hasattr(optimizer, "shard_fp32_groups"):
        models = flat([*optimizer.model_float16_groups, *optimizer.model_fp32_groups])
        mains = flat([*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups])
        for parameter, main in zip(models, mains, strict=True):
            yield parameter, main, optimizer._get_model_param_range_map(parameter)["param"].start
    elif hasattr(optimizer, "fp32_from_float16_groups"):
        models = flat([*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups])
        mains = flat([*optimizer.fp32_from_float16_groups, *optimizer.fp32_from_fp32_groups])
        for parameter, main in zip(models, mains, strict=True):
            yield parameter, main, 0
    else:
        for parameter in flat(group["params"] for group in optimizer.optimizer.param_groups):
            yield parameter, parameter, 0


def _check_everything_found(
    config: Any,
    layers: list[int],
    optimizer: Any,
    rows: dict[Tensor, tuple[int, int]],
    parts: list[Any],
    problem: ExactError | None,
    device: torch.device,
) -> int:
    """The number of slowed parameters of the whole model, after checking that every rank's rows are in some rank's optimizer."""
    shards = 1  # ranks that share the rows of one rank's model
    for part in getattr(optimizer, "chained_optimizers", [optimizer])[:1]:  # the dense one comes first
        if hasattr(part, "shard_fp32_groups"):
            shards = part.data_parallel_group.size()
    held = sum(b - a for _, _, spans in parts for a, b in spans)
    own = sum(parameter.numel() // period * kept for parameter, (period, kept) in rows.items())
    counts = torch.tensor([held, own / shards, own, problem is not None], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(counts)
    found, expected, everywhere, problems = (round(n) for n in counts.tolist())
    if problem is not None:
        raise problem
    if problems:
        refuse(f"{problems} other ranks cannot be timed, and say why")
    groups = config.num_query_groups or config.num_attention_heads
    bias = bool(config.add_bias_linear or getattr(config, "add_qkv_bias", False))
    whole = config.kv_channels * (config.num_attention_heads + groups) * (config.hidden_size + bias) * len(layers)
    if found != expected or not everywhere or everywhere % whole:
        refuse(
            f"all ranks' optimizers hold {found:,} query and key parameters of {expected:,}, and the ranks' models {everywhere:,}, "
            f"which should be a multiple of {whole:,}"
        )
    return whole
