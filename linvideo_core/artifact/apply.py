"""Take an artifact out of a trained student, and apply it to a model for a while."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention import LinearAttention, MixedAttention
from ..models.attention_sites import (
    AttentionSite,
    ModelFamily,
    Shapes,
    attention_at,
    fingerprint,
    install,
    restore,
    shapes_of,
    trainable_weights,
)
from ..models.base_weights import base_weights_of, compare_weights
from ..models.families import identify
from ..models.lora import LowRank
from ..models.quantized import Float8Linear
from .header import Artifact, ArtifactError, ArtifactHeader, Usage

logger = logging.getLogger(__name__)


def check(artifact: Artifact, model_shapes: Shapes) -> list[AttentionSite]:
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
    found = fingerprint(family, sites)
    if (family.name, found, len(sites)) != (header.family, header.fingerprint, header.num_layers):
        raise ArtifactError(
            f"this file was made for {header.fingerprint!a} (family {header.family!a}, "
            f"{header.num_layers} layers), but the model is {found!a} (family {family.name!a}, "
            f"{len(sites)} layers): choose a file made for this model"
        )
    by_layer = {site.layer: site for site in sites}
    linear = []
    for layer, name in zip(header.linear_layers, header.site_names, strict=True):
        site = by_layer.get(layer)
        if site is None or site.name != name:
            raise ArtifactError(f"the model has no self-attention {name!a} at layer {layer}")
        for part, shape in header.tensor_shapes(site.num_heads, site.head_dim).items():
            _check_shape(f"the {part} of {name}", artifact.linear[layer][part].shape, shape)
        linear.append(site)
    for name, delta in artifact.deltas.items():
        _check_shape(f"the change of {name}", delta.shape, model_shapes.get(name))
    for name, (down, up) in artifact.low_rank.items():
        shape = (up.shape[0], down.shape[1])
        _check_shape(f"the LoRA of {name}", shape, model_shapes.get(f"{name}.weight"))
    return linear


def warn_of_other_weights(artifact: Artifact, model: nn.Module) -> None:
    """Log when a model's weights are not those that the artifact was trained from."""
    found = base_weights_of(model, *identify(shapes_of(model)))
    match = compare_weights(artifact.header.base_weights, found)
    if match.kind != "same":
        logger.warning("LinVideo: %s", match)


