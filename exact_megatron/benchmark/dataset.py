"""The census against Megatron's own index build, and a sample against the stock one."""

from __future__ import annotations

import argparse
import copy
import tempfile
import tracemalloc

import numpy as np

from .arms import Arm, prove_arms
from .harness import SEED, Measured, Row, compare_arms, interleaved
from .synthetic import VOCABULARY, benchmark_corpus, document_lengths, write_corpus


def measure_census(args: argparse.Namespace) -> Measured:
    """ExposureCensus.from_document_lengths against Megatron's indices for the same documents."""
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    from ..exposure import ExposureCensus

    lengths = document_lengths(args.documents)
    tokens = int(lengths.sum(dtype=np.int64))
    documents = np.arange(len(lengths), dtype=np.int32)

    def indices(_: int = 0) -> np.ndarray:
        state = np.random.RandomState(SEED)
        order = _build_document_index(documents, 1, state, False)
        samples = len(helpers.build_sample_idx(lengths, order, args.seq_length, 1, tokens, True, True)) - 1
        _build_shuffle_index(samples, samples, state)
        return order

    order = indices()

    def census(_: int = 0) -> ExposureCensus:
        return ExposureCensus.from_document_lengths(lengths, args.seq_length, document_index=order)

    samples = census().samples
    seconds = interleaved({"census": census, "indices": indices}, args.repeats)
    mib: list[float] = []
    for arm in (census, indices):
        tracemalloc.start()
        arm()
        mib.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    setup = (
        f"{benchmark_corpus(len(lengths), args.seq_length)}, {tokens:,} tokens in {samples:,} samples, {args.repeats} "
        "runs an arm; reference: Megatron's _build_document_index, build_sample_idx, _build_shuffle_index; "
        "extra memory: peak by tracemalloc, which does not see what Megatron's C++ takes"
    )
    memory = Row("extra memory", mib[0], mib[1], "MiB", mib[0] / mib[1], "own <= 256 MiB", mib[0] <= 256)
    return {"setup": setup}, [compare_arms("census", seconds["census"], seconds["indices"], "s", 0.5), memory]


def measure_getitem(args: argparse.Namespace) -> Measured:
    """A weighted sample with document boundaries against the stock dataset's."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from ..loss import ExactLoss, gpt_loss
    from ..training.config import load_config
    from ..training.data import build_datasets
    from ..training.data_files import Vocabulary

    few = min(3, args.samples)
    with tempfile.TemporaryDirectory() as folder:
        documents = len(write_corpus(f"{folder}/corpus", args.samples * args.seq_length + 1))
        settings = load_config(
            None,
            [
                f"model.data.data_prefix=[{folder}/corpus]",
                "model.data.splits_string=1",
                f"model.data.index_mapping_dir={folder}/cache",
                f"model.data.seq_length={args.seq_length}",
                f"trainer.max_steps={args.samples}",
                "model.global_batch_size=1",
                "model.exact.enabled=true",
            ],
        )
        loss = ExactLoss(settings.model.exact)
        hooked = loss.wrap(gpt_loss)
        (exact, _, _), _ = build_datasets(settings, Vocabulary(VOCABULARY, eod=0), loss)
        flags = copy.copy(exact.config)
        flags.reset_position_ids = flags.reset_attention_mask = flags.create_attention_mask = True
        stock, reset = (
            BlendedMegatronDatasetBuilder(GPTDataset, [args.samples, 0, 0], lambda: True, config).build()[0]
            for config in (exact.config, flags)
        )
        proof = prove_arms(Arm(exact, hooked), Arm(stock, gpt_loss), 1)
        # Half the corpus apart, so that no arm finds its tokens in the processor's cache by the other's work.
        arms = {"exact": exact.__getitem__, "stock": lambda i: stock[(i + args.samples // 2) % args.samples]}
        interleaved(arms, args.samples)
        fast = interleaved(arms, args.samples)
        slow = interleaved({"exact": exact.__getitem__, "reset": reset.__getitem__}, few)
    setup = (
        f"{benchmark_corpus(documents, args.seq_length)}, in the page cache; EXACT gives weights and cu_seqlens; "
        f"{args.samples:,} samples an arm, {few} with reset_position_ids and reset_attention_mask"
    )
    return {"setup": setup, "arms": proof}, [
        compare_arms("against stock", fast["exact"] * 1e3, fast["stock"] * 1e3, "ms", 1.25),
        compare_arms("against reset flags", slow["exact"] * 1e3, slow["reset"] * 1e3, "ms", 0.05),
    ]
