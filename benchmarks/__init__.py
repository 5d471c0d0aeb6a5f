"""Speed of kernels and models, and of transfers in ComfyUI; run from a checkout."""

import os

# PyTorch reads it when it is imported: threads that spin while they wait slow a command down
# tenfold where anything else computes on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
