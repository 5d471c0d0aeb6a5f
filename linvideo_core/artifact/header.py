"""What an artifact holds, and what makes it consistent in itself."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.config import FEATURE_MAPS, MAP_SHARINGS, LinearForm
from ..models.sketch import SIZE as SKETCH_SIZE
from .fields import ArtifactError, check_integer, check_text, is_integer, is_number, refuse, show
from .usage import Usage

FORMAT_VERSION = 3
PARAMETERS = ("full", "lora", "feature_maps")
_FORM_FIELDS = tuple(field.name for field in dataclasses.fields(LinearForm))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_MAX_LAYERS = 1000
_MAX_FEATURE_DIM = 8192
_MAX_RANK = 65536
_MAX_STEPS = 10**9
_MAX_WINDOW = 2**20


def version_for(form: LinearForm, usage: Usage, weights_sketch: tuple[float, ...]) -> int:
    """Return the lowest format version that says all of this, which older LinVideos read too.

    A LinVideo that does not know a version refuses it in one sentence.
    """
    if usage.said or weights_sketch:
        return 3
    return 1 if form == LinearForm() else 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactHeader:
    """What an artifact says of itself.

    family, fingerprint: the architecture that it fits, in `adapters`' words.
    weights_digest: the weights that it was trained from, `attention_sites.weights_digest`.
    layers: the linear layers, each once and ascending, of the model's `num_layers`.
    site_names: for each of `layers` the module that holds its attention.
    parameters: which weights were trained beside the feature maps: "full", "lora" or none,
        "feature_maps".
    lora_rank: 0 unless "lora".
    feature_map, feature_dim, map_sharing, output_gate, window: the linear attention, in
        `attention.LinearForm`'s words.
    objective, steps: what was trained, and for how many training steps.
    sigmas: the sampling grid that a distilled model is bound to, empty for any other.
    usage: how the file wants to be used, as far as it says.
    weights_sketch: of the weights that it was trained from, `weights_sketch` beside it; empty for
        a file that has none.
    provenance: how the file was made, for its reader.

    Raises ArtifactError naming the field that is wrong.
    """

    format_version: int = 1
    family: str
    fingerprint: str
    weights_digest: str
    layers: tuple[int, ...]
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
    usage: Usage = dataclasses.field(default_factory=Usage)
    weights_sketch: tuple[float, ...] = ()

    @property
    def form(self) -> LinearForm:
        """Return what the linear layers are made of."""
        return LinearForm(**{name: getattr(self, name) for name in _FORM_FIELDS})

    def __post_init__(self) -> None:
        _check_version(self.format_version)
        for name in ("family", "fingerprint", "weights_digest", "objective"):
            check_text(name, getattr(self, name))
        if not re.fullmatch("[0-9a-f]{16}", self.weights_digest):
            refuse("weights_digest", self.weights_digest, "16 hexadecimal digits are expected")
        for name, choices in (
            ("feature_map", FEATURE_MAPS),
            ("map_sharing", MAP_SHARINGS),
            ("parameters", PARAMETERS),
        ):
            if getattr(self, name) not in choices:
                refuse(name, getattr(self, name), f"one of {', '.join(choices)} is expected")
        check_integer("num_layers", self.num_layers, 1, _MAX_LAYERS)
        check_integer("feature_dim", self.feature_dim, 2, _MAX_FEATURE_DIM)
        if self.feature_dim % 2:
            refuse("feature_dim", self.feature_dim, "an even number is expected")
        if not isinstance(self.output_gate, bool):
            refuse("output_gate", self.output_gate, "true or false is expected")
        check_integer("window", self.window, 0, _MAX_WINDOW)
        if self.window == 1:
            refuse("window", self.window, "0, or 2 or more tokens are expected")
        self._check_usage()
        is_lora = self.parameters == "lora"
        check_integer("lora_rank", self.lora_rank, *((1, _MAX_RANK) if is_lora else (0, 0)))
        check_integer("steps", self.steps, 0, _MAX_STEPS)
        _check_layers(self.layers, self.num_layers)
        _check_site_names(self.site_names, self.layers)
        _check_sigmas(self.sigmas)
        _check_provenance(self.provenance)

    def _check_usage(self) -> None:
        if not isinstance(self.usage, Usage):
            refuse("usage", self.usage, "a Usage is expected")
        _check_sketch(self.weights_sketch)
        needed = version_for(self.form, self.usage, self.weights_sketch)
        if self.format_version < needed:
            refuse("format_version", self.format_version, f"{needed} is expected for what it says")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Artifact:
    """Everything that makes a model linear where it may be.

    feature_maps: layer -> query map and key map, [N, D, M/2] each, N being 1 if heads share one.
    gates: layer -> output gate [N, D], for a header with output_gate.
    window_mixes: layer -> share of the local softmax [N], for a header with a window.
    deltas: parameter name -> change, of the parameter's shape.
    low_rank: name of a linear layer -> down [R, in] and up [out, R]; the change is `up down`.

    Raises ArtifactError when the tensors do not fit the header or one another.
    """

    header: ArtifactHeader
    feature_maps: Mapping[int, tuple[Tensor, Tensor]]
    deltas: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    low_rank: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    gates: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)
    window_mixes: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.validate()

    def linear_tensors(self, layer: int) -> dict[str, Tensor]:
        """Return the tensors of a layer's linear attention by their names in `LinearAttention`."""
        query_map, key_map = self.feature_maps[layer]
        tensors = {"query_map": query_map, "key_map": key_map}
        for name, added in (("gate", self.gates), ("window_mix", self.window_mixes)):
            if layer in added:
                tensors[name] = added[layer]
        return tensors

    def validate(self) -> None:
        """Raise ArtifactError when header and tensors contradict each other."""
        parameters = self.header.parameters
        if self.deltas and parameters != "full":
            raise ArtifactError(f"parameters is {parameters!r}, yet full weight changes are there")
        if bool(self.low_rank) != (parameters == "lora"):
            there = "are there" if self.low_rank else "are missing"
            raise ArtifactError(f"parameters is {parameters!r}, yet LoRA tensors {there}")
        _check_feature_maps(self.header, self.feature_maps)
        _check_added("output gate", self.header, self.header.output_gate, self.gates, 2)
        _check_added("window mix", self.header, self.header.window > 0, self.window_mixes, 1)
        for name, delta in self.deltas.items():
            check_text("parameter name", name)
            _check_dtype(f"the change of {name}", delta)
        for name, pair in self.low_rank.items():
            check_text("layer name", name)
            _check_low_rank(self.header, name, *pair)


