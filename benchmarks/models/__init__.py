"""Whole models at published sizes: `python -m benchmarks.models`."""
