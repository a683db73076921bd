"""Small corpora, and a tiny run on random documents of very uneven length, for the tests that train."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 96
SEQ_LENGTH = 64


def write_documents(prefix: Path | str, documents: Iterable[Any], dtype: type = np.uint16) -> str:
    """Write documents, each a sequence of token ids, as PREFIX.bin and PREFIX.idx with Megatron's own builder; returns the prefix."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in documents:
        builder.add_document(torch.from_numpy(np.asarray(tokens, np.int64)), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_data(
    folder: Path,
    name: str = "x",
    seed: int = 11,
    tokens: tuple[int, int] = (1, VOCABULARY),
    eod: int = 0,
    ordinary: int = 60,
) -> str:
    """Documents of 1, 2, S - 1, S, S + 1 and 10 S tokens among `ordinary` short and as many longer ones, each closed by its only EOD;
    returns the prefix.

    Args:
        tokens: the least id, and the one after the last.
    """
    rng = np.random.default_rng(seed)
    s = SEQ_LENGTH
    lengths = [1, 2, s - 1, s, s + 1, 10 * s, *rng.integers(1, 12, ordinary), *rng.integers(1, 3 * s, ordinary)]
    rng.shuffle(lengths)
    return write_documents(folder / name, (np.append(rng.integers(*tokens, n - 1), eod) for n in lengths))


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
