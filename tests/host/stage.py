"""What the tests inside ComfyUI share: the demo's graph there, and the same sampling by the core.

Latents are compared by the norm of the difference over the norm of the expected ones. "Headless" is
our core without ComfyUI's model, sampler or patching, in fp32, where ComfyUI computes.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import re
import sys
import tempfile
import unittest
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.sd
import folder_paths
import safetensors.torch
import torch
from comfy.quant_ops import QuantizedTensor
from linvideo_pack.linvideo_core import artifact, flow
from linvideo_pack.linvideo_core.artifact import Artifact
from linvideo_pack.linvideo_core.demo import weights_path
from linvideo_pack.linvideo_core.flow import VelocityFn, bind_guided
from linvideo_pack.linvideo_core.models.config import LinearForm
from linvideo_pack.linvideo_core.teacher.config import TeacherConfig
from linvideo_pack.linvideo_core.teacher.teacher import load_teacher
from linvideo_pack.nodes import demo as demo_nodes
from linvideo_pack.nodes import model_folder
from linvideo_pack.nodes.transfer.host_model import cast_weights
from torch import Tensor, nn

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.6e-1}
"""How far latents may be off, by what the host computes them in.

A sampling of the demo in fp16 on a CPU is 6e-3 from one in fp32, which is 10 times the rounding of
one number; three times that is allowed. bf16 rounds eight times as coarsely. TF32 has fp16's 11
bits and is nowhere in it: ComfyUI leaves matrix products in full fp32, and tests see to it that
convolutions are, too.
"""
STEPS, GUIDANCE, SHIFT = 4, 3.0, 3.0
SHAPE = 16, 3, 16, 16
"""Channels, frames, height and width of latents that are sampled: fewer frames than the demo's."""
NUM_TOKENS = 3 * 16 * 16 // 4
MODEL_OF_SHAPES = {"device": "meta", "operations": nn}
"""Settings for a model whose weights' shapes are all that is wanted.

ComfyUI's own layers have none before a file is loaded, where memory is dynamic.
"""


def needs_cpu(why: str) -> None:
    """Skip a test where ComfyUI computes on anything but a CPU."""
    if device().type != "cpu":
        raise unittest.SkipTest(f"needs a CPU: {why}")


def is_streaming() -> bool:
    """Say whether ComfyUI brings every weight to each call: --novram."""
    states = comfy.model_management.VRAMState
    return comfy.model_management.vram_state is states.NO_VRAM


def needs_cuda(why: str) -> None:
    """Skip a test where ComfyUI does not compute on an NVIDIA GPU."""
    if device().type != "cuda":
        raise unittest.SkipTest(f"needs a CUDA device: {why}")


def device() -> torch.device:
    """Return where ComfyUI computes; its nodes give and take tensors on the CPU."""
    return comfy.model_management.get_torch_device()


_READS_FP16 = "_fp16_linear_wanted"
as_one_graph = mock.patch.object(comfy.ops, _READS_FP16, lambda _: False, create=True)
"""For a test that counts graphs: newer ComfyUI reads a setting here that torch.compile cannot."""


@contextlib.contextmanager
def fused_in_fp16() -> Iterator[None]:
    """Compute layers as newer ComfyUI does with --fast fp16_accumulation, whatever the dtype.

    Unless a layer is said to need full precision, one after an activation is not called.
    """
    usual = getattr(comfy.ops, "linear_input_act", None)
    if usual is None:
        raise unittest.SkipTest("needs a ComfyUI that fuses layers")

    def fuse(layer: nn.Module, x: Tensor, activation: str, *args: Any, **kwargs: Any) -> Tensor:
        is_quantised = isinstance(layer.weight, QuantizedTensor)
        if is_quantised or getattr(layer, "_full_precision_mm", False):
            return usual(layer, x, activation, *args, **kwargs)
        with cast_weights(layer, x.dtype, x.device) as (weight, bias):
            return nn.functional.linear(comfy.ops.INPUT_ACT_EAGER[activation](x), weight, bias)

    has_own = hasattr(comfy.ops, _READS_FP16)
    replaced = (_READS_FP16, lambda _: True) if has_own else ("linear_input_act", fuse)
    with mock.patch.object(comfy.ops, *replaced):
        yield


