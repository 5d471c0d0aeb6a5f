"""Measurements that need more than the core: run from a checkout, never shipped."""
