"""`exact-megatron plan`: layout, memory, tokens and hours of a run before it is started."""
