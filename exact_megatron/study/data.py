"""Data of a study's runs: the built-in task as .bin/.idx, and its long documents once more for the arm that draws them more often.

python -m exact_megatron.study.data task PREFIX --seed 1 --tokens 700000 ...
python -m exact_megatron.study.data upsample PREFIX --seq-length 1024 --least 256 --share 0.41
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..exposure import ExposureCensus
from ..packing import read_index
from ..utils.files import read_json, write_json
from .task import write_corpus, write_tokenizer


def make_task(prefix: Path, seed: int, tokens: int, median: float, sigma: float, longest: int) -> None:
    """Write a corpus of the built-in task and prepare it to PREFIX.bin, PREFIX.idx, PREFIX.json."""
    from ..prepare import command as prepare

    text, tokenizer = prefix.parent / f"{prefix.name}.jsonl", prefix.parent / "tokenizer"
    write_corpus(text, seed, tokens, median, sigma, longest)
    write_tokenizer(tokenizer)
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    code = prepare.run(
        parser.parse_args([str(text), "--tokenizer", str(tokenizer), "--output", str(prefix), "--overwrite"])
    )
    if code:
        raise SystemExit(code)


def tail_share(lengths: np.ndarray, seq_length: int, least: int, eod_mask_loss: bool) -> float:
    """Share of the supervised targets that see `least` tokens or more, packed in stored order."""
    census = ExposureCensus.from_document_lengths(lengths, seq_length, eod_mask_loss=eod_mask_loss)
    return float(census.counts[least:].sum() / census.targets)


def make_long(prefix: Path, seq_length: int, least: int, share: float, eod_mask_loss: bool) -> dict[str, Any]:
    """Write the documents longer than `least` as PREFIX_long, and solve how much of it a blend needs.

    Args:
        share: of the targets that see `least` tokens or more, wanted in the blend.

    Returns:
        {"blend": [weight, PREFIX, weight, PREFIX_long], "share": in PREFIX, "share of long": in PREFIX_long}

    Raises:
        ValueError: no mixture of the two reaches the share.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    index = read_index(str(prefix))
    lengths = np.array(index.lengths)
    chosen = np.flatnonzero(lengths > least)
    long = Path(f"{prefix}_long")
    before = tail_share(lengths, seq_length, least, eod_mask_loss)
    after = tail_share(lengths[chosen], seq_length, least, eod_mask_loss) if len(chosen) else 0.0
    if not before <= share <= after:
        raise ValueError(
            f"{prefix}: {before:.4g} of the targets see {least} tokens or more, {after:.4g} among documents longer than that: no mixture "
            f"of the two reaches {share:.4g}"
        )
    data = IndexedDataset(str(prefix))
    builder = IndexedDatasetBuilder(f"{long}.bin", dtype=index.dtype.type)
    for number in chosen:
        document = torch.from_numpy(np.array(data[int(number)]))
        builder.add_document(document, [len(document)])
    builder.finalize(f"{long}.idx")
    write_json(Path(f"{long}.json"), read_json(f"{prefix}.json"))
    weight = (share - before) / (after - before)
    found = {
        "blend": [round(1 - weight, 6), str(prefix), round(weight, 6), str(long)],
        "share": before,
        "share of long": after,
        "wanted": share,
    }
    write_json(Path(f"{long}.blend.json"), found)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m exact_megatron.study.data", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    task = kinds.add_parser("task")
    for name, kind in (("seed", int), ("tokens", int), ("median", float), ("sigma", float), ("longest", int)):
        task.add_argument(f"--{name}", type=kind, required=True)
    upsample = kinds.add_parser("upsample")
    for name, kind in (("seq-length", int), ("least", int), ("share", float)):
        upsample.add_argument(f"--{name}", type=kind, required=True)
    upsample.add_argument("--eod-mask-loss", action="store_true")
    for sub in (task, upsample):
        sub.add_argument("prefix", type=Path)
    args = vars(parser.parse_args(arguments))
    kind = args.pop("kind")
    if kind == "task":
        make_task(**args)
    else:
        print(json.dumps(make_long(**args)))


if __name__ == "__main__":
    main()
