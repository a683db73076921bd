"""Whether the data hold what the steps of a run draw, from the indices alone. numpy only."""

from __future__ import annotations

from itertools import accumulate, pairwise

from ..blend import member_samples, split_tokens
from ..packing import read_index
from .data_files import data_prefixes
from .schema import RunConfig


def check_lengths(run: RunConfig) -> None:
    """Look at the training and validation data of a run as its datasets will be built.

    megatron.core repeats a single prefix, and members with weights, as often as the steps need; ExactDatasetBuilder repeats members
    without weights. What is left to refuse is a part that holds nothing.

    Raises:
        FileNotFoundError, ValueError: see packing.read_index; a split or a member of it holds no token or no sample, or validation is
            asked for and has no share of the data.
    """
    data = run.model.data
    batch = run.model.global_batch_size
    blends = data_prefixes(run)
    shares = [float(part) for part in data.splits_string.replace("/", ",").split(",")]
    ends = [0.0, *accumulate(share / (sum(shares) or 1.0) for share in shares)]
    ratio = [*pairwise(ends), (1.0, 1.0), (1.0, 1.0)]  # of up to three splits
    asked = {"train": run.trainer.max_steps * batch, "validation": run.trainer.limit_val_batches * batch}
    for part, (name, samples) in enumerate(asked.items()):
        blend = blends.get("all") or blends.get(name)
        if not samples or blend is None:
            continue
        split = ratio[part] if "all" in blends else (0.0, 1.0)
        if split[0] == split[1]:
            raise ValueError(
                f"model.data.splits_string={data.splits_string!r} has no share for the {name} split, and the run asks for {samples} "
                "samples of it: give it a share, give it data of its own (model.data.data_prefix), or set "
                + ("trainer.limit_val_batches=0" if part else "trainer.max_steps")
            )
        prefixes, weights = blend
        lengths = [read_index(prefix, run.whole_documents).lengths for prefix in prefixes]
        tokens = [split_tokens(member, split) for member in lengths]
        for prefix, member, own in zip(prefixes, lengths, tokens):
            if not own:
                raise ValueError(
                    f"the {name} split of {prefix} holds no token (of {len(member)} documents, splits_string={data.splits_string!r}): "
                    "give it a larger share, a share of 0, or data of its own"
                )
        if weights is None and len(prefixes) > 1:
            member_samples(prefixes, tokens, samples, data.seq_length, split=name)
