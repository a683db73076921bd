"""What EXACT makes of Megatron-LM's arguments: what it refuses, and who masks the documents. Standard library only, so that
`exact-megatron doctor` can say it on a login node."""

from __future__ import annotations

from typing import Any

from ..config import ExactConfig

OWN, UPSTREAM, NONE = "own", "upstream", "none"
ASK = "--reset-attention-mask or, from Megatron-LM 0.19 on, --dataloader-inter-document-masking"

_REFUSED_ARGUMENTS = {
    "mtp_num_layers": "multi-token prediction uses the weights of one depth for another: unset --mtp-num-layers",
    "modelopt_enabled": "modelopt has a loss of its own: train without modelopt",
    "export_kd_teacher_load": "distillation has a loss of its own: unset --export-kd-teacher-load",
    "logits_load_dir": "distillation from cached logits has a loss of its own: unset --logits-load-dir",
    "sft": "SFT data are not GPTDataset's: unset --sft",
    "mock_data": "mock data have no documents: unset --mock-data and give --data-path",
    "fim_data": "fill-in-the-middle reorders documents: unset --fim-data",
    "use_legacy_models": "the legacy models are not hooked: unset --use-legacy-models",
    "perform_rl_step": "reinforcement learning has a loss of its own: unset --perform-rl-step",
    "hybrid_context_parallel": "its samples are of other lengths than the window: use --context-parallel-size alone",
}
_REFUSED_WITH_OWN_MASKING = {
    "overlap_moe_expert_parallel_comm": "DocumentAttention gets no boundaries from its schedule: unset "
    "--overlap-moe-expert-parallel-comm",
    "iterations_to_skip": "skipping draws batches on some ranks only, and the boundaries would be another batch's: unset "
    "--iterations-to-skip",
}


def refusals(args: Any, config: ExactConfig, core: tuple[int, int] | None = None) -> list[str]:
    """What of a Megatron-LM run EXACT would weight wrongly, in words; empty is a run that can start.

    Args:
        args: Megatron-LM's parsed arguments, of any version; one that it lacks counts as unset.
        config: the settings.
        core: version of megatron-core, (0, 16); None is the imported one.
    """
    found = [text for name, text in _REFUSED_ARGUMENTS.items() if getattr(args, name, None)]
    cp = getattr(args, "context_parallel_size", 1) or 1
    if cp > 1 and getattr(args, "eod_mask_loss", False) and not getattr(args, "calculate_per_token_loss", False):
        found.append(
            f"--context-parallel-size {cp} with --eod-mask-loss: each rank would divide by its own count of targets. Add "
            "--calculate-per-token-loss"
        )
    try:
        masking, _ = plan_masking(args, config, core)
        if masking == OWN:
            found += [text for name, text in _REFUSED_WITH_OWN_MASKING.items() if getattr(args, name, None)]
            if getattr(args, "dataloader_type", None) == "external":
                found.append(
                    "--dataloader-type external: its batches have no boundaries of documents. Use single or cyclic"
                )
    except ValueError as error:
        found.append(str(error))
    return found


def plan_masking(args: Any, config: ExactConfig, core: tuple[int, int] | None = None) -> tuple[str, str]:
    """Who masks the documents, from what the user's own arguments ask for.

    --reset-attention-mask is answered by DocumentAttention at every version: the stock dense mask is quadratic, ignored by
    Transformer Engine, and not built under context parallelism. --dataloader-inter-document-masking is upstream's own, except
    where upstream is wrong: under context parallelism its thd kernels expect a zigzag per document and the batch is a zigzag of
    the whole sample; and micro-batches of several samples are joined into one on the first stage, while the next stages
    receive tensors of the shape before that (NVIDIA/Megatron-LM issue 5635 is the like under tensor parallelism).

    Below core 0.16 attention takes every packed_seq_params for thd (megatron/core/transformer/attention.py), so that only the
    stock dense masks are left, of the local layers and without context parallelism.

    Args:
        args, config, core: as in `refusals`.

    Returns:
        (OWN, UPSTREAM or NONE, one line that says so).

    Raises:
        ValueError: nobody asked for masking, and allow_unmasked_documents is not set; or nothing here can mask documents.
    """
    cp, tp, pp = (
        getattr(args, f"{name}_parallel_size", 1) or 1 for name in ("context", "tensor_model", "pipeline_model")
    )
    flag = "--dataloader-inter-document-masking"
    samples = max(args.micro_batch_size or 1, getattr(args, "eval_micro_batch_size", None) or 1)
    if getattr(args, "dataloader_inter_document_masking", False):
        if cp > 1:
            wrong = f"wrong with --context-parallel-size {cp}"
        elif samples > 1 and tp * pp > 1:
            wrong = f"not right with micro-batches of {samples} samples over {tp} tensor and {pp} pipeline ranks"
        else:
            return UPSTREAM, f"masked by {flag} (Megatron-LM's)"
        return OWN, f"masked by DocumentAttention, in place of {flag}, which is {wrong}"
    if getattr(args, "reset_attention_mask", False):
        if (core or core_version()) >= (0, 16):
            return (
                OWN,
                "masked by DocumentAttention, in place of the dense masks of --reset-attention-mask",
            )
        if args.transformer_impl == "local" and not args.spec and cp == 1:
            # The fused kernel for causal masks ignores the mask it is given (fused_softmax.py).
            for name, unmasked, remedy in (
                ("masked_softmax_fusion", True, "add --no-masked-softmax-fusion"),
                ("create_attention_mask_in_dataloader", False, "leave out --no-create-attention-mask-in-dataloader"),
            ):
                if getattr(args, name, not unmasked) == unmasked:
                    raise ValueError(
                        f"before Megatron-LM 0.16 --reset-attention-mask masks nothing with {name}={unmasked}: {remedy}"
                    )
            return UPSTREAM, "masked by the dense masks of --reset-attention-mask (Megatron-LM's)"
        raise ValueError(
            "before Megatron-LM 0.16 only --transformer-impl local without --spec and without context parallelism masks documents "
            "(Transformer Engine ignores --reset-attention-mask): take such layers or a newer version, or accept unmasked "
            "documents with model.exact.allow_unmasked_documents=true and without --reset-attention-mask"
        )
    if config.allow_unmasked_documents:
        return NONE, "not masked: documents in a sample see each other (model.exact.allow_unmasked_documents=true)"
    raise ValueError(
        "documents in a sample would see each other, and the weights would not measure what a target sees. Ask for masking with "
        f"{ASK}, or accept it with model.exact.allow_unmasked_documents=true"
    )


def core_version() -> tuple[int, int]:
    """Major and minor version of the megatron-core that is imported, the checkout's own as a rule."""
    import megatron.core

    major, minor = megatron.core.__version__.split(".")[:2]
    return int(major), int(minor)