@contextlib.contextmanager
def own_folders() -> Iterator[Path]:
    """Yield a folder with an `output` and a `models`, which stand for ComfyUI's and our own."""
    known, kind = folder_paths.folder_names_and_paths, model_folder.FOLDER
    kept, kept_output = dict(known), folder_paths.get_output_directory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("output", "models"):
            (folder / part).mkdir()
        folder_paths.set_output_directory(str(folder / "output"))
        known[kind] = ([str(folder / "models")], {".safetensors"})
        folder_paths.filename_list_cache.pop(kind, None)
        try:
            yield folder
        finally:
            folder_paths.set_output_directory(kept_output)
            folder_paths.filename_list_cache.pop(kind, None)
            known.clear()
            known.update(kept)


def without_dynamic_memory(model: Any) -> Any:
    """Return a clone as ComfyUI's compile node makes it: its weights are loaded, or offloaded."""
    return model.clone(disable_dynamic=True)


def tolerance_of(model: Any) -> float:
    """Return how far a ModelPatcher's latents may be off."""
    dtypes = {model.model.get_dtype_inference()}
    if not model.is_dynamic():
        # In it weight changes are merged, and the sum is rounded, however the model computes.
        dtypes.add(comfy.model_management.lora_compute_dtype(model.load_device))
    return max(TOLERANCES[dtype] for dtype in dtypes)


def make_noise(frames: int = SHAPE[1]) -> Tensor:
    """Return the noise [1, C, F, H, W] that every sampling starts from."""
    C, _, H, W = SHAPE
    return torch.randn(1, C, frames, H, W, generator=torch.Generator().manual_seed(3))


def finish(patcher: Any) -> Any:
    """Return the demo's weights, loaded as a Wan's, as LinVideo Demo gives them."""
    patcher.model.latent_format = demo_nodes.DemoLatents()
    patcher.model.model_sampling.set_parameters(shift=SHIFT)
    return patcher


def load_in_hosts_dtype(**settings: Any) -> Any:
    """Return the demo's model, loaded and computed as Load Diffusion Model does with a Wan."""
    path = str(weights_path("model.safetensors"))
    patcher = finish(comfy.sd.load_diffusion_model(path, **settings))
    patcher.cached_patcher_init = (load_in_hosts_dtype, ())
    return patcher


_computes_in_hosts_dtype = False


@contextlib.contextmanager
def in_hosts_dtype() -> Iterator[None]:
    """Let the demo's model compute in the host's dtype, not in the fp32 that its node asks for."""
    global _computes_in_hosts_dtype
    _computes_in_hosts_dtype = True
    forget()
    try:
        yield
    finally:
        _computes_in_hosts_dtype = False
        forget()


def forget() -> None:
    """Empty the caches of the test files that are loaded."""
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", "")).startswith(str(Path(__file__).parent)):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@functools.cache
def demo() -> tuple[Any, Any, Any, Any]:
    """Return what LinVideo Demo gives, MODEL, positive, negative, LATENT; that smaller."""
    model, *prompts, _ = demo_nodes.LinVideoDemo.execute("seven", "up-right", 1).result
    model = load_in_hosts_dtype() if _computes_in_hosts_dtype else model
    return (model, *prompts, {"samples": torch.zeros(1, *SHAPE)})


@functools.cache
def shipped() -> Artifact:
    """Return the file that comes with the pack."""
    return artifact.load(model_folder.find_file(model_folder.SHIPPED))


@functools.cache
def short_demo() -> Any:
    """Return the demo's model with its first three layers alone: to compile, and to train."""
    return load_short_demo()


