"""The images that the videos of an image-to-video Wan start from, one for all prompts or one each.

A model is called with latents, timesteps and prompts. Where each prompt has its own image, a last
row of the prompt's embeddings says which: both guidance branches of a video, and whatever draws
prompts, so keep the image with the prompt.
"""

import dataclasses
import hashlib

import torch
from torch import Tensor

CLIP_TOKENS = 257
"""Of an image, as CLIP ViT-H/14 sees it: 16 x 16 patches and a summary."""

# A number is written in binary, which is exact in any dtype.
_NUM_BITS = 16
NO_IMAGE = 2**_NUM_BITS - 1
"""The number of no image, at which `pick` fails."""


@dataclasses.dataclass(frozen=True)
class ImageCondition:
    """Images in the form in which ComfyUI gives them to Wan; N is 1, or the number of prompts.

    latents: [N, K, F, H, W], joined to the noisy latents channel by channel: a mask (4), 1 where a
        frame is given, then the given frames as the model's own latents.
    clip_embeds: [N, CLIP_TOKENS, D] of CLIP Vision's last layer but one; None for Wan 2.2.
    """

    latents: Tensor
    clip_embeds: Tensor | None = None

    @property
    def is_numbered(self) -> bool:
        """Whether prompts have images of their own, and their last row says which."""
        return len(self.latents) > 1

    def digest(self) -> str:
        """Return 16 hex digits that tell these images from others."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in filter(torch.is_tensor, (self.latents, self.clip_embeds)):
            digest.update(tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def pick(self, prompt_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return prompts [B, S, T] and the latents and CLIP embeddings [B or 1, ...] for them.

        prompt_embeds: [B, S, T]; [B, S + 1, T] of `with_numbers` where images are numbered.
        """
        if not self.is_numbered:
            return prompt_embeds, self.latents, self.clip_embeds
        bits = prompt_embeds[:, -1, :_NUM_BITS].cpu() > 0.5
        numbers = (bits * 2 ** torch.arange(_NUM_BITS)).sum(dim=1)
        clip_embeds = None if self.clip_embeds is None else self.clip_embeds[numbers]
        return prompt_embeds[:, :-1], self.latents[numbers], clip_embeds


def with_numbers(prompt_embeds: Tensor, numbers: Tensor) -> Tensor:
    """Return prompts [P, S, T] with a row more, [P, S + 1, T], for the numbers [P] of images.

    Numbers are int64, below NO_IMAGE; T is 16 at least.
    """
    bits = (numbers.unsqueeze(1) >> torch.arange(_NUM_BITS)) & 1
    row = torch.zeros_like(prompt_embeds[:, :1])
    row[:, 0, :_NUM_BITS] = bits.to(row)
    return torch.cat([prompt_embeds, row], dim=1)
