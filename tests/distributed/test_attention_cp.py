"""Document attention under context parallelism: four gloo processes, started once, run every check below.

This file is their script too: each leaves its report in the folder of its argument.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from exact_megatron.attention import DocumentAttention, context_parallel, document_boundaries
from tests.helpers.groups import share_process_groups
from tests.helpers.ranks import launch
from tests.unit.attention.test_attention import PACKINGS, S, assert_close, attend, config, dense, packing, run, tensors

WORLD, SECONDS = 4, 300
GROUPS: dict[int, dist.ProcessGroup] = {}


def zigzag(x: torch.Tensor, rank: int, cp: int, dim: int) -> torch.Tensor:
    """A rank's part of a batch, as Megatron's get_batch_on_this_cp_rank cuts it."""
    chunks = x.chunk(2 * cp, dim)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]], dim)


class Pgs:
    def __init__(self, cp: int) -> None:
        self.cp = GROUPS[cp]


def module(cp: int, mode: str, heads: int, groups: int, **more) -> DocumentAttention:
    given = config(heads, groups, context_parallel_size=cp)
    return DocumentAttention(given, 1, pg_collection=Pgs(cp), mode=mode, **more)


def run_local(attend_, cp: int, *case: torch.Tensor):
    """`run` on this rank's part of whole-sequence tensors."""
    return run(attend_, *(zigzag(t, GROUPS[cp].rank(), cp, 0) for t in case))


def equals_dense(cp: int, mode: str) -> None:
    cases = [(name, cuts, 1) for name, cuts in PACKINGS.items()] + [(f"batch{i}", packing(i, 2), 2) for i in range(4)]
    for i, (name, cuts, batch) in enumerate(cases):
        heads, groups = [(4, 4), (8, 4), (16, 4)][i % 3] if mode == "ulysses" else [(4, 4), (4, 2), (4, 1)][i % 3]
        case = tensors(heads, groups, batch, i)
        ours = run_local(attend(module(cp, mode, heads, groups), document_boundaries(cuts, S, batch)), cp, *case)
        reference = run(lambda *t, cuts=cuts: dense(*t, cuts), *case)
        try:
            assert_close(ours, [zigzag(t, GROUPS[cp].rank(), cp, 0) for t in reference])
        except AssertionError as error:
            raise AssertionError(f"{name}, {heads}:{groups} heads: {error}") from None


def without_boundaries(cp: int, mode: str) -> None:
    case = tensors(4, 4, 2)
    ours = run_local(attend(module(cp, mode, 4, 4), None), cp, *case)
    reference = run(lambda *t: dense(*t, [0, S, 2 * S]), *case)
    assert_close(ours, [zigzag(t, GROUPS[cp].rank(), cp, 0) for t in reference])


def no_leak(cp: int, mode: str) -> None:
    """Other values in one document, on all ranks, leave all else bitwise as it was."""
    cuts, rank = [0, 5, 61, 80, S], GROUPS[cp].rank()
    case = tensors(4, 4, 1, dtype=torch.float32)
    changed = [torch.cat([t[:5], 3 - 2 * t[5:61], t[61:]]) for t in case]
    attend_ = attend(module(cp, mode, 4, 4), document_boundaries(cuts, S))
    same = zigzag(torch.tensor([not 5 <= i < 61 for i in range(S)]), rank, cp, 0)
    for a, b in zip(run_local(attend_, cp, *case), run_local(attend_, cp, *changed), strict=True):
        assert torch.equal(a[same], b[same])
        assert same.all() or not torch.equal(a[~same], b[~same])


def gradient_strides(cp: int, mode: str) -> None:
    """Gradients that arrive expanded or permuted are exchanged right (empty_like keeps their strides)."""
    q, k, v, _ = tensors(4, 4, 2)
    whole = document_boundaries(packing(1, 2), S, 2)
    for expand in (True, False):

        def backward(function, cut, expand=expand):
            q_, k_, v_ = (cut(t).clone().requires_grad_() for t in (q, k, v))
            out = function(q_, k_, v_)
            weight = torch.linspace(-1, 1, out.size(2), dtype=out.dtype)
            (out.sum((0, 1)) * weight).sum().backward() if expand else (out.permute(2, 1, 0) ** 2).sum().backward()
            return out.detach(), q_.grad, k_.grad, v_.grad

        cut = partial(zigzag, rank=GROUPS[cp].rank(), cp=cp, dim=0)
        ours = backward(attend(module(cp, mode, 4, 4), whole), cut)
        assert_close(ours, [cut(t) for t in backward(lambda *t: dense(*t, packing(1, 2)), lambda t: t)])


