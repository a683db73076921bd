"""Log-probabilities of tokens, all that the distance probe and the loss by context ask of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from ..utils.ranks import ONE_RANK

ROWS = 1024  # positions whose logits exist at a time: 1024 x 128,256 floats are 0.5 GB


class Scorer(Protocol):
    """A language model as conditional probabilities."""

    vocab_size: int

    def logprobs(self, ids: Sequence[int], positions: Sequence[int], targets: Sequence[int]) -> np.ndarray:
        """float64[k]: natural log of P(next token = targets[j] | ids[0 .. positions[j]]), by one forward over `ids`."""
        ...


def continuation_logprobs(scorer: Scorer, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
    """log P(continuation | prompt) of each; one forward where all are single tokens, else one a continuation."""
    prompt = list(prompt)
    last = len(prompt) - 1
    if all(len(c) == 1 for c in continuations):
        found = scorer.logprobs(prompt, [last] * len(continuations), [c[0] for c in continuations])
        return [float(x) for x in found]
    total = []
    for c in continuations:
        ids = [*prompt, *c[:-1]]
        total.append(float(scorer.logprobs(ids, range(last, len(ids)), list(c)).sum()))
    return total


class HuggingFaceScorer:
    """A causal language model of transformers.

    Args:
        folder: as `save_pretrained` writes it.
        device: "cpu", "cuda", ...
        dtype: "float32" or "bfloat16".

    Raises:
        ValueError: logits that are no plain product of hidden states and output embeddings (soft caps, scales), which the
            blockwise computation here would get wrong.
    """

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"{folder}: {name}={getattr(model.config, name)} in config.json is not supported here")
        self.model = model.eval().to(torch.device(device))
        self.device = device
        self.vocab_size = int(model.config.vocab_size)

    def logprobs(self, ids: Sequence[int], positions: Sequence[int], targets: Sequence[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            tokens = torch.tensor([list(ids)], device=self.device)
            hidden = self.model.base_model(input_ids=tokens, use_cache=False)[0][0]
            head = self.model.get_output_embeddings()

            def score(rows: Any, wanted: Any) -> Any:
                return torch.log_softmax(head(rows).float(), -1).gather(-1, wanted[:, None])[:, 0]

            return _blockwise(hidden, positions, targets, score)


class MegatronScorer:
    """A checkpoint of the native runner, whatever layout it was trained with, on one rank or tensor-parallel.

    With several ranks the first one drives: the others call `serve` and compute what it asks for, until it calls `close`.

    Args:
        path: checkpoints/step_N, see training.checkpoint_files.find_checkpoint.
        dtype: "float32" or "bfloat16".
        tensor_parallel: ranks that share the model.
    """

    def __init__(self, path: Path, dtype: str, tensor_parallel: int = 1) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        from ..training import checkpoint, checkpoint_files, checkpoint_state
        from ..training.model import build_chunks
        from ..training.trainer import init_distributed

        checkpoint_files.refuse_damaged(path)
        state = checkpoint_state.read_state(path)
        run = scoring_config(state, dtype, tensor_parallel)
        # Padding of the vocabulary depends on the training layout: the checkpoint knows its size.
        padded = checkpoint.stored_entries(path)["embedding.word_embeddings.weight"].size[0]
        if padded % tensor_parallel:
            raise ValueError(f"{path}: a vocabulary of {padded} rows cannot be shared by {tensor_parallel} ranks")
        self.vocab_size = int(state.get("vocab_size") or _vocab_size(run) or padded)
        run.model.make_vocab_size_divisible_by = 1
        self.device = init_distributed(run)
        self.model: Any = build_chunks(run, int(padded), self.device)[0].eval()
        checkpoint.load_weights(path, [SimpleNamespace(module=self.model)])
        self.model.post_process = False  # forward returns hidden states [s, b, h], after the final norm
        self.rank = torch.distributed.get_rank()
        self.ranks = tensor_parallel
        part = padded // tensor_parallel
        self._real = max(0, min(part, self.vocab_size - part * parallel_state.get_tensor_model_parallel_rank()))
        self._cross_entropy = vocab_parallel_cross_entropy

    def logprobs(self, ids: Sequence[int], positions: Sequence[int], targets: Sequence[int]) -> np.ndarray:
        self._ask((list(ids), list(positions), list(targets)))
        return self._compute(ids, positions, targets)

    def _compute(self, ids: Sequence[int], positions: Sequence[int], targets: Sequence[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            tokens = torch.tensor([list(ids)], device=self.device)
            places = torch.arange(tokens.shape[1], device=self.device)[None]
            hidden = self.model(tokens, places, None)[:, 0]
            shared = self.model.share_embeddings_and_output_weights
            weight = self.model.shared_embedding_or_output_weight() if shared else None

            def score(rows: Any, wanted: Any) -> Any:
                logits, _ = self.model.output_layer(rows[:, None], weight=weight)
                logits = logits.float()
                logits[..., self._real :] = -1e30  # rows that pad the vocabulary are no words
                return -self._cross_entropy(logits, wanted[:, None])[:, 0]

            return _blockwise(hidden, positions, targets, score)

    def _ask(self, what: Any) -> Any:
        import torch

        message = [what]
        if self.ranks > 1:
            torch.distributed.broadcast_object_list(message, src=0)
        return message[0]

    def serve(self) -> None:
        """On every rank but the first: compute until `close`."""
        while (asked := self._ask(None)) is not None:
            self._compute(*asked)

    def close(self) -> None:
        """Let the other ranks go, and leave megatron.core's groups."""
        import torch

        from ..training.trainer import shutdown

        if self.rank == 0:
            self._ask(None)
        shutdown()
        torch.distributed.destroy_process_group()


