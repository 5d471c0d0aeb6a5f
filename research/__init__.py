"""What made the evidence: run from a checkout, never shipped."""
