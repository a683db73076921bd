"""EXACT inside other trainers. Each host's module is thin: it wires dataset, loss and attention into the host.

* host: what every host says, refuses, builds, saves and guards at a resume; what a new host supplies.
* settings: `model.exact.*`, --exact-* flags, EXACT_* and --exact-config, taken out before the host parses anything.
* hooks: replacing parts of a host while it trains.
* checkpoint_guard: the weights in words, and their comparison with a checkpoint.
* documents: DocumentAttention in a host's model, and the boundaries on every rank of every stage.
* megatron_lm: Megatron-LM's pretrain_gpt.py; megatron_lm_arguments: what of its arguments is refused, who masks documents.
* bridge: Megatron-Bridge's recipes and scripts, by one call or under bridge_launch; bridge_training: one run of its pretrain().
* nemo: NeMo's YAML-configured MegatronGPTModel; nemo_recipes: NeMo 2's GPTModel; nemo_arguments: versions, settings, what is refused.
* loss_sums: sums of the losses for hosts whose own log carries one.
"""
