"""Rank script: load converted checkpoints in a layout and write their logits.

argv: a JSON file with jobs {"model": folder of convert, "overrides": [...], "tokens": [[...]], "out": file without ending}; from
the last pipeline stage, OUT.pt has float32 [b, s, padded vocabulary]. "fused" layers keep their norms where Transformer
Engine has them; "other_positions" says that RoPE is another than the checkpoint's; "save" is a run directory to save to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp

from exact_megatron.attention import document_boundaries
from exact_megatron.training import checkpoint, checkpoint_files, checkpoint_state, model
from exact_megatron.training.config import load_config
from exact_megatron.training.trainer import init_distributed, shutdown
from tests.helpers.groups import share_process_groups

unfused_spec = model.layer_spec


class FusedLinear(ColumnParallelLinear):
    """What TELayerNormColumnParallelLinear keeps: layer_norm_weight, and an extra state that a converted checkpoint lacks."""

    def __init__(self, input_size, *args, config, **kwargs):
        super().__init__(input_size, *args, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.full([input_size], torch.nan))
        self.eps = config.layernorm_epsilon

    def forward(self, x, *args, **kwargs):
        x = torch.nn.functional.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        return super().forward(x, *args, **kwargs)

    def get_extra_state(self):
        return torch.zeros(3)


class Nothing:
    """Optimizer and schedule of a checkpoint that has none."""

    def sharded_state_dict(self, *args, **kwargs):
        return {}

    state_dict = sharded_state_dict


def fused_spec(*args):
    block = unfused_spec(*args)
    for spec in block.layer_specs:
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        layer.self_attention.submodules.linear_qkv = layer.mlp.submodules.linear_fc1 = FusedLinear
        layer.sharded_state_dict_keys_map = {}
    return block


def logits(job):
    tokens = torch.tensor(job["tokens"])
    size, length = tokens.shape
    data = ["model.data.data_prefix=[none]", "trainer.accelerator=cpu", f"model.data.seq_length={length}"]
    run = load_config(Path(job["model"], "model.yaml"), [*data, *job["overrides"]])
    device = init_distributed(run)
    model.layer_spec = fused_spec if job.get("fused") else unfused_spec
    chunks = model.build_model(run, run.model.override_vocab_size, device)
    path = checkpoint_files.find_checkpoint(run.restore_from_path)
    changed = checkpoint_state.refuse_other_model(checkpoint_state.read_state(path), run, run.model.override_vocab_size)
    assert bool(changed) == job.get("other_positions", False), changed
    checkpoint.load_weights(path, chunks)
    if job.get("save"):
        state = checkpoint_state.describe(run, 5, run.model.override_vocab_size, None, None)
        checkpoint.save(job["save"], 5, chunks, Nothing(), Nothing(), state, 1)
    packed = document_boundaries(torch.arange(0, size * length + 1, length, dtype=torch.int32), length, size)

    def step(iterator, chunk):
        output = chunk(tokens, torch.arange(length).expand_as(tokens), None, packed_seq_params=packed)
        return output, lambda output, non_loss_data=False: gather_from_tensor_model_parallel_region(output)

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        torch.save(found[0].float(), job["out"] + ".pt")
    shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    share_process_groups()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        logits(job)
    torch.distributed.destroy_process_group()
