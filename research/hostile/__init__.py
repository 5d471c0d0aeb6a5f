"""Damaged files of every kind, and what the readers make of them: `python -m research.hostile`."""
