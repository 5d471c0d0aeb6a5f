"""The transfer inside ComfyUI.

A run here is a few steps on the embedded model with three prompts and tiny latents: nothing is
learned; what is kept, continued, given back and refused is all there is.
"""

import contextlib
import functools
import gc
import shutil
import tempfile
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.ldm.wan.model
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from linvideo_pack.linvideo_core import artifact
from linvideo_pack.linvideo_core.demo.codec import LATENT_SHAPE
from linvideo_pack.linvideo_core.demo.prompts import encode_prompts, make_prompt
from linvideo_pack.linvideo_core.run.config import override
from linvideo_pack.linvideo_core.run.context import Run
from linvideo_pack.linvideo_core.teacher.teacher import Teacher
from linvideo_pack.linvideo_core.teacher.trajectories import collect
from linvideo_pack.linvideo_core.training.trainer import seed_step
from linvideo_pack.linvideo_core.transfer.config import PARAMETERS, StudentConfig
from linvideo_pack.linvideo_core.transfer.student import Student, TransferTask
from linvideo_pack.nodes import demo, model_folder
from linvideo_pack.nodes.linearize import TRANSFER, LinVideoLinearize
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.weights import describe_base
from linvideo_pack.nodes.transfer.host_teacher import HostTeacher
from linvideo_pack.nodes.transfer.pipeline import make_config, run
from stage import (
    MODEL_OF_SHAPES,
    complaint,
    device,
    load_headless,
    make_noise,
    short_demo,
    short_file,
    tolerance_of,
)
from torch import Tensor

_TOLERANCE = 1e-5
_REFUSALS = ValueError, RuntimeError


@functools.cache
def _any_demo() -> tuple[Any, Any, Any, Any]:
    _, *prompts, latent = demo.LinVideoDemo.execute("seven", "up-right", 1).result
    return (short_demo(), *prompts, latent)


def _can_train() -> bool:
    return hasattr(comfy.model_management, "in_training")


def _need_training() -> None:
    if not _can_train():
        raise unittest.SkipTest("this ComfyUI's clones cannot be trained: 0.25 is needed")


def _demo() -> tuple[Any, Any, Any, Any]:
    _need_training()
    return _any_demo()


def _inputs(**changes: Any) -> dict[str, Any]:
    """Return what the node is given; an expert's settings are told from the others by name."""
    prompts = encode_prompts([make_prompt(digit, digit) for digit in range(3)])
    settings = {
        "target": 2,
        "steps": 6,
        "batch_size": 2,
        "cfg": 3.0,
        "seed": 1,
        "parameters": "lora",
        "lora_rank": 4,
        "objective": "adm",
        "learning_rate": 2e-3,
        "warm_start_steps": 2,
        "num_videos": 2,
        "sampler_steps": 8,
        "width": 64,
        "height": 64,
        "frames": 9,
    }
    usual = {
        "mode": TRANSFER,
        "name": "fast",
        "quality": "standard",
        "prompts": "",
        "positive": [[prompts, {}]],
        "negative": _any_demo()[2],
        "clip": None,
        "latent": {"samples": torch.zeros(1, LATENT_SHAPE[0], 2, 8, 8)},
        "keep_first_steps": 0,
    }
    expert = {name: changes.pop(name) for name in list(changes) if name in settings}
    return {**usual, "settings": {**settings, **expert}, **changes}


