#!/bin/bash
# Pretraining of a small Llama at 16K with Megatron-LM, on one node with 8 GPUs. EXACT=1 weights it, ALPHA=0 is the baseline of
# a comparison. MEGATRON_LM is a checkout, DATA the prefix of a .bin/.idx pair, TOKENIZER a Hugging Face tokenizer.
set -eu
cd "${MEGATRON_LM:?path of a Megatron-LM checkout}"

RANKS=(--nproc-per-node "${GPUS:-8}")
MODEL=(
    --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --seq-length 16384 --max-position-embeddings 16384 --position-embedding-type rope
    --rotary-base 500000 --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
)
DATASET=(
    --data-path "${DATA:?prefix of a .bin/.idx pair}" --split 99,1,0 --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "${TOKENIZER:?name or folder}" --reset-attention-mask --data-cache-path "${CACHE:-cache}"
)
TRAINING=(
    --micro-batch-size 1 --global-batch-size 64 --train-iters 2000 --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine
    --lr-warmup-iters 100 --weight-decay 0.1 --clip-grad 1.0 --bf16 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather --tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2
    --calculate-per-token-loss --recompute-activations
)
OUTPUT=(
    --log-interval 10 --eval-interval 200 --eval-iters 8 --save "${SAVE:-checkpoints}" --load "${SAVE:-checkpoints}"
    --save-interval 500 --tensorboard-dir "${SAVE:-checkpoints}/tensorboard"
)
ARGUMENTS=("${MODEL[@]}" "${DATASET[@]}" "${TRAINING[@]}" "${OUTPUT[@]}")

if [ "${EXACT:-0}" = 1 ]; then
    exec torchrun "${RANKS[@]}" -m exact_megatron.launch \
        model.exact.enabled=true model.exact.alpha="${ALPHA:-0.15}" pretrain_gpt.py "${ARGUMENTS[@]}"
else
    exec torchrun "${RANKS[@]}" pretrain_gpt.py "${ARGUMENTS[@]}"
fi
