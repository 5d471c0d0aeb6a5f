"""Quantised models: what is applied is exact, whatever the weights are kept in.

Expected latents come from the headless core with the weights that the quantised ones stand for, the
file's changes added in fp32. ComfyUI computes these models in a dtype of its own choice: fp16 on a
GPU.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import safetensors.torch
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy.weight_adapter import LoRAAdapter
from linvideo_pack.linvideo_core.artifact import Artifact
from linvideo_pack.linvideo_core.demo import weights_path
from linvideo_pack.linvideo_core.models.attention_sites import shapes_of
from linvideo_pack.linvideo_core.models.base_weights import base_weights_of
from linvideo_pack.linvideo_core.models.checkpoint import load_wan
from linvideo_pack.linvideo_core.models.config import LinearForm
from linvideo_pack.linvideo_core.models.families import identify
from linvideo_pack.nodes import demo as demo_nodes
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.injection import KEY
from linvideo_pack.nodes.patching.weights import (
    LowRankChange,
    compare_base,
    describe_base,
    sketch_base,
)
from linvideo_pack.nodes.transfer.host_model import cast_weights
from stage import (
    assert_close,
    bind_headless,
    collect_warnings,
    demo,
    device,
    finetuned,
    finish,
    fused_in_fp16,
    in_form,
    is_streaming,
    load_headless,
    relative_difference,
    sample,
    sample_again,
    sample_headless,
    shipped,
    stream_weights,
    tolerance_of,
    with_lora,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from variants import quantise

_FP8 = torch.float8_e4m3fn
_STEPS = 2


def _load_fp8(**settings: Any) -> Any:
    """Load as Load Diffusion Model does with weight_dtype fp8_e4m3fn: all weights, unscaled."""
    path = str(weights_path("model.safetensors"))
    return finish(comfy.sd.load_diffusion_model(path, {"dtype": _FP8}, **settings))


def _load_quantised(quantisation: str, layout: str, **settings: Any) -> Any:
    """Load a checkpoint in ComfyUI's own quantised form, every linear layer of the blocks in it."""
    weights = safetensors.torch.load_file(weights_path("model.safetensors"))
    names = [n for n in weights if n.startswith("blocks.") and weights[n].ndim == 2]
    tensors = quantise(weights, names, quantisation, layout)
    options = {"dtype": torch.float32}
    patcher = comfy.sd.load_diffusion_model_state_dict(tensors, options, **settings)
    assert any(isinstance(p, QuantizedTensor) for p in patcher.model.parameters())
    return finish(patcher)


LOADERS: dict[str, Callable[..., Any]] = {"fp8": _load_fp8}
# Older ComfyUI knows fewer forms.
for _form, _layout in (
    ("float8_e4m3fn", "TensorCoreFP8E4M3Layout"),
    ("int8_tensorwise", "TensorWiseINT8Layout"),
):
    if _form in QUANT_ALGOS:
        LOADERS[_form] = functools.partial(_load_quantised, _form, _layout)


def _plain_weights(patcher: Any) -> dict[str, Tensor]:
    """Return what a model's weights stand for, in fp32, with what is merged into them."""
    # Only where they were used are they as the host keeps them: in the file they are as they were.
    sample(patcher, steps=1)
    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model.diffusion_model
    plain = dict(model.named_parameters())
    for name, layer in model.named_modules():
        if hasattr(layer, "comfy_cast_weights") and layer.weight is not None:
            with cast_weights(layer, torch.float32, device()) as found:
                named = zip(("weight", "bias"), found, strict=True)
                plain |= {f"{name}.{leaf}": x.clone() for leaf, x in named if x is not None}
    return {name: weight.detach().float().cpu() for name, weight in plain.items()}


def _merge(model: Any) -> Any:
    """Return the linearized model with its changes merged as ComfyUI merges a LoRA."""
    merged = linearize(model, shipped(), strength=0.0)
    patches = {
        f"diffusion_model.{name}.weight": LoRAAdapter(set(), (up, down, None, None, None, None))
        for name, (down, up) in shipped().low_rank.items()
    }
    assert len(merged.add_patches(patches)) == len(patches)
    return merged


