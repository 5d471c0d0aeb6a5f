"""A LINVIDEO file in a diffusers pipeline computes what it computes in our own model."""

import copy
import dataclasses
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from linvideo_core import artifact
from linvideo_core.artifact import Artifact, ArtifactError
from linvideo_core.artifact.header import Usage
from linvideo_core.evaluate.card import CARD_NAME, write_card
from linvideo_core.flow import bind, sample_few_step
from linvideo_core.models.checkpoint import from_diffusers
from linvideo_core.models.wan import WanModel
from linvideo_core.pipelines import apply
from tests.conftest import LATENT_SHAPE, TEXT_DIM, make_wan

Inputs = tuple[Tensor, Tensor, Tensor]


def as_diffusers(wan: WanModel) -> WanTransformer3DModel:
    """Return diffusers' transformer with a model's weights."""
    model = WanTransformer3DModel(
        num_attention_heads=wan.config.num_heads,
        attention_head_dim=128,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        text_dim=TEXT_DIM,
        freq_dim=wan.config.freq_dim,
        ffn_dim=wan.config.ffn_dim,
        num_layers=wan.config.num_layers,
    )
    ours = wan.state_dict()
    model.load_state_dict({name: ours[from_diffusers(name)] for name in model.state_dict()})
    return model.eval().requires_grad_(False)


@pytest.fixture
def pipeline(wan: WanModel) -> SimpleNamespace:
    """What of a Wan 2.2 pipeline a file changes: its two transformers, alike here."""
    transformers = (as_diffusers(wan), as_diffusers(wan))
    return SimpleNamespace(**dict(zip(("transformer", "transformer_2"), transformers, strict=True)))


