"""The picture of a LINVIDEO file as ComfyUI's IMAGE."""

import numpy as np
import torch
from torch import Tensor

from ..linvideo_core.artifact import Artifact


def show_datasheet(artifact: Artifact, *, note: str = "") -> Tensor:
    """Draw an artifact as an IMAGE [1, H, W, 3] fp32, 0 to 1; `note` stands at its foot."""
    # Drawing loads matplotlib, which would make every start of ComfyUI slower.
    from ..linvideo_core.datasheet import draw_datasheet

    picture = np.array(draw_datasheet(artifact, note=note))
    return torch.from_numpy(picture).float().div(255)[None]
