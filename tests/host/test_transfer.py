"""The transfer inside ComfyUI.

A run here is a few steps on the embedded model with three prompts and tiny latents: nothing is
learned; what is kept, continued, given back and refused is all there is.
"""

import contextlib
import functools
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.ldm.wan.model
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from linvideo_pack.linvideo_core import artifact
from linvideo_pack.linvideo_core.demo.codec import LATENT_SHAPE
from linvideo_pack.linvideo_core.demo.prompts import encode_prompts, make_prompt
from linvideo_pack.linvideo_core.run.config import override
from linvideo_pack.linvideo_core.run.context import Run
from linvideo_pack.linvideo_core.teacher.trajectories import collect
from linvideo_pack.linvideo_core.training.trainer import seed_step
from linvideo_pack.linvideo_core.transfer.config import PARAMETERS, StudentConfig
from linvideo_pack.linvideo_core.transfer.student import Student, TransferTask
from linvideo_pack.nodes import demo
from linvideo_pack.nodes.linearize import TRANSFER, LinVideoLinearize, read_transfer_inputs
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.weights import describe_base
from linvideo_pack.nodes.transfer.host_teacher import HostTeacher, attention_order
from linvideo_pack.nodes.transfer.pipeline import make_config, run
from linvideo_pack.nodes.transfer_settings import LinVideoTransferSettings
from stage import (
    MODEL_OF_SHAPES,
    complaint,
    device,
    load_headless,
    merge_lora,
    own_folders,
    relative_difference,
    sample,
    short_demo,
    short_file,
    tolerance_of,
    with_lora,
)
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._pytree import tree_leaves
from transfers import lend_teacher, make_inputs
from variants import random_tensor

_TOLERANCE = 1e-5
_REFUSALS = ValueError, RuntimeError


def test_attention_is_what_pytorch_takes_without_comfyui() -> None:
    query = torch.randn(1, 4, 4096, 128, device=device()).bfloat16()
    # ComfyUI's order stands around the first attention of the process, or is put back after it.
    comfy.ops.scaled_dot_product_attention(query, query, query)
    before = torch._C._get_sdp_priority_order()
    with attention_order(device()):
        found = torch._fused_sdp_choice(query, query, query)
    assert torch._C._get_sdp_priority_order() == before
    if device().type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        assert found == SDPBackend.CUDNN_ATTENTION.value
    else:
        assert found == torch._fused_sdp_choice(query, query, query)


@functools.cache
def _any_demo() -> tuple[Any, Any, Any, Any]:
    _, *prompts, latent = demo.LinVideoDemo.execute("seven", "up-right", 1).result
    return (short_demo(), *prompts, latent)


def _demo() -> tuple[Any, Any, Any, Any]:
    return _any_demo()


def _inputs(**changes: Any) -> dict[str, Any]:
    prompts = encode_prompts([make_prompt(digit, digit) for digit in range(3)])
    usual = {
        "mode": TRANSFER,
        "positive": [[prompts, {}]],
        "negative": _any_demo()[2],
        "latent": {"samples": torch.zeros(1, LATENT_SHAPE[0], 2, 8, 8)},
    }
    return make_inputs(**{**usual, **changes})


def _run(**changes: Any) -> artifact.Artifact:
    return artifact.load(run(_demo()[0], _inputs(**changes)))


def _run_folder(folder: Path) -> Path:
    return folder / "output" / "linvideo" / "fast"


def _assert_equal(made: artifact.Artifact, expected: artifact.Artifact) -> None:
    for kind in ("linear", "low_rank", "deltas"):
        found, others = (tree_leaves(getattr(each, kind)) for each in (made, expected))
        assert len(found) == len(others) and all(map(torch.equal, found, others))


def _is_interrupted(function: Callable[[], Any]) -> bool:
    try:
        function()
    except comfy.model_management.InterruptProcessingException:
        return True
    return False