@contextlib.contextmanager
def _folders() -> Iterator[Path]:
    """Send what is written to a folder of its own."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as undo:
        folder = Path(name)
        undo.callback(folder_paths.set_output_directory, folder_paths.get_output_directory())
        folder_paths.set_output_directory(str(folder / "output"))
        before = folder_paths.folder_names_and_paths.get(model_folder.FOLDER)
        if before is None:
            undo.callback(folder_paths.folder_names_and_paths.pop, model_folder.FOLDER)
        else:
            undo.callback(
                folder_paths.folder_names_and_paths.__setitem__, model_folder.FOLDER, before
            )
        models = [str(folder / "models")]
        folder_paths.folder_names_and_paths[model_folder.FOLDER] = (models, {".safetensors"})
        yield folder


def _run(**changes: Any) -> artifact.Artifact:
    return artifact.load(run(_demo()[0], _inputs(**changes)))


def _tensors(made: artifact.Artifact) -> list[Tensor]:
    pairs = [*(x.values() for x in made.linear.values()), *made.low_rank.values()]
    return [*made.deltas.values(), *(tensor for pair in pairs for tensor in pair)]


def _sample(model: Any) -> Tensor:
    _, positive, negative, _ = _demo()
    noise = make_noise()
    settings = (2, 3.0, "euler", "simple", positive, negative, torch.zeros_like(noise))
    return comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=1)


@contextlib.contextmanager
def _seen(interrupt_at: Callable[[int], bool] = lambda _: False) -> Iterator[list[Any]]:
    """Watch what the browser is told; press Interrupt where a value of the bar says so."""
    told: list[Any] = []

    def hook(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        told.append((value, total, preview))
        if interrupt_at(value):
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        yield told
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


def test_a_transfer_gives_the_faster_model_its_file_and_the_input_unchanged() -> None:
    with _folders() as folder, _seen() as told:
        model, *_ = _demo()
        before, names = _sample(model), list(model.model.state_dict())
        linear, made = LinVideoLinearize.execute(model, _inputs()).result[:2]
        assert len(made.header.linear_layers) == 2 and made.header.steps == 6
        assert made.header.provenance["model"] == "demo"
        assert made.header.weights_digest == describe_base(model).digest
        assert (folder / "models" / "fast.safetensors").is_file()
        assert not torch.equal(_sample(linear), before)
        assert torch.equal(_sample(model), before)
        assert list(model.model.state_dict()) == names
        assert not any(p.requires_grad for p in model.model.parameters())
        assert not comfy.model_management.in_training
    values = [value for value, total, _ in told if total == 100]
    assert values == sorted(values) and len(set(values)) > 5
    pictures = [preview[1] for _, _, preview in told if preview]
    assert pictures and all(picture.mode == "RGB" for picture in pictures)


def test_an_interrupted_transfer_continues_and_ends_as_an_unbroken_one() -> None:
    with _folders() as folder:
        unbroken = _run(name="unbroken")
        # The bar at 30 is the training's start; one of its six steps is a ninth of the bar.
        for moment in (5, 26, 45, 70):
            with _seen(lambda value, moment=moment: value >= moment):
                try:
                    _run()
                except comfy.model_management.InterruptProcessingException:
                    pass
                else:
                    raise AssertionError(f"nothing stopped at {moment}")
            assert not comfy.model_management.in_training
            assert not (folder / "models" / "fast.safetensors").exists()
        rows = (folder / "output" / "linvideo" / "fast" / "training" / "metrics.jsonl").read_text()
        assert rows
        continued = _run()
    assert continued.header.linear_layers == unbroken.header.linear_layers
    for tensor, expected in zip(_tensors(continued), _tensors(unbroken), strict=True):
        assert torch.equal(tensor, expected)


def test_an_interrupt_within_a_step_is_noticed_before_the_next_layer() -> None:
    with _folders(), _seen() as told:
        attention_calls = []

        def press(module: torch.nn.Module, *_: Any) -> None:
            is_training = bool(told) and told[-1][0] > 30
            if is_training and type(module).__name__ == "WanSelfAttention":
                attention_calls.append(1)
                comfy.model_management.interrupt_current_processing()

        _need_training()
        hook = torch.nn.modules.module.register_module_forward_hook(press)
        try:
            _run()
        except comfy.model_management.InterruptProcessingException:
            pass
        finally:
            hook.remove()
        assert len(attention_calls) == 1


def test_a_finished_transfer_is_not_run_again() -> None:
    with _folders() as folder:
        made = _run()
        path = folder / "models" / "fast.safetensors"
        before = path.read_bytes()
        for prepare in (lambda: None, path.unlink):
            prepare()
            with _seen() as told:
                again = _run()
            assert not told
            assert path.read_bytes() == before
            assert again.header == made.header
        # A damaged result is written again.
        result = folder / "output" / "linvideo" / "fast" / "linearized.safetensors"
        result.write_bytes(result.read_bytes()[:500])
        path.unlink()
        again = _run()
    for tensor, expected in zip(_tensors(again), _tensors(made), strict=True):
        assert torch.equal(tensor, expected)


def test_a_name_belongs_to_one_transfer() -> None:
    with _folders() as folder:
        made = folder / "models" / "fast.safetensors"
        made.parent.mkdir()
        made.write_bytes(b"a file of another origin")
        assert "another name" in complaint(_REFUSALS, _run)
        assert made.read_bytes() == b"a file of another origin"
        made.unlink()
        _run(steps=1, warm_start_steps=0)
        usual = {"steps": 1, "warm_start_steps": 0}
        for setting, changes in {
            "steps 1 and 300": {"steps": 300},
            "cfg 3.0 and 2.0": {"cfg": 2.0},
            "with other prompts": {"negative": [[encode_prompts(["seven"]), {}]]},
        }.items():
            message = complaint(_REFUSALS, _run, **{**usual, **changes})
            assert setting in message and "another name" in message, message
        message = complaint(_REFUSALS, run, _with_lora(_demo()[0]), _inputs(**usual))
        assert "with another model" in message and "another name" in message
        size = {"latent": {"samples": torch.zeros(1, LATENT_SHAPE[0], 2, 8, 16)}}
        message = complaint(_REFUSALS, _run, **usual, **size)
        assert "another video size" in message and "/" not in message


def _with_lora(model: Any) -> Any:
    tensors = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": 0.1 * torch.ones(shape)
        for side, shape in (("down", (2, 128)), ("up", (128, 2)))
    }
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)[0]


def test_a_loras_changes_are_part_of_the_teacher() -> None:
    model = _with_lora(_demo()[0])
    with _teacher(model, _inputs()) as teacher:
        weight = teacher.model.blocks[0].self_attn.q.weight.float().cpu()
        plain = load_headless().blocks[0].self_attn.q.weight
        torch.testing.assert_close(weight - plain, torch.full_like(plain, 0.02), atol=1e-6, rtol=0)


def test_weights_of_every_kind_can_be_trained_with_every_objective() -> None:
    for parameters, objective in zip(PARAMETERS, ("adm", "velocity", "adm"), strict=True):
        with _folders():
            made = _run(parameters=parameters, objective=objective, steps=2, warm_start_steps=0)
            header = made.header
            assert (header.parameters, bool(made.deltas), bool(made.low_rank)) == (
                parameters,
                parameters == "full",
                parameters == "lora",
            )
            assert _sample(linearize(_demo()[0], made)).isfinite().all()


@contextlib.contextmanager
def _teacher(model: Any, inputs: dict[str, Any]) -> Iterator[Teacher]:
    """Lend the teacher of a transfer, outside of the inference mode that nodes run in."""
    with torch.inference_mode(False), torch.no_grad():
        host = HostTeacher(model, inputs)
        with host.teacher(make_config(inputs, host)) as teacher:
            yield teacher


def test_the_teacher_is_the_model_of_the_headless_core() -> None:
    latents, sigma = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.9, 0.2])
    with _teacher(_demo()[0], _inputs()) as teacher:
        prompts = teacher.prompt_embeds[:2]
        inputs = latents.to(device()), 1000 * sigma.to(device()), prompts
        found = teacher.model(*(x.clone() for x in inputs))
        headless = load_headless()
        headless.blocks = headless.blocks[:3]
        _assert_close(found, headless.to(device())(*inputs))


def _assert_close(found: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> None:
    """Compare the norm of the difference to that of the expected: 1e-5 in fp32, 2e-2 in bf16."""
    difference = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert difference <= tolerance, difference


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    with torch.inference_mode(False), torch.enable_grad(), _folders() as folder:
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
    _need_training()
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
    usual["latent"] = None
    return _inputs(**{**usual, **changes})


def _velocity_of_host(model: Any, conditions: Any, latents: Tensor, prompt: Tensor) -> Tensor:
    """Return the velocity at full noise, where it is the state less ComfyUI's clean estimate."""
    comfy.model_management.load_models_gpu([model])
    extra = {"c_concat": conditions.concat, **conditions.inputs}
    sigmas, prompt = torch.ones(len(latents), device=device()), prompt.to(device())
    return latents - model.model.apply_model(
        latents, sigmas, c_crossattn=prompt, transformer_options={}, **extra
    )