def test_changes_are_exact_where_merging_rounds_them() -> None:
    for kind, load in LOADERS.items():
        model = load()
        for made in (in_form(shipped(), LinearForm(tile="1x3x3")), shipped()):
            expected = _expected(model, made)
            bypassed = sample(linearize(model, made), steps=_STEPS)
            # Random gates of tiles amplify rounding.
            assert_close(bypassed, expected, (3 if made.header.tile else 1) * tolerance_of(model))
        merged = relative_difference(sample_again(_merge(model), steps=_STEPS), expected)
        without = sample(linearize(model, shipped(), strength=0.0), steps=_STEPS)
        effect = relative_difference(without, expected)
        print(f"{kind}: merged {merged:.1e} off, without the changes {effect:.1e}")
        # Weights that are brought to each call are changed there, and not rounded again.
        assert effect > merged and (merged > 0.02 or is_streaming())


def _expected(model: Any, applied: Artifact) -> Tensor:
    return sample_headless([bind_headless(load_headless(_plain_weights(model)), applied)] * _STEPS)


def _two_ways() -> list[Callable[[], Any]]:
    """Return loaders of layers changed in their forward, and in a function of their weight."""
    return [LOADERS[form] for form in ("fp8", "int8_tensorwise") if form in LOADERS]


class _Made(TorchDispatchMode):
    """Keeps what operations make, tensors of so many elements, as addresses of their memory."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.num_elements, self.kept = num_elements, []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if result.numel() == self.num_elements:
            # Kept, so that no later one has its place.
            self.kept.append(result)
        return result

    def addresses(self) -> set[int]:
        """Return where they lie; views lie where what they are views of does."""
        return {each.data_ptr() for each in self.kept}


def test_a_change_beside_a_layer_makes_nothing_as_large_as_its_output_but_that() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 5, 12), (7, 12)):
        x, down, up = (torch.randn(s, generator=generator) for s in (shape, (3, 12), (40, 3)))
        output = torch.randn(*shape[:-1], 40, generator=generator)
        expected = output.double() + 0.5 * x.double() @ down.double().T @ up.double().T
        change = LowRankChange(down, up, 0.5, torch.device(device())).requires_grad_(False)
        change.load_state_dict({"down.weight": down, "up.weight": up})
        given = (x.to(device()), output.to(device()))
        with _Made(output.numel()) as made:
            found = change(*given)
        assert made.addresses() - {given[1].data_ptr()} == {found.data_ptr()}
        torch.testing.assert_close(found.cpu(), expected.float())
        assert torch.equal(given[1].cpu(), output)
        change.is_resting = True
        assert change(*given) is given[1]


def test_a_quantised_model_comes_back_bit_for_bit() -> None:
    for load in _two_ways():
        model = load()
        sample(model, steps=1)
        before = sample(model, steps=_STEPS)
        linearized = linearize(model, shipped())
        first = sample(linearized, steps=_STEPS)
        assert torch.equal(sample(model, steps=_STEPS), before)
        assert torch.equal(sample(linearized.clone(), steps=_STEPS), first)
        assert not any("forward" in m.__dict__ for m in model.model.modules())
        assert not any(getattr(m, "weight_function", []) for m in model.model.modules())


def test_layers_that_newer_comfyui_fuses_take_the_changes_and_come_back() -> None:
    for load in _two_ways():
        model = load()
        # As a layer of ComfyUI's that may be quantised has it.
        model.model.diffusion_model.blocks[1].ffn[2]._full_precision_mm = False
        expected = _expected(model, shipped())
        before = _full_precision(model)
        with fused_in_fp16():
            linear = sample(linearize(model, shipped()), steps=_STEPS)
            assert_close(linear, expected, tolerance_of(model))
            sample(model, steps=1)
        assert _full_precision(model) == before


def _full_precision(model: Any) -> list[bool | None]:
    return [vars(module).get("_full_precision_mm") for module in model.model.modules()]


def test_a_users_lora_is_merged_beside_bypassed_changes() -> None:
    """Merged into fp8 it is rounded as without LinVideo: the same merged weights are expected."""
    model = with_lora(_load_fp8())
    expected, tolerance = _expected(model, shipped()), tolerance_of(model)
    for linearized in (linearize(model, shipped()), with_lora(linearize(_load_fp8(), shipped()))):
        assert_close(sample_again(linearized, steps=_STEPS), expected, tolerance)


def test_streamed_quantised_weights_give_the_same_latents() -> None:
    settings = {"disable_dynamic": True} if demo()[0].is_dynamic() else {}
    for load in _two_ways():
        expected = sample(linearize(load(**settings), shipped()), steps=_STEPS)
        linearized = linearize(load(**settings), shipped())
        comfy.model_management.unload_all_models()
        stream_weights(linearized)
        latents = sample(linearized, steps=_STEPS)
        assert linearized.model.model_lowvram
        comfy.model_management.unload_all_models()
        assert_close(latents, expected, tolerance_of(linearized))


def test_the_changes_are_loaded_with_the_model_and_are_no_part_of_it() -> None:
    model = _load_fp8()
    names = list(model.model.state_dict())
    linearized = linearize(model, shipped())
    assert not linearized.patches
    comfy.model_management.load_models_gpu([linearized, *linearized.get_additional_models()])
    loaded = {type(each.model).__name__ for each in comfy.model_management.loaded_models()}
    assert {"FeatureMaps", "LowRankChanges"} <= loaded
    assert list(model.model.state_dict()) == names
    linearized.eject_model()


def test_what_will_be_kept_in_fp8_is_changed_beside_its_layers() -> None:
    """With dynamic video memory a weight is as in its file until it is used."""
    model = demo_nodes.load_demo_model()
    for layer in model.model.modules():
        layer.weight_comfy_model_dtype = _FP8
    assert not linearize(model, shipped()).patches


def test_whole_weights_are_merged_and_said_to_be_rounded() -> None:
    low_rank = shipped().low_rank.items()
    deltas = {f"{name}.weight": up.float() @ down.float() for name, (down, up) in low_rank}
    modulation = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(8))
    deltas["blocks.5.modulation"] = 0.05 * modulation
    header = dataclasses.replace(shipped().header, parameters="full", lora_rank=0)
    whole = dataclasses.replace(shipped(), header=header, deltas=deltas, low_rank={})
    nothing = dataclasses.replace(whole, deltas={})
    model = _load_fp8()
    with collect_warnings() as warnings:
        linearized = linearize(model, whole)
    assert "rounded once more" in warnings[0] and len(warnings) == 1
    expected = _expected(model, whole)
    effect = relative_difference(_expected(model, nothing), expected)
    error = relative_difference(sample_again(linearized, steps=_STEPS), expected)
    print(f"whole weights merged into fp8: {error:.1e} off, without the changes {effect:.1e}")
    assert error < 0.5 * effect


def test_quantised_weights_are_told_from_other_weights() -> None:
    loaders = dict(LOADERS)
    for form, layout in (("nvfp4", "TensorCoreNVFP4Layout"), ("mxfp8", "TensorCoreMXFP8Layout")):
        if form in QUANT_ALGOS:
            loaders[form] = functools.partial(_load_quantised, form, layout)
    sketch = sketch_base(finetuned(0.3)).sketch
    other = dataclasses.replace(shipped().header, weights_sketch=sketch)
    for kind, load in loaders.items():
        with collect_warnings() as warnings:
            model = load()
            match = compare_base(shipped().header, model)
            said = linearize(model, shipped()).get_attachment(KEY).text
        print(f"{kind}: {match.distance:.3f} off")
        # Where memory is dynamic, weights are as in the file until they are used.
        expected = "same" if kind == "fp8" and model.is_dynamic() else "close"
        assert match.kind == expected and str(match)[1:] in said, kind
        assert not warnings, warnings
        other = dataclasses.replace(
            shipped().header, weights_sketch=sketch_base(finetuned(0.3)).sketch
        )
        assert compare_base(other, model).kind == "other", kind


def test_a_file_made_headless_from_fp8_knows_the_same_checkpoint_again() -> None:
    weights = safetensors.torch.load_file(weights_path("model.safetensors"))
    names = [n for n in weights if n.startswith("blocks.") and weights[n].ndim == 2]
    forms = {"fp8": {**weights, **{name: weights[name].to(_FP8) for name in names}}}
    forms["scale_weight"] = scaled = dict(weights, scaled_fp8=torch.zeros(2, dtype=_FP8))
    for name in names:
        scale = weights[name].abs().max() / torch.finfo(_FP8).max
        scaled[name] = (weights[name] / scale).to(_FP8)
        scaled[name.replace("weight", "scale_weight")] = scale
    if "float8_e4m3fn" in QUANT_ALGOS:
        layout = "TensorCoreFP8E4M3Layout"
        forms["comfy_quant"] = quantise(weights, names, "float8_e4m3fn", layout)
    for form, tensors in forms.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "fp8.safetensors")
            safetensors.torch.save_file(tensors, path)
            model = load_wan(path)
            base = base_weights_of(model, *identify(shapes_of(model)))
            theirs = finish(comfy.sd.load_diffusion_model(str(path)))
            made = {"weights_digest": base.digest, "weights_sketch": base.sketch}
            header = dataclasses.replace(shipped().header, **made)
            match = compare_base(header, theirs)
            with collect_warnings() as warnings:
                linearize(theirs, dataclasses.replace(shipped(), header=header))
        print(f"{form}: {match.distance:.4f} off")
        assert match.kind == "same" and not warnings, (form, match, warnings)
        assert compare_base(header, finetuned(0.3)).kind == "other", form


class _PackedTensor(torch.Tensor):
    """A weight as a GGUF pack keeps it: packed bytes that give the shape of what they stand for."""

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape


class _GgufLinear(nn.Module):
    """A layer of a GGUF pack in 8 bits: each row begins with its scale, in fp32."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        packed = (linear.weight / scale).round().to(torch.int8).view(torch.uint8)
        rows = torch.cat([scale.contiguous().view(torch.uint8), packed], dim=1)
        self.weight = nn.Parameter(rows.as_subclass(_PackedTensor), requires_grad=False)
        self.weight.tensor_type, self.weight.tensor_shape = "8 bits", linear.weight.shape
        self.bias = linear.bias

    def get_weight(self, tensor: Any, dtype: torch.dtype) -> Tensor:
        assert not getattr(tensor, "patches", [])
        scale = tensor[:, :4].contiguous().view(torch.float32)
        return (scale * tensor[:, 4:].view(torch.int8)).to(dtype).reshape(tensor.tensor_shape)