def load_short_demo(**settings: Any) -> Any:
    """Load it, as ComfyUI's loaders do."""
    weights = safetensors.torch.load_file(weights_path("model.safetensors"))
    kept = {name: x for name, x in weights.items() if not re.match(r"blocks\.[3-9]\.", name)}
    options = {}
    if not _computes_in_hosts_dtype:
        # As LinVideo Demo does, for the reason that it gives.
        kept, options = {name: x.float() for name, x in kept.items()}, {"dtype": torch.float32}
    patcher = finish(comfy.sd.load_diffusion_model_state_dict(kept, options, **settings))
    patcher.cached_patcher_init = (load_short_demo, ())
    return patcher


@functools.cache
def short_file() -> Artifact:
    """Return the shipped file's changes of layer 1, for the short demo."""
    header = dataclasses.replace(
        shipped().header,
        fingerprint="wan, 3 layers, 1 heads of 128",
        num_layers=3,
        linear_layers=(1,),
        site_names=("blocks.1.self_attn",),
    )
    low_rank = {
        n: pair for n, pair in shipped().low_rank.items() if re.match(r"blocks\.[0-2]\.", n)
    }
    maps = {1: shipped().linear[1]}
    return dataclasses.replace(shipped(), header=header, linear=maps, low_rank=low_rank)


def in_form(first: Artifact, form: LinearForm) -> Artifact:
    """Return a file for the demo in a form, random numbers in all that its layers have more."""
    header = dataclasses.replace(first.header, **dataclasses.asdict(form))
    shapes, linear = header.tensor_shapes(1, 128), {}
    for layer, tensors in first.linear.items():
        generator = torch.Generator().manual_seed(layer)
        added = {
            name: 0.3 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
            if name not in tensors
        }
        linear[layer] = {**tensors, **added}
    return dataclasses.replace(first, header=header, linear=linear)


def sample(
    model: Any,
    *,
    steps: int = STEPS,
    cfg: float = GUIDANCE,
    sampler: str = "euler",
    noise: Tensor | None = None,
    on_step: Callable[..., None] | None = None,
    **others: Any,
) -> Tensor:
    """Sample as ComfyUI's KSampler does; others: settings of `comfy.sample.sample`."""
    _, positive, negative, _ = demo()
    noise = make_noise() if noise is None else noise
    settings = (steps, cfg, sampler, "simple", positive, negative, torch.zeros_like(noise))
    keywords = {"callback": on_step, "disable_pbar": True, "seed": 1, **others}
    return comfy.sample.sample(model, noise, *settings, **keywords)


def sample_again(model: Any, *, steps: int = STEPS) -> Tensor:
    """Sample a model that has been sampled before.

    At its first use, dynamic video memory gives a changed weight as it was computed; ever after as
    it is kept, rounded to the weights' dtype.
    """
    sample(model, steps=1)
    return sample(model, steps=steps)


_APPLIED = contextlib.ExitStack()  # to the end: what it lends to models stays in them


@functools.cache
def _headless_demo() -> nn.Module:
    return load_teacher(TeacherConfig()).model


def load_headless(weights: dict[str, Tensor] | None = None) -> nn.Module:
    """Return the demo's model of our core, with other weights if given."""
    model = copy.deepcopy(_headless_demo())
    if weights is not None:
        model.load_state_dict(weights)
    return model


def bind_headless(
    model: nn.Module, applied: Artifact | None = None, *, strength: float = 1.0
) -> VelocityFn:
    """Return the guided velocity of a headless model, linearized if a file is given."""
    if applied is not None:
        _APPLIED.enter_context(artifact.apply(applied, model, strength=strength))
    prompts = (prompt[0][0].to(device()) for prompt in demo()[1:3])
    return bind_guided(model.to(device()), *prompts, GUIDANCE)


def sample_headless(velocities: Sequence[VelocityFn], *, noise: Tensor | None = None) -> Tensor:
    """Sample with Euler steps, one velocity function a step."""
    latents = (make_noise() if noise is None else noise).to(device())
    sigmas = flow.make_sigmas(len(velocities), SHIFT).to(device())
    for velocity, sigma, following in zip(velocities, sigmas[:-1], sigmas[1:], strict=True):
        latents = latents + (following - sigma) * velocity(latents, sigma.expand(len(latents)))
    return latents.cpu()


