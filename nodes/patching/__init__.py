"""How a MODEL of ComfyUI is changed by a file, and given back."""
