"""The judge of the demo's clips: which digit, which direction, and how close to real clips.

A small 3D convolutional classifier, trained on real clips alone. Its file also carries the mean
and covariance of its features over real clips, so measuring a model needs no training data.
"""

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from . import DIRECTIONS, weights_path

FEATURE_DIM = 64
NUM_DIGITS = 10
CHANNELS = (16, 48, 48, 64)


class Judge(nn.Module):
    """Classify the digit and the direction of a clip.

    `real_mean` [64] and `real_cov` [64, 64] describe the features of real clips.
    """

    def __init__(self) -> None:
        super().__init__()
        first, second, third, last = CHANNELS
        # The 2 x 2 space-to-depth loses nothing and makes the convolutions four times cheaper.
        self.layers = nn.Sequential(
            _conv(4, first, (1, 3, 3), (1, 1, 1)),
            _conv(first, second, (3, 3, 3), (2, 2, 2)),
            _conv(second, third, (3, 3, 3), (1, 2, 2)),
            _conv(third, last, (3, 3, 3), (2, 2, 2)),
        )
        self.project = nn.Linear(last, FEATURE_DIM)
        # Without learned scale every feature vector has length 8: moderate, never exploding.
        self.norm = nn.LayerNorm(FEATURE_DIM, elementwise_affine=False)
        self.digit_head = nn.Linear(FEATURE_DIM, NUM_DIGITS)
        self.motion_head = nn.Linear(FEATURE_DIM, len(DIRECTIONS))
        self.register_buffer("real_mean", torch.zeros(FEATURE_DIM))
        self.register_buffer("real_cov", torch.eye(FEATURE_DIM))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Judge clips.

        frames: [B, F, 32, 32] fp32, [0, 1]

        Returns digit_logits [B, 10], motion_logits [B, 8], features [B, 64].
        """
        small = rearrange(frames, "b f (h p) (w q) -> b (p q) f h w", p=2, q=2)
        features = self.norm(self.project(self.layers(small).mean(dim=(2, 3, 4))))
        return self.digit_head(features), self.motion_head(features), features


def load_judge(device: torch.device | str = "cpu") -> Judge:
    """Load the shipped judge in fp32, ready to measure (no gradient)."""
    judge = Judge()
    state = load_file(weights_path("judge.safetensors"))
    judge.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return judge.eval().requires_grad_(False).to(device)


def _conv(
    in_channels: int, out_channels: int, kernel: tuple[int, ...], stride: tuple[int, ...]
) -> nn.Sequential:
    padding = tuple(size // 2 for size in kernel)
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False),
        nn.GroupNorm(8, out_channels),
        nn.SiLU(),
    )