def test_a_text_to_video_wan_computed_in_bf16_is_trained_at_the_size_that_is_asked_for() -> None:
    with _folders() as folder:
        model = _make_wan(folder, torch.bfloat16)
        model.set_model_compute_dtype(torch.bfloat16)
        inputs = _wan_inputs()
        host = HostTeacher(model, inputs)
        assert host.video.latent_shape == (16, 3, 8, 8)
        latents = torch.randn(1, *host.video.latent_shape).to(device())
        prompt = host.conditions.prompt_embeds[:1]
        expected = _velocity_of_host(model, host.conditions, latents, prompt)
        with _teacher(model, inputs) as teacher:
            found = teacher.model(
                latents.clone(),
                torch.tensor([1000.0], device=device()),
                prompt.to(device()).clone(),
            )
            student = Student(teacher, StudentConfig(lora_rank=4), seed=0)
            assert {p.dtype for p in student.weights.values()} == {torch.float32}
        _assert_close(found, expected, 2e-2)
        made = artifact.load(run(model, _wan_inputs()))
        assert made.header.provenance["model"] == "wan"
        assert linearize(model, made)


def _start_image() -> dict[str, Tensor]:
    """Return what an image-to-video node adds to each prompt."""
    return {
        "concat_latent_image": torch.randn(1, 16, 3, 8, 8),
        "concat_mask": torch.ones(1, 1, 3, 8, 8),
    }


