"""Losses and gradients of one model with its documents attended in three ways: model_check.py OUT.json PRECISION...

* documents: the plugin's DocumentAttention, packed (the one that trains).
* alone: the same module, one document a forward.
* stock: the host's core attention with Transformer Engine's thd batch; on a CPU, megatron-core's with a dense mask.

For each precision: {"losses": {way: mean relative difference to "documents"}, "gradients": {way: ||a - b|| / ||b||}}, or the
error. Every way first takes two steps that are not looked at, so that delayed scaling has a history.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

LENGTHS = (48, 16, 112, 80)  # FP8 products need a multiple of 16 tokens
STEPS = 3


def build(run: Any, stock: bool) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from exact_megatron.training.model import layer_spec, transformer_config, uses_transformer_engine

    config = transformer_config(run)
    spec = layer_spec(run, config, None)
    if stock and uses_transformer_engine(run):
        spec = get_gpt_layer_with_transformer_engine_spec()
    elif stock:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    m = run.model
    model = GPTModel(
        config,
        spec,
        vocab_size=m.override_vocab_size,
        max_sequence_length=m.data.seq_length,
        position_embedding_type="rope",
    )
    model = model.to(DEVICE)
    return model.bfloat16() if config.bf16 else model


def boundaries(lengths: tuple[int, ...], thd: bool) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    from exact_megatron.attention import document_boundaries

    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    if not thd:
        return document_boundaries(cu, cu[-1], device=DEVICE)
    on_device = torch.tensor(cu, dtype=torch.int32, device=DEVICE)
    return PackedSeqParams("thd", on_device, on_device, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))


def dense_mask(lengths: tuple[int, ...]) -> torch.Tensor:
    """True where a query may not look."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ~(document[:, None] == document).tril()[None, None]


def losses_and_gradients(model: Any, batch: Any, way: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token losses [T] and the gradient of their weighted mean, all parameters in one vector."""
    tokens, labels = batch
    model.zero_grad()
    parts, start = [], 0
    for lengths in [(n,) for n in LENGTHS] if way == "alone" else [LENGTHS]:
        part = slice(start, start + sum(lengths))
        start = part.stop
        ids, targets = tokens[None, part], labels[None, part]
        restart = way == "alone" or (
            way == "stock" and DEVICE.type == "cuda"
        )  # RoPE is relative: the same but for rounding
        sizes = lengths if restart else (sum(lengths),)
        positions = torch.cat([torch.arange(n, device=DEVICE) for n in sizes])[None]
        if way == "stock" and DEVICE.type == "cpu":
            losses = model(ids, positions, dense_mask(lengths), labels=targets)
        else:
            packed = boundaries(lengths, thd=way == "stock")
            losses = model(ids, positions, None, labels=targets, packed_seq_params=packed)
        losses = losses.float().flatten()
        (losses * weight[part]).sum().div(len(tokens)).backward()
        parts.append(losses.detach())
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts), torch.cat(gradients)


def check(precision: str) -> dict[str, Any]:
    from small import MODEL, SEQ_LENGTH, precision_settings

    from exact_megatron.training.config import load_config

    assert sum(LENGTHS) == SEQ_LENGTH
    settings = [
        *MODEL,
        *precision_settings(precision),
        f"model.data.seq_length={SEQ_LENGTH}",
        "model.data.data_prefix=[none]",
    ]
    run = load_config(None, settings)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(7)
    batches = [torch.randint(0, 256, (2, SEQ_LENGTH), generator=generator).to(DEVICE) for _ in range(STEPS)]
    weight = (torch.rand(SEQ_LENGTH, generator=generator) + 0.5).to(DEVICE)
    state = None
    for way in ("documents", "alone", "stock"):
        torch.manual_seed(0)
        model = build(run, way == "stock")
        own = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
        if state is None:
            state = {name: value.clone() for name, value in own.items()}
        assert set(own) == set(state), set(own) ^ set(state)
        model.load_state_dict(state, strict=False)
        for batch in batches:
            found[way] = losses_and_gradients(model, batch, way, weight)
    reference = found["documents"]
    result: dict[str, Any] = {"losses": {}, "gradients": {}, "mean loss": float(reference[0].mean())}
    for way in ("alone", "stock"):
        losses, gradients = found[way]
        result["losses"][way] = float(((losses - reference[0]).abs() / reference[0]).mean())
        result["gradients"][way] = float((gradients - reference[1]).norm() / reference[1].norm())
    return result


def main() -> None:
    from megatron.core import parallel_state, tensor_parallel

    from exact_megatron.utils.ranks import be_single_rank

    sys.path.insert(0, str(Path(__file__).parent))
    if DEVICE.type == "cpu":
        from exact_megatron.training import cpu_runtime

        cpu_runtime.install()
    be_single_rank()
    torch.distributed.init_process_group("gloo" if DEVICE.type == "cpu" else "nccl")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    results: dict[str, Any] = {}
    for precision in sys.argv[2:]:
        try:
            results[precision] = check(precision)
        except Exception as error:  # written down; the test of this precision fails with it, the others go on
            traceback.print_exc()
            results[precision] = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    DEVICE = torch.device("cpu" if sys.argv[2] == "fp32" else "cuda")
    main()