@pytest.fixture(params=["linearized"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The file of `linearized`, or of another fixture of that name."""
    path = tmp_path / "linearized.safetensors"
    artifact.save(request.getfixturevalue(request.param), path, dtype=torch.float32)
    return path


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    latents, timesteps, embeds = inputs
    with torch.no_grad():
        return model(latents, timesteps, embeds, return_dict=False)[0]


@pytest.mark.parametrize(
    ("path", "strength"),
    [("linearized", 1.0), ("linearized", 0.5), ("hybrid", 1.0)],
    indirect=["path"],
)
def test_a_pipeline_computes_what_our_model_does_and_is_given_back_bit_for_bit(
    wan: WanModel,
    pipeline: SimpleNamespace,
    path: Path,
    inputs: Inputs,
    strength: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformer = pipeline.transformer
    before, plain = copy.deepcopy(transformer.state_dict()), run(transformer, inputs)
    applied = apply(pipeline, path, strength=strength)
    # The weights are known again as those that the file was made from.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    found = run(transformer, inputs)
    with torch.no_grad(), artifact.apply(artifact.load(path), wan, strength=strength) as ours:
        expected = ours(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - plain).norm() > 0.01 * plain.norm()
    applied.close()
    after = transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(run(transformer, inputs), plain)


@pytest.mark.gpu
def test_on_a_gpu_in_bf16_a_pipeline_computes_what_our_model_does(
    wan: WanModel, pipeline: SimpleNamespace, path: Path, inputs: Inputs
) -> None:
    latents, timesteps, embeds = (x.cuda() for x in inputs)
    inputs = (latents.bfloat16(), timesteps, embeds.bfloat16())
    transformer = pipeline.transformer.to("cuda", torch.bfloat16)
    plain = run(transformer, inputs)
    with apply(pipeline, path):
        found = run(transformer, inputs)
    assert torch.equal(run(transformer, inputs), plain)
    ours = wan.to("cuda", torch.bfloat16)
    with torch.no_grad(), artifact.apply(artifact.load(path), ours):
        expected = ours(*inputs)
    # What bf16 rounds away in four layers; the file changes more than that.
    assert (found - expected).float().norm() < 0.02 * expected.float().norm()
    assert (found - plain).float().norm() > 0.05 * plain.float().norm()


def test_the_lines_in_a_distilled_files_card_sample_it_as_linvideo_does(
    wan: WanModel, linearized: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigmas = (1.0, 0.9, 0.6, 0.0)
    usage = Usage(width=32, height=32, num_frames=9)
    header = dataclasses.replace(linearized.header, sigmas=sigmas, usage=usage)
    made = dataclasses.replace(linearized, header=header)
    artifact.save(made, tmp_path / "distilled.safetensors", dtype=torch.float32)
    write_card(tmp_path, {tmp_path / "distilled.safetensors": made}, None)
    card = (tmp_path / CARD_NAME).read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    pipe = WanPipeline(None, None, None, None, transformer=as_diffusers(wan))
    noise, embeds = torch.randn(1, LATENT_SHAPE[0], 3, 4, 4), torch.randn(1, 5, TEXT_DIM)
    how = {"prompt_embeds": embeds, "latents": noise, "output_type": "latent"}
    names = {"pipe": pipe, "how": how}
    torch.manual_seed(1)
    exec(code.replace("pipe(prompt,", "pipe(**how,"), names)  # noqa: S102
    torch.manual_seed(1)
    with artifact.apply(made, wan):
        expected = sample_few_step(
            bind(wan, embeds), noise, torch.tensor(sigmas), generator=torch.default_generator
        )
    torch.testing.assert_close(names["video"].frames, expected, rtol=1e-4, atol=1e-5)


def test_a_file_stays_applied_where_the_result_is_dropped(
    pipeline: SimpleNamespace, path: Path, inputs: Inputs
) -> None:
    applied = apply(pipeline, path)
    found = run(pipeline.transformer, inputs)
    applied.close()
    apply(pipeline, path)
    gc.collect()
    assert torch.equal(run(pipeline.transformer, inputs), found)


def test_each_expert_gets_its_own_file(
    pipeline: SimpleNamespace, path: Path, inputs: Inputs, tmp_path: Path
) -> None:
    both = (pipeline.transformer, pipeline.transformer_2)
    plain = run(both[0], inputs)
    with apply(pipeline, path):
        first, second = (run(model, inputs) for model in both)
        assert not torch.equal(first, plain) and torch.equal(second, plain)
    with apply(pipeline, path, low_noise_path=path):
        assert all(torch.equal(run(model, inputs), first) for model in both)
    with pytest.raises(ArtifactError, match="does not exist"):
        apply(pipeline, path, low_noise_path=tmp_path / "none.safetensors")
    assert all(torch.equal(run(model, inputs), plain) for model in both)


@pytest.mark.parametrize("is_lora_first", [True, False])
def test_it_stacks_with_a_lora_of_diffusers(
    pipeline: SimpleNamespace, path: Path, inputs: Inputs, is_lora_first: bool
) -> None:
    transformer, twin = pipeline.transformer, pipeline.transformer_2
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with apply(SimpleNamespace(transformer=twin), path):
        linear = run(twin, inputs)
    if is_lora_first:
        transformer.add_adapter(lora)
    applied = apply(pipeline, path)
    if not is_lora_first:
        transformer.add_adapter(lora)
    both = run(transformer, inputs)
    transformer.disable_adapters()
    assert torch.equal(run(transformer, inputs), linear)
    assert (both - linear).norm() > 0.01 * linear.norm()
    applied.close()
    assert torch.equal(run(transformer, inputs), run(twin, inputs))


def test_an_applied_file_moves_with_the_pipeline(
    pipeline: SimpleNamespace, path: Path, inputs: Inputs
) -> None:
    with apply(pipeline, path):
        expected = run(pipeline.transformer, inputs)
        pipeline.transformer.to(torch.bfloat16)
        latents, timesteps, embeds = inputs
        found = run(pipeline.transformer, (latents.bfloat16(), timesteps, embeds.bfloat16()))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.fuse_qkv_projections(), "fused projections"),
        (lambda model: model.blocks[0].ffn.to(torch.float8_e4m3fn), "quantised"),
        (lambda model: model.blocks[0].to("meta"), "offloaded"),
    ],
)
def test_a_transformer_that_cannot_take_a_file_is_refused(
    change: Callable[[nn.Module], object], reason: str, pipeline: SimpleNamespace, path: Path
) -> None:
    change(pipeline.transformer)
    with pytest.raises(ArtifactError, match=reason):
        apply(pipeline, path)


def test_a_file_that_does_not_fit_is_refused(pipeline: SimpleNamespace, path: Path) -> None:
    with apply(pipeline, path), pytest.raises(ArtifactError, match="applied already"):
        apply(pipeline, path)
    pipeline.transformer_2 = None
    with pytest.raises(ArtifactError, match="no transformer_2"):
        apply(pipeline, path, low_noise_path=path)
    pipeline.transformer = as_diffusers(make_wan(num_layers=2))
    with pytest.raises(ArtifactError, match="made for"):
        apply(pipeline, path)
    pipeline.transformer = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match="no self-attention layers of a known family"):
        apply(pipeline, path)


def test_tokens_that_are_split_between_gpus_are_refused(
    pipeline: SimpleNamespace, path: Path, inputs: Inputs
) -> None:
    with apply(pipeline, path):
        pipeline.transformer.blocks[0].attn1.processor._parallel_config = object()
        with pytest.raises(ValueError, match="context parallelism"):
            run(pipeline.transformer, inputs)
