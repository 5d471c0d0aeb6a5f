"""The model card: read by huggingface_hub, and true to the file and its evaluation."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from linvideo_core.artifact import Artifact
from linvideo_core.artifact.summary import describe
from linvideo_core.evaluate.card import CARD_NAME, upload_commands, write_card

EVALUATION = {
    "settings": {"num_samples": 8, "steps": 50, "guidance_scale": 5.0, "shift": 3.0},
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
    is_measured = "motion energy / teacher's" in card.text and "decoded videos" in card.text
    has_videos = "(samples.mp4)" in card.text
    assert is_measured == has_videos == (evaluation is not None)
    assert "samples.gif" not in card.text
    offered = json.loads(card.text.partition("```json\n")[2].partition("```")[0])
    assert offered["models"][0]["name"] == "high.safetensors"


def test_uploading_takes_the_files_and_no_checkpoints() -> None:
    commands = upload_commands(Path("runs/wan"), [Path("runs/wan/linearized.safetensors")])
    folder, file = commands.splitlines()
    assert (
        folder.startswith("hf upload YOU/REPO runs/wan . --include")
        and ".safetensors" not in folder
    )
    assert file == "hf upload YOU/REPO runs/wan/linearized.safetensors"
