"""Measurements. Run them from the root of the repository, for example `python -m benchmarks.split`."""
