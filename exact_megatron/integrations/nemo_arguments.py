"""What of a NeMo run EXACT refuses, and which nemo_toolkit it knows. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ..attention.supported import LOSS
from ..config import PREFIX, ExactConfig, ExactError, as_mapping, parse_scalar
from ..refusals import Row, is_above_1, is_set, reasons, unmasked
from .settings import take_settings

BRIDGE = "Megatron-Bridge is where NeMo trains language models now: exact_megatron.integrations.bridge"
RECIPES = "NeMo 2 recipes are hooked by exact_megatron.integrations.nemo_recipes"


def check_version(version: str, *, recipes: bool = False) -> None:
    """Refuse a nemo_toolkit that lacks what is to be hooked.

    Args:
        version: nemo.__version__, "2.4.0".
        recipes: nemo.collections.llm with 2.4's MaskedTokenLossReduction is needed (2.4 to 2.7), else the YAML-configured
            MegatronGPTModel (up to 2.5.0).

    Raises:
        ExactError: this version lacks it.
    """
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers >= (3,):
        raise ExactError(f"nemo_toolkit {version} has no Megatron: it holds speech only. {BRIDGE}")
    if recipes and numbers < (2,):
        raise ExactError(
            f"nemo_toolkit {version} has no nemo.collections.llm: use its YAML (exact_megatron.integrations.nemo)"
        )
    if recipes and numbers < (2, 4):
        # 2.0 to 2.2: forward returns two values. 2.3: llm/gpt/model/base.py:745-765 puts loss_mask.sum() into the batch as the count.
        raise ExactError(
            f"nemo_toolkit {version} counts a recipe's targets by the sum of loss_mask, which would be the weights': use its YAML "
            "(exact_megatron.integrations.nemo), or recipes of 2.4 to 2.7"
        )
    if not recipes and numbers > (2, 5, 0):
        raise ExactError(
            f"nemo_toolkit {version} has no MegatronGPTModel (it left after 2.5.0): model.exact in a YAML does nothing here. "
            f"{RECIPES}; {BRIDGE}"
        )


def settings(block: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> ExactConfig:
    """The settings of a NeMo run. Later wins: defaults, EXACT_CONFIG's file, EXACT_ALPHA and the like, `model.exact`.

    Args:
        block: `model.exact` as YAML and command line made it, plain values, "???" where nothing was said (the Hydra plugin);
            None where there is none.
        environment: os.environ if None.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value of the wrong kind.
    """
    base, _ = take_settings([], os.environ if environment is None else environment)
    return ExactConfig.from_mapping({**base.to_dict(), **said(block)})


def said(block: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of a block that somebody set, as values; "???" stands where nobody did."""
    given = {key: value for key, value in as_mapping(PREFIX.rstrip("."), block).items() if value != "???"}
    return {key: parse_scalar(value) if isinstance(value, str) else value for key, value in given.items()}


# What would be weighted wrongly, by the paths of the block `model`; `asked` is whether masked documents were asked for.
ROWS = (
    Row(
        "mcore_gpt",
        lambda core: not core,
        "model.mcore_gpt=false: the model from before megatron-core is not hooked. Set it to true",
    ),
    Row(
        "fsdp",
        is_set,
        "model.fsdp=true: its gradients are reduced in another way, which nobody has compared. Use DDP or a distributed optimizer",
    ),
    Row(
        "virtual_pipeline_model_parallel_size",
        is_above_1,
        "model.virtual_pipeline_model_parallel_size: NeMo's own model refuses it at the first validation. Set it to null",
    ),
    Row(
        "data.legacy_dataset",
        is_set,
        "model.data.legacy_dataset=true: only megatron-core's GPTDataset is weighted. Set it to false",
    ),
    Row(
        "data.data_impl",
        lambda kind: kind == "mock",
        "model.data.data_impl=mock: mock data have no documents. Set it to mmap",
    ),
    Row("data.add_fim", is_set, "model.data.add_fim=true: fill-in-the-middle reorders documents. Set it to false"),
    Row(
        "data.data_prefix",
        lambda prefix: not prefix,
        "model.data.data_prefix is missing: give the prefix of a .bin/.idx pair",
    ),
    Row(
        "asked exact.allow_unmasked_documents",
        lambda asked, accepted: not asked and not accepted,
        unmasked("model.data.reset_attention_mask=true (EXACT does it with an attention of its own)"),
    ),
)
# What of the TransformerConfig that NeMo makes of it.
BUILT = (
    Row(
        "calculate_per_token_loss mtp_num_layers",
        lambda per_token, depths: per_token or depths,
        "EXACT divides the loss itself and knows one prediction per target: unset calculate_per_token_loss and mtp_num_layers "
        "in model.mcore_customization_config",
    ),
    *LOSS,
)


def refusals(model: Mapping[str, Any], config: ExactConfig) -> list[str]:
    """What of a NeMo YAML run EXACT would weight wrongly, in words; empty is a run that can start.

    Args:
        model: the block `model` of the configuration.
        config: the settings.
    """
    return reasons(ROWS, {"exact": config, "asked": masked(model)}, model)


def masked(model: Mapping[str, Any]) -> bool:
    """Whether the user asked for documents to be masked."""
    return bool((model.get("data") or {}).get("reset_attention_mask"))
