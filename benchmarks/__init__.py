"""Benchmarks of training and sampling speed. Run each one from the repository with `python -m benchmarks.NAME`."""
