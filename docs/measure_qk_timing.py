"""Query/key timing on and off in GPT-style and LLaMA-style blocks: final losses over seeds, as JSON and a Markdown table.

    exact-megatron prepare stdlib --train-tokenizer 1024 --valid-fraction 0.03 --output runs/qk/data/stdlib
    python docs/measure_qk_timing.py runs/qk/data/stdlib runs/qk/out --seeds 4 --steps 300

Runs that are done are not done again. The arms of a pair share seed, initial weights, data and their order.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

FAMILIES = {
    "GELU, LayerNorm, biases": (
        "model.normalization=layernorm model.activation=gelu model.bias=true model.ffn_hidden_size=256"
    ),
    "SwiGLU, RMSNorm, no biases": (
        "model.normalization=rmsnorm model.activation=fast-swiglu model.bias=false model.ffn_hidden_size=176"
    ),
}
COMMON = """
    trainer.devices=1 trainer.accelerator=cpu trainer.limit_val_batches=32 model.micro_batch_size=4 model.global_batch_size=4
    model.num_layers=4 model.hidden_size=64 model.num_attention_heads=4 model.data.seq_length=256 model.data.num_workers=0
    model.optim.lr=2e-3 model.optim.sched.min_lr=2e-4 exp_manager.create_tensorboard_logger=false
    exp_manager.checkpoint_callback_params.save_top_k=-1
""".split()


def train(overrides: list[str]) -> dict:
    from exact_megatron.training.config import load_config
    from exact_megatron.training.trainer import Trainer, shutdown

    run = load_config(None, overrides)
    trainer = Trainer(run, progress=False)
    if trainer.fit() != "finished":
        raise SystemExit("stopped; the same command goes on")
    shutdown()
    folder = Path(run.exp_manager.exp_dir)
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-25:]
    validation = json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
    parameters = sum(p.numel() for chunk in trainer.model for p in chunk.parameters())
    slowed = trainer.timing.parameters if trainer.timing else 0
    return {
        "training": statistics.fmean(line["lm_loss"] for line in last),
        "validation": validation["validation_loss"],
        "parameters": parameters,
        "slowed": slowed,
    }


def result_file(args: argparse.Namespace, family: str, seed: int, on: bool) -> Path:
    return args.out / f"{family.split(',')[0].lower()}-{'on' if on else 'off'}-{seed}.json"


def settings(args: argparse.Namespace, family: str, seed: int, on: bool) -> list[str]:
    every = args.probe_every if seed == 0 else 0
    return [
        *COMMON,
        *FAMILIES[family].split(),
        f"exp_manager.exp_dir={result_file(args, family, seed, on).with_suffix('')}",
        f"model.data.data_prefix={{train: [{args.data}], validation: [{args.data}_valid]}}",
        f"model.data.index_mapping_dir={args.out}/cache",
        f"trainer.max_steps={args.steps}",
        f"model.optim.sched.warmup_steps={args.steps // 50}",
        f"model.seed={1234 + seed}",
        f"model.qk_timing.enabled={str(on).lower()}",
        f"exp_manager.checkpoint_callback_params.every_n_train_steps={every}",
        f"exp_manager.checkpoint_callback_params.save_last={str(bool(every)).lower()}",
        *args.overrides,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prefix; PREFIX_valid is the held-out text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=4, choices=range(3, 11))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--probe-every", type=int, default=0, help="checkpoints of the first seed, for the probes")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    from rich.progress import track

    from exact_megatron.reporting.style import markdown_table
    from exact_megatron.study.statistics import paired
    from exact_megatron.utils.ranks import be_single_rank

    be_single_rank()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(family, seed, on) for seed in range(args.seeds) for family in FAMILIES for on in (False, True)]
    for family, seed, on in track(jobs, description="runs"):
        file = result_file(args, family, seed, on)
        if not file.is_file():
            file.write_text(json.dumps(train(settings(args, family, seed, on))))
    rows = [["blocks", "loss", "off", "on", "on - off", "pairs"]]
    for family in FAMILIES:
        arms = [
            [json.loads(result_file(args, family, seed, on).read_text()) for seed in range(args.seeds)]
            for on in (False, True)
        ]
        for loss in ("validation", "training"):
            off, on = ([run[loss] for run in arm] for arm in arms)
            pairs = [b - a for a, b in zip(off, on)]
            means = [
                paired(values) for values in (off, on, pairs)
            ]  # mean and interval of any values, with 3 or more seeds
            cells = [f"{m.mean:{sign}.4f} ± {m.half_width:.4f}" for m, sign in zip(means, ("", "", "+"))]
            rows.append([family, loss, *cells, ", ".join(f"{d:+.4f}" for d in pairs)])
        print(f"{family}: {arms[0][0]['parameters']:,} parameters, {arms[1][0]['slowed']:,} of them slowed")
    table = markdown_table(rows, left=[0, 1, 5])
    (args.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
