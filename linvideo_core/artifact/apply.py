"""Take an artifact out of a trained student, put it into a model, and take it out again."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import attention_sites
from ..models.attention import LinearAttention, MixedAttention
from ..models.families import identify
from ..models.lora import LowRank
from ..models.quantized import Float8Linear
from .base_weights import BaseWeights, compare_weights
from .header import Artifact, ArtifactError, ArtifactHeader, version_for
from .usage import Usage


@torch.no_grad()
def add_change(
    undo: contextlib.ExitStack,
    model: nn.Module,
    name: str,
    factors: Sequence[Tensor],
    strength: float,
) -> None:
    """Add `strength` times the product of the factors to a parameter, and note how to undo it.

    The sum is taken in fp32 and stored in the parameter's dtype; a copy of the parameter waits in
    CPU memory, so that the accelerator's memory does not grow. An fp8 weight, in which most of the
    change would be rounded away, stays as it is: the change is computed beside it.

    factors: one change, or matrices whose product has as many elements as the parameter.

    Raises ArtifactError, leaving the parameter as it was, when the sum overflows.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, Float8Linear) and leaf == "weight":
        hook = functools.partial(_add_beside, tuple(factors), strength)
        undo.callback(owner.register_forward_hook(hook).remove)
        return
    parameter = model.get_parameter(name)
    factors = [factor.to(parameter.device, torch.float32) for factor in factors]
    change = functools.reduce(torch.matmul, factors).reshape(parameter.shape)
    total = (parameter.float() + strength * change).to(parameter.dtype)
    if not total.isfinite().all():
        raise ArtifactError(f"the change of {name} overflows {parameter.dtype}: lower the strength")
    undo.callback(_overwrite, parameter, parameter.detach().to("cpu", copy=True))
    _overwrite(parameter, total)


@torch.no_grad()
def _overwrite(parameter: Tensor, value: Tensor) -> None:
    if parameter.is_cpu and torch.cuda.is_initialized():
        # An offloaded weight may be on its way to the device.
        torch.cuda.synchronize()
    parameter.copy_(value)


