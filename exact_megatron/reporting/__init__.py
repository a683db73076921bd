"""Tables and pictures. No torch, no megatron."""
