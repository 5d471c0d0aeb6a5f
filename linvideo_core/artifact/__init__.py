"""The LINVIDEO file: which layers become linear, their feature maps, and the weight changes.

`contents` says what an artifact is, `file` stores it as one safetensors file, `transplant` takes
it from a trained student and puts it into a model. A file is untrusted: everything in it is
checked, and every complaint is an `ArtifactError` of one sentence.
"""

from .contents import Artifact, ArtifactError, ArtifactHeader
from .file import load, save
from .transplant import Applied, apply, check, extract, transfer_into, warn_of_other_weights

__all__ = [
    "Applied",
    "Artifact",
    "ArtifactError",
    "ArtifactHeader",
    "apply",
    "check",
    "extract",
    "load",
    "save",
    "transfer_into",
    "warn_of_other_weights",
]
