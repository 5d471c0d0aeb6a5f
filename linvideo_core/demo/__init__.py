"""The embedded default: a small, really trained Wan text-to-video of moving handwritten digits.

    codec       frames <-> latents, a fixed space-to-depth that stands where a video VAE stands
    prompts     prompt -> prompt embeddings, from a stored table of word vectors
    classifier  which digit moves where in a clip

The stored weights are all that these need; `research/demo_model` is what made them.
"""

import math
from pathlib import Path

NUM_FRAMES, FRAME_SIZE = 28, 32
"""Of a clip: frames, and the pixels of a side."""

# Word -> unit vector (x to the right, y downwards); the order is the order of motion labels.
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-right": (math.sqrt(0.5), -math.sqrt(0.5)),
    "up-left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "down-right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down-left": (-math.sqrt(0.5), math.sqrt(0.5)),
}

DEMO_GUIDANCE_SCALE = 3.0
"""The guidance at which the embedded model is sampled wherever no other is asked for."""

DEMO_STEPS = 50
"""The Euler steps with which it is sampled wherever no other number is asked for."""

DEMO_SHIFT = 3.0
"""The warp of the noise levels that the embedded model was trained with; Wan's own for 480p."""

WEIGHTS_FOLDER = Path(__file__).parent / "weights"


def weights_path(name: str) -> Path:
    """Locate a stored file of the demo, such as "judge.safetensors"; it may not exist yet."""
    return WEIGHTS_FOLDER / name
