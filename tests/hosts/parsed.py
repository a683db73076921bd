"""What EXACT makes of command lines by the arguments of Megatron-LM's own parser, and by those that `doctor` reads: parsed.py USUAL ..."""

import argparse
import json
import sys
from pathlib import Path

import megatron.training
from megatron.training.arguments import add_megatron_arguments, parse_args

from exact_megatron import ExactConfig
from exact_megatron.commands.doctor.megatron_line import options
from exact_megatron.integrations.megatron_lm_arguments import plan_masking, read_arguments, refusals, training_data

LINES = """

--reset-attention-mask
--reset-attention-mask --attention-dropout 0.1
--reset-attention-mask --multi-latent-attention
--reset-attention-mask --context-parallel-size 2 --eod-mask-loss
--reset-attention-mask --context-parallel-size 3
--reset-attention-mask --context-parallel-size 2 --cp-comm-type a2a+p2p
--reset-attention-mask --context-parallel-size 4 --cp-comm-type a2a
--reset-attention-mask --tensor-model-parallel-size 3 --sequence-parallel
--reset-attention-mask --mtp-num-layers 1
--reset-attention-mask --mock-data
--reset-attention-mask --dataloader-type external
--reset-attention-mask --iterations-to-skip 3 4
--reset-attention-mask --cross-entropy-loss-fusion --cross-entropy-fusion-impl te
--reset-attention-mask --log-max-attention-logit
--reset-attention-mask --micro-batch-size 4
--data-path
--data-path 0.3 x 0.7 y
--train-data-path x --data-path y
""".splitlines()[1:]


def said(args):
    try:
        masking = plan_masking(args, ExactConfig())
    except ValueError as error:
        masking = str(error)
    return [refusals(args, ExactConfig()), masking, training_data(args)]


def main():
    usual = sys.argv[1:]
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    known = options(Path(megatron.training.__file__).parents[2] / "pretrain_gpt.py")
    print("\nUNKNOWN", json.dumps(sorted(flags - known)), flush=True)
    for line in LINES:
        sys.argv[1:] = [*usual, *line.split()]
        try:
            theirs = said(parse_args())
        except SystemExit:  # this version has no such argument
            continue
        print("\nLINE", json.dumps([line, theirs, said(read_arguments(sys.argv[1:]))]), flush=True)


if __name__ == "__main__":
    main()
