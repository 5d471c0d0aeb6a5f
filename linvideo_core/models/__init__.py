"""Models for headless use; inside ComfyUI the host's own models are used instead.

wan: the architecture; attention, attention_sites, families: what LinVideo replaces, and where;
checkpoint, shards: published files; quantized: frozen weights in fewer bytes; lora: trained
changes; base_weights: which weights a model has; velocity, experts: a model as a velocity function.
"""
