"""The LINVIDEO file: which layers become linear, their feature maps, and the weight changes.

`contents` says what an artifact is and `usage` how it wants to be used, `file` stores it as one
safetensors file, `transplant` takes it from a trained student and puts it into a model;
`base_weights` tells whether that is the model it was made from, `sampled` whether it is sampled as
it wants to be. A file is untrusted: everything
in it is checked, and every complaint is an `ArtifactError` of one sentence.
"""

from .apply import Applied, apply, check, extract, transfer_into, warn_of_other_weights
from .base_weights import BaseWeights, WeightsMatch, compare_weights
from .fields import ArtifactError
from .file import load, save
from .header import Artifact, ArtifactHeader
from .sampled import find_differences
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
    "find_differences",
    "load",
    "save",
    "transfer_into",
    "warn_of_other_weights",
]
