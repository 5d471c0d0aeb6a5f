"""Declared runs on the embedded model: `python -m research.ablations`."""
