"""The transfer of MiniMax-H3 inside ComfyUI, on a small model with random weights.

Expected velocities are ComfyUI's own of the untouched model, called as its samplers call it.
"""

import contextlib
import copy
import functools
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.cli_args
import comfy.model_management
import comfy.nested_tensor
import comfy.quant_ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy_kitchen.backends.eager.rope
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from linvideo_pack.linvideo_core import artifact
from linvideo_pack.linvideo_core.artifact.summary import describe_size
from linvideo_pack.linvideo_core.flow import bind_guided, make_sigmas, sample_euler
from linvideo_pack.linvideo_core.transfer.config import StudentConfig
from linvideo_pack.linvideo_core.transfer.student import Student
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.families import host_family
from linvideo_pack.nodes.patching.injection import KEY
from linvideo_pack.nodes.transfer import host_teacher
from linvideo_pack.nodes.transfer.conditioning import Conditions
from linvideo_pack.nodes.transfer.host_model import HostModel, freeze
from linvideo_pack.nodes.transfer.host_teacher import HostTeacher
from linvideo_pack.nodes.transfer.pipeline import run
from stage import TOLERANCES, assert_close, complaint, device, own_folders
from torch import Tensor
from transfers import lend_teacher, make_inputs
from variants import FHW, minimax_h3, quantise, random_tensor

_TOLERANCE = TOLERANCES[torch.float32]
_SHAPES = ((1, 24, *FHW), (1, 32, 2, 7))
_NUM_VIDEO = 24 * 3 * 8 * 8
_NUM_ALL = _NUM_VIDEO + 32 * 2 * 7
_TEXT = 40


@functools.cache
def _h3() -> Any:
    return minimax_h3()[0]


def _latent() -> dict[str, Any]:
    streams = [torch.zeros(shape) for shape in _SHAPES]
    return {"samples": comfy.nested_tensor.NestedTensor(streams)}


def _prompt(length: int, seed: int, **options: Any) -> list[Any]:
    return [random_tensor(1, length, _TEXT, seed=seed), options]


def _inputs(**changes: Any) -> dict[str, Any]:
    """Return what the node is given: three prompts of as many lengths, and a tiny training."""
    usual = {
        "positive": [_prompt(5, seed=4), _prompt(9, seed=5)],
        "negative": [_prompt(1, seed=6)],
        "latent": _latent(),
    }
    settings = {"target": 1, "steps": 3, "learning_rate": 1e-3, "width": 0, "height": 0}
    return make_inputs(**{**usual, **settings, "frames": 0, **changes})


@contextlib.contextmanager
def _as_packed(model: Any) -> Iterator[Any]:
    """Lend the host's model as it is while a sampler works with the packed streams."""
    comfy.model_management.load_models_gpu([model])
    model.model.latent_shapes = list(map(torch.Size, _SHAPES))
    try:
        yield model.model
    finally:
        model.model.latent_shapes = None


def _velocity_of_host(model: Any, entry: list[Any], latents: Tensor, sigma: float) -> Tensor:
    """Return the velocity of latents [1, 1, n]: the state less the clean estimate, over sigma."""
    with _as_packed(model) as base, torch.inference_mode():
        shapes = base.latent_shapes
        given = {"noise": latents, "device": device(), "latent_shapes": shapes, **entry[1]}
        conditions = base.extra_conds(cross_attn=entry[0], **given)
        extra = {name: condition.cond for name, condition in conditions.items()}
        options = model.model_options["transformer_options"]
        levels = torch.tensor([sigma], device=device())
        denoised = base.apply_model(latents, levels, transformer_options=options, **extra)
        return (latents - denoised) / sigma


def _compare(model: Any, inputs: dict[str, Any]) -> None:
    """Compare the copy's velocities of a batch with ComfyUI's of one sample after the other."""
    latents = random_tensor(3, 1, 1, 1, _NUM_ALL, seed=8).to(device())
    sigmas = (0.95, 0.4, 1.0)
    entries = [*inputs["positive"], *inputs["negative"]]
    expected = [
        _velocity_of_host(model, entry, latent[0, 0], sigma)
        for entry, latent, sigma in zip(entries, latents.unsqueeze(1), sigmas, strict=True)
    ]
    with lend_teacher(model, inputs) as teacher:
        prompts = torch.cat([teacher.prompt_embeds, teacher.negative_embeds[None]])
        timesteps = 1000 * torch.tensor(sigmas, device=device())
        found = teacher.model(latents.clone(), timesteps, prompts)
    # What is not copied computes in bf16 on a GPU.
    is_exact = device().type == "cpu" or host_teacher.COPIED_BYTES
    tolerance = _TOLERANCE if is_exact else TOLERANCES[torch.float16]
    for part in (slice(_NUM_VIDEO), slice(_NUM_VIDEO, None)):
        assert_close(found[:, 0, 0, 0, part], torch.cat(expected)[:, 0, part], tolerance)


