"""How sharp each layer attends, and how much it writes to the residual stream, over the checkpoints of runs: JSON and a picture.

    python -m exact_megatron.evaluation.attention_probes RUN_DIR [RUN_DIR ...] --json FILE --plot FILE

The quantities of arXiv 2605.10504: sharp attention in upper layers early in training is the failure that `model.qk_timing` is for,
and the paper bounds its growth along a path by a step-size factor (here: the learning rate of the query and key projections) and
a residual-energy factor (here: the norm of what the layers write). How the paper averages them is not known here; see `Probe`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.ranks import ONE_RANK

MEASURES = {
    "entropy": "attention entropy (nats)",
    "largest": "largest attention weight",
    "attention_write": "norm of attention's write",
    "mlp_write": "norm of the MLP's write",
}
_ROWS = 512  # queries at a time: the weights of all heads take 4 * heads * _ROWS * length bytes


def attention_sharpness(query: Tensor, key: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Entropy and largest weight of causal attention within one document.

    Args:
        query: [n, heads, d]. key: [n, kv_heads, d]. scale: of the scores, None for 1 / sqrt(d).

    Returns:
        float32[n, heads] entropy in nats, and float32[n, heads] largest weight. The first token sees itself alone: 0 and 1.
    """
    n, heads, d = query.shape
    q = query.float().transpose(0, 1) * (d**-0.5 if scale is None else scale)
    k = key.float().transpose(0, 1).repeat_interleave(heads // key.shape[1], 0)
    entropy, largest = [], []
    for start in range(0, n, _ROWS):
        stop = min(start + _ROWS, n)
        scores = q[:, start:stop] @ k[:, :stop].transpose(1, 2)
        seen = torch.arange(stop, device=q.device) <= torch.arange(start, stop, device=q.device)[:, None]
        log_weights = scores.masked_fill(~seen, -math.inf).log_softmax(-1)
        weights = log_weights.exp()
        entropy.append(-(weights * log_weights.masked_fill(~seen, 0)).sum(-1))
        largest.append(weights.amax(-1))
    return torch.cat(entropy, 1).T, torch.cat(largest, 1).T


class Probe:
    """Sums over the tokens that pass through a model's layers.

    Per layer: entropy and largest weight, means over heads and over the tokens that see at least two; the L2 norm of what attention
    and the MLP add to the residual stream, means over all tokens.
    """

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, list[float]]] = {}

    def _add(self, layer: int, measure: str, values: Tensor) -> None:
        entry = self.sums.setdefault(layer, {}).setdefault(measure, [0.0, 0])
        entry[0] += float(values.double().sum())
        entry[1] += values.numel()

    @contextmanager
    def watching(self, layers: Any) -> Iterator[None]:
        """Measure every forward pass through these layers of megatron.core within the block."""
        handles = []
        for layer in layers:
            number, attention = layer.layer_number, layer.self_attention
            attend = self._attention(number)
            write = self._write(number, "attention_write")
            handles.append(attention.core_attention.register_forward_pre_hook(attend, with_kwargs=True))
            handles.append(attention.register_forward_hook(write))
            handles.append(layer.mlp.register_forward_hook(self._write(number, "mlp_write")))
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _attention(self, number: int) -> Any:
        def hook(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query, key = args[:2]
            s, b = query.shape[:2]
            packed = kwargs.get("packed_seq_params")
            ends = range(0, s * b + 1, s) if packed is None else packed.cu_seqlens_q.tolist()
            flat_query, flat_key = (t.transpose(0, 1).flatten(0, 1) for t in (query, key))
            for start, stop in pairwise(ends):
                if stop - start > 1:
                    values = attention_sharpness(flat_query[start:stop], flat_key[start:stop], core.softmax_scale)
                    for measure, value in zip(("entropy", "largest"), values):
                        self._add(number, measure, value[1:])

        return hook

    def _write(self, number: int, measure: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor | None]) -> None:
            output, bias = result
            self._add(number, measure, (output if bias is None else output + bias).float().norm(dim=-1))

        return hook

    def means(self) -> dict[str, list[float]]:
        """{measure: [first layer, ..., last layer]}"""
        return {m: [self.sums[n][m][0] / max(self.sums[n][m][1], 1) for n in sorted(self.sums)] for m in MEASURES}


