"""A script that starts itself anew before it trains, as scripts/training/recipe_runner.py of Megatron-Bridge 0.6 does."""

import os
import sys

from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

MARKER = "TEST_BOOTSTRAPPED"

if __name__ == "__main__":
    config = process_config_with_overrides(llama32_1b_pretrain_config(), cli_overrides=sys.argv[1:])
    if os.environ.get(MARKER) != str(os.getpid()):
        print("starting anew", flush=True)
        environment = {**os.environ, MARKER: str(os.getpid())}
        os.execvpe(sys.executable, [sys.executable, os.path.abspath(__file__), *sys.argv[1:]], environment)
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    pretrain(config=config, forward_step_func=forward_step)
