"""What a LINVIDEO file holds: its header, how it wants to be used, and its tensors.

Files come from anywhere, so every value is checked; what is wrong with one is an `ArtifactError`
of one sentence that names the field.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..models.attention import tensor_shapes
from ..models.base_weights import SKETCH_SIZE, BaseWeights
from ..models.config import (
    ATTENTION_MASSES,
    FEATURE_MAPS,
    MAP_SHARINGS,
    TILE_NEEDED,
    LinearForm,
    read_tile,
)
from ..run import limits
from ..run.errors import SettingError, shown_value
from ..run.limits import Limits

PARAMETERS = ("full", "lora", "feature_maps")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_TEXT = 200
_NONE = Limits(low=0, high=0, is_whole=True)

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is valid, and what to say where it is not."""


class ArtifactError(ValueError):
    """A LINVIDEO file that is damaged, foreign, or made for another model."""

    # ComfyUI shows this name, and loads the pack under the path of its folder.
    __module__ = "linvideo_core.artifact"


def refuse(name: str, value: object, expected: str) -> NoReturn:
    """Raise ArtifactError saying what a field is and what is expected of it."""
    raise ArtifactError(f"{name} is {shown_value(value, is_quoted=True)}; {expected}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable()


def _within(limits: Limits) -> Rule:
    return limits.takes, f"{limits} is expected"


def _one_of(choices: tuple[str, ...]) -> Rule:
    return lambda value: value in choices, f"one of {', '.join(choices)} is expected"


def _is_falling_to_zero(sigmas: object) -> bool:
    if not isinstance(sigmas, tuple) or not all(map(_is_number, sigmas)):
        return False
    falls = list(sigmas) == sorted(set(sigmas), reverse=True)
    return not sigmas or (falls and 1 >= sigmas[0] > sigmas[-1] == 0)


def _is_sketch(sketch: object) -> bool:
    is_sized = isinstance(sketch, tuple) and len(sketch) in (0, SKETCH_SIZE)
    return is_sized and all(_is_number(value) and abs(value) <= 1 for value in sketch)


def _are_sizes(sizes: object) -> bool:
    are_triples = isinstance(sizes, tuple) and all(
        isinstance(size, tuple) and len(size) == 3 for size in sizes
    )
    return are_triples and all(
        _USAGE_RULES[name][0](value)
        for size in sizes
        for name, value in zip(_SIZE_FIELDS, size, strict=True)
    )


_SIZE_FIELDS = ("width", "height", "num_frames")
"""Of `Usage`: the size of a video, in the order in which people write it."""
_TEXT: Rule = (_is_text, f"1 to {_MAX_TEXT} printable characters are expected")
_USAGE_RULES: dict[str, Rule] = {
    "width": _within(limits.PIXELS),
    "height": _within(limits.PIXELS),
    "num_frames": _within(limits.FRAMES),
    "guidance_scale": _within(limits.GUIDANCE_SCALE),
    "shift": _within(limits.SHIFT),
    "steps": _within(limits.SAMPLER_STEPS),
    "sampler": _TEXT,
    "sigma_from": _within(limits.FRACTION),
    "sigma_to": _within(limits.FRACTION),
    "more_sizes": (_are_sizes, "sizes of width, height and frames are expected"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What a file was made at, or how a model is sampled; None is what is not known.

    width, height, num_frames: of the video, in pixels and frames.
    guidance_scale: classifier-free guidance; 1 is none (a distilled file has it trained in).
    shift: warp of the noise levels. steps, sampler: "euler", or "lcm" for a distilled file.
    sigma_from, sigma_to: noise levels that its model works at, such as 1 and 0.875 for Wan 2.2's
        high-noise expert.
    more_sizes: (width, height, num_frames) of other sizes that a file was made at.

    Raises ArtifactError naming the field that is wrong.
    """

    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    steps: int | None = None
    sampler: str | None = None
    sigma_from: float | None = None
    sigma_to: float | None = None
    more_sizes: tuple[tuple[int, int, int], ...] | None = None

    def __post_init__(self) -> None:
        for name, value in self.said.items():
            is_valid, expected = _USAGE_RULES[name]
            if not is_valid(value):
                refuse(f"usage's {name}", value, expected)
        if (self.sigma_from is None) != (self.sigma_to is None):
            refuse("usage's sigma_to", self.sigma_to, "sigma_from and sigma_to come together")
        if self.sigma_from is not None and self.sigma_from <= self.sigma_to:
            refuse("usage's sigma_to", self.sigma_to, "less than sigma_from is expected")

    @property
    def said(self) -> dict[str, Any]:
        """Return what is known, by name."""
        return {name: x for name, x in dataclasses.asdict(self).items() if x is not None}

    @property
    def sizes(self) -> list[tuple[int | None, ...]]:
        """Width, height and frames of every size, the main one first."""
        return [tuple(getattr(self, name) for name in _SIZE_FIELDS), *(self.more_sizes or ())]

    @classmethod
    def parse(cls, value: object) -> "Usage":
        """Return the usage that a JSON object holds; ArtifactError for anything else."""
        if not isinstance(value, dict) or not value.keys() <= _USAGE_RULES.keys():
            refuse("usage", value, f"an object of {', '.join(_USAGE_RULES)} is expected")
        if isinstance(sizes := value.get("more_sizes"), list):
            sizes = tuple(tuple(size) if isinstance(size, list) else size for size in sizes)
            value = {**value, "more_sizes": sizes}
        return cls(**value)


_RULES: dict[str, Rule] = {
    "family": _TEXT,
    "fingerprint": _TEXT,
    "weights_digest": (
        lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{16}", v) is not None,
        "16 hexadecimal digits are expected",
    ),
    "num_layers": _within(limits.LAYERS),
    "feature_map": _one_of(FEATURE_MAPS),
    "feature_dim": _within(limits.FEATURE_DIM),
    "map_sharing": _one_of(MAP_SHARINGS),
    "output_gate": (lambda v: isinstance(v, bool), "true or false is expected"),
    "window": _within(limits.WINDOW),
    "tile": (lambda v: v is None or read_tile(v) is not None, f"{TILE_NEEDED} is expected"),
    "attention_mass": _one_of(ATTENTION_MASSES),
    "parameters": _one_of(PARAMETERS),
    "objective": _TEXT,
    "steps": _within(limits.COUNT_OR_NONE),
    "sigmas": (
        _is_falling_to_zero,
        "an empty list or noise levels that fall from at most 1 to 0 are expected",
    ),
    "usage": (lambda v: isinstance(v, Usage), "a Usage is expected"),
    "weights_sketch": (
        _is_sketch,
        f"an empty list or {SKETCH_SIZE} numbers from -1 to 1 are expected",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactHeader:
    """What an artifact says of itself.

    family, fingerprint: the architecture that it fits, see `models.attention_sites.fingerprint`.
    weights_digest, weights_sketch: of the weights that it was trained from, see
        `models.base_weights`; the sketch is empty where there is none.
    linear_layers: the layers that become linear, ascending, of the model's `num_layers`.
    site_names: for each of them the module that holds its attention.
    feature_map, feature_dim, map_sharing, output_gate, window, tile, attention_mass: see
        `models.config.LinearForm`.
    parameters: the weights trained beside the feature maps: "full", "lora" (of `lora_rank`) or
        "feature_maps", none.
    objective, steps: what was trained, and for how many training steps.
    sigmas: the sampling grid that a distilled model is bound to, empty for any other.
    usage: how the file wants to be used, as far as it says.
    provenance: how the file was made, for its reader.

    Raises ArtifactError naming the field that is wrong.
    """

    family: str
    fingerprint: str
    weights_digest: str
    linear_layers: tuple[int, ...]
    site_names: tuple[str, ...]
    num_layers: int
    feature_map: str = "hedgehog"
    feature_dim: int
    parameters: str
    lora_rank: int = 0
    objective: str
    steps: int
    sigmas: tuple[float, ...] = ()
    provenance: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)
    map_sharing: str = "per_head"
    output_gate: bool = False
    window: int = 0
    tile: str | None = None
    attention_mass: str = "query"
    usage: Usage = dataclasses.field(default_factory=Usage)
    weights_sketch: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rank = limits.LORA_RANK if self.parameters == "lora" else _NONE
        for name, (is_valid, expected) in {**_RULES, "lora_rank": _within(rank)}.items():
            if not is_valid(getattr(self, name)):
                refuse(name, getattr(self, name), expected)
        # Of what excludes another part of the form, the form itself knows.
        self.tensor_shapes()
        self._check_layers()
        _check_provenance(self.provenance)

    @property
    def form(self) -> LinearForm:
        """Return what the linear layers are made of."""
        fields = dataclasses.fields(LinearForm)
        try:
            return LinearForm(**{field.name: getattr(self, field.name) for field in fields})
        except SettingError as error:
            raise ArtifactError(error.worded(str)) from error

    @property
    def base_weights(self) -> BaseWeights:
        """Return what tells the weights that it was trained from."""
        return BaseWeights(digest=self.weights_digest, sketch=self.weights_sketch)

    def tensor_shapes(
        self, num_heads: int | str = "N", head_dim: int | str = "D"
    ) -> dict[str, list[int | str]]:
        """Return the shapes of a layer's tensors by their names in `LinearAttention`."""
        return tensor_shapes(self.form, self.feature_dim, num_heads, head_dim)

    def _check_layers(self) -> None:
        layers, names = self.linear_layers, self.site_names
        if not isinstance(layers, tuple) or not layers or not all(map(_is_integer, layers)):
            refuse("linear_layers", layers, "the numbers of one layer or more are expected")
        if outside := [layer for layer in layers if not 0 <= layer < self.num_layers]:
            has_none = f"a model of {self.num_layers} layers has no layer {shown_value(outside[0])}"
            refuse("linear_layers", layers, has_none)
        if list(layers) != sorted(set(layers)):
            refuse("linear_layers", layers, "each layer once, in ascending order, is expected")
        is_list = isinstance(names, tuple) and all(map(_is_text, names))
        if not is_list or len(set(names)) != len(names) or len(names) != len(layers):
            refuse("site_names", names, f"{len(layers)} module names, each once, are expected")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Artifact:
    """Everything that makes chosen layers of a model linear.

    linear: layer -> the tensors of its `LinearAttention` by name, see `tensor_shapes`.
    deltas: parameter name -> change, of the parameter's shape.
    low_rank: name of a linear layer -> down [R, in] and up [out, R]; the change is `up down`.

    Its `repr`, which ComfyUI takes of a failed node's inputs, leaves the tensors out.

    Raises ArtifactError when the tensors do not fit the header or one another.
    """

    header: ArtifactHeader
    linear: Mapping[int, Mapping[str, Tensor]] = dataclasses.field(repr=False)
    deltas: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    low_rank: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        parameters = self.header.parameters
        if self.deltas and parameters != "full":
            raise ArtifactError(f"parameters is {parameters!r}, yet full weight changes are there")
        if bool(self.low_rank) != (parameters == "lora"):
            there = "are there" if self.low_rank else "are missing"
            raise ArtifactError(f"parameters is {parameters!r}, yet LoRA tensors {there}")
        if differing := sorted(set(self.header.linear_layers) ^ set(self.linear)):
            fault = "is not linear, yet has tensors"
            if differing[0] not in self.linear:
                fault = "is linear, yet its tensors are missing"
            raise ArtifactError(f"layer {differing[0]} {fault}")
        for layer, tensors in self.linear.items():
            _check_tensors(layer, tensors, self.header)
        for name in (*self.deltas, *self.low_rank):
            if not _is_text(name):
                refuse("a changed weight's name", name, _TEXT[1])
        for name, delta in self.deltas.items():
            _check_tensor(f"the change of {name}", delta)
        for name, pair in self.low_rank.items():
            _check_low_rank(name, *pair, rank=self.header.lora_rank)


def _check_provenance(provenance: object) -> None:
    if not isinstance(provenance, Mapping):
        refuse("provenance", provenance, "names with texts or numbers are expected")
    for name, value in provenance.items():
        is_small = _is_text(name) and (not isinstance(value, int) or abs(value) < 2**63)
        if not is_small or (not isinstance(value, str | bool) and not _is_number(value)):
            refuse(
                f"provenance's {shown_value(name)}", value, "a text or a finite number is expected"
            )


def _check_tensor(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ArtifactError(f"{what} holds {tensor.dtype}; fp16, bf16 or fp32 is expected")
    if 0 in tensor.shape:
        raise ArtifactError(f"{what} is empty, of shape {list(tensor.shape)}")


def _check_tensors(layer: int, tensors: Mapping[str, Tensor], header: ArtifactHeader) -> None:
    """Check a linear layer's tensors; N and D are whatever the first that has them says."""
    shapes = header.tensor_shapes()
    if differing := sorted(shapes.keys() ^ tensors.keys()):
        fault = "is missing" if differing[0] in shapes else "is there, yet the header has none"
        raise ArtifactError(f"the {differing[0]!a} of layer {layer} {fault}")
    sizes: dict[int | str, int] = {}
    for name, expected in shapes.items():
        what, found = f"the {name} of layer {layer}", list(tensors[name].shape)
        _check_tensor(what, tensors[name])
        for key, size in zip(expected, found, strict=False):
            sizes.setdefault(key, size if isinstance(key, str) else key)
        if len(found) != len(expected) or found != [sizes[key] for key in expected]:
            shape = f"[{', '.join(map(str, expected))}]"
            known = ", ".join(f"{key} = {n}" for key, n in sizes.items() if isinstance(key, str))
            raise ArtifactError(
                f"{what} has shape {found}; {shape} is expected{known and ' with '}{known}, as "
                f"feature_dim is {header.feature_dim} and map_sharing {header.map_sharing}"
            )


def _check_low_rank(name: str, down: Tensor, up: Tensor, *, rank: int) -> None:
    _check_tensor(f"lora_down of {name}", down)
    _check_tensor(f"lora_up of {name}", up)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise ArtifactError(
            f"the LoRA of {name} has shapes {list(down.shape)} and {list(up.shape)}; "
            f"[{rank}, in] and [out, {rank}] are expected, as lora_rank is {rank}"
        )
