"""Rank script: run each job of a JSON file in turn with query/key timing and write the metrics of its steps.

A job is {"name", "overrides": [...], "steps": n, "save": bool, "first": bool, "reference": bool}; results go to OUT/NAME.json from
rank 0. "first" compares the first update with that of a run without timing, row by row, in the optimizer's masters; "reference"
trains a twin with separate projections in torch parameter groups beside the run and compares all parameters after every step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

SCALE = 0.25


def masters(trainer):
    """{name: (flat copy of what the optimizer updates, its start in the parameter, the parameter, its layer or None)}."""
    from exact_megatron.qk_timing import _mains

    found = {}
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        by_parameter = {id(p): (main, start) for p, main, start in _mains(part)}
        for i, chunk in enumerate(trainer.model):
            layers = {f"decoder.layers.{j}.": layer for j, layer in enumerate(chunk.module.decoder.layers)}
            for name, p in chunk.module.named_parameters():
                layer = next((layer for prefix, layer in layers.items() if name.startswith(prefix)), None)
                if id(p) in by_parameter:
                    main, start = by_parameter[id(p)]
                    found[f"{i}.{name}"] = (main.detach().flatten().clone(), start, p, layer)
    return found


def is_query_or_key(parameter, layer, config):
    """bool mask of the parameter, by the shape that attention splits it in."""
    groups = config.num_query_groups // config.tensor_model_parallel_size
    heads = config.num_attention_heads // config.num_query_groups
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    if layer.layer_number > config.num_layers / 2:
        mask.view(groups, heads + 2, -1)[:, : heads + 1] = True
    return mask.flatten()


def check_first_update(before, without, after, config, gathered_later):
    """after = before + SCALE * (without - before) in the rows of queries and keys, and bitwise `without` everywhere else."""
    counts = {"slowed": 0, "cut": 0}
    for name, (new, start, parameter, layer) in after.items():
        old, plain = before[name][0], without[name][0]
        slow = torch.zeros(len(new), dtype=torch.bool)
        if "linear_qkv.weight" in name or "linear_qkv.bias" in name:
            whole = is_query_or_key(parameter, layer, config)
            slow = whole[start : start + len(new)]
            columns = parameter.shape[1] if parameter.dim() > 1 else 1
            counts["cut"] += bool(start % columns) or bool(len(new) % columns)
        assert torch.equal(new[~slow], plain[~slow]), name
        torch.testing.assert_close(new[slow], (old + SCALE * (plain - old))[slow], rtol=1e-6, atol=1e-8)
        if slow.any():
            assert not torch.equal(new[slow], plain[slow]) and not torch.equal(new[slow], old[slow])
        if not gathered_later:
            mine = parameter.detach().flatten()[start : start + len(new)]
            assert torch.equal(mine, new.to(mine.dtype)), name
        counts["slowed"] += int(slow.sum())
    return counts


class SeparateProjections(torch.nn.Module):
    """linear_qkv's weight or bias from separate ones."""

    def __init__(self, groups, heads):
        super().__init__()
        self.groups, self.heads = groups, heads

    def forward(self, *parts):
        rest = parts[0].shape[1:]
        return torch.cat([part.view(self.groups, -1, *rest) for part in parts], 1).flatten(0, 1)

    def right_inverse(self, fused):
        by_head = fused.view(self.groups, self.heads + 2, -1, *fused.shape[1:])
        parts = by_head.split([self.heads, 1, 1], dim=1)
        return tuple(part.reshape(-1, *fused.shape[1:]).clone() for part in parts)