def relative_difference(latents: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    latents, expected = latents.cpu().float(), expected.cpu().float()
    return float((latents - expected).norm() / expected.norm())


def assert_close(latents: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Fail where latents are not the expected ones; the tolerance is that of the demo's model."""
    difference = relative_difference(latents, expected)
    tolerance = tolerance_of(demo()[0]) if tolerance is None else tolerance
    print(f"{inspect.stack()[1].function}: relative difference {difference:.1e}")
    assert difference <= tolerance, difference
    assert not torch.equal(expected.cpu(), make_noise())


def complaint(
    kind: type[Exception] | tuple[type[Exception], ...],
    function: Callable[..., Any],
    *args: Any,
    **kws: Any,
) -> str:
    """Return the one sentence with which a call is refused."""
    try:
        function(*args, **kws)
    except kind as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 400, message
        assert "--" not in message, message  # a flag of the command line
        return message
    raise AssertionError("nothing was refused")


@functools.cache
def lora() -> dict[str, Tensor]:
    """Return a user's LoRA: two layers that the shipped file makes linear, one that it leaves.

    Its numbers are exact in fp16, in which a host may keep it.
    """
    generator = torch.Generator().manual_seed(9)
    tensors = {}
    for name in ("blocks.0.self_attn.q", "blocks.6.self_attn.v", "blocks.9.self_attn.o"):
        for side, shape in (("down", (4, 128)), ("up", (128, 4))):
            tensor = (0.15 * torch.randn(shape, generator=generator)).half().float()
            tensors[f"diffusion_model.{name}.lora_{side}.weight"] = tensor
    return tensors


def with_lora(model: Any, *, is_bypassed: bool = False) -> Any:
    """Apply the LoRA at 0.7 as ComfyUI's nodes do."""
    load = comfy.sd.load_bypass_lora_for_models if is_bypassed else comfy.sd.load_lora_for_models
    return load(model, None, lora(), 0.7, 0)[0]


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge the LoRA at 0.7 into a headless model."""
    for key in [key for key in lora() if key.endswith("lora_up.weight")]:
        up, down = lora()[key], lora()[key.replace("_up", "_down")]
        name = key.removeprefix("diffusion_model.").replace("lora_up.weight", "weight")
        model.get_parameter(name).data += 0.7 * up @ down
    return model


def finetuned(amount: float) -> Any:
    """Return the demo with weights that are off by `amount` of their norm."""
    model = demo_nodes.load_demo_model()
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.model.diffusion_model.named_parameters():
        if name.endswith(("q.weight", "v.weight")):
            noise = torch.randn(weight.shape, generator=generator)
            weight.data += amount * weight.norm() / noise.norm() * noise
    return model


def stream_weights(model: Any) -> None:
    """Let ComfyUI load almost nothing of a model: weights come to each call from offload."""
    load = model.partially_load

    def load_little(device: torch.device, *_: Any, **__: Any) -> Any:
        return load(device, 1000)

    model.partially_load = load_little


@contextlib.contextmanager
def made_with_weights() -> Iterator[None]:
    """Let ComfyUI's layers have weights once they are made, as without dynamic video memory."""
    memory = sys.modules.get("comfy.memory_management")
    with contextlib.ExitStack() as undo:
        if hasattr(memory, "aimdo_enabled"):
            undo.callback(setattr, memory, "aimdo_enabled", memory.aimdo_enabled)
            memory.aimdo_enabled = False
        yield


@contextlib.contextmanager
def collect_warnings(part: str = "") -> Iterator[list[str]]:
    """Collect what LinVideo warns of, or a part of it, such as ".nodes.patching"."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    root = logging.getLogger(f"linvideo_pack{part}")
    root.addHandler(handler)
    try:
        yield messages
    finally:
        root.removeHandler(handler)
