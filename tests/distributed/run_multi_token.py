"""Rank script: multi-token prediction on packed documents against a plain reference.

One micro-batch of two samples. What megatron.core computed for each depth is caught where it enters the gradient, and put together from
the context-parallel ranks.
"""

from __future__ import annotations

import sys

import torch

DEPTHS, SAMPLES, S = 2, 2, 24
CUTS = [
    0,
    1,
    3,
    10,
    24,
    24 + 5,
    24 + 17,
    24 + 19,
    24 + 24,
]  # documents of 1 and 2 tokens too, cut at other places in each sample
SCALE = 0.3


def main() -> None:
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.transformer import multi_token_prediction as mtp

    from exact_megatron.attention import document_boundaries
    from exact_megatron.training import trainer
    from exact_megatron.training.model import build_chunks

    torch.set_num_threads(1)
    run = load(sys.argv[1])
    trainer.init_distributed(run)
    group = parallel_state.get_context_parallel_group()
    cp, rank = group.size(), group.rank()
    (model,) = build_chunks(run, 96, torch.device("cpu"))
    rng = torch.Generator().manual_seed(5)
    stream = torch.randint(1, 96, (SAMPLES, S + 1), generator=rng)
    tokens, labels = stream[:, :-1], stream[:, 1:]
    weights = torch.rand(SAMPLES, S, generator=rng) + 0.5
    weights[torch.rand(SAMPLES, S, generator=rng) < 0.2] = 0
    documents = document_boundaries(CUTS, S, SAMPLES)

    def part(rows: torch.Tensor) -> torch.Tensor:
        """This rank's part of [b, S], Megatron's zigzag."""
        return rows.unflatten(1, (2 * cp, -1))[:, [rank, 2 * cp - 1 - rank]].flatten(1) if cp > 1 else rows

    def whole(rows: torch.Tensor) -> torch.Tensor:
        every = [torch.empty_like(rows) for _ in range(cp)]
        torch.distributed.all_gather(every, rows.contiguous(), group=group)
        if cp == 1:
            return every[0]
        halves = [r.unflatten(1, (2, -1)) for r in every]
        return torch.cat([*(h[:, 0] for h in halves), *(h[:, 1] for h in reversed(halves))], 1)

    def forward(tokens: torch.Tensor) -> tuple[list, list, list, list]:
        seen, made, entered = [], [], []
        compute, apply = type(model).compute_language_model_loss, mtp.MTPLossAutoScaler.apply

        def caught(labels, logits):
            loss = compute(model, labels, logits)
            seen.append(labels)
            made.append(loss.detach())
            return loss

        def scaled(hidden, loss):
            entered.append(loss.detach())
            return apply(hidden, loss)

        model.compute_language_model_loss, mtp.MTPLossAutoScaler.apply = caught, scaled
        places = torch.arange(S).expand(SAMPLES, S)
        loss = model(
            part(tokens), part(places), None, labels=part(labels), loss_mask=part(weights), packed_seq_params=documents
        )
        mtp.MTPLossAutoScaler.apply = apply
        return seen, made, entered, [loss]

    seen, made, entered, (loss,) = forward(tokens)
    order = (
        [DEPTHS, *range(DEPTHS)] if torch.equal(seen[-1], part(labels)) else range(DEPTHS + 1)
    )  # the model's own labels come last
    depths = [i for i in order if not torch.equal(seen[i], part(labels))]
    assert len(depths) == len(entered) == DEPTHS, (len(seen), len(entered))
    local = part(weights)
    for depth, (at, gradient) in enumerate(zip(depths, entered), 1):
        wanted, w = reference(labels, weights, depth)
        supervised = w != 0
        assert torch.equal(whole(seen[at])[supervised], wanted[supervised]), f"labels of depth {depth}"
        scale = SCALE / DEPTHS
        if tuple(map(int, megatron.core.__version__.split(".")[:2])) >= (0, 17):
            scale *= local.sum() / part(w).sum().clamp(min=1)
        torch.testing.assert_close(gradient, scale * part(w) * made[at], rtol=1e-5, atol=1e-7)
        assert supervised.sum() > 10

    # The tokens of another document change nothing. Its own targets, and the first after it, which its neighbour predicts, are left out.
    other = tokens.clone()
    other[0, 3:10] = (other[0, 3:10] + 7) % 95 + 1
    _, changed, _, _ = forward(other)
    left = torch.ones(SAMPLES, S, dtype=torch.bool)
    left[0, 3:10] = False
    for at in depths:
        before, after = whole(made[at]), whole(changed[at])
        inside = left & (reference(labels, weights, 1 + depths.index(at))[1] != 0)
        assert torch.equal(before[inside], after[inside])
        assert not torch.equal(before[~left], after[~left])

    loss.sum().backward()
    trainer.shutdown()
    torch.distributed.destroy_process_group()


def reference(labels: torch.Tensor, weights: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(target, weight) [b, S] of every position: the label `depth` positions on, and its weight, inside the position's own document."""
    target, weight = torch.zeros_like(labels), torch.zeros_like(weights)
    for start, end in zip(CUTS, CUTS[1:]):
        for position in range(start, end - depth):
            sample, at = divmod(position, S)
            target[sample, at] = labels[sample, at + depth]
            weight[sample, at] = weights[sample, at + depth]
    return target, weight


def load(config: str):
    import os

    from exact_megatron.training.config import load_config

    world = int(os.environ["WORLD_SIZE"])
    return load_config(
        config,
        [f"model.mtp_num_layers={DEPTHS}", f"model.mtp_loss_scaling_factor={SCALE}", "model.num_layers=1"]
        + [f"model.data.seq_length={S}", f"trainer.devices={world}", f"model.context_parallel_size={world}"]
        + [f"model.micro_batch_size={SAMPLES}", f"model.global_batch_size={SAMPLES}"],
    )


if __name__ == "__main__":
    main()
