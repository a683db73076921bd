"""A tiny run on random documents of very uneven length, for the tests that train."""

from __future__ import annotations

from pathlib import Path

import numpy as np

VOCABULARY = 96
SEQ_LENGTH = 64


def write_data(folder: Path, ordinary: int = 60) -> str:
    """Documents of 1, 2, S - 1, S, S + 1 and 10 S tokens among `ordinary` short and as many longer ones, each closed by EOD (0)."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(11)
    s = SEQ_LENGTH
    lengths = [1, 2, s - 1, s, s + 1, 10 * s, *rng.integers(1, 12, ordinary), *rng.integers(1, 3 * s, ordinary)]
    rng.shuffle(lengths)
    prefix = str(folder / "x")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for n in lengths:
        builder.add_document(torch.from_numpy(np.append(rng.integers(1, VOCABULARY, n - 1), 0)), [int(n)])
    builder.finalize(prefix + ".idx")
    return prefix


def config_file(folder: Path, prefix: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(
        f"""
trainer: {{devices: 1, accelerator: cpu, max_steps: 4, log_every_n_steps: 1}}
exp_manager: {{exp_dir: {folder}/run, create_tensorboard_logger: false}}
model:
  global_batch_size: 8
  num_layers: 4
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  make_vocab_size_divisible_by: 32
  override_vocab_size: {VOCABULARY}
  data:
    data_prefix: [{prefix}]
    splits_string: "90,10,0"
    index_mapping_dir: {folder}/cache
    seq_length: {SEQ_LENGTH}
    eod_id: 0
    eod_mask_loss: true
    num_workers: 0
  optim: {{lr: 5e-3, sched: {{warmup_steps: 0, min_lr: 1e-3}}}}
  exact: {{enabled: true, alpha: 0.5, tau: 16}}
"""
    )
    return path
