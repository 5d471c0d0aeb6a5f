"""The model card: read by huggingface_hub, and true to the file and its evaluation."""

import dataclasses
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from linvideo_core.artifact import Artifact
from linvideo_core.artifact.header import Usage
from linvideo_core.artifact.summary import describe
from linvideo_core.evaluate.card import CARD_NAME, upload_commands, write_card

EVALUATION = {
    "settings": {"num_samples": 8, "steps": 50, "guidance_scale": 5.0, "shift": 3.0}
    | {"width": 832, "height": 480, "num_frames": 81},
    "rows": [
        {"model": "teacher", "motion_energy": 1.0},
        {"model": "student", "motion_energy": 0.9},
    ],
    "velocity_rows": [],
    "is_decoded": True,
}


@pytest.mark.parametrize("evaluation", [EVALUATION, None])
def test_a_card_says_what_the_file_and_its_evaluation_say(
    evaluation: dict | None, linearized: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "samples.mp4").touch()
    names = ("high.safetensors", "low.safetensors")
    write_card(tmp_path, {tmp_path / name: linearized for name in names}, evaluation)
    card = ModelCard.load(tmp_path / CARD_NAME)
    assert card.data.library_name == "linvideo" and "linear-attention" in card.data.tags
    assert card.data.base_model is None and card.data.license is None
    for name in names:
        assert f"## {name}: 2 of 3 layers are linear" in card.text
    assert all(f"- **{name}**: {text}" in card.text for name, text in describe(linearized).items())
    measured = ("motion energy / teacher's", "decoded videos", "832 x 480, 81 frames, 50 steps")
    is_measured = all(text in card.text for text in measured)
    has_videos = "(samples.mp4)" in card.text
    assert is_measured == has_videos == (evaluation is not None)
    assert "samples.gif" not in card.text
    offered = json.loads(card.text.partition("```json\n")[2].partition("```")[0])
    assert offered["models"][0]["name"] == "high.safetensors"


def test_the_files_of_two_experts_are_applied_together(
    linearized: Artifact, tmp_path: Path
) -> None:
    ranges = {"high": (1.0, 0.9), "low": (0.9, 0.0)}
    made = {}
    for name, (sigma_from, sigma_to) in ranges.items():
        usage = Usage(sigma_from=sigma_from, sigma_to=sigma_to, shift=5.0)
        header = dataclasses.replace(linearized.header, usage=usage)
        made[tmp_path / name] = dataclasses.replace(linearized, header=header)
    write_card(tmp_path, made, None)
    card = (tmp_path / CARD_NAME).read_text(encoding="utf-8")
    assert 'apply(pipe, "high", low_noise_path="low")' in card and "flow_shift is to be 5." in card


def test_uploading_takes_the_files_and_no_checkpoints() -> None:
    commands = upload_commands(Path("runs/wan"), [Path("runs/wan/linearized.safetensors")])
    folder, file = commands.splitlines()
    assert (
        folder.startswith("hf upload YOU/REPO runs/wan . --include")
        and ".safetensors" not in folder
    )
    assert file == "hf upload YOU/REPO runs/wan/linearized.safetensors"
