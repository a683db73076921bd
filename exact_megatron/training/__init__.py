"""The native runner: megatron.core's parts put together, for single-node work, tests and benchmarks."""
