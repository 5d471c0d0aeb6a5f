"""A random Wan as ComfyUI makes and samples it, linearized by the pack: what `benchmark` measures.

`comfyui_process` loads it. All times are taken inside ComfyUI's own sampling: the model is loaded,
the pack's hook is in place, and patches and wrappers are as they are for a user.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from linvideo_pack.nodes.patching.apply import linearize
from linvideo_pack.nodes.patching.attention_override import override_self_attention
from linvideo_pack.nodes.patching.injection import KEY
from torch import Tensor

from linvideo_core.artifact import Artifact, ArtifactHeader
from linvideo_core.models import attention_sites
from linvideo_core.models.base_weights import weights_digest
from linvideo_core.models.families import identify
from linvideo_core.models.wan import WanModel

from ..kernels.baselines import Contender
from .agreement import check_kernels, check_subject, shrink
from .comfyui import PROGRESS, read_version
from .measuring import Patience, free_memory, measure_subject
from .random_weights import count_bytes, draw_inputs, fill_random, make_random_maps
from .sizes import GUIDANCE_SCALE, SIZES, VIDEO_STEPS, Size
from .teachers import SIGMA, Call, Setting, T
from .variants import Variant, find_softmax, plan_variants


def run(job: Mapping[str, Any]) -> None:
    """Check agreement, then measure a size; the job is what `benchmark` wrote."""
    size = SIZES[job["size"]]
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    setting = Setting(device, dtype, job["seed"])
    found, absent = find_softmax(job["softmax"], device.type)
    softmax, kernels, left_out = check_kernels(found, setting)
    with torch.inference_mode():  # as ComfyUI runs nodes
        models = check_subject(HostTeacher(shrink(size), softmax, setting), list(softmax), setting)
        free_memory()
        measure_subject(
            HostTeacher(size, softmax, setting),
            plan_variants(list(softmax), len(size.layers), compiled=False),
            Patience(**job["patience"]),
            device,
            Path(job["results"]),
            _tell,
            {
                **job["facts"],
                "agreement": [*kernels, *models],
                "absent": [*absent, *left_out],
            },
        )


def _tell(stage: str, done: int, total: int, **_: float) -> None:
    state = {"stage": stage, "done": done, "total": total}
    sys.stdout.write(f"{PROGRESS}{json.dumps(state)}\n")
    sys.stdout.flush()


class HostTeacher:
    """ComfyUI's own Wan with random weights, in a ModelPatcher."""

    def __init__(self, size: Size, softmax: Mapping[str, Contender], setting: Setting) -> None:
        self.size, self._softmax = size, softmax
        self.where = f"ComfyUI {read_version(Path.cwd())}"
        self._patcher = make_random_patcher(size, setting)
        self._artifact = make_random_artifact(self._patcher.model.diffusion_model, size, setting)
        self._latents, prompt, negative = draw_inputs(size, setting.device, setting.seed)
        self._positive, self._negative = ([[x.cpu(), {}]] for x in (prompt, negative))

    def with_call(self, variant: Variant, use: Callable[[Call], T]) -> T:
        """Hand a call, the velocity of the conditional branch, to `use`, within a sampling."""
        results = []

        def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, **_: Any) -> Tensor:
            sigma = sigmas[:1]
            # ComfyUI calls it denoised: x0 = x - sigma velocity.
            scale = 1 / SIGMA
            results.append(
                use(lambda: (self._latents - model(self._latents, sigma, **extra_args)) * scale)
            )
            return x

        noise = self._latents.cpu()
        comfy.sample.sample_custom(
            self._arranged(variant),
            noise,
            1.0,
            comfy.samplers.KSAMPLER(sample),
            torch.tensor([SIGMA, 0.0]),
            self._positive,
            self._negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        return results[0]

    def with_video(self, variant: Variant, use: Callable[[Call], T]) -> T:
        """Hand the sampling of a video, as KSampler does it, to `use`."""
        model, noise = self._arranged(variant), self._latents.cpu()
        settings = (VIDEO_STEPS, GUIDANCE_SCALE, "euler", "simple")
        conditions = (self._positive, self._negative, torch.zeros_like(noise))
        return use(
            lambda: comfy.sample.sample(
                model, noise, *settings, *conditions, disable_pbar=True, seed=0
            )
        )

    def weight_bytes(self, variant: Variant) -> int:
        """Return the bytes of the weights, feature maps included where layers are linear."""
        parts = self._arranged(variant).get_additional_models_with_key(KEY)
        return count_bytes([self._patcher.model, *(part.model for part in parts)])

    def describe(self) -> dict[str, Any]:
        """Return what the host computes with: its default attention, and its PyTorch."""
        return {"host_attention": optimized_attention.__name__, "host_torch": torch.__version__}

    def _arranged(self, variant: Variant) -> Any:
        model = self._patcher.clone()
        if variant.num_linear:
            model = linearize(model, self._artifact)
        if variant.kept != "default":
            attend = self._softmax[variant.kept].attend
            options = model.model_options.setdefault("transformer_options", {})
            options["optimized_attention_override"] = override_self_attention(attend)
        return model


def make_random_patcher(size: Size, setting: Setting) -> Any:
    """Return ComfyUI's model of a size, recognised from a checkpoint's shapes, made on the device.

    Its weights are those of our own model of the same seed.
    """
    with torch.device("meta"):
        shapes = WanModel(size.config).state_dict()
    config = comfy.model_detection.model_config_from_unet(shapes, "")
    config.set_inference_dtype(setting.dtype, None)
    model = config.get_model(shapes, "", device=setting.device)
    fill_random(model.diffusion_model.named_parameters(), setting.seed)
    patcher_class = getattr(
        comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher
    )
    # Its home is the card, so that nothing is moved away between variants.
    return patcher_class(model, load_device=setting.device, offload_device=setting.device)


def make_random_artifact(model: Any, size: Size, setting: Setting) -> Artifact:
    """Return a file of random feature maps for a size's linear layers, without weight changes."""
    family, sites = identify(attention_sites.shapes_of(model))
    chosen = [site for site in sites if site.layer in size.layers]
    maps = {}
    for site in chosen:
        shape = (site.layer, site.num_heads, site.head_dim)
        pair = make_random_maps(*shape, setting.device, setting.seed)
        maps[site.layer] = dict(zip(("query_map", "key_map"), (x.cpu() for x in pair), strict=True))
    header = ArtifactHeader(
        family=family.name,
        fingerprint=attention_sites.fingerprint(family, sites),
        weights_digest=weights_digest(model, sites),
        linear_layers=tuple(site.layer for site in chosen),
        site_names=tuple(site.name for site in chosen),
        num_layers=len(sites),
        feature_dim=chosen[0].head_dim,
        parameters="feature_maps",
        objective="none",
        steps=0,
    )
    return Artifact(header=header, linear=maps)