def probe_run(run_dir: str | Path, batches: int, overrides: list[str]) -> dict[str, Any]:
    """Probe every checkpoint of a run of the native runner, on one rank and always on the same held-out (or else training) samples.

    Returns:
        {"run", "layers", "slowed": [numbers], "steps": [of the checkpoints], measure: [checkpoint][layer], "rate", "slowed_rate":
        [step]}; the rates are the learning rate of every step of the run, without and with model.qk_timing's factor.

    Raises:
        FileNotFoundError: no run, or no checkpoints. ValueError: settings that do not fit, see load_config.
    """
    from rich.progress import track

    from ..training import checkpoint, checkpoint_files, checkpoint_state
    from ..training.config import load_config
    from ..training.data import build_loader
    from ..training.trainer import Trainer, shutdown

    found = checkpoint_files.checkpoints(run_dir)
    if not found:
        raise FileNotFoundError(
            f"{run_dir} has no checkpoints: keep them with exp_manager.checkpoint_callback_params.save_top_k=-1"
        )
    forced = [f"exp_manager.exp_dir={run_dir}", f"trainer.limit_val_batches={batches}", *ONE_RANK, *overrides]
    run = load_config(Path(run_dir) / "config.yaml", forced)
    trainer = Trainer(run, progress=False)
    timing, layers = run.model.qk_timing, run.model.num_layers
    data = trainer.train_data if trainer.valid_data is None else trainer.valid_data
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        "run": str(run_dir),
        "layers": layers,
        "slowed": [n for n in range(1, layers + 1) if timing.enabled and timing.touches(n, layers)],
        "rate": [line["learning_rate"] for line in lines],
        "slowed_rate": [line["learning_rate"] * line.get("qk_factor", 1.0) for line in lines],
        **{key: [] for key in ("steps", *MEASURES)},
    }
    for path in track(found, description=Path(run_dir).name):
        checkpoint_files.refuse_damaged(path)
        step = checkpoint_state.read_state(path)["step"]
        checkpoint.load_weights(path, trainer.model)
        probe = Probe()
        loader = iter(build_loader(run, data, trainer.vocabulary, consumed=0))
        for chunk in trainer.model:
            chunk.eval()
        with probe.watching([layer for chunk in trainer.model for layer in chunk.module.decoder.layers]):
            for _ in range(batches):
                trainer.run_schedule(loader, trainer.measure_func, forward_only=True)
        for key, value in probe.means().items():
            result[key].append(value)
        result["steps"].append(step)
    shutdown()
    return result


def plot(runs: list[dict[str, Any]], path: str | Path) -> None:
    """A column for each run and a row for each measure; a line for each layer, upper layers darker."""
    import matplotlib

    from ..reporting.style import new_figure, plain_axes

    figure = new_figure(5 * len(runs), 13, "Attention and residual writes by layer")
    grid = figure.subplots(len(MEASURES) + 1, len(runs), sharex="col", sharey="row", squeeze=False)
    shades = matplotlib.colormaps["viridis_r"]
    for column, run in enumerate(runs):
        for row, (measure, label) in enumerate(MEASURES.items()):
            axes = grid[row][column]
            for layer in range(run["layers"]):
                color = shades(0.1 + 0.9 * layer / max(run["layers"] - 1, 1))
                values = [at_step[layer] for at_step in run[measure]]
                axes.plot(run["steps"], values, color=color, label=f"layer {layer + 1}", marker=".", linewidth=1.4)
            axes.set_ylabel(label if column == 0 else "")
            plain_axes(axes)
        axes = grid[-1][column]
        axes.plot(range(1, len(run["rate"]) + 1), run["rate"], color="#666666", label="other parameters")
        if run["slowed"]:
            label = f"queries and keys of layers {run['slowed'][0]}-{run['slowed'][-1]}"
            axes.plot(range(1, len(run["rate"]) + 1), run["slowed_rate"], color="#b03060", linestyle="--", label=label)
        axes.set_ylabel("learning rate" if column == 0 else "")
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=8)
        plain_axes(axes)
        grid[0][column].set_title(Path(run["run"]).name)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", help="exp_manager.exp_dir of a run with its checkpoints kept"
    )
    parser.add_argument("--batches", type=int, default=4, help="global batches of held-out text for each checkpoint")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="an override of the run's config"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", metavar="FILE", help="draw them (PNG, SVG or PDF)")


def run(args: argparse.Namespace) -> int:
    """Probe the runs one after another; refused where several ranks were started."""
    from ..utils.files import write_text
    from ..utils.ranks import be_single_rank, is_rank

    if is_rank():
        raise ValueError("the probes are one rank: start them without torchrun or srun")
    if args.batches < 1:
        raise ValueError(f"--batches {args.batches} must be at least 1")
    if args.plot:
        from ..reporting.style import picture_name

        picture_name(args.plot)  # before the probes, which take minutes
    be_single_rank()
    results = [probe_run(run_dir, args.batches, args.set) for run_dir in args.runs]
    torch.distributed.destroy_process_group()
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)
    for result in results:
        print(f"{result['run']}: {len(result['steps'])} checkpoints, steps {result['steps'][0]}-{result['steps'][-1]}")
        for measure, label in MEASURES.items():
            print(f"  {label:<28}" + "  ".join(f"{value:8.3f}" for value in result[measure][-1]))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
