"""What layers take: measured in a MODEL's first sampling, and told on the node."""

import contextlib
import math
import re
import unittest
from typing import Any

import comfy.model_management
import torch
from linvideo_pack.linvideo_core.models.config import LinearForm
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.injection import KEY
from linvideo_pack.nodes.softmax_backend import LinVideoSoftmaxBackend
from stage import (
    NUM_TOKENS,
    SHAPE,
    demo,
    device,
    in_form,
    make_noise,
    sample,
    shipped,
)
from torch import nn


def _linearized(**settings: Any) -> Any:
    if device().type not in ("cpu", "cuda"):
        raise unittest.SkipTest("needs a CPU or a CUDA device: others have no clock")
    return linearize(demo()[0], shipped(), **settings)


def _told(model: Any) -> tuple[str, ...]:
    return tuple(model.get_attachment(KEY).times)


def _hooked(model: Any) -> list[nn.Module]:
    modules = model.model.diffusion_model.modules()
    return [each for each in modules if each._forward_pre_hooks or each._forward_hooks]


def test_the_first_sampling_tells_what_layers_take_and_later_ones_measure_nothing() -> None:
    linearized = _linearized()
    assert not _told(linearized)
    measured = sample(linearized)
    first, *_ = told = _told(linearized)
    # Prompt and negative prompt go through the model together.
    found = re.fullmatch(
        r"a linear layer takes ([\d.]+) ms \((?:plain PyTorch|fused Triton kernels)\), a softmax "
        rf"layer ([\d.]+) ms \(ComfyUI's \w+ attention\), at 2 x {NUM_TOKENS} tokens",
        first,
    )
    assert found and all(0 < float(ms) < math.inf for ms in found.groups()), first
    assert torch.equal(sample(linearized), measured) and _told(linearized) == told
    assert first[1:] in linearized.get_attachment(KEY).text


def test_a_hybrid_layer_is_called_so() -> None:
    hybrid = linearize(demo()[0], in_form(shipped(), LinearForm(tile="1x3x3")))
    sample(hybrid)
    assert "a hybrid layer takes" in _told(hybrid)[0]
    assert "5 of 10 layers are hybrid" in hybrid.get_attachment(KEY).text


def test_another_size_or_clone_is_measured_anew_with_what_computes_it() -> None:
    linearized = _linearized()
    sample(linearized)
    sample(linearized, noise=make_noise(frames=SHAPE[1] + 1))
    assert f"at 2 x {NUM_TOKENS // SHAPE[1] * (SHAPE[1] + 1)} tokens" in _told(linearized)[0]
    other = linearized.clone()
    options = other.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda function, *args, **kws: function(*args, **kws)
    sample(other)
    assert "(another node's attention)" in _told(other)[0]
    if device().type == "cpu":
        chosen = LinVideoSoftmaxBackend.execute(linearized, {"backend": "FlashAttention"}).result[0]
        sample(chosen)
        assert "(PyTorch's FlashAttention)" in _told(chosen)[0]


def test_a_call_in_which_the_kernel_of_softmax_layers_rests_is_not_measured() -> None:
    linearized = _linearized()

    def override(function: Any, *args: Any, **settings: Any) -> Any:
        return function(*args, **settings)

    override.kernel, override.is_resting = "a kernel", True
    options = linearized.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = override

    def begin(step: int, *_: Any) -> None:
        override.is_resting = step < 3

    sample(linearized, steps=3, on_step=begin)
    assert not _told(linearized)
    sample(linearized, steps=5, on_step=begin)
    assert "(a kernel)" in _told(linearized)[0]


def test_an_interrupted_sampling_tells_nothing_and_leaves_nothing() -> None:
    linearized = _linearized()

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with contextlib.suppress(comfy.model_management.InterruptProcessingException):
        sample(linearized, on_step=stop)
    assert not _told(linearized) and not _hooked(linearized)
    sample(linearized)
    assert _told(linearized) and not _hooked(linearized)


def test_only_a_second_call_in_which_layers_are_linear_is_measured() -> None:
    kept = _linearized(keep_first_steps=3)
    sample(kept, steps=4)
    assert not _told(kept)
    sample(kept, steps=5)
    assert "a linear layer takes" in _told(kept)[0]