@contextlib.contextmanager
def _uncopied() -> Iterator[None]:
    """Train beside ComfyUI's own weights, as models of real size are."""
    usual = host_teacher.COPIED_BYTES
    host_teacher.COPIED_BYTES = 0
    try:
        yield
    finally:
        host_teacher.COPIED_BYTES = usual


def test_the_teacher_is_comfyuis_model_for_prompts_of_any_length() -> None:
    _compare(_h3(), _inputs())
    with _uncopied():
        _compare(_h3(), _inputs())


def test_comfyuis_compiler_rests_while_the_teacher_is_lent() -> None:
    """It refuses the new tensors that a block gives in training."""
    name, args = "disable_comfy_compiler", comfy.cli_args.args
    has_it = hasattr(args, name)
    with lend_teacher(_h3(), _inputs()):
        assert hasattr(args, name) == has_it
    with mock.patch.object(args, name, False, create=True):
        with lend_teacher(_h3(), _inputs()):
            assert getattr(args, name)
        assert not getattr(args, name)


def test_a_table_in_place_of_the_time_embedding_is_the_models_own() -> None:
    model = minimax_h3(adaln_curve_grid=9, time_embed_dim=3)[0]
    _compare(model, _inputs())
    with own_folders():
        assert run(model, _inputs()).is_file()


def _quantised() -> Any:
    """Return the model with its blocks' attention and feed-forward kept in fp8, scaled."""
    weights = {n: x.cpu().clone() for n, x in _h3().model.diffusion_model.state_dict().items()}
    blocks = [n for n in weights if n.startswith("blocks.") and "adaln" not in n]
    matrices = [name for name in blocks if weights[name].ndim == 2]
    tensors = quantise(weights, matrices, "float8_e4m3fn", "TensorCoreFP8E4M3Layout")
    model = comfy.sd.load_diffusion_model_state_dict(tensors, {"dtype": torch.float32})
    assert any(isinstance(weight, QuantizedTensor) for weight in model.model.parameters())
    return model


def test_a_model_in_fp8_learns_beside_its_own_weights() -> None:
    if "float8_e4m3fn" not in QUANT_ALGOS:
        raise unittest.SkipTest("needs a ComfyUI that keeps scaled fp8")
    model = _quantised()
    with own_folders(), _uncopied():
        _compare(model, _inputs())
        assert run(model, _inputs()).is_file()


def _with_options(**options: Any) -> dict[str, Any]:
    """Return inputs whose every prompt comes with the same options, tags of its own beside them."""
    inputs = _inputs()
    for branch in ("positive", "negative"):
        inputs[branch] = [
            [prompt, {"minimax_token_tags": (torch.arange(prompt.shape[1]) > 1).long(), **options}]
            for prompt, _ in inputs[branch]
        ]
    return inputs


def _keyframes(seed: int = 11) -> dict[str, Any]:
    frame = random_tensor(1, 24, 1, *FHW[1:], seed=seed)
    keyframes = [{"resolved_frame_index": index, "latent": frame} for index in (0, 8)]
    return {"minimax_keyframes": keyframes, "minimax_frame_count": 9}


def test_frames_and_references_belong_to_the_teacher_and_tell_transfers_apart() -> None:
    image = {"kind": "image", "latent_h": 8, "latent_w": 4, "latent": random_tensor(1, 24, 1, 8, 4)}
    sound = {"kind": "audio", "ref_audio_t": 3, "audio_latent": random_tensor(1, 32, 2, 3)}
    for options in (_keyframes(), {"minimax_refs": [image, sound]}):
        _compare(_h3(), _with_options(**options))
    given = [_with_options(**_keyframes()), _with_options(**_keyframes(seed=12)), _with_options()]
    digests = [HostTeacher(_h3(), inputs).conditions.digest() for inputs in given]
    assert len(set(digests)) == 3


