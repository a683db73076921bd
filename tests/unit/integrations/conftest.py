from __future__ import annotations

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig


@pytest.fixture
def config(write_corpus, tmp_path):
    from tests.helpers.references import PositionTokenizer

    prefix = write_corpus(np.array([5, 70, 33, 9, 120, 64, 40, 11, 90], np.int32))
    return GPTDatasetConfig(
        random_seed=3,
        sequence_length=32,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=PositionTokenizer(),
        path_to_cache=str(tmp_path / "cache"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
