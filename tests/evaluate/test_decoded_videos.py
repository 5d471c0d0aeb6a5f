"""Videos decoded by Wan's autoencoder: loaded from what people have, shown, measured, exported."""

import json
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from PIL import Image
from safetensors.torch import save_file

from linvideo_core import artifact
from linvideo_core.artifact import Artifact
from linvideo_core.evaluate import autoencoder, videos
from linvideo_core.evaluate import cli as evaluate_cli
from linvideo_core.evaluate.autoencoder import decoder_of, find_autoencoder, load_autoencoder
from linvideo_core.evaluate.metrics import brightness, measure_videos, motion_energy
from linvideo_core.run.errors import SettingError
from linvideo_core.teacher.teacher import Teacher
from tests.conftest import LATENT_SHAPE, save_inputs

CHANNELS = LATENT_SHAPE[0]


def make_autoencoder(channels: int) -> AutoencoderKLWan:
    torch.manual_seed(0)
    scale = {} if channels == 16 else {"latents_mean": [0.5] * channels}
    if scale:
        scale["latents_std"] = [1.5 + i for i in range(channels)]
    return AutoencoderKLWan(base_dim=8, z_dim=channels, **scale).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a small random autoencoder for the tests' latents, as diffusers saves it."""
    make_autoencoder(CHANNELS).save_pretrained(tmp_path / "pipe" / "vae")
    return tmp_path / "pipe"


def wan_names() -> list[str]:
    """Return every name that a tensor of Wan's own autoencoder may have."""
    halves = [f"residual.{i}.{x}" for i in (2, 6) for x in ("weight", "bias")]
    block = [*halves, "residual.0.gamma", "residual.3.gamma"]
    block += [
        f"{x}.{y}" for x in ("shortcut", "resample.1", "time_conv") for y in ("weight", "bias")
    ]
    attention = [
        "norm.gamma",
        *(f"{x}.{y}" for x in ("to_qkv", "proj") for y in ("weight", "bias")),
    ]
    names = [f"{x}.{y}" for x in ("conv1", "conv2") for y in ("weight", "bias")]
    for side, steps in (("encoder.downsamples", 11), ("decoder.upsamples", 15)):
        half = side.partition(".")[0]
        names += [f"{side}.{i}.{leaf}" for i in range(steps) for leaf in block]
        names += [f"{half}.middle.{i}.{leaf}" for i in (0, 2) for leaf in block[:6]]
        names += [f"{half}.middle.1.{leaf}" for leaf in attention]
        names += [f"{half}.{leaf}" for leaf in ("conv1.weight", "conv1.bias", "head.0.gamma")]
        names += [f"{half}.head.2.{leaf}" for leaf in ("weight", "bias")]
    return names


def test_one_file_in_either_naming_is_the_autoencoder_of_a_folder(tmp_path: Path) -> None:
    model = make_autoencoder(16)
    state = model.state_dict()
    theirs = {name: convert_wan_vae_to_diffusers({name: name}) for name in wan_names()}
    stored = {new: old for old, renamed in theirs.items() for new in renamed if new in state}
    assert stored.keys() == state.keys()
    forms = {"wan_2.1_vae": {stored[n]: x for n, x in state.items()}, "diffusers": state}
    latents = torch.randn(2, 16, 2, 4, 6)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (model.config.latents_mean, model.config.latents_std)
    )
    with torch.no_grad():
        expected = model.decode(latents * std + mean).sample / 2 + 0.5
    for name, tensors in forms.items():
        save_file({n: x.half() for n, x in tensors.items()}, tmp_path / f"{name}.safetensors")
        loaded = load_autoencoder(tmp_path / f"{name}.safetensors", 16)
        frames = decoder_of(loaded, "cpu")(latents)
        assert frames.shape == (2, 5, 32, 48, 3) and frames.dtype == torch.float32
        torch.testing.assert_close(frames.movedim(-1, 1), expected, rtol=0, atol=0.01)


@pytest.mark.gpu
def test_on_a_gpu_a_video_is_decoded_in_tiles_as_on_the_cpu() -> None:
    latents, model = torch.randn(1, 16, 3, 40, 48), make_autoencoder(16)
    model.enable_tiling()
    expected = decoder_of(model, "cpu")(latents)
    found = decoder_of(model, "cuda")(latents.cuda())
    assert found.is_cuda and found.shape == (1, 9, 320, 384, 3)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0.01)


