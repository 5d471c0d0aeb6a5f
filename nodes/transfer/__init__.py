"""The transfer inside ComfyUI: a graph's MODEL as the teacher, its memory, its display."""
