"""Resuming megatron.core's distributed optimizer with torch's Adam, where neither Transformer Engine nor apex is installed."""

from __future__ import annotations

from typing import Any

import torch

_installed = False


def restore_torch_adam_steps() -> None:
    """Let the distributed optimizer resume with torch's Adam.

    Megatron's distributed optimizer is written for Transformer Engine's and apex's Adam, which keep `step` in the parameter
    group. torch's keeps a tensor per parameter, which a load leaves at 0, silently: bias correction starts again.
    """
    from megatron.core.optimizer import distrib_optimizer

    global _installed
    if _installed or distrib_optimizer.HAVE_APEX_OR_TE:
        return
    _installed = True
    Distributed: Any = distrib_optimizer.DistributedOptimizer

    save, load = Distributed.sharded_state_dict, Distributed.load_state_dict
    set_states = Distributed._set_main_param_and_optimizer_states

    def sharded_state_dict(self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return save(self, model_state, is_loading, *args, **kwargs)

    def load_state_dict(self: Any, state: Any) -> None:
        step = float(state["optimizer"]["param_groups"][0]["step"])  # read before the load pairs the groups in place
        with torch.no_grad():  # fp32 main parameters are views of leaves
            load(self, state)
        for values in self.optimizer.state.values():
            values["step"] = torch.tensor(step)

    def set_states_and_step(self: Any, model_parameter: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_parameter]
        mine = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_parameter, {"step": mine["step"], **tensors})

    Distributed._set_main_param_and_optimizer_states = set_states_and_step
    Distributed.sharded_state_dict = sharded_state_dict
    Distributed.load_state_dict = load_state_dict
