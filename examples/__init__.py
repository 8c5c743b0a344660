"""Programs that use the package; run them from the root of the repository, as `python -m examples.train_moe`."""
