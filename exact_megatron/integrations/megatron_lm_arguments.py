"""What EXACT makes of Megatron-LM's arguments: what it refuses, and who masks the documents. Standard library only, so that
`exact-megatron doctor` can say it on a login node."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..attention.supported import unsupported, unsupported_loss
from ..config import ExactConfig

OWN, UPSTREAM, NONE = "own", "upstream", "none"
ASK = "--reset-attention-mask or, from Megatron-LM 0.19 on, --dataloader-inter-document-masking"

_REFUSED_ARGUMENTS = {
    "modelopt_enabled": "modelopt has a loss of its own: train without modelopt",
    "export_kd_teacher_load": "distillation has a loss of its own: unset --export-kd-teacher-load",
    # Each of these selects modelopt's loss in core 0.13 and 0.14 (megatron/post_training/arguments.py: modelopt_args_enabled).
    "export_quant_cfg": "modelopt has a loss of its own: unset --export-quant-cfg",
    "export_real_quant_cfg": "modelopt has a loss of its own: unset --export-real-quant-cfg",
    "export_num_medusa_heads": "modelopt has a loss of its own: unset --export-num-medusa-heads",
    "export_num_eagle_layers": "modelopt has a loss of its own: unset --export-num-eagle-layers",
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
_UNSET: tuple[Any, ...] = (None, False, 0, "", "None", [])
_DATA = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")


def read_arguments(line: list[str]) -> argparse.Namespace:
    """Megatron-LM's arguments as far as `refusals` and `plan_masking` look at them, with its defaults, from a command line.

    Raises:
        ValueError: a value of another kind, or arguments that are not on the line (--yaml-cfg).
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    whole = {
        "seq-length": None,
        "micro-batch-size": None,
        "eval-micro-batch-size": None,
        "context-parallel-size": 1,
        "tensor-model-parallel-size": 1,
        "pipeline-model-parallel-size": 1,
        "num-attention-heads": None,
        "num-query-groups": 1,
        "export-num-medusa-heads": 0,
        "export-num-eagle-layers": 0,
    }
    text = {
        "transformer-impl": "transformer_engine",
        "dataloader-type": None,
        "logits-load-dir": None,
        "export-kd-teacher-load": None,
        "export-quant-cfg": None,
        "export-real-quant-cfg": None,
        "window-size": None,
        "softmax-type": "vanilla",
        "cross-entropy-fusion-impl": "native",
        "cuda-graph-impl": "none",
        "experimental-attention-variant": None,
        "data-args-path": None,
        "per-split-data-args-path": None,
        "yaml-cfg": None,
    }
    for kind, defaults in ((int, whole), (str, text)):
        for name, default in defaults.items():
            parser.add_argument(f"--{name}", type=kind, default=default)
    for name in ("spec", "data-path", "train-data-path", "cp-comm-type", "iterations-to-skip"):
        parser.add_argument(f"--{name}", nargs="*")
    flags = """
        reset-attention-mask eod-mask-loss calculate-per-token-loss dataloader-inter-document-masking sft mock-data fim-data
        use-legacy-models perform-rl-step hybrid-context-parallel modelopt-enabled overlap-moe-expert-parallel-comm
        group-query-attention multi-latent-attention is-hybrid-model qk-clip log-max-attention-logit fp8-dot-product-attention
        fp8-multi-head-attention enable-cuda-graph external-cuda-graph fused-single-qkv-rope cross-entropy-loss-fusion
        sequence-parallel mtp-hsm
    """
    for name in flags.split():
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    for name in ("masked-softmax-fusion", "create-attention-mask-in-dataloader"):
        parser.add_argument(f"--no-{name}", dest=name.replace("-", "_"), action="store_false")
    try:
        args, _ = parser.parse_known_args(line)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if args.yaml_cfg:
        raise ValueError(f"doctor reads a command line, and --yaml-cfg {args.yaml_cfg} holds the arguments of this run")
    return args


def training_data(args: Any) -> list[str]:
    """Prefixes of the training data that the arguments name, weights left out.

    Raises:
        OSError, ValueError: the file that names them cannot be read.
    """
    blend = args.train_data_path or args.data_path or []
    if args.data_args_path:
        blend = Path(args.data_args_path).read_text().split()
    elif args.per_split_data_args_path:
        blend = json.loads(Path(args.per_split_data_args_path).read_text())["train"] or []
    return [entry for entry in map(str, blend) if not re.fullmatch(r"[\d.eE+-]+", entry)]


def refusals(args: Any, config: ExactConfig, core: tuple[int, int] | None = None) -> list[str]:
    """What of a Megatron-LM run EXACT would weight wrongly, in words; empty is a run that can start.

    Args:
        args: Megatron-LM's parsed arguments, of any version; one that it lacks counts as unset.
        config: the settings.
        core: version of megatron-core, (0, 16); None is the imported one.
    """
    found = [text for name, text in _REFUSED_ARGUMENTS.items() if getattr(args, name, None) not in _UNSET]
    found += unsupported_loss(args)
    if not getattr(args, "mock_data", False) and not any(getattr(args, name, None) for name in _DATA):
        found.append("no data were given, and there are no weights of mock data: give --data-path")
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
            model = SimpleNamespace(**{k: v for k, v in vars(args).items() if k not in _REFUSED_ARGUMENTS})
            if not getattr(args, "group_query_attention", False):
                model.num_query_groups = None  # as core_transformer_config_from_args has it
            found += [
                f"documents are masked by DocumentAttention, which does not support {line}"
                for line in unsupported(model, getattr(args, "seq_length", None))
            ]
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
