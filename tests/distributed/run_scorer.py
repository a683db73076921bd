"""Run by test_evaluation_models.py: train a tiny model for two steps, score with its checkpoint, compare with the model itself.

run_scorer.py CONFIG OUT [TENSOR_PARALLEL]: with a third argument, only score (the checkpoint is there).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch


def main(config: str, out: str, tensor_parallel: int) -> None:
    from exact_megatron.evaluation.model import Model
    from exact_megatron.evaluation.scorer import MegatronScorer
    from exact_megatron.training.config import load_config
    from exact_megatron.training.trainer import Trainer, shutdown

    run = load_config(config)
    ids = np.random.default_rng(3).integers(0, 90, 50).tolist()
    if tensor_parallel == 1:
        trainer = Trainer(run, progress=False)
        trainer.fit()
        model = trainer.model[0].module.eval()
        with torch.no_grad():  # plain reference: all logits of the real words, then log_softmax
            logits = model(torch.tensor([ids]), torch.arange(50)[None], None)[0, :, :90]
        np.save(f"{out}/reference.npy", torch.log_softmax(logits.double(), -1).numpy())
        shutdown()
        torch.distributed.destroy_process_group()
        import os

        os.environ["MASTER_PORT"] = "0"
    model = Model.at(run.exp_manager.exp_dir)
    assert model.kind == "megatron" and model.window == run.model.data.seq_length
    scorer = MegatronScorer(model.path, "float32", tensor_parallel)
    assert scorer.vocab_size == 90
    if scorer.rank:
        scorer.serve()
    else:
        found = scorer.logprobs(ids, list(range(49)), ids[1:])
        last = scorer.logprobs(ids, [49] * 90, list(range(90)))
        np.savez(f"{out}/scores{tensor_parallel}.npz", found=found, last=last, ids=ids)
    scorer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    Path(sys.argv[2], "done").touch()