def _add_beside(
    factors: Sequence[Tensor],
    strength: float,
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    change = args[0].to(output.dtype)
    for factor in reversed(factors):
        change = F.linear(change, factor.to(change))
    return output + strength * change


_log = logging.getLogger(__name__)


class Applied:
    """An artifact at work in a model, until it is removed."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Restore the model bit for bit, with the attention modules that stood in it before."""
        self._undo.close()


def check(
    artifact: Artifact, model_shapes: attention_sites.Shapes
) -> list[attention_sites.AttentionSite]:
    """Make sure that an artifact fits a model.

    model_shapes: parameter names and shapes, as `attention_sites.shapes_of` returns them.

    Returns the sites that become linear.
    Raises ArtifactError naming what differs.
    """
    header = artifact.header
    try:
        family, sites = identify(model_shapes)
    except ValueError as error:
        raise ArtifactError(f"this file was made for {header.fingerprint}, but {error}") from error
    found = attention_sites.fingerprint(family, sites)
    if (family.name, found, len(sites)) != (header.family, header.fingerprint, header.num_layers):
        raise ArtifactError(
            f"this file was made for {header.fingerprint!a} (family {header.family!a}, "
            f"{header.num_layers} layers), but the model is {found!a} (family {family.name!a}, "
            f"{len(sites)} layers): choose a file made for this model"
        )
    by_layer = {site.layer: site for site in sites}
    linear = []
    for layer, name in zip(header.layers, header.site_names, strict=True):
        site = by_layer.get(layer)
        if site is None or site.name != name:
            raise ArtifactError(f"the model has no self-attention {name!a} at layer {layer}")
        num_maps = 1 if header.map_sharing == "shared" else site.num_heads
        expected = [num_maps, site.head_dim, header.feature_dim // 2]
        _check_shape(f"the feature maps of {name}", artifact.feature_maps[layer][0], expected)
        if header.output_gate:
            expected = [site.num_heads, site.head_dim]
            _check_shape(f"the output gate of {name}", artifact.gates[layer], expected)
        if header.window:
            mix = artifact.window_mixes[layer]
            _check_shape(f"the window mix of {name}", mix, [site.num_heads])
        linear.append(site)
    for name, delta in artifact.deltas.items():
        _check_shape(f"the change of {name}", delta, model_shapes.get(name))
    for name, (down, up) in artifact.low_rank.items():
        change = torch.empty(up.shape[0], down.shape[1], device="meta")
        _check_shape(f"the LoRA of {name}", change, model_shapes.get(f"{name}.weight"))
    return linear


def warn_of_other_weights(artifact: Artifact, model: nn.Module) -> None:
    """Log when a model's weights are not those that the artifact was trained from."""
    family, sites = identify(attention_sites.shapes_of(model))
    found = BaseWeights(
        digest=attention_sites.weights_digest(model, sites),
        sketch=attention_sites.weights_sketch(model, family, sites),
    )
    match = compare_weights(artifact.header, found)
    if match.kind != "same":
        _log.warning("LinVideo: %s", match)


def apply(artifact: Artifact, model: nn.Module, *, strength: float = 1.0) -> Applied:
    """Put linear attention and weight changes into a model, in place.

    strength: 0 to 2, scales the weight changes; the feature maps are as trained at any strength.

    Sums are taken in fp32 and stored in each parameter's dtype. Copies of the touched parameters
    wait in CPU memory for `Applied.remove`, so that the accelerator's memory does not grow.
    Raises ArtifactError, leaving the model as it was, when the artifact does not fit it, when one
    is applied already, or when a sum overflows.
    """
    if not isinstance(strength, int | float) or not 0 <= strength <= 2:
        raise ArtifactError(f"strength {strength!r} given; a number from 0 to 2 is needed")
    shapes = attention_sites.shapes_of(model)
    linear_sites = check(artifact, shapes)
    _, sites = identify(shapes)
    for site in sites:
        if isinstance(attention_sites.attention_at(model, site), LinearAttention | MixedAttention):
            raise ArtifactError(
                f"{site.name} is linear already: remove the applied file, or load the model afresh"
            )
    warn_of_other_weights(artifact, model)
    with contextlib.ExitStack() as undo, torch.no_grad():
        for name, delta in artifact.deltas.items():
            add_change(undo, model, name, (delta,), strength)
        for name, (down, up) in artifact.low_rank.items():
            add_change(undo, model, f"{name}.weight", (up, down), strength)
        for site in linear_sites:
            attention = _make_linear(model, site, artifact)
            originals = attention_sites.install(model, [site], lambda _, module=attention: module)
            undo.callback(attention_sites.restore, model, [site], originals)
        return Applied(undo.pop_all())


def extract(
    student: nn.Module,
    teacher: nn.Module,
    *,
    parameters: str,
    objective: str,
    steps: int,
    provenance: Mapping[str, str | int | float],
    sigmas: Sequence[float] = (),
    usage: Usage | None = None,
) -> Artifact:
    """Take the artifact out of a trained student: what it has that its teacher has not.

    student: linear attention, or mixed attention hardened, stands at its sites.
    teacher: the model that the student started from, untouched; the student itself where only
        adapters tell the two apart.
    parameters: "full" takes the changed weights, "lora" the low-rank changes, "feature_maps" none.
    steps: training steps taken.
    usage: how the artifact wants to be used; none: it does not say.

    Weights that differ but are not stored are logged.
    Raises ArtifactError when the two are not one architecture or a layer is not decided yet.
    """
    family, sites = _identify_both(student, teacher)
    linear = {site: module for site in sites if (module := _linear_at(student, site))}
    if not linear:
        raise ArtifactError("the student has no linear layer: there is nothing to save")
    low_rank = _collect_low_rank(student)
    if bool(low_rank) != (parameters == "lora"):
        state = "has" if low_rank else "has no"
        raise ArtifactError(
            f"parameters={parameters!r} given, but the student {state} LoRA changes"
        )
    is_full = parameters == "full"
    trainable = attention_sites.trainable_weights(student, family, sites) if is_full else {}
    first = next(iter(linear.values()))
    if any(module.form != first.form for module in linear.values()):
        raise ArtifactError("the student's linear layers differ in form: a file holds one form")
    usage, sketch = usage or Usage(), attention_sites.weights_sketch(teacher, family, sites)
    header = ArtifactHeader(
        format_version=version_for(first.form, usage, sketch),
        family=family.name,
        fingerprint=attention_sites.fingerprint(family, sites),
        weights_digest=attention_sites.weights_digest(teacher, sites),
        layers=tuple(site.layer for site in linear),
        site_names=tuple(site.name for site in linear),
        num_layers=len(sites),
        feature_dim=first.feature_dim,
        parameters=parameters,
        lora_rank=next((down.shape[0] for down, _ in low_rank.values()), 0),
        objective=objective,
        steps=steps,
        sigmas=tuple(float(sigma) for sigma in sigmas),
        usage=usage,
        weights_sketch=sketch,
        provenance=dict(provenance),
        **dataclasses.asdict(first.form),
    )
    by_layer = {site.layer: module for site, module in linear.items()}
    return Artifact(
        header=header,
        feature_maps={
            layer: (_copy_to_cpu(module.query_map), _copy_to_cpu(module.key_map))
            for layer, module in by_layer.items()
        },
        deltas=_collect_deltas(student, teacher, trainable),
        low_rank=low_rank,
        gates=_collect_added(by_layer, "gate"),
        window_mixes=_collect_added(by_layer, "window_mix"),
    )


def _check_shape(what: str, tensor: Tensor, expected: Sequence[int] | None) -> None:
    if expected is None:
        raise ArtifactError(f"{what} has no counterpart in the model")
    if list(tensor.shape) != list(expected):
        raise ArtifactError(
            f"{what} has shape {list(tensor.shape)}, but the model needs {list(expected)}"
        )


def _make_linear(
    model: nn.Module, site: attention_sites.AttentionSite, artifact: Artifact
) -> LinearAttention:
    """Return linear attention with fp32 tensors where the model works.

    The site's own weights may wait in CPU memory.
    """
    device = next(model.parameters()).device
    # On meta, the initial maps that the loaded ones replace cost neither time nor random numbers.
    with torch.device("meta"):
        attention = LinearAttention(
            site.num_heads, site.head_dim, artifact.header.feature_dim, artifact.header.form
        )
    tensors = artifact.linear_tensors(site.layer)
    state = {name: x.to(device, torch.float32, copy=True) for name, x in tensors.items()}
    attention.load_state_dict(state, assign=True)
    return attention


def _linear_at(model: nn.Module, site: attention_sites.AttentionSite) -> LinearAttention | None:
    """Return the linear attention that a site computes, or None where it computes softmax."""
    attention = attention_sites.attention_at(model, site)
    if isinstance(attention, LinearAttention):
        return attention
    if not isinstance(attention, MixedAttention) or attention.mode == "softmax":
        return None
    if attention.mode == "mixed":
        raise ArtifactError(f"{site.name} is still a mixture: select its kind first")
    return attention.linear


def _identify_both(
    student: nn.Module, teacher: nn.Module
) -> tuple[attention_sites.ModelFamily, list[attention_sites.AttentionSite]]:
    family, sites = identify(attention_sites.shapes_of(teacher))
    expected = attention_sites.fingerprint(family, sites)
    found = attention_sites.fingerprint(*identify(attention_sites.shapes_of(student)))
    if found != expected:
        raise ArtifactError(f"the student is {found!a}, but its teacher is {expected!a}")
    if teacher is not student and any(_linear_at(teacher, site) for site in sites):
        raise ArtifactError("the teacher has linear layers: give the model as it was before")
    return family, sites


def _collect_added(linear: Mapping[int, LinearAttention], name: str) -> dict[int, Tensor]:
    tensors = {layer: getattr(module, name) for layer, module in linear.items()}
    return {layer: _copy_to_cpu(x) for layer, x in tensors.items() if x is not None}


def _collect_low_rank(student: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name.removesuffix(".lora"): (_copy_to_cpu(module.down), _copy_to_cpu(module.up))
        for name, module in student.named_modules()
        if isinstance(module, LowRank)
    }


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _collect_deltas(
    student: nn.Module, teacher: nn.Module, trainable: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return `student - teacher` in fp32 of every trainable parameter that changed."""
    after = dict(student.named_parameters())
    deltas, omitted = {}, []
    for name, before in teacher.named_parameters():
        if name not in after or after[name].shape != before.shape:
            raise ArtifactError(f"the teacher's {name} has no counterpart in the student")
        if after[name] is before:
            continue
        delta = after[name].detach().float().cpu() - before.detach().float().cpu()
        if not delta.any():
            continue
        if name in trainable:
            deltas[name] = delta
        else:
            omitted.append(name)
    if omitted:
        _log.warning(
            "%d weights differ from the teacher's but are not stored (first: %s): the teacher "
            "should be the model that training started from",
            len(omitted),
            omitted[0],
        )
    return deltas


@contextlib.contextmanager
def transfer_into(model: nn.Module, artifact: Artifact) -> Iterator[nn.Module]:
    """Turn a teacher into its student for a while."""
    applied = apply(artifact, model)
    try:
        yield model
    finally:
        applied.remove()