def test_a_sampling_by_the_core_is_comfyuis() -> None:
    original = _h3()
    from comfy_extras.nodes_minimax_h3 import MiniMaxH3SigmaShift

    shifted = MiniMaxH3SigmaShift.execute(original, 7.0, 2.0).result[0]
    noise = random_tensor(1, 1, 1, 1, _NUM_ALL, seed=9)
    streams = comfy.utils.unpack_latents(noise.view(1, 1, -1), _SHAPES)
    for model, shift in ((original, 12.0), (shifted, 7.0)):
        inputs = _inputs()
        sigmas = make_sigmas(4, shift)
        sampler = comfy.samplers.sampler_object("euler")
        expected = comfy.sample.sample_custom(
            model,
            comfy.nested_tensor.NestedTensor(streams),
            3.0,
            sampler,
            sigmas,
            inputs["positive"][:1],
            inputs["negative"],
            _latent()["samples"],
            disable_pbar=True,
            seed=1,
        ).unbind()
        with lend_teacher(model, inputs) as teacher:
            assert HostTeacher(model, inputs).shift == shift
            prompts = (teacher.prompt_embeds[:1], teacher.negative_embeds[None])
            velocity = bind_guided(teacher.model, *prompts, 3.0)
            found = sample_euler(velocity, noise.to(device()), sigmas)
        scale = shift / {12.0: 3.0, 7.0: 2.0}[shift]
        assert_close(found[0, 0, 0, 0, :_NUM_VIDEO], expected[0].flatten(), _TOLERANCE)
        assert_close(found[0, 0, 0, 0, _NUM_VIDEO:] / scale, expected[1].flatten(), _TOLERANCE)


def test_gradients_are_those_of_comfyuis_own_block() -> None:
    """Compare with differences of the class's own forward, in fp64, along random directions."""
    h3 = _h3()  # an older ComfyUI knows neither the model nor its rotations
    with torch.inference_mode(False), torch.enable_grad(), _rotations_in_fp64():
        comfy.model_management.load_models_gpu([h3])
        frozen = freeze(h3.model.diffusion_model, device(), is_copied=True).double()
        own = copy.deepcopy(frozen).blocks[0]
        given = {"dtype": torch.float64, "family": host_family("minimax_h3"), "video": None}
        HostModel(frozen, HostTeacher(h3, _inputs()).sites, Conditions(None, None), **given)
        trained = frozen.blocks[0]
        x, *others = _block_inputs()
        weighted = random_tensor(*x.shape, seed=15).to(x)

        def run_own(amount: float, name: str, direction: Tensor) -> Tensor:
            block = copy.deepcopy(own)
            with torch.no_grad():
                tokens = x.clone()
                moved = tokens if name == "x" else block.get_parameter(name)
                moved.add_(amount * direction)
                return (weighted * block(tokens, *others)).sum()

        for name in ("attn.qkv_proj.weight", "attn.out_proj.weight", "mlp.fc1.weight", "x"):
            leaf = x.clone() if name == "x" else trained.get_parameter(name)
            leaf.requires_grad_(True)
            output = trained(leaf if name == "x" else x, *others)
            (gradient,) = torch.autograd.grad((weighted * output).sum(), leaf)
            direction = random_tensor(*leaf.shape, seed=16).to(x)
            step = 1e-5
            difference = run_own(step, name, direction) - run_own(-step, name, direction)
            found = (gradient * direction).sum()
            torch.testing.assert_close(found, difference / (2 * step), rtol=1e-6, atol=1e-6)
            leaf.requires_grad_(False)


@contextlib.contextmanager
def _rotations_in_fp64() -> Iterator[None]:
    """Let comfy_kitchen's own PyTorch code turn queries and keys: its choice knows no fp64."""
    name = "rms_rope_split_half_"
    kitchen = comfy.quant_ops.ck
    usual = getattr(kitchen, name)
    setattr(kitchen, name, getattr(comfy_kitchen.backends.eager.rope, name))
    try:
        yield
    finally:
        setattr(kitchen, name, usual)


def _block_inputs() -> tuple[Tensor, Tensor, list[tuple[int, int, int]], Tensor]:
    """Return tokens, the time's embedding, segments and rotations of a block's call, in fp64."""
    angles = random_tensor(11, 48, seed=13).double()
    cos, sin = angles.cos(), angles.sin()
    rotations = torch.stack([cos, -sin, sin, cos], dim=-1).view(1, 11, 1, 48, 2, 2)
    tokens, t_emb = (random_tensor(*shape, seed=14).double() for shape in ((11, 192), (2, 24)))
    segments = [(0, 3, 1), (3, 4, 5), (4, 11, 0)]
    return tokens.to(device()), t_emb.to(device()), segments, rotations.to(device())


def test_a_comfyui_that_computes_another_way_is_refused() -> None:
    block_class = type(_h3().model.diffusion_model.blocks[0])
    own = block_class.forward
    block_class.forward = lambda self, x, *args, **options: 1.1 * own(self, x, *args, **options)
    try:
        with own_folders() as folder:
            message = complaint(ValueError, run, _h3(), _inputs())
            assert "update LinVideo" in message
            assert not list((folder / "output").iterdir())
    finally:
        block_class.forward = own


