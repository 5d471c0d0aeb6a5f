"""Wan's layers with norm and rotation in one pass: the same as ComfyUI's, or left alone.

On a CPU ComfyUI's own forward would run: `_fused` takes the other way everywhere, and says how many
of a layer's runs took it. On a GPU it is `_as_comfyui` that takes ComfyUI's.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import comfy.ldm.modules.attention
import comfy.ldm.wan.model
import comfy.model_management
import comfy.ops
import test_linearize
import test_quantised
import test_stacking
import test_variants
import torch
from comfy.ldm.flux.layers import EmbedND
from comfy.ldm.flux.math import apply_rope1
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.families import wan as wan_family
from stage import (
    assert_close,
    collect_warnings,
    demo,
    device,
    made_with_weights,
    sample,
    shipped,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

_Attention = comfy.ldm.wan.model.WanSelfAttention
_ORIGINAL = _Attention.forward


@contextlib.contextmanager
def _fused() -> Iterator[list[int]]:
    """Run linear layers with `norm_rotary`; the list holds the tokens of each call of a norm."""
    num_tokens: list[int] = []

    def see(norm: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        num_tokens.append(inputs[0].shape[1])

    layer = shipped().header.linear_layers[0]
    norm = demo()[0].model.diffusion_model.blocks[layer].self_attn.norm_q
    handle = norm.register_forward_hook(see)
    wan_family.BACKEND = "reference"
    try:
        yield num_tokens
    finally:
        wan_family.BACKEND = "auto"
        handle.remove()


def _make_attention(**settings: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a layer of two heads, its input and its freqs, where ComfyUI computes."""
    generator = torch.Generator().manual_seed(0)
    operations = {"operations": comfy.ops.manual_cast, "device": "cpu", "dtype": torch.float32}
    with made_with_weights():
        attention = _Attention(256, 2, operation_settings=operations, **settings)
    for name, parameter in attention.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.06, generator=generator)
    ids = torch.stack(torch.meshgrid(*map(torch.arange, (2, 3, 4)), indexing="ij"), dim=-1)
    embed = EmbedND(dim=128, theta=10000.0, axes_dim=[44, 42, 42])
    freqs = embed(ids.reshape(1, -1, 3).float()).movedim(1, 2)
    x = torch.randn(1, 24, 256, generator=generator)
    return attention.to(device()), x.to(device()), freqs.to(device())


def _as_comfyui(model: Any) -> Any:
    """Return a clone whose linear layers run ComfyUI's own forward, as a patch of them asks for."""
    model = model.clone()
    model.set_model_attn1_patch(lambda given: given["x"])
    return model


def test_norm_and_rotation_are_comfyuis() -> None:
    _check_norm_and_rotation("reference")
    if device().type == "cuda":
        _check_norm_and_rotation("triton")


def _check_norm_and_rotation(backend: str) -> None:
    attention, x, freqs = _make_attention()
    queries = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries.append((query, key))
        return value

    wan_family.BACKEND = backend
    try:
        found = wan_family.run_fused(attention, attend, x, freqs, transformer_options={})
    finally:
        wan_family.BACKEND = "auto"
    options = {"optimized_attention_override": lambda _, q, k, v, *args, **kwargs: v}
    expected = attention(x, freqs, transformer_options=options)
    torch.testing.assert_close(found, expected)
    for found, linear, norm in zip(
        queries[0], (attention.q, attention.k), (attention.norm_q, attention.norm_k), strict=True
    ):
        normed = norm(linear(x)).unflatten(-1, (2, 128))
        expected = comfy.ldm.wan.model.apply_rope1(normed, freqs)
        assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_queries_keys_and_values_are_gone_when_the_output_is_projected() -> None:
    attention, x, freqs = _make_attention()
    alive: list[weakref.ref[Tensor]] = []

    def attend(*tensors: Tensor) -> Tensor:
        alive.extend(map(weakref.ref, tensors))
        return tensors[0].clone()

    def see(*_: Any) -> None:
        assert len(alive) == 3 and not any(x() is not None for x in alive)

    attention.o.register_forward_pre_hook(see)
    wan_family.BACKEND = "reference"
    try:
        with torch.no_grad():
            wan_family.run_fused(attention, attend, x, freqs, transformer_options={})
    finally:
        wan_family.BACKEND = "auto"
    assert alive


def test_a_norm_gives_its_weight_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        norm = _make_attention()[0].norm_q
        constant = torch.full((1, 1, 256), wan_family._CONSTANT, dtype=dtype, device=device())
        weight = norm(constant).flatten()
        torch.testing.assert_close(weight, norm.weight.to(dtype), rtol=1e-7, atol=0)


def test_both_ways_give_the_same_latents() -> None:
    linearized = linearize(demo()[0], shipped())
    with _fused() as num_tokens:
        expected = sample(_as_comfyui(linearized))
        assert 1 not in num_tokens and num_tokens
        num_tokens.clear()
        assert_close(sample(linearized), expected)
        assert set(num_tokens) == {1}, num_tokens
    assert_close(sample(linearized), expected)


def test_only_where_a_kernel_runs_is_it_taken_unasked() -> None:
    with _fused() as num_tokens:
        wan_family.BACKEND = "auto"
        sample(linearize(demo()[0], shipped()), steps=1)
        assert num_tokens and (1 in num_tokens) == (device().type == "cuda")


