"""The model variants that ComfyUI has, each with small random weights.

A variant's weights are random numbers under its own parameter names, recognised by ComfyUI's own
loader; its conditioning is what ComfyUI's nodes give it. Expected latents come from the untouched
model while attention, inside the chosen layers alone, is answered by our core's linear attention,
or by its hybrid one over the grid that the model itself makes: the same latents (norm of the
difference over the norm of the expected ones, fp32) say at once that chosen layers are linear, that
other layers, side blocks and adapters are as they were, and that no token is lost.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import comfy.ldm.modules.attention
import comfy.nested_tensor
import comfy.ops
import comfy.sample
import comfy.sd
import torch
from linvideo_pack.linvideo_core.artifact import Artifact, ArtifactError
from linvideo_pack.linvideo_core.kernels import linear_attention
from linvideo_pack.linvideo_core.kernels.tiles import TokenGrid
from linvideo_pack.linvideo_core.models.attention import attend_linearly
from linvideo_pack.linvideo_core.models.config import LinearForm
from linvideo_pack.linvideo_core.models.families import FAMILIES
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.attention_override import answer
from linvideo_pack.nodes.patching.families import host_family
from linvideo_pack.nodes.patching.injection import _warn_of_joining_inputs
from stage import TOLERANCES, collect_warnings, complaint
from torch import Tensor, nn
from variants import FHW, build, make_artifact, minimax_h3, random_tensor

_TOLERANCE = TOLERANCES[torch.float32]
_WAN = {"dim": 256, "ffn_dim": 96, "num_heads": 2, "num_layers": 3, "cross_attn_norm": True}
_MODEL = "comfy.ldm.wan.model"
_F, _H, _W = FHW


def _latents(channels: int = 16, frames: int = _F) -> Tensor:
    return random_tensor(1, channels, frames, _H, _W, seed=frames)


def _clip_vision(tokens: int = 257) -> SimpleNamespace:
    return SimpleNamespace(penultimate_hidden_states=random_tensor(1, tokens, 1280))


def _sample(patcher: Any, noise: Any, conditioning: list) -> Tensor:
    settings = (1, 1.0, "euler", "simple", conditioning, conditioning, noise * 0.5)
    return comfy.sample.sample(patcher, noise, *settings, disable_pbar=True, seed=1)


def _attend(artifact: Artifact, layer: int, grid: TokenGrid, heads: int, *inputs: Tensor) -> Tensor:
    """Answer an attention call in the most literal way: split heads, core, join heads."""
    if inputs[0].ndim == 4:  # one sample of [heads, tokens, head_dim]
        split = [x.transpose(1, 2) for x in inputs]
    else:
        split = [x.reshape(*x.shape[:2], heads, x.shape[2] // heads) for x in inputs]
    weights = {name: x.to(split[0].device) for name, x in artifact.linear[layer].items()}
    return attend_linearly(*split, weights, form=artifact.header.form, grid=grid).flatten(2)


def _watch_grid(diffusion_model: nn.Module, undo: contextlib.ExitStack) -> Callable[[], TokenGrid]:
    """Return what says where the video's tokens lie in the present call of a model.

    Wan embeds its video first, and has tokens before it that `ref_conv` makes. H3's come last.
    """
    seen: dict[str, list[torch.Size]] = {"patch_embedding": [], "ref_conv": []}

    def begin(*_: Any) -> None:
        for shapes in seen.values():
            shapes.clear()

    undo.callback(diffusion_model.register_forward_pre_hook(begin).remove)
    for name, module in diffusion_model.named_children():
        if (shapes := seen.get(name.removesuffix("_global"))) is not None:
            hook = module.register_forward_hook(lambda *a, s=shapes: s.append(a[2].shape[2:]))
            undo.callback(hook.remove)

    def find() -> TokenGrid:
        if not seen["patch_embedding"]:
            return TokenGrid((_F, _H // 2, _W // 2), before=None)
        before = sum(shape.numel() for shape in seen["ref_conv"])
        return TokenGrid(tuple(seen["patch_embedding"][0]), before=before, after=None)

    return find


@contextlib.contextmanager
def _expected(patcher: Any, artifact: Artifact) -> Iterator[None]:
    """Answer the chosen layers' attention where their code looks for it, without our nodes."""
    inside: list[int] = []
    diffusion_model = patcher.model.diffusion_model
    with contextlib.ExitStack() as undo:
        for layer, name in zip(
            artifact.header.linear_layers, artifact.header.site_names, strict=True
        ):
            attention = diffusion_model.get_submodule(name)
            enter = attention.register_forward_pre_hook(lambda *_, i=layer: inside.append(i))
            leave = attention.register_forward_hook(lambda *_: inside.clear())
            undo.callback(enter.remove)
            undo.callback(leave.remove)
        find_grid = _watch_grid(diffusion_model, undo)
        code = importlib.import_module(type(attention).__module__)
        original = code.optimized_attention

        def replacement(q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Tensor:
            if not inside:
                return original(q, k, v, heads, *args, **kwargs)
            inputs = [
                x.take() if hasattr(x, "take") and not torch.is_tensor(x) else x for x in (q, k, v)
            ]
            return _attend(artifact, inside[-1], find_grid(), heads, *inputs)

        code.optimized_attention = replacement
        undo.callback(setattr, code, "optimized_attention", original)
        yield


def _streams(latents: Any) -> list[Tensor]:
    return latents.unbind() if latents.is_nested else [latents]


def _difference(latents: Any, expected: Any) -> float:
    pairs = list(zip(_streams(latents), _streams(expected), strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _try(
    patcher: Any, noise: Any, context_dim: int, joining: tuple[str, ...] = (), **conditions: Any
) -> None:
    """Linearize a variant, sample with its conditions, compare, and take it away again."""
    conditioning = [[random_tensor(1, 5, context_dim, seed=4), conditions]]
    sample = functools.partial(_sample, noise=noise, conditioning=conditioning)
    before = sample(patcher)
    for form in (LinearForm(), LinearForm(tile="1x3x2")):
        artifact = make_artifact(patcher, form)
        with _expected(patcher, artifact):
            expected = sample(patcher)
        _warn_of_joining_inputs.cache_clear()
        with collect_warnings(".nodes.patching.injection") as messages:
            linearized = linearize(patcher, artifact)
            latents = sample(linearized)
            assert _difference(sample(linearized), latents) == 0
        moved, error = _difference(latents, before), _difference(latents, expected)
        print(f"{type(patcher.model.diffusion_model).__name__}: {moved:.1e}, error {error:.1e}")
        assert error <= _TOLERANCE and moved > 100 * _TOLERANCE, (error, moved)
        assert len(messages) == bool(joining), messages
        assert all(name in messages[0] for name in joining), messages
    assert _difference(sample(patcher), before) == 0


def _try_wan(
    module: str = _MODEL,
    class_name: str = "WanModel",
    joining: tuple[str, ...] = (),
    metadata: dict | None = None,
    kind: str | None = None,
    noise: Tensor | None = None,
    config: dict | None = None,
    **conditions: Any,
) -> None:
    patcher = build(module, class_name, {**_WAN, **(config or {})}, metadata, kind)
    noise = _latents() if noise is None else noise
    _try(patcher, noise, 4096, joining, **conditions)


_IMAGE = {"concat_latent_image": _latents()}
_VISION = {"clip_vision_output": _clip_vision()}
_REFERENCE = {"reference_latents": [_latents(frames=1)]}
_CAMERA = {"camera_conditions": random_tensor(1, 24, _F, 8 * _H, 8 * _W)}
_HUMO = {"audio_embed": random_tensor(1, _F, 8, 5, 1280), **_REFERENCE}
CASES = {
    "2.1 and 2.2 14B text to video": {},
    "2.1 image to video and Fun inpaint": {
        "config": {"model_type": "i2v", "in_dim": 36}, **_IMAGE, **_VISION,
    },
    "2.1 first and last frame": {
        "config": {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514},
        **_IMAGE, "clip_vision_output": _clip_vision(514),
    },
    "2.1 Fun control with a reference": {
        "config": {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        "joining": ("reference_latent",),
        "concat_latent_image": _latents(32), **_VISION, **_REFERENCE,
    },
    "2.2 14B image to video": {"config": {"in_dim": 36}, **_IMAGE},
    "2.2 Fun control": {
        "config": {"in_dim": 52, "in_dim_ref_conv": 16}, "concat_latent_image": _latents(32),
    },
    "2.2 5B": {"config": {"in_dim": 48, "out_dim": 48}, "kind": "WAN22", "noise": _latents(48)},
    "2.1 camera": {
        "class_name": "CameraWanModel", "config": {"in_dim": 32}, **_CAMERA, **_VISION,
    },
    "2.2 camera": {
        "class_name": "CameraWanModel", "config": {"model_type": "camera_2.2", "in_dim": 36},
        **_CAMERA,
    },
    "VACE": {
        "class_name": "VaceWanModel", "config": {"vace_layers": 3, "vace_in_dim": 96},
        "vace_frames": [_latents(32)],
    },
    "Phantom": {"joining": ("time_dim_concat",), "time_dim_concat": _latents(frames=2)},
    "latents as context": {
        "joining": ("context_latents",), "context_latents": [_latents(frames=1)],
    },
    "2.2 speech with a reference": {
        "class_name": "WanModel_S2V", "joining": ("reference_latent", "reference_motion"),
        "audio_embed": random_tensor(1, 25, 1024, 4 * _F), **_REFERENCE,
        "reference_motion": _latents(frames=19), "control_video": _latents(),
    },
    "HuMo 1.7B with a reference": {
        "class_name": "HumoWanModel", "joining": ("reference_latent",), **_HUMO,
    },
    "HuMo 17B with a reference": {
        "class_name": "HumoWanModel", "config": {"in_dim": 36}, "joining": ("reference_latent",),
        **_HUMO,
    },
    "SCAIL": {
        "class_name": "SCAILWanModel", "config": {"in_dim": 20},
        "joining": ("reference_latent", "pose_latents"),
        **_VISION, **_REFERENCE, "pose_video_latent": _latents(),
    },
    "SCAIL 2": {
        "class_name": "SCAIL2WanModel", "config": {"in_dim": 20},
        "joining": ("reference_latent", "pose_latents"),
        **_VISION, **_REFERENCE, "pose_video_latent": _latents(),
        "driving_mask_28ch": _latents(28).movedim(1, 2),
        "ref_mask_28ch": _latents(28, frames=_F + 1).movedim(1, 2),
    },
    "WanDancer": {
        "module": f"{_MODEL}_wandancer", "class_name": "WanDancerModel", "config": {"in_dim": 36},
        **_IMAGE, **_VISION, "clip_vision_output_ref": _clip_vision(),
        "audio_embed": random_tensor(1, 20, 35), "fps": 25,
    },
    "2.1 FlowRVS": {
        "metadata": {"transformer": {"model_type": "flow_rvs"}}, "kind": "WAN21_FlowRVS",
    },
}  # fmt: skip
"""Wan's variants: arguments of `_try_wan`, and what ComfyUI's nodes add to the conditioning.

joining: inputs that are warned of, whose tokens join the video's.
"""


def test_a_variant_of_wan(case: str) -> None:
    _try_wan(**CASES[case])


def test_wan_22_animate() -> None:
    config = {**_WAN, "in_dim": 36, "num_layers": 5}
    patcher = build(f"{_MODEL}_animate", "AnimateWanModel", config)
    # Its convolutions over faces of 512 x 512 take a minute here: vectors stand in for theirs.
    encoder = patcher.model.diffusion_model.motion_encoder
    encoder.get_motion = lambda faces: random_tensor(len(faces), 512).to(faces)
    faces = {"face_video_pixels": random_tensor(1, 3, 5, 8, 8)}
    pose = {"pose_video_latent": _latents(frames=2)}
    _try(patcher, _latents(), 4096, **_IMAGE, **_VISION, **faces, **pose)


def test_minimax_h3_over_text_audio_and_video_with_or_without_a_reference() -> None:
    _try(*minimax_h3(), 40)
    reference = {"kind": "image", "latent_h": _H, "latent_w": _W, "latent": _latents(24, frames=1)}
    _try(*minimax_h3(), 40, minimax_refs=[reference])


def test_a_backend_that_takes_tensors_over_serves_every_layer_of_minimax_h3_but_ours() -> None:
    patcher, noise = minimax_h3()
    served = []

    def override(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    def take_over(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Tensor:
        served.append(query.peek().shape[2])
        tensors = [container.take() for container in (query, key, value)]
        return comfy.ldm.modules.attention.attention_pytorch(*tensors, *args, **kwargs)

    override.container_function = take_over
    conditioning = [[random_tensor(1, 5, 40, seed=4), {}]]
    linearized = linearize(patcher, make_artifact(patcher))
    expected = _sample(linearized, noise, conditioning)
    linearized.model_options["transformer_options"]["optimized_attention_override"] = override
    assert _difference(_sample(linearized, noise, conditioning), expected) <= _TOLERANCE
    num_tokens = 5 + 2 * 7 + _F * _H * _W // 4
    assert served == [num_tokens], served  # the one layer of three that stays softmax


def test_attention_that_linear_attention_is_not_is_refused() -> None:
    attend, whole = linear_attention, random_tensor(1, 4, 256)
    for given in (
        {"mask": torch.ones(4, 4)},
        {"key": whole[:, :3], "value": whole[:, :3]},
        {"key": whole[..., :128], "value": whole[..., :128], "enable_gqa": True},
        {"skip_reshape": True},
    ):
        call = {"query": whole, "key": whole, "value": whole, "heads": 2, **given}
        assert "LinVideo" in complaint(RuntimeError, answer, attend, **call), list(given)


def test_every_family_of_the_core_is_known_to_the_nodes() -> None:
    for family in FAMILIES:
        assert host_family(family.name).name == family.name


def _refusal(module: str, class_name: str, config: dict, metadata: dict) -> str:
    patcher = build(module, class_name, {**_WAN, **config}, {"transformer": metadata})
    return complaint(ArtifactError, linearize, patcher, make_artifact(patcher))


def test_wan_that_keeps_a_cache_is_refused() -> None:
    message = _refusal(f"{_MODEL[:-5]}ar_model", "CausalWanModel", {}, {"causal_ar": True})
    assert "CausalWanSelfAttention" in message


def test_wan_animate_2_is_refused() -> None:
    config, metadata = {"in_dim": 36}, {"model_type": "animate2"}
    message = _refusal(f"{_MODEL}_animate2", "WanAnimate2Model", config, metadata)
    assert "WanAnimate2SelfAttention" in message


def test_a_model_whose_grid_is_not_known_takes_linear_layers_alone() -> None:
    patcher = build(_MODEL, "WanModel", _WAN)
    diffusion_model = patcher.model.diffusion_model
    diffusion_model.__class__ = type("WanModel_Other", (type(diffusion_model),), {})
    linearize(patcher, make_artifact(patcher))
    hybrid = make_artifact(patcher, LinearForm(tile="1x3x2"))
    message = complaint(ArtifactError, linearize, patcher, hybrid)
    assert "does not know where WanModel_Other has the video's tokens" in message


def test_a_model_of_no_known_family_is_refused_with_the_known_ones() -> None:
    patcher = build(_MODEL, "WanModel", _WAN)
    artifact = make_artifact(patcher)
    stranger = patcher.clone()
    stranger.model = nn.Module()
    stranger.model.diffusion_model = nn.Linear(2, 2)
    message = complaint(ArtifactError, linearize, stranger, artifact)
    assert all(family.name in message for family in FAMILIES)
