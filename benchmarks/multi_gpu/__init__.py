"""The operations on several GPUs: `python -m benchmarks.multi_gpu`."""
