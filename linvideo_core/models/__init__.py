"""Models for headless use; inside ComfyUI the host's own models are used instead.

wan: the architecture; stored, naming, checkpoint: its published files; rounded: its frozen weights
in fewer bytes; denoiser: a model as a velocity function.
"""
