"""What EXACT makes of Megatron-LM's arguments: what it refuses, and who masks the documents. Standard library only, so that
`exact-megatron doctor` can say it on a login node."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..attention.supported import LOSS, unsupported
from ..config import ExactConfig
from ..refusals import Row, is_above_1, is_set, reasons, unmasked, value_of

OWN, UPSTREAM, NONE = "own", "upstream", "none"
ASK = "--reset-attention-mask or, from Megatron-LM 0.19 on, --dataloader-inter-document-masking"
ANEW = "start anew with --finetune"
LEAST_CORE = (0, 13)  # before it, loss_func reduces what it reports
MASKING_CORE = (
    0,
    16,
)  # before it, attention takes every packed_seq_params for thd (megatron/core/transformer/attention.py)
# Functions of a script and the global of it that is replaced
USES = {"forward_step": "loss_func", "train_valid_test_datasets_provider": "BlendedMegatronDatasetBuilder"}
# Megatron-LM's own defaults, where they are no "unset"
DEFAULTS = {
    "transformer_impl": "transformer_engine",
    "attention_dropout": 0.1,
    "num_query_groups": 1,
    "masked_softmax_fusion": True,
    "create_attention_mask_in_dataloader": True,
}
_DATA = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
# What is calculated with.
WHOLE = """
    seq_length micro_batch_size eval_micro_batch_size num_attention_heads num_query_groups
    context_parallel_size tensor_model_parallel_size pipeline_model_parallel_size
    num_layers hidden_size max_position_embeddings global_batch_size train_iters train_samples
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
""".split()


def _modelopt(name: str) -> Row:
    """An argument that selects modelopt's loss in core 0.13 and 0.14 (megatron/post_training/arguments.py: modelopt_args_enabled)."""
    return Row(name, is_set, f"modelopt has a loss of its own: unset --{name.replace('_', '-')}")


# What would be weighted wrongly, whoever masks documents.
ROWS = (
    Row("modelopt_enabled", is_set, "modelopt has a loss of its own: train without modelopt"),
    Row("export_kd_teacher_load", is_set, "distillation has a loss of its own: unset --export-kd-teacher-load"),
    _modelopt("export_quant_cfg"),
    _modelopt("export_real_quant_cfg"),
    _modelopt("export_num_medusa_heads"),
    _modelopt("export_num_eagle_layers"),
    Row(
        "logits_load_dir",
        is_set,
        "distillation from cached logits has a loss of its own: unset --logits-load-dir",
    ),
    Row("sft", is_set, "SFT data are not GPTDataset's: unset --sft"),
    Row("mock_data", is_set, "mock data have no documents: unset --mock-data and give --data-path"),
    Row("fim_data", is_set, "fill-in-the-middle reorders documents: unset --fim-data"),
    Row("use_legacy_models", is_set, "the legacy models are not hooked: unset --use-legacy-models"),
    Row("perform_rl_step", is_set, "reinforcement learning has a loss of its own: unset --perform-rl-step"),
    Row(
        "hybrid_context_parallel",
        is_set,
        "its samples are of other lengths than the window: use --context-parallel-size alone",
    ),
    *LOSS,
    Row(
        " ".join(("mock_data", *_DATA)),
        lambda mock, *data: not mock and not any(data),
        "no data were given, and there are no weights of mock data: give --data-path",
    ),
    Row(
        "context_parallel_size eod_mask_loss calculate_per_token_loss",
        lambda cp, eod, per_token: is_above_1(cp) and eod and not per_token,
        lambda cp, *_: (
            f"--context-parallel-size {cp} with --eod-mask-loss: each rank would divide by its own count of targets. Add "
            "--calculate-per-token-loss"
        ),
    ),
)
# Where nobody would mask the documents; `masks` is who would, `dense` whether by the dense masks of megatron-core before 0.16.
NOBODY = (
    Row(
        "dense transformer_impl spec context_parallel_size",
        lambda dense, layers, spec, cp: dense and (layers != "local" or spec or is_above_1(cp)),
        "before Megatron-LM 0.16 only --transformer-impl local without --spec and without context parallelism masks documents "
        "(Transformer Engine ignores --reset-attention-mask): take such layers or a newer version, or accept unmasked "
        "documents with model.exact.allow_unmasked_documents=true and without --reset-attention-mask",
    ),
    Row(  # the fused kernel for causal masks ignores the mask it is given (fused_softmax.py)
        "dense masked_softmax_fusion",
        lambda dense, fused: dense and fused,
        "before Megatron-LM 0.16 --reset-attention-mask masks nothing with masked_softmax_fusion=True: add "
        "--no-masked-softmax-fusion",
    ),
    Row(
        "dense create_attention_mask_in_dataloader",
        lambda dense, created: dense and created is False,
        "before Megatron-LM 0.16 --reset-attention-mask masks nothing with create_attention_mask_in_dataloader=False: leave out "
        "--no-create-attention-mask-in-dataloader",
    ),
    Row(
        "masks exact.allow_unmasked_documents",
        lambda masks, accepted: masks == NONE and not accepted,
        unmasked(ASK),
    ),
)
# Where DocumentAttention masks them.
MASKED = (
    Row(
        "overlap_moe_expert_parallel_comm",
        is_set,
        "DocumentAttention gets no boundaries from its schedule: unset --overlap-moe-expert-parallel-comm",
    ),
    Row(
        "iterations_to_skip",
        is_set,
        "skipping draws batches on some ranks only, and the boundaries would be another batch's: unset --iterations-to-skip",
    ),
    Row(
        "dataloader_type",
        lambda kind: kind == "external",
        "--dataloader-type external: its batches have no boundaries of documents. Use single or cyclic",
    ),
)


