"""Commands of `exact-megatron` that belong to no other package."""
