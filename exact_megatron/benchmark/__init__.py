"""`exact-megatron benchmark`: speed against Megatron's own, in ratios of one run."""