def spoil(folder: Path, **changes: object) -> Path:
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def cut(folder: Path) -> Path:
    """Leave a tensor of the folder out."""
    state = make_autoencoder(CHANNELS).state_dict()
    state.popitem()
    save_file(state, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def stranger(folder: Path, shape: tuple[int, ...], *names: str) -> Path:
    save_file({name: torch.zeros(shape) for name in names}, folder / "file.safetensors")
    return folder / "file.safetensors"


@pytest.mark.parametrize(
    ("give", "reason"),
    [
        (lambda folder: folder / "none.safetensors", "--vae .*none.safetensors given, and no"),
        (lambda folder: spoil(folder, _class_name="AutoencoderKL"), "is of 'AutoencoderKL'"),
        (lambda folder: spoil(folder, latents_mean=[0.0]), "latents of .* channels"),
        (lambda folder: spoil(folder, base_dim=16), "size mismatch"),
        (cut, "Missing key"),
        (lambda folder: stranger(folder, (2,), "a", "b"), "called 'a', 'b'"),
        (
            lambda folder: stranger(folder, (48, 48), "decoder.head.2.weight", "conv2.weight"),
            "48 channels needs its folder",
        ),
        (
            lambda folder: stranger(folder, (16, 8), "decoder.head.2.weight", "conv2.weight"),
            "latents of 16 channels, and the model's have 4",
        ),
    ],
)
def test_what_is_not_the_models_autoencoder_is_refused(
    give: object, reason: str, folder: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as raised:
        load_autoencoder(give(folder), CHANNELS)
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_package_and_a_model_with_its_own_decoder_are_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="--vae was given without --model"):
        find_autoencoder(folder, None)
    monkeypatch.setitem(autoencoder.EXTRA, "no_such_package", "no-such-package")
    with pytest.raises(SettingError, match="--vae needs no-such-package, not installed"):
        load_autoencoder(folder, CHANNELS)


@pytest.fixture
def flags(teacher: Teacher, linearized: Artifact, folder: Path, tmp_path: Path) -> list[str]:
    """Flags of a short comparison of a model, with its autoencoder."""
    artifact.save(linearized, tmp_path / "linearized.safetensors")
    paths = {
        **save_inputs(teacher, tmp_path),
        "--artifact": tmp_path / "linearized.safetensors",
        "--vae": folder,
    }
    files = [str(word) for pair in paths.items() for word in pair]
    size = ["--num-frames", "9", "--height", "16", "--width", "32", "--device", "cpu"]
    return [*files, *size, "--sampler-steps", "2", "--num-samples", "2", "--batch-size", "2"]


def read_video(path: Path) -> tuple[dict, np.ndarray]:
    frames = imageio_ffmpeg.read_frames(path)
    meta = next(frames)
    width, height = meta["size"]
    shown = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]
    return meta, np.stack(shown)


def test_decoded_videos_are_shown_in_colour_and_measured_in_pixels(
    flags: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate_cli.main([*flags, "--out", str(out)])
    result = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert result["is_decoded"]
    assert [row["model"] for row in result["rows"]] == ["teacher", "swapped", "student"]
    assert all(row["spatial_spectrum_db"] is not None for row in result["rows"])
    meta, frames = read_video(out / "samples.mp4")
    assert (meta["fps"], len(frames)) == (16, 9)
    assert frames.shape[2] > 3 * 3 * 32 and not (out / "samples.gif").exists()
    with Image.open(out / "samples.png") as strip:
        assert strip.mode == "RGB"


def test_an_export_is_named_as_vbench_wants_it_and_continues(
    flags: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "vbench"
    export = [*flags, "--export-videos", str(out)]
    evaluate_cli.main(export)
    names = {f"prompt {i}-0.mp4" for i in range(3)}
    for model in ("student", "teacher"):
        assert {path.name for path in (out / model).iterdir()} == names
    first = out / "student" / "prompt 1-0.mp4"
    meta, frames = read_video(first)
    assert (meta["fps"], frames.shape) == (16, (9, 16, 32, 3))
    (out / "teacher" / "prompt 1-0.mp4").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    evaluate_cli.main([*export, "--seeds-per-prompt", "2"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    every = {f"prompt {i}-{index}.mp4" for i in range(3) for index in range(2)}
    for model in ("student", "teacher"):
        assert {path.name for path in (out / model).iterdir()} == every
    assert not np.array_equal(read_video(out / "student" / "prompt 1-1.mp4")[1], frames)
    with pytest.raises(
        SettingError, match=r"--guidance-scale 3.0 and this run has 4.0; .* --export-videos"
    ):
        evaluate_cli.main([*export, "--guidance-scale", "4"])


@pytest.mark.parametrize(
    ("left_out", "more", "reason"),
    [
        (["--vae"], [], "--export-videos was given without --vae"),
        ([], ["--lora", "a.safetensors"], "--export-videos and --lora given"),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    left_out: list[str],
    more: list[str],
    reason: str,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flag in left_out:
        del flags[flags.index(flag) : flags.index(flag) + 2]
    with pytest.raises(SystemExit):
        evaluate_cli.main([*flags, *more, "--export-videos", str(tmp_path / "vbench")])
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["a/b", "long " * 60])
def test_a_prompt_that_is_no_file_name_is_refused_before_anything_is_sampled(
    prompt: str, flags: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.safetensors"
    tensors = {"prompt_embeds": torch.zeros(1, 5, 16), "negative_embeds": torch.zeros(5, 16)}
    save_file(tensors, path, metadata={"prompts": json.dumps([prompt])})
    with pytest.raises(SettingError, match="cannot be a file's name"):
        evaluate_cli.main([*flags, "--export-videos", str(tmp_path / "vbench")])
    assert not (tmp_path / "vbench").exists()


def test_the_motion_of_large_videos_is_found_in_their_own_pixels() -> None:
    coarse = torch.rand(1, 1, 150, 150, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bicubic")[0, 0]
    clip = torch.stack([texture[:480, 8 * f : 8 * f + 480] for f in range(3)])[None]
    assert motion_energy(clip).item() == pytest.approx(8, rel=0.02)


def test_colour_is_measured_by_its_brightness() -> None:
    grey = torch.rand(1, 4, 8, 8)
    colour = grey[..., None].expand(-1, -1, -1, -1, 3)
    for name, value in measure_videos(grey).items():
        torch.testing.assert_close(measure_videos(brightness(colour))[name], value)


def test_a_page_of_colour_keeps_the_pixels_and_its_sides_are_even(tmp_path: Path) -> None:
    clips = {name: torch.zeros(1, 3, 201, 203, 3) for name in ("teacher", "student")}
    clips["student"][..., 0] = 1
    videos.save_animation(clips, ["prompt"], tmp_path / "a.mp4", fps=24)
    meta, frames = read_video(tmp_path / "a.mp4")
    assert meta["fps"] == 24 and len(frames) == 3
    assert all(side % 2 == 0 for side in meta["size"])
    is_red = (frames[0][..., 0] > 200) & (frames[0][..., 1] < 60)
    assert is_red.sum() == pytest.approx(201 * 203, rel=0.05)
