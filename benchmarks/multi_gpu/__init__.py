"""The operations on several GPUs: `python -m benchmarks.multi_gpu`."""

# Of the ways in which XLA carries out a ragged all-to-all, the default one does not reach other processes.
BETWEEN_PROCESSES = "--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true"
