"""Settings of models: linear and softmax attention, frozen weights, Wan 2.2's experts."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..run import limits
from ..run.config import Settings, option
from ..run.errors import SettingError, shown_value
from ..run.limits import Limits

FEATURE_MAPS = ("hedgehog", "hedgehog_joint")
MAP_SHARINGS = ("per_head", "shared")
ATTENTION_MASSES = ("query", "moments")
FROZEN = ("fp32", "bf16", "fp8")
SOFTMAX_KERNELS = ("default", "flash", "cudnn", "sparse")

NO_TILE = "none"
TILE_NEEDED = "frames x height x width in tokens, 0 to 9999 each and not all 0, such as 3x15x14,"


def read_tile(text: object) -> tuple[int, int, int] | None:
    """Return the frames, height and width that "3x15x14" says; None for what says no tile."""
    is_tile = isinstance(text, str) and re.fullmatch("x".join(3 * ["(0|[1-9][0-9]{0,3})"]), text)
    size = tuple(map(int, text.split("x"))) if is_tile else (0, 0, 0)
    return size if any(size) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearForm(Settings):
    """What linear attention is made of, beside the number of its features.

    The default is the paper's; each part added starts as if it were not there, all but tiles.
    A tile "none" is None.
    """

    feature_map: str = option(
        "hedgehog", "hedgehog_joint: one softmax over both signs of xW", choices=FEATURE_MAPS
    )
    map_sharing: str = option("per_head", "a map W a head, or one a layer", choices=MAP_SHARINGS)
    output_gate: bool = option(False, "scale each head's output by a gate that its query opens")
    window: int = option(
        0, "tokens of a local softmax beside the linear part; 0: none", limits.WINDOW
    )
    tile: str | None = option(
        None,
        "softmax within tiles of frames x height x width tokens, such as 3x15x14, and linear "
        "attention for all beyond them; 0 along an axis is all of it, none: no tiles; of a --model "
        "of one's own a quarter of each axis is the default",
    )
    attention_mass: str = option(
        "query",
        "with --tile: what tells how much attention lies beyond a token's tile, its query or the "
        "keys' mean and covariance",
        choices=ATTENTION_MASSES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile == NO_TILE:
            object.__setattr__(self, "tile", None)
        if self.tile is None:
            if self.attention_mass != "query":
                raise SettingError(
                    f"{{attention_mass}} {self.attention_mass} given without a {{tile}}, which it "
                    "is for: give a {tile} such as 3x15x14, or leave {attention_mass} out",
                    "attention_mass",
                    "tile",
                )
            return
        if read_tile(self.tile) is None:
            raise SettingError(
                f"{{tile}} {shown_value(self.tile)} given; {TILE_NEEDED} or none, is needed", "tile"
            )
        for name, value in self.parts_of_linear_layers(vars(self)).items():
            raise SettingError(
                f"{{tile}} {self.tile} and {{{name}}} {value} given; they do not work "
                "together: leave one of them out",
                "tile",
                name,
            )

    @classmethod
    def parts_of_linear_layers(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the settings given, by name, that add what a hybrid layer cannot have."""
        usual = {field.name: field.default for field in dataclasses.fields(cls)}
        names = ("feature_map", "output_gate", "window")
        return {name: given[name] for name in names if given.get(name, usual[name]) != usual[name]}

    @property
    def kind(self) -> str:
        """What such a layer is called: "linear", or "hybrid", which is softmax within tiles too."""
        return "hybrid" if self.tile else "linear"

    @property
    def tile_size(self) -> tuple[int, int, int]:
        """The tile's frames, height and width in tokens, 0 for all of an axis."""
        # No pattern: torch.compile would trace its lookup, and fail to replay what re's cache does.
        return tuple(map(int, self.tile.split("x")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(Settings):
    """What computes softmax attention."""

    softmax_kernel: str = option(
        "default",
        "kernel of softmax layers; sparse: Sol-Attn in those that a sampled file leaves softmax, "
        "which changes videos and needs comfy-kitchen; others are the teacher's, too",
        choices=SOFTMAX_KERNELS,
    )
    density: float | None = option(
        None,
        "with --softmax-kernel sparse: share of the attention that is computed exactly; none: 0.1",
        dataclasses.replace(limits.FRACTION, without_low=True),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None and not self.is_sparse:
            raise SettingError(
                f"{{density}} {self.density:g} and {{softmax_kernel}} {self.softmax_kernel} given; "
                "it is for sparse alone: give {softmax_kernel} sparse, or leave {density} out",
                "density",
                "softmax_kernel",
            )

    @property
    def is_sparse(self) -> bool:
        """Whether students' softmax layers are sparse, and the teacher's are not."""
        return self.softmax_kernel == "sparse"

    def check_training(self) -> None:
        """Raise SettingError for a kernel without a gradient."""
        if self.is_sparse:
            raise SettingError(
                "{softmax_kernel} sparse given, which has no gradient to train with: train with a "
                "dense one, and sample or evaluate the file with sparse layers",
                "softmax_kernel",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig(Settings):
    """Memory of the weights that are not trained, with --model."""

    frozen: str = option(
        "fp32", "frozen weights, also the teacher's: fp8 holds the blocks' matrices", choices=FROZEN
    )
    offload_blocks: int = option(
        0,
        "blocks whose frozen weights wait in CPU memory until they are computed",
        dataclasses.replace(limits.LAYERS, low=0),
    )

    @property
    def given(self) -> str:
        """Return the settings that are not as usual, for a SettingError; "" for none."""
        flags = [f"{{frozen}} {self.frozen}"] if self.frozen != "fp32" else []
        flags += [f"{{offload_blocks}} {self.offload_blocks}"] if self.offload_blocks else []
        return " ".join(flags)

    @property
    def provenance(self) -> dict[str, str]:
        """Return what a file says of its teacher, unless that was held in fp32."""
        return {"frozen": self.frozen} if self.frozen != "fp32" else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Settings):
    """Wan 2.2's two experts."""

    low_noise_model: Path | None = option(
        None, "Wan 2.2: the low-noise expert; --model is the high-noise one then"
    )
    boundary: float = option(
        0.875,
        "noise level that the high-noise expert works down to (Wan 2.2 text-to-video: 0.875, "
        "image-to-video: 0.9)",
        Limits(low=0.001, high=0.999),
    )
