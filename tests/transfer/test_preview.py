"""The picture of a training shows what is there, and can be drawn before anything is."""

import numpy as np
from PIL import Image

from linvideo_core.transfer.preview import draw_preview

LINEAR, SOFTMAX = (0, 114, 178), (213, 94, 0)


def colours_of(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.asarray(image).reshape(-1, 3).tolist()}


def test_before_the_first_row_there_is_a_picture_without_curves() -> None:
    for rows in ([], [{"step": 0, "loss": 1.0}], [{"step": 0, "layer_scores": [0.5, 0.5]}]):
        page = draw_preview(rows, {}, title="step 0 of 9", num_steps=9)
        assert page.mode == "RGB"
        assert not {LINEAR, SOFTMAX} & colours_of(page)


def test_each_layer_is_drawn_in_the_colour_of_what_it_is_becoming() -> None:
    for last, colours in (((0.1, 0.9), {LINEAR, SOFTMAX}), ((0.9, 0.9), {SOFTMAX})):
        rows = [
            {"step": 0, "layer_scores": [0.5, 0.5]},
            {"step": 8, "layer_scores": list(last)},
        ]
        page = draw_preview(rows, {}, title="step 8 of 9", num_steps=9)
        assert {LINEAR, SOFTMAX} & colours_of(page) == colours


def test_every_frame_of_every_video_is_shown_whole() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    for size in ((16, 16), (104, 60), (1, 400)):
        frames = [Image.new("RGB", size, colour) for colour in colours]
        videos = {"before": frames[:2], "now": frames[2:]}
        page = np.asarray(draw_preview([], videos, title="", num_steps=1)).reshape(-1, 3)
        counts = [int((page == colour).all(axis=1).sum()) for colour in colours]
        assert len(set(counts)) == 1 and counts[0] > 0