def _check_version(version: object) -> None:
    if not is_integer(version) or version < 1:
        refuse("format_version", version, "a whole number from 1 is expected")
    if version > FORMAT_VERSION:
        expected = f"this LinVideo reads version {FORMAT_VERSION}: update LinVideo"
        refuse("format_version", version, expected)


def _check_layers(layers: object, num_layers: int) -> None:
    if not isinstance(layers, tuple) or not layers or not all(map(is_integer, layers)):
        refuse("layers", layers, "the numbers of one linear layer or more are expected")
    for layer in layers:
        if not 0 <= layer < num_layers:
            refuse("layers", layers, f"a model of {num_layers} layers has no layer {show(layer)}")
    if list(layers) != sorted(set(layers)):
        refuse("layers", layers, "each layer once, in ascending order, is expected")


def _check_site_names(names: object, layers: tuple[int, ...]) -> None:
    if not isinstance(names, tuple) or len(names) != len(layers):
        refuse("site_names", names, f"{len(layers)} module names, one a layer, are expected")
    for name in names:
        check_text("site_names", name)
    if len(set(names)) != len(names):
        refuse("site_names", names, "each module once is expected")


def _check_sigmas(sigmas: object) -> None:
    expected = "an empty list or noise levels that fall from at most 1 to 0 are expected"
    if not isinstance(sigmas, tuple) or not all(
        isinstance(sigma, float) or is_integer(sigma) for sigma in sigmas
    ):
        refuse("sigmas", sigmas, expected)
    falls = all(high > low for high, low in itertools.pairwise(sigmas))
    if sigmas and not (falls and 1 >= sigmas[0] > sigmas[-1] == 0):
        refuse("sigmas", sigmas, expected)


