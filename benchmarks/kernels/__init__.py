"""The kernels against other attention: `python -m benchmarks.kernels`."""