def test_an_image_to_video_wan_learns_with_the_image_that_is_connected() -> None:
    with _folders() as folder:
        model = _make_wan(folder, torch.float32, model_type="i2v", in_dim=36)
        image = _start_image()
        inputs = _wan_inputs()
        for branch in ("positive", "negative"):
            inputs[branch] = [[prompt, dict(image)] for prompt, _ in inputs[branch]]
        host = HostTeacher(model, inputs)
        assert host.conditions.concat.shape == (1, 20, 3, 8, 8)
        latents = torch.randn(1, *host.video.latent_shape).to(device())
        prompt = host.conditions.prompt_embeds[:1]
        expected = _velocity_of_host(model, host.conditions, latents, prompt)
        with _teacher(model, inputs) as teacher:
            found = teacher.model(
                latents.clone(),
                torch.tensor([1000.0], device=device()),
                prompt.to(device()).clone(),
            )
        _assert_close(found, expected, tolerance_of(model))
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
    with _folders() as folder:
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


def test_a_list_of_prompts_that_cannot_be_used_is_refused() -> None:
    with _folders() as folder:
        assert "disconnect positive" in complaint(_REFUSALS, _run, prompts=_LIST)
        message = complaint(_REFUSALS, _run, positive=None, prompts="a blue whale moving up")
        assert "does not know the word 'blue'" in message
        wan = _make_wan(folder, torch.float32)
        assert "clip" in complaint(_REFUSALS, run, wan, _wan_inputs(positive=None, prompts=_LIST))
        message = complaint(_REFUSALS, run, wan, _wan_inputs(positive=None, prompts=" \n"))
        assert "positive is not connected" in message


def test_the_shift_comes_from_the_models_sampling() -> None:
    assert HostTeacher(_demo()[0], _inputs()).shift == 3.0
    shifted = ModelSamplingSD3().patch(_demo()[0], 5.0)[0]
    assert HostTeacher(shifted, _inputs()).shift == 5.0
    other = _demo()[0].clone()
    other.add_object_patch("model_sampling", torch.nn.Identity())
    assert "sampling" in complaint(_REFUSALS, HostTeacher, other, _inputs())


