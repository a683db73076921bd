#!/usr/bin/env bash
# The paired continued pretraining of SmolLM2-135M and its evaluation, in calls of 9 minutes to one machine: every call goes on
# where the last one stopped. Checkpoints (2 GB a run) stay on the machine: if it is given back, training starts over.
#
#   run: bash benchmarks/gpu/5_cpt.sh        carry: .te in the first call only; 4_stage.sh before it
#
# SEEDS="1234 5" ARMS="baseline exact" STAGES="4096:25e6 16384:25e6" SUITES="distance-probe context-loss" change the plan.
. "$(dirname "$0")/env.sh"
load=$STATE/load runs=$STATE/cpt
if [ -n "${DRY_RUN:-}" ]; then  # a tiny base and random tokens in place of the model and the text
  if ! [ -e "$STATE/base/checkpoints" ]; then
    rm -rf "$load" && mkdir -p "$load"
    "$PYTHON" -c "
import sys
from exact_megatron.benchmark import write_corpus
write_corpus(sys.argv[1] + '/corpus', 60_000); write_corpus(sys.argv[1] + '/corpus_valid', 8_000)" "$load" || exit 1
    printf 'model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2}\n' \
      >"$STATE/model.yaml"
    exact 200 train --config "$STATE/model.yaml" "model.data.data_prefix=[$load/corpus]" model.data.seq_length=64 \
      trainer.max_steps=2 model.data.splits_string=1 "exp_manager.exp_dir=$STATE/base" model.data.num_workers=0 || exit 1
  fi
  base=$STATE/base config=$STATE/model.yaml
  plan=(--stages ${STAGES:-64:2048 128:2048} --step-tokens 512 --micro-tokens 256 --valid-tokens 1024)
  settings=(model.data.num_workers=0)
  suites=(${SUITES:-})
else
  base=$STATE/base config=$STATE/base/model.yaml
  if ! [ -e "$STATE/.base" ]; then
    [ -d "$load" ] || { say "$load is not there: run 4_stage.sh for every part first"; exit 1; }
    gguf=$(ls "$load"/*.gguf)
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$STATE/site" "$load"/wheels/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$STATE/site"
    rm -rf "$STATE/hf" "$base"
    run 120 "$PYTHON" benchmarks/gpu/model_from_gguf.py "$gguf" "$STATE/hf" || exit 1
    exact 120 convert hf-to-megatron "$STATE/hf" "$base" || exit 1
    touch "$STATE/.base"
  fi
  plan=(--stages ${STAGES:-4096:25e6 16384:25e6})
  settings=(trainer.precision=bf16 model.cross_entropy_loss_fusion=true ${SETTINGS:-})
  suites=(${SUITES:-distance-probe context-loss})
fi
until=$(($(left) - 70))  # a stopped run has 60 s for its checkpoint
[ "$until" -gt 20 ] || { say "no time is left for a run: call again"; exit 3; }
run "$(left)" "$PYTHON" benchmarks/gpu/cpt.py --base "$base" --config "$config" --data "$load/corpus" --folder "$runs" "${plan[@]}" \
  --arms ${ARMS:-baseline exact} --seeds ${SEEDS:-1234} --suites "${suites[@]}" --settings "${settings[@]}" --until "$until"
code=$?
cp "$runs/cpt.json" "$OUT/" 2>/dev/null
tar -C "$runs" -czf "$OUT/cpt.tar.gz" --exclude checkpoints --exclude index . && ls -l "$OUT/cpt.tar.gz"
exit $code