def read_arguments(line: list[str]) -> SimpleNamespace:
    """Megatron-LM's arguments from a command line, in the form of its own parser: --a-b VALUE is `a_b`, a number or text; several
    values are a list, --a-b alone is True, and --no-a-b alone makes `a_b` False. The defaults are Megatron-LM's for what EXACT looks at.

    Raises:
        ValueError: a value of another kind, or arguments that are not on the line (--yaml-cfg).
    """
    given: dict[str, list[str]] = {}
    words: list[str] = []
    for word in line:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            words = given[name.replace("-", "_")] = [value] if equals else []  # given again, the later counts
        else:
            words.append(word)
    values: dict[str, Any] = dict(DEFAULTS)
    for name, words in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name in WHOLE:
            values[name] = _whole(flag, words)
        elif not words and name in _DATA:  # --data-path $EMPTY
            values[name] = None
        elif not words:
            values[name] = True
            values[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            values[name] = words if len(words) > 1 else _number(words[0])
    if values.get("yaml_cfg"):
        raise ValueError(
            f"doctor reads a command line, and --yaml-cfg {values['yaml_cfg']} holds the arguments of this run"
        )
    return SimpleNamespace(**values)


def _whole(flag: str, words: list[str]) -> int:
    if not words:
        raise ValueError(f"argument {flag}: expected one argument")
    try:
        return int(words[0])
    except ValueError:
        raise ValueError(f"argument {flag}: invalid int value: {words[0]!r}") from None


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def training_data(args: Any) -> list[str]:
    """Prefixes of the training data that the arguments name, weights left out.

    Raises:
        OSError, ValueError: the file that names them cannot be read.
    """
    blend, train, file, files = (value_of(name, args) for name in _DATA)
    blend = train or blend or []
    if file:
        blend = Path(file).read_text().split()
    elif files:
        blend = json.loads(Path(files).read_text())["train"] or []
    entries = blend if isinstance(blend, list) else [blend]
    return [entry for entry in map(str, entries) if not re.fullmatch(r"[\d.eE+-]+", entry)]


def refusals(args: Any, config: ExactConfig, core: tuple[int, int] | None = None) -> list[str]:
    """What of a Megatron-LM run EXACT would weight wrongly, in words; empty is a run that can start.

    Args:
        args: Megatron-LM's parsed arguments, of any version; one that it lacks counts as unset.
        config: the settings.
        core: version of megatron-core, (0, 16); None is the imported one.
    """
    found = reasons(ROWS, args)
    masks, _, nobody = _masking(args, config, core)
    found += nobody
    if masks == OWN:
        found += reasons(MASKED, args)
        said = {row.looks_at for row in ROWS}
        model = SimpleNamespace(**{name: value for name, value in vars(args).items() if name not in said})
        if not getattr(args, "group_query_attention", False):
            model.num_query_groups = None  # as core_transformer_config_from_args has it
        found += [
            f"documents are masked by DocumentAttention, which does not support {line}"
            for line in unsupported(model, getattr(args, "seq_length", None))
        ]
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
    masks, line, nobody = _masking(args, config, core)
    if nobody:
        raise ValueError(nobody[0])
    return masks, line


def _masking(args: Any, config: ExactConfig, core: tuple[int, int] | None) -> tuple[str, str, list[str]]:
    """(who masks, one line that says so, the first reason why nobody would)."""
    masks, line = _asked(args, core)
    dense = masks == UPSTREAM and not getattr(args, "dataloader_inter_document_masking", False)
    return masks, line, reasons(NOBODY, {"masks": masks, "dense": dense, "exact": config}, args)[:1]


def _asked(args: Any, core: tuple[int, int] | None) -> tuple[str, str]:
    """Who masks what the user's own arguments ask for."""
    cp, tp, pp = (
        getattr(args, f"{name}_parallel_size", 1) or 1 for name in ("context", "tensor_model", "pipeline_model")
    )
    flag = "--dataloader-inter-document-masking"
    samples = max(value_of(name, args) or 1 for name in ("micro_batch_size", "eval_micro_batch_size"))
    if getattr(args, "dataloader_inter_document_masking", False):
        if cp > 1:
            wrong = f"wrong with --context-parallel-size {cp}"
        elif samples > 1 and tp * pp > 1:
            wrong = f"not right with micro-batches of {samples} samples over {tp} tensor and {pp} pipeline ranks"
        else:
            return UPSTREAM, f"masked by {flag} (Megatron-LM's)"
        return OWN, f"masked by DocumentAttention, in place of {flag}, which is {wrong}"
    if not getattr(args, "reset_attention_mask", False):
        return NONE, "not masked: documents in a sample see each other (model.exact.allow_unmasked_documents=true)"
    if (core or core_version()) >= MASKING_CORE:
        return OWN, "masked by DocumentAttention, in place of the dense masks of --reset-attention-mask"
    return UPSTREAM, "masked by the dense masks of --reset-attention-mask (Megatron-LM's)"


def core_version() -> tuple[int, int]:
    """Major and minor version of the megatron-core that is imported, the checkout's own as a rule."""
    import megatron.core

    major, minor = megatron.core.__version__.split(".")[:2]
    return int(major), int(minor)