def test_what_cannot_be_learned_is_refused_and_leaves_nothing() -> None:
    prompt = encode_prompts(["seven"])
    with _folders() as folder:
        for word, changes in {
            "target 4": {"target": 4},
            "lora_rank 500": {"lora_rank": 500},
            "no prompt": {"positive": []},
            "one is needed": {"negative": [[torch.cat([prompt, prompt]), {}]]},
            "'area'": {"positive": [[prompt, {"area": (1, 1, 0, 0)}]]},
            "numbers wide": {"positive": [[prompt[..., :7], {}]]},
            "at least 8 are needed": {"sampler_steps": 1},
            "tokens long": {"positive": [[prompt[:, :4], {}]]},
            "[1, 4, 8, 8]": {"latent": {"samples": torch.zeros(1, 4, 8, 8)}},
            "[1, 4, 7, 16, 16]": {"latent": {"samples": torch.zeros(1, 4, 7, 16, 16)}},
            "the filename '../up'": {"name": "../up"},
            "the filename 'con'": {"name": "con"},
            "without folders": {"name": "a/b"},
        }.items():
            assert word in complaint(_REFUSALS, _run, **changes), word
        linear = linearize(_demo()[0], short_file())
        assert "linearized already" in complaint(_REFUSALS, run, linear, _inputs())
        wan = _make_wan(folder, torch.float32)
        message = complaint(_REFUSALS, run, wan, _wan_inputs(positive=None))
        assert "positive is not connected" in message
        assert not (folder / "output").exists()


def test_too_little_memory_says_what_to_lower() -> None:
    def exhaust(value: int) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with _folders(), _seen(exhaust):
        message = complaint(_REFUSALS, _run)
    assert "batch_size" in message and "lora_rank" in message
    assert not comfy.model_management.in_training


def test_a_training_that_fails_says_so_in_the_nodes_words() -> None:
    with _folders():
        message = complaint(_REFUSALS, _run, learning_rate=1e30, steps=10)
    assert "learning_rate" in message and "another name" in message


def test_a_comfyui_that_cannot_train_is_named_with_the_one_that_can() -> None:
    if _can_train():
        raise unittest.SkipTest("this ComfyUI can train")
    with _folders() as folder:
        assert "0.25" in complaint(_REFUSALS, run, _any_demo()[0], _inputs())
        assert not (folder / "output").exists()


def test_the_copy_that_was_trained_is_let_go() -> None:
    def count() -> int:
        gc.collect()
        models = [each for each in gc.get_objects() if type(each).__name__ == "HostModel"]
        return len(models) + len(comfy.model_management.current_loaded_models)

    with _folders():
        comfy.model_management.load_models_gpu([_demo()[0]])
        before = count()
        _run(steps=1, warm_start_steps=0)
        assert count() <= before


def test_a_damaged_result_is_mended_by_its_copy_in_models() -> None:
    with _folders() as folder:
        made = _run(steps=1, warm_start_steps=0)
        result = folder / "output" / "linvideo" / "fast" / "linearized.safetensors"
        whole = result.read_bytes()
        result.write_bytes(whole[:500])
        with _seen() as shown:
            again = _run(steps=1, warm_start_steps=0)
        assert not shown and result.read_bytes() == whole
        assert all(map(torch.equal, _tensors(again), _tensors(made)))
        (folder / "models" / "fast.safetensors").write_bytes(whole[:500])
        assert "is damaged: delete it" in complaint(_REFUSALS, _run, steps=1, warm_start_steps=0)


def test_a_folder_that_is_deleted_during_the_transfer_is_named() -> None:
    with _folders() as folder:
        run_folder = folder / "output" / "linvideo" / "fast"

        def delete(value: int) -> bool:
            if value > 40:
                shutil.rmtree(run_folder, ignore_errors=True)
            return False

        _demo()
        with _seen(delete):
            message = complaint(_REFUSALS, _run)
        assert f"{run_folder} was deleted" in message and "Errno" not in message
        assert not comfy.model_management.in_training


def test_videos_that_no_memory_holds_are_refused_with_numbers() -> None:
    with _folders() as folder:
        model = _make_wan(folder, torch.float32)
        sizes = {"width": 16384, "height": 16384, "frames": 16384}
        message = complaint(_REFUSALS, run, model, _wan_inputs(**sizes))
        assert "GB" in message and "tokens fit" in message and "lower width" in message
        assert not (folder / "output").exists()