def test_weights_of_a_gguf_pack_are_read_through_its_layers_without_their_patches() -> None:
    model = demo_nodes.load_demo_model()
    for layer in (0, 9):
        attention = model.model.diffusion_model.blocks[layer].self_attn
        for side in ("q", "k", "v", "o"):
            setattr(attention, side, _GgufLinear(getattr(attention, side)))
            getattr(attention, side).weight.patches = ["of another node"]
    match = compare_base(shipped().header, model)
    print(f"8 bits a row: {match.distance:.3f} off")
    assert match.kind == "close" and match.distance < 0.01
    found = describe_base(model)
    assert found.digest != shipped().header.weights_digest and 8 < found.bits < 9


class ForeignLinear(nn.Module):
    """A layer of another pack, which keeps its weight in a form of its own."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        with cast_weights(linear, torch.float32, torch.device("cpu")) as (weight, bias):
            self.scale = float(weight.abs().max() / 127)
            packed = (weight / self.scale).round().to(torch.int8)
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.bias = nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scale * self.weight.to(x)
        return nn.functional.linear(x, weight, self.bias.to(x))


def test_layers_that_another_pack_quantised_take_the_changes_too() -> None:
    model = demo_nodes.load_demo_model()
    plain = _plain_weights(model)
    for layer in (1, 2):
        attention = model.model.diffusion_model.blocks[layer].self_attn
        for side in ("q", "o"):
            foreign = ForeignLinear(getattr(attention, side))
            setattr(attention, side, foreign)
            plain[f"blocks.{layer}.self_attn.{side}.weight"] = foreign.scale * foreign.weight
    comfy.model_management.unload_all_models()
    expected = sample_headless([bind_headless(load_headless(plain), shipped())] * _STEPS)
    assert_close(sample(linearize(model, shipped()), steps=_STEPS), expected)
