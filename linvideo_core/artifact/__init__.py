"""The LINVIDEO file: which layers become linear, their feature maps, and the weight changes.

    header      what an artifact holds and how it wants to be used
    file        reading and writing it as one safetensors file; names for such files
    apply       taking it out of a trained student; applying it to a model
    summary     what it says, and how a sampling differs from it, in words
    picture     the same as a picture

A file may come from anywhere: everything in it is checked, and every complaint is an
`ArtifactError` of one sentence.
"""

from .apply import apply, check, extract, warn_of_other_weights
from .file import load, save
from .header import Artifact, ArtifactError, ArtifactHeader, Usage

__all__ = [
    "Artifact",
    "ArtifactError",
    "ArtifactHeader",
    "Usage",
    "apply",
    "check",
    "extract",
    "load",
    "save",
    "warn_of_other_weights",
]
