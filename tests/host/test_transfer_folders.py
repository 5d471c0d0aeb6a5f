"""What a transfer keeps on disk, and what is too large to learn from."""

import shutil

import comfy.model_management
import torch
from linvideo_pack.nodes.transfer.pipeline import run
from stage import complaint
from test_transfer import (
    _demo,
    _folders,
    _make_wan,
    _run,
    _seen,
    _tensors,
    _wan_inputs,
)


def test_a_damaged_result_is_mended_by_its_copy_in_models() -> None:
    with _folders() as folder:
        made = _run(steps=1, warm_start_steps=0)
        result = folder / "output" / "linvideo" / "law" / "linearized.safetensors"
        whole = result.read_bytes()
        result.write_bytes(whole[:500])
        with _seen() as shown:
            again = _run(steps=1, warm_start_steps=0)
        assert not shown and result.read_bytes() == whole
        assert all(map(torch.equal, _tensors(again), _tensors(made)))
        (folder / "models" / "law.safetensors").write_bytes(whole[:500])
        assert "is damaged: delete it" in complaint(_run, steps=1, warm_start_steps=0)


def test_a_folder_that_is_deleted_during_the_transfer_is_named() -> None:
    with _folders() as folder:
        run_folder = folder / "output" / "linvideo" / "law"

        def delete(value: int) -> bool:
            if value > 40:
                shutil.rmtree(run_folder, ignore_errors=True)
            return False

        _demo()
        with _seen(delete):
            message = complaint(_run)
        assert "law is gone" in message.replace("/training", "") and "Errno" not in message
        assert not comfy.model_management.in_training


def test_videos_that_no_memory_holds_are_refused_with_numbers() -> None:
    with _folders() as folder:
        model = _make_wan(folder, torch.float32)
        sizes = {"width": 16384, "height": 16384, "frames": 16384}
        message = complaint(run, model, _wan_inputs(**sizes))
        assert "GB" in message and "tokens fit" in message and "lower width" in message
        assert not (folder / "output").exists()
