"""What `exact-megatron train` would do with a configuration on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .looks import effect, problems

if TYPE_CHECKING:  # it needs omegaconf, and the rest of `doctor` does not
    from ...training.schema import RunConfig


def native_run(config: list[str] | None, overrides: list[str], build: bool = False) -> dict[str, Any]:
    """What `exact-megatron train` would do with this configuration on this machine.

    Args:
        build: build the index caches, as the run does, and count its own stream instead of the data in stored order.
    """
    from ...training.config import load_config

    runs: list[RunConfig] = []
    refused = problems(lambda: runs.append(load_config(config, overrides)))
    if refused:
        return {"refused": refused}
    run = runs[0]
    looks = _Looks(run)
    unusable = problems(looks.vocabulary) or problems(looks.lengths)
    refused = unusable + (problems(looks.stream) if build and not unusable else [])
    refused += problems(looks.start) + problems(looks.folder)
    if run.trainer.num_nodes == 1:
        refused += problems(looks.machine)
    else:
        looks.plan["devices"] = f"not looked at: those of {run.trainer.num_nodes} nodes cannot be seen from here"
    data = run.model.data
    masking = (
        "masked by DocumentAttention" if data.document_masking else "not masked: documents in a sample see each other"
    )
    if build:
        found = {"enabled": run.model.exact.enabled, "documents": masking, "window": data.seq_length}
        return {**found, **looks.counted, "plan": looks.plan, "refused": refused}
    return effect(run.model.exact, data.seq_length, looks.prefixes, masking, data.eod_mask_loss, refused)


class _Looks:
    """The looks that a run takes before its model is built, one a method; each raises as the run does.

    Attributes:
        plan: what the run is, in words by name.
        counted: of its own stream, where that was built.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.plan = _plan(run)
        self.counted: dict[str, Any] = {}
        self._vocabulary: Any = None
        self._digests: dict[str, str | None] = {}

    def vocabulary(self) -> None:
        from ...training.data_files import read_vocabulary

        self._vocabulary = read_vocabulary(self.run)
        self.plan["vocabulary"] = f"{self._vocabulary.vocab_size:,} tokens, EOD {self._vocabulary.eod}"

    def lengths(self) -> None:
        from ...training.lengths import check_lengths

        check_lengths(self.run)

    def prefixes(self) -> list[str]:
        from ...training.data_files import data_prefixes

        blends = data_prefixes(self.run)
        blend = blends.get("train") or blends["all"]
        return blend[0] if blend else []

    def stream(self) -> None:
        from ...loss import ExactLoss, gpt_loss
        from ...training.data import build_datasets

        loss = ExactLoss(self.run.model.exact)
        loss.wrap(gpt_loss)
        datasets, builder = build_datasets(self.run, self._vocabulary, loss)
        self._digests.update(builder.digests)
        sizes = [len(dataset) if dataset is not None else 0 for dataset in datasets[:2]]
        self.plan["samples"] = f"{sizes[0]:,} for training, {sizes[1]:,} for validation"
        table = builder.table
        if table is not None:
            facts = {"tau": table.config.tau, "alpha": table.config.alpha, "gamma": table.config.gamma}
            self.counted.update(facts, tail_share=table.tail_share, weighted_tail_share=table.weighted_tail_share)
            weights = [*table.lookup[: min(table.tail[0], 1)], *table.bucket_markers]
            named = ", ".join(f"{n}: {w:.4f}" for n, w in zip(table.part_names, weights))
            self.plan["weights"] = named or "all 1"

    def start(self) -> None:
        from ...training.start import find_start

        found = find_start(self.run, self._vocabulary, self._digests)
        self.plan["start"] = str(found)
        if found.remarks:
            self.plan["to know"] = "; ".join(found.remarks)

    def folder(self) -> None:
        from ...training.run_lock import only_writer

        with only_writer(self.run.exp_manager.exp_dir):  # as the run does; what it makes, it removes
            pass

    def machine(self) -> None:
        from ...training import determinism
        from ...training.model import fuses_gradient_accumulation, transformer_config, uses_transformer_engine
        from ...training.trainer import runs_on_cpu

        if not runs_on_cpu(self.run):
            determinism.check(self.run)
        uses_transformer_engine(self.run)
        fuses_gradient_accumulation(self.run)
        transformer_config(self.run)


def _plan(run: RunConfig) -> dict[str, str]:
    """What a run of the native runner is, in words by name."""
    m, t = run.model, run.trainer
    sizes = ("tensor", m.tensor_model_parallel_size), ("pipeline", m.pipeline_model_parallel_size)
    layout = ", ".join(
        f"{n} {s}" for n, s in (*sizes, ("context", m.context_parallel_size), ("data", run.data_parallel_size))
    )
    return {
        "folder": run.exp_manager.exp_dir,
        "start": "anew",
        "ranks": f"{t.num_nodes} x {t.devices} ({layout}), accelerator {t.accelerator}, precision {t.precision}",
        "steps": f"{t.max_steps:,} of {run.tokens_per_step:,} tokens: {run.num_microbatches} micro-batches of {m.micro_batch_size}",
    }
