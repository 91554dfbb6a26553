"""Configs: `get_config(argument)` returns everything that decides a run."""
