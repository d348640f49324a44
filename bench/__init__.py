"""Benchmarks, each run as ``python -m bench.<name>`` from the root of the repository."""
