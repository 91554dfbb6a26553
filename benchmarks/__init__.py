"""Benchmarks: commands that print a table, with ratios of what was measured in the same run."""