def scoring_config(state: dict[str, Any], dtype: str, tensor_parallel: int) -> Any:
    """The run that made a checkpoint, as a RunConfig for scoring: its model, this layout, and none of its training."""
    from omegaconf import OmegaConf

    from ..training.schema import OptimConfig, RunConfig

    layers = OmegaConf.structured(RunConfig), OmegaConf.create(state["config"]), OmegaConf.from_dotlist(ONE_RANK)
    run: Any = OmegaConf.to_object(OmegaConf.merge(*layers))
    m = run.model
    plain = RunConfig().model
    for name in (
        "micro_batch_size global_batch_size cp_comm_type overlap_p2p_comm batch_p2p_comm fp8 fp8_hybrid exact "
        "activations_checkpoint_granularity activations_checkpoint_method activations_checkpoint_num_layers hidden_dropout "
        "calculate_per_token_loss apply_rope_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl loss_chunk_tokens "
        "gradient_accumulation_fusion deterministic_mode qk_timing moe_aux_loss_coeff moe_token_dispatcher_type moe_grouped_gemm "
        "mtp_num_layers"
    ).split():
        setattr(m, name, getattr(plain, name))
    m.global_batch_size = 1
    m.tensor_model_parallel_size = tensor_parallel
    m.transformer_engine = None  # Transformer Engine's layers and Megatron's own read the same checkpoint
    m.optim = OptimConfig()
    run.trainer = dataclasses.replace(
        run.trainer,
        devices=tensor_parallel,
        accelerator="auto",
        precision={"bfloat16": "bf16"}.get(dtype, "32"),
    )
    return run


def _vocab_size(run: Any) -> int | None:
    """Words of the tokenizer, without the rows that pad the embedding; None where nobody says."""
    from ..training.data_files import data_prefixes

    if run.model.override_vocab_size is not None:
        return int(run.model.override_vocab_size)
    from ..utils.files import read_json

    prefixes = [p for blend in data_prefixes(run).values() if blend for p in blend[0]]
    return read_json(f"{prefixes[0]}.json").get("vocab_size")


def _blockwise(
    hidden: Any, positions: Sequence[int], targets: Sequence[int], score: Callable[[Any, Any], Any]
) -> np.ndarray:
    """score(hidden[k, h], int64[k]) -> log-probabilities [k], for ROWS positions at a time."""
    import torch

    where = torch.as_tensor(list(positions), device=hidden.device)
    wanted = torch.as_tensor(list(targets), device=hidden.device)
    parts = [score(hidden[w], t) for w, t in zip(where.split(ROWS), wanted.split(ROWS))]
    return torch.cat(parts).double().cpu().numpy()
