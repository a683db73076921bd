#!/usr/bin/env bash
# The walk of README.md, end to end, with the time of every step: `make walkthrough`. Needs two cores, 12 GB and no GPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
run=${RUN:-runs/walkthrough}
steps=${STEPS:-3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_COMPILE_DISABLE=1 CUDA_DEVICE_MAX_CONNECTIONS=1
SECONDS=0

step() {
    echo
    echo "== $1 ($SECONDS s)"
}

rm -rf "$run" # every run of it is a fresh one
mkdir -p "$run"

step "1 weights: SmolLM2-135M-Instruct, de-quantised from 4 bits"
model=$(python "$here/get_smollm2.py")

step "2 to Megatron: 9 heads and 3 KV heads padded with zeros to 12 and 4, so that two ranks can share them"
exact-megatron convert hf-to-megatron "$model" "$run/base" --pad-kv-heads 4

step "3 documents: Python's own library, with the model's tokenizer"
exact-megatron prepare stdlib --tokenizer "$run/base/hf" --eod '<|endoftext|>' --output "$run/data/stdlib"

step "4 census: where supervision goes at a window of 4096 tokens"
exact-megatron census "$run/data/stdlib" --seq-length 4096

step "5 continued pretraining with EXACT: $steps steps on two tensor-parallel ranks"
# 4,096 tokens a step and this learning rate are there to see it work, not to train a model; stages for 8 GPUs are in configs/.
exact-megatron train --config "$run/base/model.yaml" \
    "model.data.data_prefix=[$run/data/stdlib]" 'model.data.splits_string="100,0,0"' "exp_manager.exp_dir=$run/exact" \
    trainer.accelerator=cpu trainer.devices=2 "trainer.max_steps=$steps" exp_manager.create_tensorboard_logger=false \
    model.tensor_model_parallel_size=2 model.sequence_parallel=true model.micro_batch_size=1 model.global_batch_size=1 \
    model.activations_checkpoint_granularity=full model.activations_checkpoint_method=uniform \
    model.activations_checkpoint_num_layers=1 model.data.seq_length=4096 model.data.num_workers=0 model.optim.lr=1e-5 model.optim.sched.name=constant \
    model.exact.enabled=true

step "6 to Hugging Face"
exact-megatron convert megatron-to-hf "$run/exact" "$run/hf"

step "7 transformers reads it"
python "$here/generate.py" "$run/hf"

step "8 evaluate: every suite with a handful of items, before and after, and the comparison"
# RULER and the short tasks need lm-eval, which has an environment of its own (`make test-eval` makes the same); NoLiMa's files and the
# short tasks' data are brought by the user, and own-made stand-ins of the same form take their place here.
evaluate=${EVALUATE:-exact-megatron}
python - "$here/../../tests/helpers" "$run/brought" <<'PY'
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import own_items

folder = Path(sys.argv[2])
folder.mkdir()
own_items.write_nolima(folder, words=1200)
own_items.write_short(folder / "short", ["piqa"])
PY
needles=$(echo "$run"/brought/*.json)
books=$(dirname "$(find "$run/brought" -name 'book*.txt' | head -n1)")
for arm in before after; do
    source=$model
    [ "$arm" = after ] && source="$run/hf"
    "$evaluate" evaluate "$source" --output "$run/evaluation/$arm" --suite distance-probe context-loss ruler nolima \
        --limit 2 --trained-length 2048 --distances 64 512 2048 --data "$run/data/stdlib" --window 1024 \
        --lengths 1024 --tasks niah_single_1 ruler_vt --needles "$needles" --haystacks "$books" --depths 2 --max-new-tokens 8
    "$evaluate" evaluate "$source" --output "$run/evaluation/$arm" --suite short --datasets "$run/brought/short" --limit 2
done
"$evaluate" evaluate compare "$run/evaluation/before" "$run/evaluation/after" --output "$run/evaluation/compare"

step "done"
