"""The headless Wan agrees with ComfyUI's own Wan: same file, same inputs, same velocity.

ComfyUI loads each checkpoint with its own loader in its own process; tensors travel as
safetensors files. One process answers all cases.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linvideo_core.demo import weights_path
from linvideo_core.models.checkpoint import load_wan
from linvideo_core.models.wan import WanConfig, WanModel

pytestmark = pytest.mark.host

TOLERANCE = 1e-5  # relative norm of the difference, in fp32
DEMO_MODEL = weights_path("model.safetensors")

TWO_HEADS = WanConfig(dim=256, num_heads=2, num_layers=4, ffn_dim=704)
DEMO_SHAPED = WanConfig(dim=128, num_heads=1, num_layers=10, ffn_dim=512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint and the shape of what is asked of it; without a config it is the demo's."""

    config: WanConfig | None
    latents_shape: tuple[int, int, int, int, int]
    num_prompt_tokens: int
    prefix: str = ""


CASES = {
    "two heads": Case(config=TWO_HEADS, latents_shape=(2, 16, 5, 10, 14), num_prompt_tokens=13),
    "two heads, sides that the patch does not divide": Case(
        config=TWO_HEADS, latents_shape=(1, 16, 3, 7, 9), num_prompt_tokens=63
    ),
    "two heads, names with ComfyUI's prefix": Case(
        config=TWO_HEADS,
        latents_shape=(1, 16, 2, 4, 6),
        num_prompt_tokens=8,
        prefix="model.diffusion_model.",
    ),
    "one head, ten layers": Case(
        config=DEMO_SHAPED, latents_shape=(2, 16, 7, 6, 10), num_prompt_tokens=8
    ),
    "one head, one token": Case(
        config=DEMO_SHAPED, latents_shape=(3, 16, 1, 2, 2), num_prompt_tokens=1
    ),
    "the shipped demo": Case(config=None, latents_shape=(2, 16, 7, 16, 16), num_prompt_tokens=8),
}


def run_in_comfyui(folder: str) -> None:
    """Answer every case in the folder; runs in ComfyUI's process, which knows only ComfyUI."""
    import json
    from pathlib import Path

    import comfy.model_management
    import comfy.sd
    import torch
    from safetensors.torch import load_file, save_file

    # As in the laws: a convolution's products have only 11 bits in TF32.
    torch.backends.cudnn.allow_tf32 = False
    device = comfy.model_management.get_torch_device()
    for inputs_path in sorted(Path(folder).glob("*/inputs.safetensors")):
        inputs = {name: tensor.to(device) for name, tensor in load_file(inputs_path).items()}
        checkpoint = Path(json.loads((inputs_path.parent / "case.json").read_text())["checkpoint"])
        num_tensors = len(load_file(checkpoint))
        patcher = comfy.sd.load_diffusion_model(
            str(checkpoint), model_options={"dtype": torch.float32}
        )
        model = patcher.model
        assert type(model.diffusion_model).__module__ == "comfy.ldm.wan.model"
        assert type(model.diffusion_model).__name__ == "WanModel"
        assert len(model.diffusion_model.state_dict()) == num_tensors
        latents, sigmas = inputs["latents"], inputs["sigmas"]
        comfy.model_management.load_models_gpu([patcher])
        with torch.no_grad():
            velocity = model.diffusion_model(
                latents, 1000 * sigmas, context=inputs["prompt_embeds"]
            )
            answers = {"velocity": velocity.cpu().contiguous()}
            if velocity.shape == latents.shape:
                x0 = model.apply_model(latents, sigmas, c_crossattn=inputs["prompt_embeds"])
                answers["x0"] = x0.cpu().contiguous()
        save_file(answers, inputs_path.parent / "answers.safetensors")


def tell_where_nodes_come_from() -> None:
    """Print the file of the module `nodes`, without importing it."""
    import importlib.util

    print(importlib.util.find_spec("nodes").origin)


def randomize(model: WanModel, *, seed: int) -> None:
    """Give every parameter, norms and modulations included, a value that the output depends on."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("modulation"):
            values = 0.3 * values
        elif parameter.ndim == 1:
            values = 0.2 * values + float("norm" in name and name.endswith("weight"))
        else:
            values = values / parameter[0].numel() ** 0.5
        parameter.data.copy_(values)


def write_case(folder: Path, case: Case, *, seed: int) -> None:
    """Write the case's checkpoint and inputs into its folder, and where the checkpoint lies."""
    folder.mkdir()
    checkpoint = DEMO_MODEL
    config = case.config
    if config is None:
        config = load_wan(checkpoint).config
    else:
        checkpoint = folder / "model.safetensors"
        model = WanModel(config)
        randomize(model, seed=seed)
        save_file({case.prefix + k: v for k, v in model.state_dict().items()}, checkpoint)
    generator = torch.Generator().manual_seed(seed + 1)
    batch = case.latents_shape[0]
    prompt_shape = (batch, case.num_prompt_tokens, config.text_dim)
    inputs = {
        "latents": torch.randn(case.latents_shape, generator=generator),
        "sigmas": torch.linspace(0.7317, 0.0413, batch),
        "prompt_embeds": torch.randn(prompt_shape, generator=generator),
    }
    save_file(inputs, folder / "inputs.safetensors")
    (folder / "case.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))


@pytest.fixture(scope="module")
def folders(host: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case's folder: checkpoint, inputs and ComfyUI's answers."""
    root = tmp_path_factory.mktemp("agreement")
    folders = {}
    for seed, (name, case) in enumerate(CASES.items()):
        if case.config is None and not DEMO_MODEL.is_file():
            continue
        folders[name] = root / str(seed)
        write_case(folders[name], case, seed=seed)
    host.call(run_in_comfyui, str(root))
    return folders


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm of ComfyUI's tensor."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", CASES)
def test_wan_agrees_with_comfyui(name: str, folders: dict[str, Path]) -> None:
    if name not in folders:
        pytest.skip(f"the demo's model file {DEMO_MODEL.name} is not there yet")
    folder = folders[name]
    checkpoint = json.loads((folder / "case.json").read_text())["checkpoint"]
    inputs = load_file(folder / "inputs.safetensors")
    theirs = load_file(folder / "answers.safetensors")
    model = load_wan(checkpoint, device="cpu")
    latents, sigmas = inputs["latents"], inputs["sigmas"]

    with torch.no_grad():
        velocity = model(latents, 1000 * sigmas, inputs["prompt_embeds"])

    assert velocity.shape == theirs["velocity"].shape
    # Agreement on a vanishing or exploding output would say nothing.
    assert 0.05 < float(theirs["velocity"].std()) < 20
    difference = relative_difference(velocity, theirs["velocity"])
    print(f"{name}: relative difference {difference:.2e}")
    assert difference <= TOLERANCE
    if "x0" in theirs:
        x0 = latents - sigmas.view(-1, 1, 1, 1, 1) * velocity
        assert relative_difference(x0, theirs["x0"]) <= TOLERANCE


def test_comfyui_sees_its_own_nodes(host: Any) -> None:
    assert Path(host.call(tell_where_nodes_come_from).splitlines()[-1]) == host.root / "nodes.py"