def test_a_patch_of_attention_is_given_comfyuis_queries_and_keys() -> None:
    shapes = []

    def patch(given: dict) -> Tensor:
        shapes.append(given["q"].shape)
        return 0.5 * given["x"]

    def patched() -> Any:
        model = linearize(demo()[0], shipped())
        model.set_model_attn1_patch(patch)
        return model

    expected, num_calls = sample(patched()), len(shapes)
    with _fused() as num_tokens:
        assert torch.equal(sample(patched()), expected)
        assert len(shapes) == 2 * num_calls > 0 and 1 not in num_tokens


def test_what_is_not_known_is_left_to_comfyui() -> None:
    attention, x, freqs = _make_attention()

    def run(layer: nn.Module = attention, given: Tensor = freqs, **options: Any) -> Tensor | None:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return value

        return wan_family.run_fused(layer, attend, x, given, transformer_options=options)

    class Changed(_Attention):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(x, *args, **kwargs)

    changed = _make_attention()[0]
    changed.__class__ = Changed

    @functools.wraps(_ORIGINAL)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * _ORIGINAL(*args, **kwargs)

    code = comfy.ldm.wan.model
    rotation = code.apply_rope1
    wan_family.BACKEND = "reference"
    try:
        assert run() is not None
        assert run(given=freqs[:, :5]) is None and run(given=freqs.half()) is None
        assert run(given=freqs.expand(2, *freqs.shape[1:])) is None
        assert run(patches={"attn1_patch": [print]}) is None
        assert run(layer=changed) is None
        assert run(layer=_make_attention(qk_norm=False)[0]) is None
        _Attention.forward = wrapped
        assert run() is None
        _Attention.forward = _ORIGINAL
        code.apply_rope1 = lambda x, freqs: x
        assert run() is None
        code.apply_rope1 = rotation
        assert run() is not None
        with torch.inference_mode(False), torch.enable_grad():
            assert run() is None
        comfy.model_management.in_training = True
        assert run() is None
    finally:
        _Attention.forward, code.apply_rope1 = _ORIGINAL, rotation
        comfy.model_management.in_training = False
        wan_family.BACKEND = "auto"


def _in_other_words(self: nn.Module, x: Tensor, freqs: Tensor, transformer_options: dict) -> Tensor:
    """Compute what the class's own forward does, called as ComfyUI 0.46 calls attention."""
    contain = getattr(comfy.ldm.modules.attention, "AttentionTensorContainer", lambda x: x)
    split = (*x.shape[:2], self.num_heads, self.head_dim)
    query = apply_rope1(self.norm_q(self.q(x)).view(split), freqs).flatten(2)
    key = apply_rope1(self.norm_k(self.k(x)).view(split), freqs).flatten(2)
    tensors = map(contain, (query, key, self.v(x)))
    options = {"transformer_options": transformer_options, "preferred_attention": None}
    return self.o(comfy.ldm.wan.model.optimized_attention(*tensors, self.num_heads, **options))


def _turning_values(self: nn.Module, x: Tensor, freqs: Tensor, **options: Any) -> Tensor:
    class Turned(nn.Module):
        def forward(_, x: Tensor) -> Tensor:
            return apply_rope1(v(x).view(*x.shape[:2], self.num_heads, -1), freqs).flatten(2)

    v, self.v = self.v, Turned()
    try:
        return _ORIGINAL(self, x, freqs, **options)
    finally:
        self.v = v


def _of_another_signature(self: nn.Module, x: Tensor, rotations: Tensor, mask: Tensor) -> Tensor:
    raise AssertionError("called")


def test_another_forward_is_taken_where_it_gives_the_same_and_said_once() -> None:
    wan_family.BACKEND = "reference"
    try:
        for forward, said in (
            (_in_other_words, None),
            (_turning_values, "gives something else for a few tokens (difference"),
            (_of_another_signature, "cannot be tried on a few tokens (TypeError: "),
        ):
            _Attention.forward = forward
            attention, x, freqs = _make_attention()
            call = functools.partial(wan_family.run_fused, transformer_options={})
            with collect_warnings(".nodes.patching.families.wan") as messages:
                for _ in range(2):
                    found = call(attention, lambda q, k, v: v, x, freqs)
                    assert (found is None) == bool(said)
            assert len(messages) == bool(said) and (not said or said in messages[0]), messages
    finally:
        _Attention.forward = _ORIGINAL
        wan_family.BACKEND = "auto"


def test_loras_quantised_streamed_and_compiled_weights_and_variants_stay_the_same() -> None:
    variants = (
        functools.partial(test_variants.test_a_variant_of_wan, case)
        for case in ("VACE", "2.2 speech with a reference")
    )
    wan_family.BACKEND = "reference"
    try:
        for test in (
            test_linearize.test_weights_that_are_streamed_give_the_same_latents,
            test_linearize.test_compiled_as_one_graph_it_gives_the_same_latents_and_compiles_once,
            test_stacking.test_a_lora_merged_or_bypassed_by_comfyui_is_the_lora_of_merged_weights,
            test_quantised.test_a_users_lora_is_merged_beside_bypassed_changes,
            *variants,
        ):
            torch._dynamo.reset()
            wan_family._agrees_once.cache_clear()
            counters.clear()
            test()
            print(f"also fused: {test}")
    finally:
        wan_family.BACKEND = "auto"
