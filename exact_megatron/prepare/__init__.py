"""`exact-megatron prepare`: text to Megatron's .bin/.idx."""
