"""What every host does alike: what EXACT says, builds, saves and guards at a resume in one run of it.

A new host is a module beside this one. It supplies

* `Words`: what its users call things;
* tables of what is rejected (refusals.py), which it hands to `refuse` before the first step;
* a `Host`, or a subclass of it, with `masking` and `seq_length`;

and puts these into the host's own code, for example with hooks.replaced:

* `host.loss.wrap(loss_func)` around the loss function, before data are built;
* `functools.partial(HostBuilder, host)` in place of BlendedMegatronDatasetBuilder;
* where EXACT masks the documents: `host.masking_init(GPTModel.__init__)` or `host.build_masked` where the model is built, and
  documents.feed_documents around the forward step;
* `host.ready()` before a step, and `host.loss.check()` at the end of training;
* `host.saving(save)` around what writes a checkpoint, which stores `host.entry`; `host.guard(entry)` where a checkpoint is read, also in
  runs that do not enable EXACT.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.document_attention import DocumentAttention
from ..config import ExactConfig, ExactError
from ..dataset import ExactDatasetBuilder, members
from ..loss import ExactLoss
from .checkpoint_guard import check_resumed, refuse_unweighted, table_lines
from .documents import check_masked, masking_documents

UNWEIGHTED = "training is about to start on data that EXACT did not weight"
DENSE_MASKS = ("reset_attention_mask", "create_attention_mask", "inter_document_masking")  # fields of GPTDatasetConfig


@dataclass(frozen=True)
class Words:
    """What the users of a host call things.

    Attributes:
        hooked: the parts of the host that are hooked.
        anew: how a run starts from a checkpoint's weights alone.
        ask: the option that asks for masked documents.
        masked, unmasked: the line of a run whose documents EXACT masks, or nobody.
    """

    hooked: str
    anew: str
    ask: str
    masked: str = "masked by DocumentAttention"
    unmasked: str = "not masked: documents in a sample see each other (model.exact.allow_unmasked_documents=true)"


class Host:
    """EXACT in one run of a host.

    Attributes:
        masking: whether EXACT masks the documents; the host sets it, or a property does, before data and model are built.
        seq_length: S, alike.
        config: the settings.
        words: the host's.
        loss: the hook in its loss.
        entry: what its checkpoints hold under `exact`, plain values; empty until the data are built.
        weighted: whether weighted data were built.
        masked: whether a model with DocumentAttention was built.
    """

    masking: bool
    seq_length: int

    def __init__(self, config: ExactConfig, words: Words) -> None:
        self.config = config
        self.words = words
        self.loss = ExactLoss(config)
        self.entry: dict[str, Any] = {}
        self.weighted = False
        self.masked = False
        self._resumed: Mapping[str, Any] | None = None

    def reads_tokens(self, is_built_on_rank: Callable[[], bool]) -> bool:
        """Whether this rank needs whole samples; the others get boundaries alone, where EXACT masks the documents."""
        return is_built_on_rank()

    def masking_line(self) -> str:
        return self.words.masked if self.masking else self.words.unmasked

    def notes(self) -> list[str]:
        """Lines below the weights, "note        ..."."""
        return []

    def built(self, builder: ExactDatasetBuilder) -> None:
        """When the data are built, on every rank: compare them with the checkpoint, and say once what is hooked."""
        assert builder.table is not None and builder.census is not None
        self.entry = {**self.config.to_dict(), "table": builder.table.digest, "census": builder.census.digest}
        self.guard(self._resumed)
        if not self.weighted:
            hooked, masking = f"hooked      {self.words.hooked}", f"masking     {self.masking_line()}"
            say("\n  ".join(["EXACT", hooked, masking, *table_lines(builder.table), *self.notes()]))
        self.weighted = True

    def guard(self, entry: Mapping[str, Any] | None) -> None:
        """Compare the entry of the checkpoint that this run goes on from; data that are built later are compared then.

        Raises:
            ValueError: it was trained with other weights, or with weights where this run has none, and that is not accepted.
        """
        self._resumed = entry
        refuse_unweighted(entry, self.config, self.words.anew)
        if self.entry:
            check_resumed(entry, self.entry, self.config, self.words.anew)

    def ready(self) -> None:
        """Before a step.

        Raises:
            ExactError: its data are not weighted, or its model does not mask the documents that EXACT is to mask.
        """
        if not self.weighted:
            raise ExactError(UNWEIGHTED)
        if self.masking and not self.masked:
            raise ExactError(
                "documents were to be masked, but no GPTModel was built: EXACT masks documents in GPTModel only. Accept unmasked "
                f"documents with model.exact.allow_unmasked_documents=true and without {self.words.ask}"
            )

    def build_masked(self, build: Callable[[], Any], attention: type[DocumentAttention] = DocumentAttention) -> Any:
        """Return the model that `build` makes, with `attention` in its layers, looked at; as it is where EXACT masks nothing."""
        if not self.masking:
            return build()
        with masking_documents(attention):
            model = build()
        check_masked(model, self.seq_length)
        self.masked = True
        return model

    def masking_init(self, init: Callable[..., None]) -> Callable[..., None]:
        """Return `GPTModel.__init__`, see build_masked."""

        @functools.wraps(init)
        def built(model: Any, *args: Any, **kwargs: Any) -> None:
            def build() -> Any:
                init(model, *args, **kwargs)
                return model

            self.build_masked(build)

        return built

    def saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that writes a checkpoint, after a look at the weights of the batches so far."""

        @functools.wraps(save)
        def saved(*args: Any, **kwargs: Any) -> Any:
            self.loss.check()
            return save(*args, **kwargs)

        return saved


class HostBuilder(ExactDatasetBuilder):
    """What a host calls in place of BlendedMegatronDatasetBuilder, after `functools.partial(HostBuilder, host)`.

    Where EXACT masks the documents, every rank gets boundaries, and the config that the samples see asks for no dense masks; the
    host's own config is left as it is, since some save it.
    """

    def __init__(self, host: Host, cls: Any, sizes: Any, is_built_on_rank: Callable[[], bool], config: Any) -> None:
        self.host = host
        self.boundaries_only = False
        if host.masking:
            config = copy.copy(config)
            for name in [name for name in DENSE_MASKS if hasattr(config, name)]:
                setattr(config, name, False)
            self.boundaries_only = not host.reads_tokens(is_built_on_rank)
            is_built_on_rank = _everywhere
        super().__init__(
            cls, sizes, is_built_on_rank, config, exact=host.config, loss=host.loss, emit_cu_seqlens=host.masking
        )

    def weight(self, datasets: list[Any]) -> list[Any]:
        datasets = super().weight(datasets)
        for member in members(datasets):
            member.boundaries_only = self.boundaries_only
        self.host.built(self)
        return datasets


def _everywhere() -> bool:
    return True


def averages(eod: str, per_token: str) -> str:
    """The note of a run that masks the loss at EOD, in the host's names of options, and lets micro-batches count alike."""
    return f"note        {eod} without {per_token} averages over micro-batches, not targets"


def say(line: str) -> None:
    """Print for all ranks: on rank 0."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if (torch.distributed.get_rank() if initialized else int(os.environ.get("RANK", 0))) == 0:
        print(line, flush=True)
