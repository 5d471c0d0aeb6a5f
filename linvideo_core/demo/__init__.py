"""The embedded default: a small, really trained Wan text-to-video of moving handwritten digits.

In the order of the flow:
    digits    clips of a handwritten digit that moves in one of eight directions (training data)
    codec     frames <-> latents, a fixed space-to-depth that stands where a video VAE stands
    prompts   prompt -> prompt embeddings, from a stored table of word vectors
    judge     a video classifier that says which digit moves where
    sampling  prompts and noise -> clips, with guidance; their measures; a picture of them
    flow_matching  training of the model: loss, schedule, averaged weights
    train     the command that made every file in weights/

Sampling and judging need the stored weights alone; only training needs scikit-learn.
"""

from pathlib import Path

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
