"""What a node says: is this the file's model, and is it sampled as the file was made."""

import dataclasses
import functools
import re
import types
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from linvideo_pack.linvideo_core import artifact
from linvideo_pack.linvideo_core.artifact import Artifact, Usage
from linvideo_pack.nodes import demo as demo_nodes
from linvideo_pack.nodes import model_folder
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.injection import KEY
from linvideo_pack.nodes.patching.weights import compare_base, describe_base
from server import PromptServer
from stage import (
    GUIDANCE,
    SHIFT,
    collect_warnings,
    complaint,
    demo,
    finetuned,
    make_noise,
    sample,
    shipped,
    with_lora,
)
from test_quantised import ForeignLinear
from torch import nn

_MADE_AT = {
    "width": 32,
    "height": 32,
    "num_frames": 12,
    "guidance_scale": GUIDANCE,
    "shift": SHIFT,
    "steps": 8,
    "sampler": "euler",
}
_AS_MADE = ["Sampled as the file was made."]


@functools.cache
def _file(**changes: Any) -> Artifact:
    """Return the shipped file, saying that it was made from the demo and as that is sampled."""
    base = describe_base(demo()[0])
    header = dataclasses.replace(
        shipped().header,
        weights_digest=base.digest,
        weights_sketch=base.sketch,
        usage=Usage(**{**_MADE_AT, **changes}),
    )
    return dataclasses.replace(shipped(), header=header)


def _said(model: Any) -> list[str]:
    return model.get_attachment(KEY).text.splitlines()


def _said_of_sampling(model: Any, **settings: Any) -> list[str]:
    """Sample, and return what the node says of that."""
    sample(model, **settings)
    return [line for line in _said(model) if line.startswith("Sampled")]


def test_the_file_is_told_its_own_weights_loaded_or_not() -> None:
    changed = with_lora(demo_nodes.load_demo_model())
    for model in (demo()[0], changed):
        assert compare_base(_file().header, model).kind == "same"
    comfy.model_management.load_models_gpu([changed])
    assert changed.backup
    match = compare_base(_file().header, changed)
    assert (match.kind, match.distance) == ("same", 0.0)


def test_without_a_sketch_the_digest_is_compared() -> None:
    """The files that were made before there were sketches, such as the shipped ones once."""
    header = dataclasses.replace(_file().header, weights_sketch=())
    assert compare_base(header, demo()[0]).kind == "same"
    header = dataclasses.replace(header, weights_digest="0" * 16)
    assert compare_base(header, demo()[0]).kind == "other"


def test_another_finetune_or_expert_is_said_on_the_node_and_still_applied() -> None:
    other, slight = finetuned(0.3), finetuned(0.03)
    with collect_warnings() as warnings:
        linearized = linearize(other, _file())
        assert re.search("about (2[6-9]|3[0-4]) % off", _said(linearized)[1]), _said(linearized)
        assert "the other one of two experts" in _said(linearized)[1]
    assert len(warnings) == 1 and f"{warnings[0]}.".endswith(_said(linearized)[1][1:])
    with collect_warnings() as warnings:
        assert "slight finetune" in _said(linearize(slight, _file()))[1]
    assert not warnings, warnings
    assert sample(linearized).isfinite().all()


def test_weights_that_cannot_be_read_are_said_to_be_unknown_and_the_file_is_applied() -> None:
    model = demo_nodes.load_demo_model()
    attention = model.model.diffusion_model.blocks[0].self_attn
    attention.q = ForeignLinear(attention.q)
    assert "not known" in complaint(ValueError, describe_base, model)
    with collect_warnings() as warnings:
        linearized = linearize(model, _file())
    assert "cannot be compared" in _said(linearized)[1] and not warnings
    assert sample(linearized).isfinite().all()
    attention.q.weight = nn.Parameter(torch.empty(128, 128, device="meta"), requires_grad=False)
    assert compare_base(_file().header, model).kind == "unknown"


def test_a_file_that_does_not_say_is_not_compared() -> None:
    header = dataclasses.replace(_file().header, usage=Usage())
    linearized = linearize(demo()[0], dataclasses.replace(_file(), header=header))
    assert _said_of_sampling(linearized, cfg=7.0) == []