@contextlib.contextmanager
def _seen(interrupt_at: Callable[[int], bool] = lambda _: False) -> Iterator[list[Any]]:
    """Watch what the browser is told; press Interrupt where a value of the bar says so."""
    told: list[Any] = []

    def hook(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        told.append((value, total, preview))
        if interrupt_at(value):
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    # What is told is not to depend on how quick the machine is: ComfyUI tells ten times a second.
    every = mock.patch.object(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, create=True)
    try:
        with every:
            yield told
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


def test_a_transfer_gives_the_faster_model_its_file_and_the_input_unchanged() -> None:
    with own_folders() as folder, _seen() as told:
        model, *_ = _demo()
        before, names = sample(model, steps=2), list(model.model.state_dict())
        trained = [p.requires_grad for p in model.model.parameters()]
        linear, made = LinVideoLinearize.execute(model, _inputs()).result[:2]
        # Before ComfyUI merges weight changes, after which an older one asks for fewer gradients.
        assert [p.requires_grad for p in model.model.parameters()] == trained
        assert len(made.header.linear_layers) == 2 and made.header.steps == 6
        assert made.header.provenance["model"] == "demo"
        assert made.header.weights_digest == describe_base(model).digest
        assert (folder / "models" / "fast.safetensors").is_file()
        assert not torch.equal(sample(linear, steps=2), before)
        assert torch.equal(sample(model, steps=2), before)
        assert list(model.model.state_dict()) == names
        assert not comfy.model_management.in_training
    values = [value for value, total, _ in told if total == 100]
    assert values == sorted(values) and len(set(values)) > 5
    pictures = [preview[1] for _, _, preview in told if preview]
    assert pictures and all(picture.mode == "RGB" for picture in pictures)


def test_an_interrupted_transfer_continues_and_ends_as_an_unbroken_one() -> None:
    with own_folders() as folder:
        unbroken = _run(name="unbroken")
        # The bar at 30 is the training's start; one of its six steps is a ninth of the bar.
        for moment in (5, 26, 70):
            with _seen(lambda value, moment=moment: value >= moment):
                assert _is_interrupted(_run), moment
            assert not comfy.model_management.in_training
            assert not (folder / "models" / "fast.safetensors").exists()
        assert (_run_folder(folder) / "training" / "metrics.jsonl").read_text()
        continued = _run()
    assert continued.header.linear_layers == unbroken.header.linear_layers
    _assert_equal(continued, unbroken)


def test_an_interrupt_within_a_step_is_noticed_before_the_next_layer() -> None:
    with own_folders(), _seen() as told:
        attention_calls = []

        def press(module: torch.nn.Module, *_: Any) -> None:
            is_training = bool(told) and told[-1][0] > 30
            if is_training and type(module).__name__ == "WanSelfAttention":
                attention_calls.append(1)
                comfy.model_management.interrupt_current_processing()

        hook = torch.nn.modules.module.register_module_forward_hook(press)
        try:
            assert _is_interrupted(_run)
        finally:
            hook.remove()
        assert len(attention_calls) == 1


def test_a_finished_transfer_is_not_run_again_and_mends_what_is_damaged() -> None:
    short = {"steps": 1, "warm_start_steps": 0}
    with own_folders() as folder:
        made = _run(**short)
        path = folder / "models" / "fast.safetensors"
        result = _run_folder(folder) / "linearized.safetensors"
        whole = path.read_bytes()

        def damage() -> None:
            result.write_bytes(whole[:500])

        for prepare in (lambda: None, path.unlink, damage):
            prepare()
            with _seen() as told:
                again = _run(**short)
            assert not told
            assert path.read_bytes() == result.read_bytes() == whole
            assert again.header == made.header
        # Where no whole copy is left, it is trained to its end again.
        damage()
        path.unlink()
        _assert_equal(_run(**short), made)
        path.write_bytes(whole[:500])
        assert "is damaged: delete it" in complaint(_REFUSALS, _run, **short)


def test_a_name_belongs_to_one_transfer() -> None:
    with own_folders() as folder:
        made = folder / "models" / "fast.safetensors"
        made.write_bytes(b"a file of another origin")
        assert "another name" in complaint(_REFUSALS, _run)
        assert made.read_bytes() == b"a file of another origin"
        made.unlink()
        usual = {"steps": 1, "warm_start_steps": 0}
        _run(**usual)
        for setting, changes in {
            "steps 1 and this run has 300": {"steps": 300},
            "cfg 3.0 and this run has 2.0": {"cfg": 2.0},
            "with other prompts": {"negative": [[encode_prompts(["seven"]), {}]]},
        }.items():
            message = complaint(_REFUSALS, _run, **{**usual, **changes})
            assert setting in message and "another name" in message, message
            is_setting = "and this run has" in setting
            assert ("in LinVideo Transfer Settings" in message) == is_setting, message
        message = complaint(_REFUSALS, run, with_lora(_demo()[0]), _inputs(**usual))
        assert "with another model" in message and "another name" in message
        message = complaint(_REFUSALS, _run, **usual, name="whole", tile="0x99x99")
        assert "give a smaller" in message and not _run_folder(folder).with_name("whole").exists()
        size = {"latent": {"samples": torch.zeros(1, LATENT_SHAPE[0], 2, 8, 16)}}
        message = complaint(_REFUSALS, _run, **usual, **size)
        assert "another video size" in message and "/" not in message


def test_weights_of_every_kind_can_be_trained_with_every_objective() -> None:
    cases = zip(PARAMETERS, ("adm", "velocity", "adm"), ("", "1x2x3", "1x0x0"), strict=True)
    for parameters, objective, tile in cases:
        with own_folders():
            settings = {"parameters": parameters, "objective": objective, "tile": tile}
            made = _run(**settings, steps=2, warm_start_steps=1 if tile else 0)
            header = made.header
            assert (header.tile or "") == tile
            assert (header.parameters, bool(made.deltas), bool(made.low_rank)) == (
                parameters,
                parameters == "full",
                parameters == "lora",
            )
            assert sample(linearize(_demo()[0], made), steps=2).isfinite().all()


def test_the_teacher_is_the_model_of_the_headless_core_with_its_loras() -> None:
    latents, sigma = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.9, 0.2])
    plain, merged = load_headless(), merge_lora(load_headless())
    for model, headless in ((_demo()[0], plain), (with_lora(_demo()[0]), merged)):
        headless.blocks = headless.blocks[:3]
        with lend_teacher(model, _inputs()) as teacher:
            inputs = latents.to(device()), 1000 * sigma.to(device()), teacher.prompt_embeds[:2]
            found = teacher.model(*(x.clone() for x in inputs))
        assert relative_difference(found, headless.to(device())(*inputs)) <= _TOLERANCE


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    with torch.inference_mode(False), torch.enable_grad(), own_folders() as folder:
        host = HostTeacher(_demo()[0], _inputs())
        for is_recomputed in (False, True):
            config = override(
                make_config(_inputs(), host), {"activation_checkpointing": is_recomputed}
            )
            where = Run(folder=folder / "states", device=config.device, seed=0)
            with host.teacher(config) as teacher, Student(teacher, config.student, seed=0) as made:
                with made.disabled():
                    trajectories = collect(teacher, config.trajectories, where)
                rooms = ("selection", "objective", "training")
                settings = {room: getattr(config, room) for room in rooms}
                task = TransferTask(made, teacher, trajectories, **settings, run=where)
                task.loss(0, seed_step(0, 0))[0].backward()
                gradients.append([p.grad for p in made.model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 30
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_the_demos_own_prompts_and_size_are_used_where_nothing_is_connected() -> None:
    host = HostTeacher(_demo()[0], _inputs(positive=None, negative=None, latent=None))
    assert host.video.latent_shape == LATENT_SHAPE and host.is_demo
    assert host.conditions.prompt_embeds.shape == (80, 8, 4096)
    assert torch.equal(host.conditions.negative_embeds, _demo()[2][0][0][0])


def _make_wan(folder: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """Return a random Wan of its own architecture, loaded from a file as ComfyUI's loader does."""
    wan = comfy.ldm.wan.model.WanModel(
        **{"dim": 128, "ffn_dim": 64, "num_heads": 1, "num_layers": 3, "text_dim": 4096},
        **settings,
        **MODEL_OF_SHAPES,
    )
    generator = torch.Generator().manual_seed(4)
    weights = {
        name: (0.05 * torch.randn(weight.shape, generator=generator)).to(dtype)
        for name, weight in wan.state_dict().items()
    }
    path = str(folder / "wan.safetensors")
    comfy.utils.save_torch_file(weights, path)
    return comfy.sd.load_diffusion_model(path)


def _wan_inputs(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randn(1, 6, 4096, generator=generator) for _ in range(3)]
    positive = [[prompt, {}] for prompt in prompts[:2]]
    usual = {"positive": positive, "negative": [[prompts[2], {}]], "target": 1, "steps": 2}
    usual |= {"latent": None, "width": 64, "height": 64, "frames": 9}
    return _inputs(**{**usual, **changes})


def _compare_with_host(model: Any, inputs: dict[str, Any], tolerance: float) -> None:
    """Compare the velocity of what is trained with that of ComfyUI's model.

    At full noise that is the state less ComfyUI's clean estimate.
    """
    host = HostTeacher(model, inputs)
    latents = random_tensor(1, *host.video.latent_shape).to(device())
    prompt = host.conditions.prompt_embeds[:1].to(device())
    comfy.model_management.load_models_gpu([model])
    extra = {"c_concat": host.conditions.concat, **host.conditions.inputs}
    given = {"c_crossattn": prompt, "transformer_options": {}, **extra}
    sigmas = torch.ones(1, device=device())
    expected = latents - model.model.apply_model(latents, sigmas, **given)
    with lend_teacher(model, inputs) as teacher:
        timesteps = torch.tensor([1000.0], device=device())
        found = teacher.model(latents.clone(), timesteps, prompt.clone())
    assert relative_difference(found, expected) <= tolerance


def test_a_text_to_video_wan_computed_in_bf16_is_trained_at_the_size_that_is_asked_for() -> None:
    with own_folders() as folder:
        model = _make_wan(folder, torch.bfloat16)
        model.set_model_compute_dtype(torch.bfloat16)
        inputs = _wan_inputs()
        assert HostTeacher(model, inputs).video.latent_shape == (16, 3, 8, 8)
        _compare_with_host(model, inputs, 2e-2)
        with lend_teacher(model, inputs) as teacher:
            student = Student(teacher, StudentConfig(lora_rank=4), seed=0)
            assert {p.dtype for p in student.weights.values()} == {torch.float32}
        made = artifact.load(run(model, _wan_inputs()))
        assert made.header.provenance["model"] == "wan"
        assert linearize(model, made)


def test_layers_of_a_model_of_ones_own_are_hybrid_where_its_grid_is_known() -> None:
    def tile_of(**settings: Any) -> str | None:
        inputs = _wan_inputs(**settings)
        return make_config(inputs, HostTeacher(model, inputs)).student.form.tile

    with own_folders() as folder:
        model = _make_wan(folder, torch.float32)
        assert (tile_of(width=128), tile_of(tile="3x2x0"), tile_of(tile="none")) == (
            "1x1x2",
            "3x2x0",
            None,
        )
        assert tile_of(width=16, height=16, frames=1) is None
        run_folder = _run_folder(folder)
        run_folder.mkdir(parents=True)
        for begun in ("3x3x3", None):
            transfer = {"student": {"form": {"tile": begun}}, "trajectories": {"guidance_scale": 2}}
            (run_folder / "config.json").write_text(json.dumps({"transfer": transfer}))
            assert tile_of() == begun and tile_of(tile="1x2x2") == "1x2x2"
        shutil.rmtree(run_folder)
        diffusion_model = model.model.diffusion_model
        diffusion_model.__class__ = type("WanModel_Other", (type(diffusion_model),), {})
        assert tile_of() is None


def test_a_model_of_ones_own_learns_from_a_pool_continues_with_it_and_keeps_no_videos() -> None:
    with own_folders() as folder:
        model = _make_wan(folder, torch.float32)
        usual = {"num_videos": 0, "steps": 4, "batch_size": 2}
        unbroken = artifact.load(run(model, _wan_inputs(name="unbroken", **usual)))
        # While videos are begun, in the warm start, and in training.
        for moment in (5, 26, 50):
            with _seen(lambda value, moment=moment: value >= moment):
                assert _is_interrupted(lambda: run(model, _wan_inputs(**usual))), moment
        continued = artifact.load(run(model, _wan_inputs(**usual)))
        assert not list(folder.glob("**/video-*"))
        _assert_equal(continued, unbroken)
        kept = artifact.load(run(model, _wan_inputs(name="kept", **(usual | {"num_videos": 2}))))
        assert list(folder.glob("**/video-*")) and kept.header.objective == "adm"


def _start_image() -> dict[str, Tensor]:
    """Return what an image-to-video node adds to each prompt."""
    return {
        "concat_latent_image": torch.randn(1, 16, 3, 8, 8),
        "concat_mask": torch.ones(1, 1, 3, 8, 8),
    }


def test_an_image_to_video_wan_learns_with_the_image_that_is_connected() -> None:
    with own_folders() as folder:
        model = _make_wan(folder, torch.float32, model_type="i2v", in_dim=36)
        image = _start_image()
        inputs = _wan_inputs()
        for branch in ("positive", "negative"):
            inputs[branch] = [[prompt, dict(image)] for prompt, _ in inputs[branch]]
        assert HostTeacher(model, inputs).conditions.concat.shape == (1, 20, 3, 8, 8)
        _compare_with_host(model, inputs, tolerance_of(model))
        assert run(model, inputs).is_file()
        inputs["negative"] = [[prompt, {}] for prompt, _ in inputs["negative"]]
        assert "the same start image" in complaint(_REFUSALS, HostTeacher, model, inputs)


class _WordEncoder:
    """A text encoder of the demo's words, asked as ComfyUI's text encoder node asks a CLIP."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        return [[encode_prompts([tokens]), {"pooled_output": None}]]


_PROMPTS = ("a handwritten one moving up", "a handwritten two moving down")
_LIST = f"\n {_PROMPTS[0]} \n\n{_PROMPTS[1]}"


def test_listed_prompts_are_those_of_combined_text_encoder_nodes() -> None:
    with own_folders() as folder:
        negative = [[encode_prompts(["seven"]), {}]]
        for model_type, extra in (("t2v", {}), ("i2v", _start_image())):
            model = _make_wan(
                folder, torch.float32, model_type=model_type, in_dim=16 + 20 * bool(extra)
            )
            usual = _wan_inputs(negative=[[prompt, dict(extra)] for prompt, _ in negative])
            listed = {"positive": None, "clip": _WordEncoder(), "prompts": _LIST}
            connected = [[encode_prompts([prompt]), dict(extra)] for prompt in _PROMPTS]
            hosts = [HostTeacher(model, {**usual, **x}) for x in (listed, {"positive": connected})]
            assert len({host.conditions.digest() for host in hosts}) == 1
            assert hosts[0].conditions.prompt_embeds.shape == (2, 8, 4096)
        assert run(model, {**usual, **listed}).is_file()


def test_the_demo_reads_listed_prompts_itself() -> None:
    listed = HostTeacher(_demo()[0], _inputs(positive=None, prompts=_LIST))
    connected = HostTeacher(_demo()[0], _inputs(positive=[[encode_prompts(list(_PROMPTS)), {}]]))
    assert listed.conditions.digest() == connected.conditions.digest()


def test_the_shift_comes_from_the_models_sampling() -> None:
    assert HostTeacher(_demo()[0], _inputs()).shift == 3.0
    shifted = ModelSamplingSD3().patch(_demo()[0], 5.0)[0]
    assert HostTeacher(shifted, _inputs()).shift == 5.0
    other = _demo()[0].clone()
    other.add_object_patch("model_sampling", torch.nn.Identity())
    assert "sampling" in complaint(_REFUSALS, HostTeacher, other, _inputs())


def test_what_cannot_be_learned_is_refused_and_leaves_nothing() -> None:
    prompt = encode_prompts(["seven"])
    with own_folders() as folder:
        for word, changes in {
            "target 4": {"target": 4},
            "lora_rank 500": {"lora_rank": 500},
            "no prompt": {"positive": []},
            "one is needed": {"negative": [[torch.cat([prompt, prompt]), {}]]},
            "'area'": {"positive": [[prompt, {"area": (1, 1, 0, 0)}]]},
            "numbers wide": {"positive": [[prompt[..., :7], {}]]},
            "at least 8 are needed": {"sampler_steps": 1},
            "width 17 is for a model of your own": {"width": 17},
            "width 64 height 64 is for a model of your own": {"width": 64, "height": 64},
            "frames 2 is for a model of your own": {"frames": 2},
            "tokens long": {"positive": [[prompt[:, :4], {}]]},
            "[1, 4, 8, 8]": {"latent": {"samples": torch.zeros(1, 4, 8, 8)}},
            "[1, 4, 7, 16, 16]": {"latent": {"samples": torch.zeros(1, 4, 7, 16, 16)}},
            "the filename '../up'": {"name": "../up"},
            "the filename 'con'": {"name": "con"},
            "without folders": {"name": "a/b"},
            "disconnect positive": {"prompts": _LIST},
            "does not know the word 'blue'": {"positive": None, "prompts": "a blue whale"},
        }.items():
            assert word in complaint(_REFUSALS, _run, **changes), word
        linear = linearize(_demo()[0], short_file())
        assert "linearized already" in complaint(_REFUSALS, run, linear, _inputs())
        wan = _make_wan(folder, torch.float32)
        for words, changes in {
            "positive is not connected": {"prompts": " \n"},
            "clip is not connected": {"prompts": _LIST},
            "width 17 given; a multiple of 16 is needed": {"width": 17},
            "height 8 given; a multiple of 16 is needed": {"height": 8},
            "frames 2 given; 4 n + 1 is needed": {"frames": 2},
            "tokens fit": {
                **{"width": 16384, "height": 16384, "frames": 16385},
                "positive": [[prompt, {}]],
            },
        }.items():
            message = complaint(_REFUSALS, run, wan, _wan_inputs(**{"positive": None, **changes}))
            assert words in message, message
        assert "GB" in message and "lower width" in message
        assert not list((folder / "output").iterdir())


def test_too_little_memory_says_what_to_lower() -> None:
    def exhaust(value: int) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with own_folders(), _seen(exhaust):
        message = complaint(_REFUSALS, _run)
    assert "batch_size" in message and "lora_rank" in message
    assert not comfy.model_management.in_training


def test_a_training_that_fails_says_so_in_the_nodes_words() -> None:
    with own_folders():
        message = complaint(_REFUSALS, _run, learning_rate=1e30, steps=10)
    assert "learning_rate" in message and "another name" in message


def test_the_copy_that_was_trained_is_let_go() -> None:
    def count() -> int:
        gc.collect()
        models = [each for each in gc.get_objects() if type(each).__name__ == "HostModel"]
        return len(models) + len(comfy.model_management.current_loaded_models)

    with own_folders():
        comfy.model_management.load_models_gpu([_demo()[0]])
        before = count()
        _run(steps=1, warm_start_steps=0)
        assert count() <= before


def test_a_folder_that_is_deleted_during_the_transfer_is_named() -> None:
    with own_folders() as folder:
        run_folder = _run_folder(folder)

        def delete(value: int) -> bool:
            if value > 40:
                shutil.rmtree(run_folder, ignore_errors=True)
            return False

        _demo()
        with _seen(delete):
            message = complaint(_REFUSALS, _run)
        assert f"{run_folder} was deleted" in message and "Errno" not in message
        assert not comfy.model_management.in_training


def _defaults() -> dict[str, object]:
    return {each.id: each.default for each in LinVideoTransferSettings.define_schema().inputs}


def test_settings_are_passed_on_by_name_and_are_auto_until_they_are_set() -> None:
    settings = _defaults() | {"target": 7, "learning_rate": 1e-4}
    assert LinVideoTransferSettings.execute(**settings).result == (settings,)
    untouched = {name for name, value in settings.items() if value in (0, "")}
    chosen = {"parameters", "objective", "attention_mass"}
    assert untouched == settings.keys() - {"target", "learning_rate", *chosen}


def test_a_transfer_is_run_with_every_input_whatever_is_connected() -> None:
    typed = {"name": "mine", "quality": "best", "prompts": "", "keep_first_steps": 2}
    sockets = dict.fromkeys(("positive", "negative", "clip", "latent", "settings"))
    assert read_transfer_inputs({"mode": TRANSFER, **typed}) == typed | sockets
    connected = {"latent": {"samples": 1}, "settings": _defaults()}
    found = read_transfer_inputs({"mode": TRANSFER, **typed, **connected})
    assert found == typed | sockets | connected