def test_every_gradient_of_the_student_is_there_and_finite() -> None:
    latents = random_tensor(2, 1, 1, 1, _NUM_ALL, seed=8).to(device())
    timesteps = torch.tensor([900.0, 300.0], device=device())
    gradients = []
    for lends in (contextlib.nullcontext, _uncopied):
        with lends(), lend_teacher(_h3(), _inputs()) as teacher, torch.enable_grad():
            student = Student(teacher, StudentConfig(lora_rank=4), seed=0)
            for number, module in enumerate(student.mixed.values()):
                module.layer_score.data.fill_(0.3 + 0.2 * number)
            for weight in student.weights.values():
                weight.data.normal_(std=0.05, generator=torch.Generator(device()).manual_seed(2))
            student.model(
                latents.clone(), timesteps, teacher.prompt_embeds
            ).square().sum().backward()
            found = {n: p.grad for n, p in student.model.named_parameters() if p.requires_grad}
            assert not any("adaln" in name for name in found)
            assert all(g is not None and g.isfinite().all() and g.any() for g in found.values())
            gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        # On a GPU what is not copied computes in bf16.
        tolerance = 1e-4 if device().type == "cpu" else TOLERANCES[torch.bfloat16]
        assert_close(gradient, gradients[1][name], tolerance)


def _sample(model: Any) -> Tensor:
    inputs = _inputs()
    noise = comfy.nested_tensor.NestedTensor([random_tensor(*x, seed=21) for x in _SHAPES])
    settings = (2, 3.0, "euler", "simple", inputs["positive"][:1], inputs["negative"])
    latents = comfy.sample.sample(
        model, noise, *settings, _latent()["samples"], disable_pbar=True, seed=1
    )
    return torch.cat([stream.flatten() for stream in latents.unbind()])


def test_a_transfer_gives_a_file_that_applies_and_leaves_the_model_as_it_was() -> None:
    model = _h3()
    before = _sample(model)
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    for lends, name, tile, expected in (
        (contextlib.nullcontext, "copied", "none", None),
        (contextlib.nullcontext, "auto", "", "1x1x1"),
        (_uncopied, "beside", "1x3x2", "1x3x2"),
    ):
        with own_folders(), lends():
            path = run(model, _inputs(name=name, tile=tile))
            made = artifact.load(Path(path))
            assert made.header.tile == expected
            assert made.header.family == "minimax_h3" and len(made.header.linear_layers) == 1
            usage = made.header.usage
            assert (usage.width, usage.height, usage.num_frames) == (128, 128, 5)
            assert usage.shift == 12.0
            linearized = linearize(model, made)
            linear = _sample(linearized)
        assert linear.isfinite().all() and not torch.equal(linear, before)
        # H3 counts its frames in a way of its own: sampled as it was made, no size differs.
        assert describe_size(usage) not in linearized.get_attachment(KEY).text
        assert torch.equal(_sample(model), before)
        after = model.model.state_dict()
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_the_usual_size_is_that_of_comfyuis_empty_latent() -> None:
    model = _h3()
    from comfy_extras.nodes_minimax_h3 import EmptyMiniMaxH3LatentAV

    for given, expected in (
        ({}, (1344, 768, 124)),
        ({"width": 64, "height": 96, "frames": 40}, (64, 96, 40)),
        ({"width": 64, "height": 96, "frames": 4}, (64, 96, 4)),
    ):
        inputs = _inputs(latent=None)
        inputs["settings"] |= given
        video = HostTeacher(model, inputs).video
        samples = EmptyMiniMaxH3LatentAV.execute(*expected).result[0]["samples"]
        assert video.shapes == tuple(tuple(x.shape[1:]) for x in samples.unbind())
        num_frames = {124: 124, 40: 56, 4: 5}[expected[2]]
        assert video.size == (num_frames, expected[1], expected[0])


def test_what_cannot_be_learned_is_refused() -> None:
    differing = _with_options(**_keyframes())
    differing["negative"] = _inputs()["negative"]
    for words, inputs in {
        "the same first frame, last frame or references": differing,
        "Empty MiniMax H3 AV Latent": _inputs(latent={"samples": torch.zeros(1, 24, *FHW)}),
        "mask": _inputs(latent={**_latent(), "noise_mask": torch.ones(1)}),
    }.items():
        assert words in complaint(ValueError, HostTeacher, _h3(), inputs)
