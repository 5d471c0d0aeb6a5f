"""The picture and the words of a file, whatever the file says of itself."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from linvideo_core import artifact
from linvideo_core.artifact import Artifact, ArtifactHeader
from linvideo_core.artifact.picture import draw_summary
from linvideo_core.artifact.summary import count_bytes, describe, title
from linvideo_core.demo import weights_path
from linvideo_core.teacher.config import TeacherConfig
from linvideo_core.teacher.teacher import load_teacher
from linvideo_core.transfer.preview import draw_preview


def make_artifact(num_layers: int = 10, **header: object) -> Artifact:
    """Return an artifact whose every third layer is linear."""
    layers = tuple(range(0, num_layers, 3))
    settings = {
        "family": "wan",
        "fingerprint": f"wan, {num_layers} layers, 1 heads of 4",
        "weights_digest": "0123456789abcdef",
        "linear_layers": layers,
        "site_names": tuple(f"blocks.{layer}.self_attn" for layer in layers),
        "num_layers": num_layers,
        "feature_dim": 8,
        "parameters": "feature_maps",
        "objective": "adm",
        "steps": 12,
    }
    maps = torch.zeros(1, 4, 4)
    return Artifact(
        header=ArtifactHeader(**(settings | header)),
        linear={layer: {"query_map": maps, "key_map": maps} for layer in layers},
    )


def pixels(made: Artifact, note: str = "") -> np.ndarray:
    return np.asarray(draw_summary(made, note=note))


@pytest.mark.parametrize("num_layers", [1, 10, 30, 40, 61, 1000])
def test_a_file_of_any_depth_is_drawn(num_layers: int) -> None:
    picture = pixels(make_artifact(num_layers))
    assert picture.dtype == np.uint8 and picture.shape[1:] == (1024, 3)
    assert picture.min() < 60 and picture.max() == 255


def test_the_picture_shows_which_layers_are_linear_and_how_it_was_made() -> None:
    first = make_artifact()
    layers = {"linear_layers": (0, 3, 6, 8), "site_names": tuple("abcd")}
    other = dataclasses.replace(
        first,
        header=dataclasses.replace(first.header, **layers),
        linear={layer: first.linear[0] for layer in layers["linear_layers"]},
    )
    changed = [other, make_artifact(steps=13), make_artifact(provenance={"seed": 1})]
    for made in changed:
        assert not np.array_equal(pixels(made), pixels(first))
    assert len(pixels(first, "applied to a model")) > len(pixels(first))


def test_what_a_stranger_wrote_into_a_file_is_one_readable_line_each() -> None:
    strange = {"notes": "a\nb\x00\u202e" + "long " * 5000, "word": "x" * 5000}
    made = make_artifact(provenance=strange)
    facts = describe(made)
    assert all(text.isprintable() and len(text) <= 400 for text in facts.values())
    assert "notes a b long" in facts["made with"] and "word xxx" in facts["made with"]
    assert len(pixels(made)) < 2 * len(pixels(make_artifact()))


def test_the_words_name_the_sampling_grid_of_a_distilled_file() -> None:
    assert describe(make_artifact())["sampling"] == "any number of steps"
    distilled = make_artifact(sigmas=(1.0, 0.9375, 0.625, 0.0))
    assert describe(distilled)["sampling"] == "3 steps: sigmas 1, 0.9375, 0.625, 0"
    assert title(distilled.header) == "4 of 10 layers are linear"


def test_the_bytes_are_those_of_the_tensors() -> None:
    made = make_artifact()
    assert count_bytes(made) == {"feature maps": 4 * 2 * 16 * 4, "weight changes": 0}
    header = dataclasses.replace(made.header, parameters="lora", lora_rank=2)
    low_rank = {"blocks.0.ffn.0": (torch.zeros(2, 5), torch.zeros(7, 2))}
    changed = dataclasses.replace(made, header=header, low_rank=low_rank)
    assert count_bytes(changed)["weight changes"] == 24 * 4
    assert describe(changed)["weight changes"] == "LoRA of rank 2 on 1 weight"


def test_applying_showing_and_previewing_a_file_need_no_matplotlib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ["matplotlib", *filter(lambda name: name.startswith("matplotlib."), sys.modules)]:
        monkeypatch.setitem(sys.modules, name, None)
    made = artifact.load(weights_path("linearized.safetensors"))
    with artifact.apply(made, load_teacher(TeacherConfig()).model):
        widths = draw_summary(made).width, draw_preview([], {}, title="a", num_steps=1).width
    assert widths == (1024, 560)