def gather_keeps_local(cp: int) -> None:
    """The gathered K/V are freed after the forward, gathered once more in the backward, and freed again."""
    from torch.multiprocessing.reductions import StorageWeakRef

    gathered, gather = [], context_parallel._gather

    def watch(*args):
        every = gather(*args)
        gathered.append(StorageWeakRef(every.untyped_storage()))
        return every

    context_parallel._gather = watch
    try:
        q, k, v, w = (zigzag(t, GROUPS[cp].rank(), cp, 0) for t in tensors(4, 2, 2))
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
        out = module(cp, "gather", 4, 2)(q, k, v, None, packed_seq_params=document_boundaries(packing(2, 2), S, 2))
        assert len(gathered) == 1 and gathered[0].expired(), "the gathered K/V outlive the forward"
        (out * w).sum().backward()
        assert len(gathered) == 2 and gathered[1].expired(), [g.expired() for g in gathered]
        with torch.no_grad():
            module(cp, "gather", 4, 2)(q, k, v, None)
        assert len(gathered) == 3 and gathered[2].expired()
    finally:
        context_parallel._gather = gather


def gather_with_a_kernel_that_saves_copies(cp: int) -> None:
    """Kernels differ by rank and by piece: one that saves copies on one rank alone leaves the collectives in step."""
    from exact_megatron.attention import kernels

    rank, sdpa = GROUPS[cp].rank(), kernels.KERNEL_FUNCTIONS["sdpa"]
    if rank == 0:
        kernels.KERNEL_FUNCTIONS["sdpa"] = lambda q, kv, v, nq, nk, scale: sdpa(q, kv * 1, v, nq, nk, scale)
    try:
        q, k, v, w = tensors(4, 2, 2)
        whole = document_boundaries(packing(2, 2), S, 2)
        reference = [t.clone().requires_grad_() for t in (q, k, v)]
        expected = dense(*reference, packing(2, 2))
        (expected * w).sum().backward()
        cut = partial(zigzag, rank=rank, cp=cp, dim=0)
        local = [cut(t).clone().requires_grad_() for t in (q, k, v)]
        for _ in range(2):
            out = module(cp, "gather", 4, 2)(*local, None, packed_seq_params=whole)
            for t in local:
                t.grad = None
            (out * cut(w)).sum().backward()
            theirs = [cut(expected.detach()), *(cut(t.grad) for t in reference)]
            assert_close([out.detach(), *(t.grad for t in local)], theirs)
    finally:
        kernels.KERNEL_FUNCTIONS["sdpa"] = sdpa


def batch_is_megatrons(cp: int) -> None:
    """The zigzag of these checks is the one of get_batch_on_this_cp_rank."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    try:
        group = parallel_state.get_context_parallel_group()
        known = inspect.signature(get_batch_on_this_cp_rank).parameters
        more = {n: v for n, v in {"is_hybrid_cp": False, "cp_group": group}.items() if n in known}
        x = torch.arange(2 * S).view(2, S)
        assert torch.equal(get_batch_on_this_cp_rank({"x": x.clone()}, **more)["x"], zigzag(x, group.rank(), cp, 1))
        given = config(4, 4, context_parallel_size=cp)
        assert DocumentAttention(given, 1).cp_group is group, "without process groups: those of parallel_state"
    finally:
        parallel_state.destroy_model_parallel()


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's torch norm refuses sequence parallelism, for which the mark on the weight is enough."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


WINDOW, VOCAB, LAYERS = 64, 64, 2
RECOMPUTE = {
    "kept": {},
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
}


def gpt(tp: int, cp: int, core_attention, recompute: str, documents: bool = True):
    """Loss and gradients (whole tensors, by name) of two micro-batches with different boundaries."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    given = config(
        8,
        4,
        num_layers=LAYERS,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=tp > 1,
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **RECOMPUTE[recompute],
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if core_attention is not None:
        spec.submodules.self_attention.submodules.core_attention = core_attention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    model = GPTModel(
        given,
        TransformerBlockSubmodules(layer_specs=[spec] * LAYERS, layer_norm=RMSNorm),
        vocab_size=VOCAB,
        max_sequence_length=WINDOW,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    ).train()
    used = {type(layer.self_attention.core_attention).__name__ for layer in model.decoder.layers}
    assert core_attention is None or all(name.startswith("DocumentAttention") for name in used), used
    tp_rank, tp_group = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    cp_group = parallel_state.get_context_parallel_group()

    def split(parameter) -> int | None:
        return parameter.partition_dim if tp > 1 and getattr(parameter, "tensor_model_parallel", False) else None

    for name, parameter in model.named_parameters():
        shape, dim = list(parameter.shape), split(parameter)
        if dim is not None:
            shape[dim] *= tp
        seed = int(hashlib.md5(name.encode()).hexdigest()[:8], 16)
        full = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (0.3 if "norm" in name else 0.15)
        full = full + 1 if "norm" in name else full
        parameter.data.copy_(full if dim is None else full.chunk(tp, dim)[tp_rank])

    gen, losses = torch.Generator().manual_seed(3), []
    for micro_batch in range(2):
        tokens = torch.randint(VOCAB, (2, WINDOW + 1), generator=gen)
        weight = torch.rand(2, WINDOW, generator=gen)
        place = torch.arange(WINDOW).expand(2, -1)
        cuts = packing(20 + micro_batch, 2, WINDOW) if documents else [0, WINDOW, 2 * WINDOW]
        batch = [zigzag(t, cp_group.rank(), cp, 1) for t in (tokens[:, :-1], tokens[:, 1:], weight, place)]
        mask = params = None
        if core_attention is None:
            document = torch.bucketize(torch.arange(2 * WINDOW), torch.tensor(cuts[1:-1]), right=True).view(2, 1, -1)
            ahead = torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu(1)
            mask = ((document.mT != document) | ahead)[:, None]
        elif documents:
            params = document_boundaries(cuts, WINDOW, 2)
        out = model(batch[0], batch[3], mask, labels=batch[1], packed_seq_params=params)
        losses.append((out * batch[2]).sum())
    sum(losses).backward()  # both forwards came first: recomputation must find its own micro-batch's boundaries

    loss = sum(losses).detach()
    dist.all_reduce(loss, group=cp_group)
    grads = {}
    for name, parameter in model.named_parameters():
        grad, dim = parameter.grad.contiguous(), split(parameter)
        dist.all_reduce(grad, group=cp_group)
        if dim is None and tp > 1 and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad, group=tp_group)
        if dim is not None:
            parts = [torch.empty_like(grad) for _ in range(tp)]
            dist.all_gather(parts, grad, group=tp_group)
            grad = torch.cat(parts, dim)
        grads[name] = grad
    parallel_state.destroy_model_parallel()
    return loss, grads


