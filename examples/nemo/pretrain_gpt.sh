#!/bin/bash
# Pretraining of a small GPT at 16K with NeMo's own script and stock YAML (nemo_toolkit up to 2.5.0), on one node with 8 GPUs.
# EXACT=1 weights it, ALPHA=0 is the baseline of a comparison. NEMO is a checkout, DATA the prefix of a .bin/.idx pair, TOKENIZER
# a Hugging Face tokenizer.
set -eu

OVERRIDES=(
    trainer.devices="${GPUS:-8}" trainer.precision=bf16 trainer.max_steps=2000 trainer.val_check_interval=200
    trainer.limit_val_batches=8 exp_manager.exp_dir="${SAVE:-nemo_experiments}"
    model.tensor_model_parallel_size=2 model.sequence_parallel=true +model.context_parallel_size=2
    model.micro_batch_size=1 model.global_batch_size=64 model.encoder_seq_length=16384
    model.num_layers=16 model.hidden_size=2048 model.ffn_hidden_size=8192 model.num_attention_heads=32 model.num_query_groups=8
    model.normalization=rmsnorm model.activation=fast-swiglu model.bias=false model.position_embedding_type=rope
    +model.rotary_base=500000 model.share_embeddings_and_output_weights=false model.transformer_engine=true
    model.hidden_dropout=0 model.attention_dropout=0 model.activations_checkpoint_granularity=selective
    model.optim.name=mcore_distributed_optim model.optim.lr=3e-4 model.optim.sched.warmup_steps=100 model.optim.sched.min_lr=3e-5
    model.tokenizer.library=huggingface model.tokenizer.type="${TOKENIZER:?name or folder}"
    model.data.data_prefix="[1.0,${DATA:?prefix of a .bin/.idx pair}]" model.data.splits_string="'99,1,0'"
    model.data.reset_attention_mask=true
)
if [ "${EXACT:-0}" = 1 ]; then
    OVERRIDES+=(model.exact.enabled=true model.exact.alpha="${ALPHA:-0.15}")
fi
cd "${NEMO:?path of a NeMo checkout}/examples/nlp/language_modeling"
exec torchrun --nproc-per-node "${GPUS:-8}" megatron_gpt_pretraining.py "${OVERRIDES[@]}"