@contextlib.contextmanager
def apply(artifact: Artifact, model: nn.Module, *, strength: float = 1.0) -> Iterator[nn.Module]:
    """Give a model linear attention and weight changes, in place, while the context lasts.

    strength: 0 to 2, scales the weight changes; the feature maps are as trained at any strength.

    Afterwards the model is bit for bit what it was; see `add_change` for what that takes.
    Raises ArtifactError, leaving the model as it was, when the artifact does not fit it, when one
    is applied already, or when a sum overflows.
    """
    if not isinstance(strength, int | float) or not 0 <= strength <= 2:
        raise ArtifactError(f"strength {strength!r} given; a number from 0 to 2 is needed")
    shapes = shapes_of(model)
    linear_sites = check(artifact, shapes)
    for site in identify(shapes)[1]:
        if isinstance(attention_at(model, site), LinearAttention | MixedAttention):
            raise ArtifactError(
                f"{site.name} is linear already: remove the applied file, or load the model afresh"
            )
    warn_of_other_weights(artifact, model)
    with contextlib.ExitStack() as undo:
        for name, delta in artifact.deltas.items():
            add_change(undo, model, name, (delta,), strength)
        for name, (down, up) in artifact.low_rank.items():
            add_change(undo, model, f"{name}.weight", (up, down), strength)
        make = functools.partial(_make_linear, model, artifact)
        undo.callback(restore, model, linear_sites, install(model, linear_sites, make))
        yield model


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
    # Where the model works, though the parameter may wait in CPU memory.
    device = next(model.parameters()).device
    factors = [factor.to(device, torch.float32) for factor in factors]
    change = functools.reduce(torch.matmul, factors).reshape(parameter.shape)
    total = (parameter.to(device, torch.float32) + strength * change).to(parameter.dtype)
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
        adapters tell the two apart, as in all but "full".
    parameters: "full" takes the changed weights, "lora" the low-rank changes, "feature_maps" none.
    steps: training steps taken.
    usage: how the artifact wants to be used; none: it does not say.

    Weights that differ but are not stored are logged.
    Raises ArtifactError when the two are not one architecture or a layer is not decided yet.
    """
    is_full = parameters == "full"
    family, sites = _identify_both(student, teacher)
    if (is_full or teacher is not student) and any(_linear_at(teacher, site) for site in sites):
        raise ArtifactError("the teacher has linear layers: give the model as it was before")
    linear = _collect_linear(student, sites)
    low_rank = _collect_low_rank(student, parameters)
    trainable = trainable_weights(student, family, sites) if is_full else {}
    first = next(iter(linear.values()))
    base = base_weights_of(teacher, family, sites)
    header = ArtifactHeader(
        family=family.name,
        fingerprint=fingerprint(family, sites),
        weights_digest=base.digest,
        linear_layers=tuple(site.layer for site in linear),
        site_names=tuple(site.name for site in linear),
        num_layers=len(sites),
        feature_dim=first.feature_dim,
        parameters=parameters,
        lora_rank=next((down.shape[0] for down, _ in low_rank.values()), 0),
        objective=objective,
        steps=steps,
        sigmas=tuple(float(sigma) for sigma in sigmas),
        usage=usage or Usage(),
        weights_sketch=base.sketch,
        provenance=dict(provenance),
        **dataclasses.asdict(first.form),
    )
    return Artifact(
        header=header,
        linear={
            site.layer: {name: _copy_to_cpu(x) for name, x in module.named_parameters()}
            for site, module in linear.items()
        },
        deltas=_collect_deltas(student, teacher, trainable),
        low_rank=low_rank,
    )


def _check_shape(what: str, shape: Sequence[int], expected: Sequence[int] | None) -> None:
    if expected is None:
        raise ArtifactError(f"{what} has no counterpart in the model")
    if list(shape) != list(expected):
        raise ArtifactError(f"{what} has shape {list(shape)}, but the model needs {list(expected)}")


def _make_linear(model: nn.Module, artifact: Artifact, site: AttentionSite) -> LinearAttention:
    """Return linear attention with fp32 tensors where the model works.

    The site's own weights may wait in CPU memory.
    """
    device = next(model.parameters()).device
    # On meta, the initial maps that the loaded ones replace cost neither time nor random numbers.
    with torch.device("meta"):
        attention = LinearAttention(
            site.num_heads, site.head_dim, artifact.header.feature_dim, artifact.header.form
        )
    tensors = artifact.linear[site.layer]
    state = {name: x.to(device, torch.float32, copy=True) for name, x in tensors.items()}
    attention.load_state_dict(state, assign=True)
    return attention


def _linear_at(model: nn.Module, site: AttentionSite) -> LinearAttention | None:
    """Return the linear attention that a site computes, or None where it computes softmax."""
    attention = attention_at(model, site)
    if isinstance(attention, LinearAttention):
        return attention
    if not isinstance(attention, MixedAttention) or attention.mode == "softmax":
        return None
    if attention.mode == "mixed":
        raise ArtifactError(f"{site.name} is still a mixture: select its kind first")
    return attention.linear


def _identify_both(
    student: nn.Module, teacher: nn.Module
) -> tuple[ModelFamily, list[AttentionSite]]:
    family, sites = identify(shapes_of(teacher))
    expected = fingerprint(family, sites)
    found = fingerprint(*identify(shapes_of(student)))
    if found != expected:
        raise ArtifactError(f"the student is {found!a}, but its teacher is {expected!a}")
    return family, sites


def _collect_linear(
    student: nn.Module, sites: Sequence[AttentionSite]
) -> dict[AttentionSite, LinearAttention]:
    linear = {site: module for site in sites if (module := _linear_at(student, site))}
    if not linear:
        raise ArtifactError("the student has no linear layer: there is nothing to save")
    if len({module.form for module in linear.values()}) > 1:
        raise ArtifactError("the student's linear layers differ in form: a file holds one form")
    return linear


def _collect_low_rank(student: nn.Module, parameters: str) -> dict[str, tuple[Tensor, Tensor]]:
    low_rank = {
        name.removesuffix(".lora"): (_copy_to_cpu(module.down), _copy_to_cpu(module.up))
        for name, module in student.named_modules()
        if isinstance(module, LowRank)
    }
    if bool(low_rank) != (parameters == "lora"):
        state = "has" if low_rank else "has no"
        raise ArtifactError(
            f"parameters={parameters!r} given, but the student {state} LoRA changes"
        )
    return low_rank


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
        logger.warning(
            "%d weights differ from the teacher's but are not stored (first: %s): the teacher "
            "should be the model that training started from",
            len(omitted),
            omitted[0],
        )
    return deltas
