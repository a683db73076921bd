"""examples/torch: each loop's loss is that of the Megatron path on the same samples."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from exact_megatron.dataset import ExactDatasetBuilder
from exact_megatron.loss import ExactLoss, gpt_loss
from tests.helpers.references import uneven_lengths
from tests.unit.test_dataset import ON, S, dataset_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "torch"
VOCABULARY = 50


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stream(tmp_path, write_corpus):
    """The table, and every sample with tokens below VOCABULARY: tokens, labels, loss_mask, boundaries, whether the document goes on."""
    loss = ExactLoss(ON)
    hooked = loss.wrap(gpt_loss)
    prefix = write_corpus(uneven_lengths(np.random.default_rng(4), S, 60))
    builder = ExactDatasetBuilder(
        GPTDataset, [None, 0, 0], lambda: True, dataset_config(tmp_path, ([prefix], None)), exact=ON, loss=loss
    )
    (train, _, _) = builder.build()
    samples = []
    for i in range(len(train)):
        sample = train[i]
        cu, goes_on = train.segments(i)
        samples.append(
            (sample["tokens"] % VOCABULARY, sample["labels"] % VOCABULARY, sample["loss_mask"], cu.tolist(), goes_on)
        )
    assert any(goes_on for *_, goes_on in samples) and len(samples) > 20
    return builder.table, hooked, samples


def positions(cu):
    return torch.cat([torch.arange(end - start) for start, end in zip(cu, cu[1:])])


def megatron_loss(hooked, samples, logits):
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.stack([labels for _, labels, *_ in samples]), reduction="none"
    )
    total, count, _ = hooked(torch.stack([mask for _, _, mask, *_ in samples]), losses)
    return total / count


def test_plain_loop_and_torchtitan(stream):
    table, hooked, samples = stream
    model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, VOCABULARY))
    ended = [sample for sample in samples if not sample[-1]]  # torchtitan does not know of the others
    for name, rows in (("plain_loop", samples), ("torchtitan_loss", ended)):
        tokens, labels = (torch.stack([row[part] for row in rows]) for part in (0, 1))
        logits = model(tokens)
        if name == "plain_loop":
            ends = [0, *[number * S + end for number, (*_, cu, _) in enumerate(rows) for end in cu[1:]]]
            batch = {"input_ids": tokens, "labels": labels, "cu_seqlens": torch.tensor(ends)}
            batch["continues"] = torch.tensor([goes_on for *_, goes_on in rows])
            loss = example(name).loss_of(model, batch, table)
        else:
            ids = torch.stack([positions(cu) for *_, cu, _ in rows])
            loss = example(name).exact_loss(logits, labels, ids, table) / labels.numel()
        torch.testing.assert_close(loss, megatron_loss(hooked, rows, logits))


def test_hugging_face(stream, tmp_path):
    """Its rows hold the last label as an input too, so that the end of a sample needs no more to be known."""
    transformers = pytest.importorskip("transformers", reason="pip install exact-megatron[hf]")
    table, hooked, samples = stream
    samples = samples[:6]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = example("hugging_face").ExactTrainer(model=model, args=arguments)
    trainer.table = table
    rows = torch.stack([torch.cat([tokens, labels[-1:]]) for tokens, labels, *_ in samples])
    ids = torch.stack([torch.cat([p := positions(cu), (p[-1:] + 1) * goes_on]) for *_, cu, goes_on in samples])
    inputs = {"input_ids": rows, "labels": rows.clone(), "position_ids": ids}
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
    torch.testing.assert_close(loss, megatron_loss(hooked, samples, outputs.logits[:, :-1].float()))
    torch.testing.assert_close(
        trainer.compute_loss(model, dict(inputs), num_items_in_batch=100), loss * len(samples) * S / 100
    )
