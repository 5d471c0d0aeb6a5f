"""Pictures are whole files of the right shape, whatever the run looked like."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.kernels.cli import plot_cost
from linvideo_core.evaluate import plots
from linvideo_core.evaluate import videos as video_files

SIZE = (4, 7, 12, 10)  # B, F, H, W: odd, not square


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def videos() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(SIZE, generator=generator) for name in ("before", "after", "teacher")}


def metrics(num_layers: int) -> list[dict]:
    return [
        {"step": step, "loss": 1 / (step + 1), "objective_loss": 0.5 / (step + 1)}
        | ({"layer_scores": [layer / num_layers for layer in range(num_layers)]} if step else {})
        for step in range(5)
    ]


def is_blank(path: Path) -> bool:
    with Image.open(path) as image:
        low, high = image.convert("L").getextrema()
    return low == high


VELOCITY_ROWS = [
    {"model": model, "sigma": sigma, "velocity_error": error, "velocity_cosine": 1 - error**2}
    for model, error in (("swapped", 0.9), ("student", 0.1))
    for sigma in (1.0, 0.5, 0.1)
]
STEP_ROWS = [
    {"model": model, "steps": steps, "frechet_teacher_features": value, "motion_energy": value}
    for model, steps, value in (
        ("teacher", 50, 0.0), ("teacher_4_plain", 4, 3.0), ("distilled_4", 4, 0.5)
    )
]  # fmt: skip
COST_ROWS = [
    {"layer": layer, "tokens": tokens, "milliseconds": tokens / 9, "extra_mb": megabytes}
    for layer in ("softmax", "linear")
    for tokens, megabytes in ((1024, 0.0), (3000, 7.0))
]


@pytest.mark.parametrize(
    ("plot", "rows"),
    [
        *(
            (partial(plots.plot_layer_scores, hardened_at=2), metrics(num_layers))
            for num_layers in (1, 10, 40)
        ),
        (plots.plot_losses, metrics(2)),
        (plots.plot_losses, metrics(2)[:1]),
        (plots.plot_losses, [{"step": 0, "loss": -1.0}, {"step": 1, "loss": 0.5}]),
        (plots.plot_velocity_error, VELOCITY_ROWS),
        (plots.plot_steps, STEP_ROWS),
        (plots.plot_steps, [row | {"frechet": 0.5, "motion": None} for row in STEP_ROWS]),
        (partial(plot_cost, slopes={"softmax": 2.0, "linear": 1.0}), COST_ROWS),
    ],
)
def test_a_plot_is_drawn(plot: Callable, rows: list[dict], tmp_path: Path) -> None:
    path = tmp_path / "new" / "plot.png"
    plot(rows, path)
    assert not is_blank(path)


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    scores = plots.plot_layer_scores
    for plot in (scores, plots.plot_losses, plots.plot_velocity_error, plots.plot_steps):
        with pytest.raises(ValueError, match="nothing to plot"):
            plot([], tmp_path / "plot.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        scores([{"step": 0, "loss": 1.0}], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_an_animation_holds_every_frame_and_the_fade_and_loops(tmp_path: Path) -> None:
    path = tmp_path / "samples.gif"
    video_files.save_animation(videos(), [f"prompt {i}" for i in range(4)], path)
    with Image.open(path) as image:
        assert image.n_frames == SIZE[1] + 3
        assert image.info["loop"] == 0


def test_a_strip_shows_every_second_frame_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "samples.png"
    clips = {"before": torch.zeros(1, 5, 96, 96), "after": torch.zeros(1, 5, 96, 96)}
    clips["after"][:, ::2] = 0.5
    video_files.save_strip(clips, ["prompt"], path)
    with Image.open(path) as image:
        counts = image.convert("L").histogram()
    assert counts[128] >= 3 * 96 * 96
    assert counts[0] >= 3 * 96 * 96


def test_values_outside_the_range_or_not_finite_are_drawn_as_black_or_white(tmp_path: Path) -> None:
    clip = torch.tensor([float("nan"), -3.0, 7.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    video_files.save_strip({"student": clip}, ["prompt"], tmp_path / "strip.png")
    assert not is_blank(tmp_path / "strip.png")


def test_a_long_caption_is_cut_to_the_picture(tmp_path: Path) -> None:
    sizes = set()
    for caption in ("short", "long " * 200):
        video_files.save_strip({"a": torch.rand(1, 4, 8, 8)}, [caption], tmp_path / "strip.png")
        with Image.open(tmp_path / "strip.png") as image:
            sizes.add(image.size)
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("clips", "captions"),
    [
        ({"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(2, 3, 4, 5)}, ["x", "y"]),
        ({"a": torch.zeros(2, 3, 4, 4)}, ["x"]),
        ({"a": torch.zeros(2, 3, 4)}, ["x", "y"]),
        ({}, []),
    ],
)
def test_videos_that_do_not_match_are_refused(tmp_path: Path, clips: dict, captions: list) -> None:
    for save in (video_files.save_strip, video_files.save_animation):
        with pytest.raises(ValueError, match="one shape"):
            save(clips, captions, tmp_path / "picture")