STOCK: dict[bool, tuple] = {}


def gpt_equals_stock(tp: int, cp: int, mode: str, recompute: str, documents: bool = True) -> None:
    """Against one rank of Megatron's own DotProductAttention with a dense mask."""
    if documents not in STOCK:
        STOCK[documents] = gpt(1, 1, None, "kept", documents)
    (loss, grads), (loss0, grads0) = (
        gpt(tp, cp, DocumentAttention.with_mode(mode), recompute, documents),
        STOCK[documents],
    )
    assert abs(loss / loss0 - 1) < 1e-5, (loss, loss0)
    assert grads.keys() == grads0.keys() and len(grads) > 4 * LAYERS
    for name, grad in grads0.items():
        error = (grads[name] - grad).abs().max() / grad.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"
    if documents:
        assert abs(loss / STOCK.setdefault(False, gpt(1, 1, None, "kept", False))[0] - 1) > 1e-3, "boundaries unused"


CHECKS = {
    f"{check.__name__}-cp{cp}-{mode}": partial(check, cp, mode)
    for check in (equals_dense, without_boundaries, no_leak, gradient_strides)
    for cp in (2, 4)
    for mode in ("ulysses", "gather")
}
CHECKS |= {
    f"{check.__name__}-cp{cp}": partial(check, cp)
    for check in (gather_keeps_local, gather_with_a_kernel_that_saves_copies, batch_is_megatrons)
    for cp in (2, 4)
}
CHECKS |= {
    f"gpt-tp{tp}-cp{cp}-{mode}-{recompute}": partial(gpt_equals_stock, tp, cp, mode, recompute)
    for tp, cp, mode, recomputes in (
        (1, 1, "auto", RECOMPUTE),
        (2, 1, "auto", ["kept"]),
        (1, 2, "ulysses", ["kept"]),
        (1, 2, "gather", RECOMPUTE),
        (1, 4, "ulysses", ["kept"]),
        (1, 4, "gather", ["kept"]),
        (2, 2, "ulysses", RECOMPUTE),
        (2, 2, "gather", RECOMPUTE),
    )
    for recompute in recomputes
}
CHECKS["gpt-whole-samples"] = partial(gpt_equals_stock, 2, 2, "auto", "kept", False)


def worker(report: Path) -> None:
    torch.set_num_threads(1)
    from exact_megatron.training.cpu_runtime import install

    install()
    share_process_groups()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    GROUPS.update({2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD})
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = ""
        except AssertionError:  # found after the exchanges: the other ranks go on, and so does this one
            results[name] = traceback.format_exc()
        except Exception:  # the others wait for this rank: leave, and they fail at once
            results[name] = traceback.format_exc()
            break
        finally:
            report.write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("attention_cp")
    with contextlib.suppress(subprocess.TimeoutExpired):
        launch("distributed/test_attention_cp.py", [str(folder)], WORLD, SECONDS)
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    assert all(f.exists() for f in files), f"no check ended within {SECONDS} s"
    return [json.loads(f.read_text()) for f in files]


@pytest.mark.parametrize("name", CHECKS)
def test_four_ranks(reports, name):
    for rank, report in enumerate(reports):
        assert report.get(name, "not reached") == "", f"rank {rank}:\n{report.get(name, 'not reached')}"


if __name__ == "__main__":
    worker(Path(sys.argv[1], f"{os.environ['RANK']}.json"))