class Twin:
    """The run's model with separate projections, torch's AdamW and parameter groups, on the same batches."""

    def __init__(self, run, trainer):
        from exact_megatron.training.data import build_loader
        from exact_megatron.training.model import build_model

        self.run = run
        self.model = build_model(run, trainer.vocabulary.vocab_size, trainer.device)[0].module
        self.model.load_state_dict(trainer.model[0].module.state_dict())
        for module in self.model.modules():  # leave DDP's hooks behind
            for name, p in module._parameters.items():
                module._parameters[name] = p if p is None else torch.nn.Parameter(p.detach().clone())
        m = run.model
        slow = set()
        for layer in self.model.decoder.layers:
            linear = layer.self_attention.linear_qkv
            for name in ("weight", "bias"):
                split = SeparateProjections(m.num_query_groups, m.num_attention_heads // m.num_query_groups)
                torch.nn.utils.parametrize.register_parametrization(linear, name, split)
                query, key, _ = (getattr(linear.parametrizations[name], f"original{i}") for i in range(3))
                if layer.layer_number > m.num_layers / 2:
                    slow |= {id(query), id(key)}
        groups = {}
        for p in self.model.parameters():
            groups.setdefault((id(p) in slow, p.dim() > 1), []).append(p)
        assert len(groups) == 4
        self.slow = [key[0] for key in groups]
        groups = [{"params": ps, "weight_decay": m.optim.weight_decay * key[1]} for key, ps in groups.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=tuple(m.optim.betas), eps=m.optim.eps)
        self.loader = iter(build_loader(run, trainer.train_data, trainer.vocabulary, 0))
        self.device = trainer.device

    def step(self, rate, factor):
        from exact_megatron.training.data import get_batch

        total, targets = 0.0, 0
        for _ in range(self.run.num_microbatches):
            batch, packed = get_batch(self.loader, self.device, True)
            losses = self.model(
                batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed
            )
            total, targets = total + (losses * batch["loss_mask"]).sum(), targets + int(batch["loss_mask"].sum())
        self.optimizer.zero_grad()
        (total / targets).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.trainer.gradient_clip_val)
        for group, slow in zip(self.optimizer.param_groups, self.slow):
            group["lr"] = rate * factor if slow else rate
        self.optimizer.step()

    def difference(self, model):
        """Largest absolute difference of any parameter."""
        worst = 0.0
        modules = dict(self.model.named_modules())
        for name, p in model.named_parameters():
            owner, _, last = name.rpartition(".")
            worst = max(worst, float((getattr(modules[owner], last) - p).abs().max()))
        return worst


def main() -> None:
    from exact_megatron.training.config import load_config
    from exact_megatron.training.data import build_loader
    from exact_megatron.training.trainer import Trainer, shutdown
    from tests.helpers.groups import share_process_groups

    config, jobs, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(1)
    share_process_groups()
    for job in jobs:
        run = load_config(config, [f"exp_manager.exp_dir={out}/runs/{job['name']}", *job["overrides"]])
        result = {}
        if job.get("first"):
            trainer = Trainer(run, progress=False)
            trainer.timing = None
            before = masters(trainer)
            trainer.train_step(iter(build_loader(run, trainer.train_data, trainer.vocabulary, 0)))
            without = masters(trainer)
            shutdown()
        trainer = Trainer(run, progress=False)
        consumed = trainer.step * run.model.global_batch_size
        loader = iter(build_loader(run, trainer.train_data, trainer.vocabulary, consumed))
        twin = Twin(run, trainer) if job.get("reference") else None
        lines, hooks = [], []
        for step in range(job["steps"]):
            lines.append(trainer.train_step(loader))
            if trainer.timing is not None:
                hooks.append(len(trainer.timing._handles))
            if step == 0 and job.get("first"):
                later = run.model.optim.overlap_param_sync
                result = check_first_update(before, without, masters(trainer), trainer.model[0].config, later)
            if twin is not None:
                twin.step(lines[-1]["learning_rate"], job["factors"][step])
                result.setdefault("difference", []).append(twin.difference(trainer.model[0].module))
        if job.get("save"):
            trainer.save()
        if trainer.timing is not None:
            t = trainer.timing
            result.update(parameters=t.parameters, layers=t.layers, held_bytes=t.held_bytes, line=t.describe())
        everywhere = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, result)
        if torch.distributed.get_rank() == 0:
            text = json.dumps({"lines": lines, "hooks": hooks, "ranks": everywhere})
            (out / f"{job['name']}.json").write_text(text)
        shutdown()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