def _check_sketch(sketch: object) -> None:
    expected = f"an empty list or {SKETCH_SIZE} numbers from -1 to 1 are expected"
    if not isinstance(sketch, tuple) or len(sketch) not in (0, SKETCH_SIZE):
        refuse("weights_sketch", sketch, expected)
    if not all(is_number(value) and abs(value) <= 1 for value in sketch):
        refuse("weights_sketch", sketch, expected)


def _check_provenance(provenance: object) -> None:
    if not isinstance(provenance, Mapping):
        refuse("provenance", provenance, "names with texts or numbers are expected")
    for name, value in provenance.items():
        check_text("provenance's name", name)
        is_small = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
        if not (isinstance(value, str) or (is_small and math.isfinite(value))):
            refuse(f"provenance's {show(name)}", value, "a text or a finite number is expected")


def _check_dtype(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ArtifactError(f"{what} holds {tensor.dtype}; fp16, bf16 or fp32 is expected")
    if 0 in tensor.shape:
        raise ArtifactError(f"{what} is empty, of shape {list(tensor.shape)}")


def _check_feature_maps(
    header: ArtifactHeader, feature_maps: Mapping[int, tuple[Tensor, Tensor]]
) -> None:
    half = header.feature_dim // 2
    for layer in header.layers:
        if layer not in feature_maps:
            raise ArtifactError(f"layer {layer} is linear, yet its feature maps are missing")
    if extra := sorted(set(feature_maps) - set(header.layers)):
        raise ArtifactError(f"layer {extra[0]} has feature maps, yet it is not a linear layer")
    for layer, pair in feature_maps.items():
        for side, feature_map in zip(("query_map", "key_map"), pair, strict=True):
            _check_dtype(f"{side} of layer {layer}", feature_map)
            is_shared = header.map_sharing == "shared"
            is_matrix = feature_map.ndim == 3 and feature_map.shape[2] == half
            if not is_matrix or (is_shared and feature_map.shape[0] != 1):
                raise ArtifactError(
                    f"{side} of layer {layer} has shape {list(feature_map.shape)}; "
                    f"[{'1' if is_shared else 'N'}, D, {half}] is expected, as feature_dim is "
                    f"{header.feature_dim} and map_sharing {header.map_sharing}"
                )
        if pair[0].shape != pair[1].shape:
            shapes = " and ".join(str(list(feature_map.shape)) for feature_map in pair)
            raise ArtifactError(f"query_map and key_map of layer {layer} differ in shape: {shapes}")


def _check_added(
    what: str, header: ArtifactHeader, is_there: bool, added: Mapping[int, Tensor], ndim: int
) -> None:
    """Check a part that every linear layer has, or none."""
    if differing := sorted(set(header.layers if is_there else ()) ^ set(added)):
        state = "is missing" if is_there else "is there, yet the header has none"
        layer = differing[0]
        if is_there and layer in added:
            state = "is there, yet it is not a linear layer"
        raise ArtifactError(f"the {what} of layer {layer} {state}")
    for layer, tensor in added.items():
        _check_dtype(f"the {what} of layer {layer}", tensor)
        if tensor.ndim != ndim:
            shape = "[N, D]" if ndim == 2 else "[N]"
            raise ArtifactError(
                f"the {what} of layer {layer} has shape {list(tensor.shape)}; {shape} is expected"
            )


def _check_low_rank(header: ArtifactHeader, name: str, down: Tensor, up: Tensor) -> None:
    _check_dtype(f"lora_down of {name}", down)
    _check_dtype(f"lora_up of {name}", up)
    R = header.lora_rank
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != R or up.shape[1] != R:
        raise ArtifactError(
            f"the LoRA of {name} has shapes {list(down.shape)} and {list(up.shape)}; [{R}, in] and "
            f"[out, {R}] are expected, as lora_rank is {R}"
        )