def test_another_size_guidance_or_shift_is_said_when_it_is_sampled() -> None:
    linearized = linearize(demo()[0], _file())
    # A node after ours decides the shift.
    shifted = ModelSamplingSD3().patch(linearized, 8.0)[0]
    for model, settings, said in (
        (linearized, {}, "as the file was made"),
        (
            linearized,
            {"noise": make_noise(frames=4)},
            "32 x 32, 16 frames, but the file was made at 32 x 32, 12 frames",
        ),
        (linearized, {"cfg": 5.0}, "cfg 5, but the file was made at 3"),
        (linearized, {"cfg": 1.0}, "no guidance (cfg 1), but the file was made at cfg 3"),
        (shifted, {}, "shift 8, but the file was made at 3"),
        (linearized, {}, "as the file was made"),
    ):
        (found,) = _said_of_sampling(model, **settings)
        assert found.replace(":", "") == f"Sampled {said}.", found


def test_a_guider_without_negative_prompt_guides_nothing() -> None:
    _, positive, negative, _ = demo()
    linearized = linearize(demo()[0], _file())
    basic = Guider_Basic(linearized)
    basic.set_conds(positive)
    assert "no guidance" in _said_with(basic)[-1]
    two = Guider_DualCFG(linearized)
    two.set_conds(positive, positive, negative)
    two.set_cfg(5.0, 5.0)
    assert _said_with(two)[-1] == _AS_MADE[0]


def _said_with(guider: Any) -> list[str]:
    noise = make_noise()
    sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)
    return _said(guider.model_patcher)


def test_a_distilled_file_is_sampled_at_its_levels_with_its_sampler_unguided() -> None:
    made = artifact.load(model_folder.find_file(model_folder.SHIPPED_FEW_STEP))
    usage = Usage(**{**_MADE_AT, "guidance_scale": 1.0, "steps": 4, "sampler": "lcm"})
    header = dataclasses.replace(made.header, usage=usage)
    linearized = linearize(demo()[0], dataclasses.replace(made, header=header))
    own = {"steps": 4, "cfg": 1.0, "sampler": "lcm", "sigmas": torch.tensor(header.sigmas)}
    assert _said_of_sampling(linearized, **own) == _AS_MADE
    assert _said_of_sampling(linearized, **own, last_step=2, force_full_denoise=False) == _AS_MADE
    said = "\n".join(_said_of_sampling(linearized, steps=20))
    assert "the 4 steps that the file was distilled for" in said
    assert "sampler euler" in said and "set cfg to 1" in said


def test_steps_that_the_file_was_not_made_for_are_said() -> None:
    high = linearize(demo()[0], _file(sigma_from=1.0, sigma_to=0.875, steps=12))
    assert _said_of_sampling(high, steps=12, last_step=3) == _AS_MADE
    (said,) = _said_of_sampling(high, steps=12)
    assert said.startswith("Sampled: 7 of 12 steps at noise levels that the file was not made")
    many = linearize(demo()[0], _file(steps=50))
    (said,) = _said_of_sampling(many, steps=4)
    assert said.startswith("Sampled: 4 steps, but the file was made in 50")
    assert _said_of_sampling(many, steps=20) == _AS_MADE


def test_kept_steps_are_said_to_be_slow() -> None:
    linearized = linearize(demo()[0], _file(), keep_first_steps=2)
    # On a GPU another line says which kernel computes the linear layers.
    assert "The first 2 steps of each sampling run the model" in "\n".join(_said(linearized))
    sample(linearized, steps=2)
    assert "every step as the model came in" in "\n".join(_said(linearized))


def test_what_one_run_of_a_graph_samples_is_shown_together() -> None:
    linearized = linearize(demo()[0], _file())
    with CurrentNodeContext("first run", "sampler"):
        sample(linearized)
        sample(linearized, cfg=5.0)
        sample(linearized, cfg=6.0)
        sample(linearized)
    said = [line[:14] for line in _said(linearized) if line.startswith("Sampled")]
    assert said == ["Sampled: cfg 5", "Sampled: cfg 6"]
    with CurrentNodeContext("second run", "sampler"):
        sample(linearized)
    assert _said(linearized)[-1:] == _AS_MADE


def test_the_node_is_told_while_it_is_sampled_even_through_clones() -> None:
    shown: list[tuple[str, str, str]] = []
    server = types.SimpleNamespace(
        client_id="browser", send_progress_text=lambda *message: shown.append(message)
    )
    linearized = linearize(demo()[0], _file(), node_id="7").clone()
    before = getattr(PromptServer, "instance", None)
    PromptServer.instance = server
    try:
        sample(linearized, cfg=5.0)
    finally:
        PromptServer.instance = before
    # When the sampling begins, and when its layers have been measured.
    (before, *begun), (after, *ended) = shown
    assert begun == ended == ["7", "browser"]
    assert "cfg 5" in before and "linear layer takes" not in before
    assert after.splitlines() == _said(linearized) and "linear layer takes" in after
