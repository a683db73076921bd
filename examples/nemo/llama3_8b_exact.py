"""NeMo 2's recipe for Llama 3 8B, with EXACT at a window of 16K: python llama3_8b_exact.py PREFIX TOKENIZER [--alpha 0.15]

PREFIX is that of a .bin/.idx pair, TOKENIZER a Hugging Face tokenizer. --alpha 0 is the baseline of a comparison.
"""

import argparse

import nemo_run as run
from nemo.collections import llm
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

from exact_megatron.integrations.nemo_recipes import ExactCallback, ExactDataset


def recipe(prefix: str, tokenizer: str, alpha: float) -> run.Partial:
    pretrain = llm.llama3_8b.pretrain_recipe(name="llama3_8b_exact", num_nodes=1, num_gpus_per_node=8)
    pretrain.data = run.Config(
        PreTrainingDataModule,
        paths=[prefix],
        seq_length=16384,
        micro_batch_size=1,
        global_batch_size=64,
        tokenizer=run.Config(AutoTokenizer, tokenizer),
        split="99,1,0",
        reset_attention_mask=True,  # asks for document masking
        dataset_cls=ExactDataset,
    )
    pretrain.model.config.seq_length = 16384
    pretrain.trainer.callbacks.append(run.Config(ExactCallback, alpha=alpha))
    return pretrain


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix")
    parser.add_argument("tokenizer")
    parser.add_argument("--alpha", type=float, default=0.15)
    given = parser.parse_args()
    run.run(
        recipe(given.prefix, given.tokenizer, given.alpha),
        executor=run.LocalExecutor(ntasks_per_node=8, launcher="torchrun"),
    )
