"""The LINVIDEO file: which layers become linear, their feature maps, and the weight changes.

`contents` says what an artifact is and `usage` how it wants to be used, `file` stores it as one
safetensors file, `transplant` takes it from a trained student and puts it into a model, and
`base_weights` tells whether that model is the one it was made from. A file is untrusted: everything
in it is checked, and every complaint is an `ArtifactError` of one sentence.
"""

from .base_weights import BaseWeights, WeightsMatch, compare_weights
from .contents import Artifact, ArtifactHeader
from .fields import ArtifactError
from .file import load, save
from .transplant import Applied, apply, check, extract, transfer_into, warn_of_other_weights
from .usage import Usage

__all__ = [
    "Applied",
    "Artifact",
    "ArtifactError",
    "ArtifactHeader",
    "BaseWeights",
    "Usage",
    "WeightsMatch",
    "apply",
    "check",
    "compare_weights",
    "extract",
    "load",
    "save",
    "transfer_into",
    "warn_of_other_weights",
]
