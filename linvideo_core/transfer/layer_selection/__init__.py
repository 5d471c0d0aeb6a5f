"""Which layers become linear: learned scores, a rule, or measured sensitivity."""
