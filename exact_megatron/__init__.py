"""EXACT (arXiv 2605.10544) for Megatron: up-weights tokens that can attend to a long context, within a fixed budget.

How data flows, and the module of each step:

    .bin, .idx ── Megatron's index caches
        │              │
        │              ├─ packing      segments of the packed samples, from the index alone
        │              ├─ exposure     effective context of every target token; census over the whole blend
        │              └─ allocation   log2 buckets -> tail -> WeightTable
        ▼              │
    dataset  ◄─────────┘               stock sample; loss_mask * token weight; boundaries of the segments
        ▼
    the host's get_batch and model     TP, CP, PP as always; `attention` masks the documents
        ▼
    loss                               sum of weighted losses / number of supervised tokens; loss per bucket

Public names, importable with numpy alone:

    ExactConfig         the settings, `model.exact.*`
    effective_context   effective context of every target token in a packed sample
    log2_bucket_edges   the buckets
    ExposureCensus      how many target tokens of a training stream have which effective context
    WeightTable         the weight of a target token by its effective context

With torch and megatron-core:

    exact_megatron.dataset        ExactGPTDataset, ExactDatasetBuilder
    exact_megatron.loss           ExactLoss, the hook in the GPT loss
    exact_megatron.attention      DocumentAttention, core attention for packed documents
    exact_megatron.integrations   megatron_lm, bridge, nemo, nemo_recipes: the same in other trainers
    exact_megatron.training       config.load_config, trainer.Trainer: the native runner
    exact_megatron.launch         python -m exact_megatron.launch SCRIPT: an unchanged script, hooked
"""

from .allocation import WeightTable
from .config import ExactConfig
from .exposure import ExposureCensus, effective_context, log2_bucket_edges

__version__ = "0.1.0"

__all__ = ["ExactConfig", "ExposureCensus", "WeightTable", "effective_context", "log2_bucket_edges"]
