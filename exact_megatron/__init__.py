"""EXACT (arXiv 2605.10544) for Megatron: more supervision for targets that see a long context.

Public API, importable without torch:

    ExactConfig         the settings, `model.exact.*`
    effective_context   effective context of every target in a packed sample
    log2_bucket_edges   the buckets
    ExposureCensus      how many targets of a training stream have which effective context
    WeightTable         the weight of a target by its effective context

With torch and megatron-core:

    exact_megatron.dataset     ExactGPTDataset, ExactDatasetBuilder
    exact_megatron.loss        ExactLoss, the hook in the GPT loss
    exact_megatron.attention   DocumentAttention, core attention for packed documents
    exact_megatron.training    the native runner
"""

from .allocation import WeightTable
from .config import ExactConfig
from .exposure import ExposureCensus, effective_context, log2_bucket_edges

__version__ = "0.1.0"

__all__ = ["ExactConfig", "ExposureCensus", "WeightTable", "effective_context", "log2_bucket_edges"]
