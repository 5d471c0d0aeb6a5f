"""Files whose linear layers have a form of their own."""

import tempfile
from pathlib import Path

import comfy.model_management
import torch
from linvideo_pack.linvideo_core import artifact
from linvideo_pack.linvideo_core.artifact import Artifact
from linvideo_pack.linvideo_core.kernels.tiles import TokenGrid
from linvideo_pack.linvideo_core.models.attention import LinearAttention
from linvideo_pack.linvideo_core.models.config import LinearForm
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.weights import LayerMaps
from stage import (
    assert_close,
    bind_headless,
    demo,
    device,
    in_form,
    load_headless,
    relative_difference,
    sample,
    sample_headless,
    shipped,
    stream_weights,
    tolerance_of,
    without_dynamic_memory,
)
from torch import Tensor

_STEPS = 2
_FORMS = [
    LinearForm(feature_map="hedgehog_joint"),
    LinearForm(map_sharing="shared"),
    LinearForm(output_gate=True),
    # No divisor of the 192 tokens: the last block is shorter.
    LinearForm(window=45),
    LinearForm(feature_map="hedgehog_joint", map_sharing="shared", output_gate=True, window=45),
]
_HYBRID = [
    LinearForm(tile="1x3x3"),
    LinearForm(tile="1x0x0", attention_mass="moments", map_sharing="shared"),
]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _make_file(form: LinearForm) -> Artifact:
    """Return the shipped file in a form, whose every part is at work, saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        artifact.save(in_form(shipped(), form), path)
        return artifact.load(path)


def _tolerance() -> float:
    """Random gates and mixes amplify rounding: by 1.6 on one CPU, by 2.2 on a GPU."""
    return 3 * tolerance_of(demo()[0])


def _sample_core(made: Artifact) -> Tensor:
    return sample_headless([bind_headless(load_headless(), made)] * _STEPS)


def test_a_form_gives_the_latents_of_the_headless_core() -> None:
    plain = _sample_core(shipped())
    # Each of the others is a layer's business, which the last test sees to.
    for form in (LinearForm(map_sharing="shared"), _FORMS[-1], *_HYBRID):
        made = _make_file(form)
        latents = sample(linearize(demo()[0], made), steps=_STEPS)
        assert_close(latents, _sample_core(made), _tolerance())
        # The demo has one head: sharing a map among its heads changes nothing.
        is_plain = form == LinearForm(map_sharing="shared")
        is_close = relative_difference(latents, plain) <= tolerance_of(demo()[0])
        assert is_close == is_plain, form


def test_a_form_whose_tensors_come_from_offload_gives_the_same() -> None:
    made = _make_file(_FORMS[-1])
    linearized = without_dynamic_memory(linearize(demo()[0], made))
    comfy.model_management.unload_all_models()
    parts = linearized.get_additional_models()
    for patcher in (linearized, *parts):
        stream_weights(patcher)
    latents = sample(linearized, steps=_STEPS)
    assert all(part.model.model_lowvram for part in parts)
    comfy.model_management.unload_all_models()
    assert_close(latents, _sample_core(made), _tolerance())


def test_a_layer_of_several_heads_is_the_cores() -> None:
    heads, head_dim, half = 3, 16, 8
    tokens = [_random(2, 63, heads, head_dim, seed=seed).to(device()) for seed in range(3)]
    grid = TokenGrid((3, 4, 5), before=1, after=2)
    for form in (*_FORMS, *_HYBRID):
        linear = LinearAttention(heads, head_dim, 2 * half, form).requires_grad_(False)
        for seed, parameter in enumerate(linear.parameters()):
            parameter += 0.5 * _random(*parameter.shape, seed=9 + seed)
        linear.to(device())
        tensors = {name: p.detach() for name, p in linear.named_parameters()}
        made = LayerMaps(tensors, form, device())
        weights = {"query_map": linear.query_map, "key_map": linear.key_map}
        state = {
            f"{name}.weight": x.permute(0, 2, 1).reshape(-1, head_dim)
            for name, x in weights.items()
        }
        if form.output_gate:
            state["gate.weight"] = linear.gate
        for name in ("window_mix", "mass_bias"):
            if name in tensors:
                state[f"{name}.weight"] = tensors[name][:, None]
        if "mass_gate" in tensors:
            state["mass_gate.weight"] = linear.mass_gate
        if "mass_moments" in tensors:
            state["mass_moments.weight"] = linear.mass_moments.T
        made.load_state_dict(state)
        made.grid = grid
        torch.testing.assert_close(made(*tokens), linear(*tokens, grid))
