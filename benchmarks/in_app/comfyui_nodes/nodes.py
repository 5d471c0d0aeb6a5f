"""Random prompts, latents that are kept, and checkpoints that only ComfyUI can write."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import safetensors.torch
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy_api.latest import ComfyExtension, io
from server import PromptServer
from torch import Tensor, nn

_ROTATION_BASE = 10_000.0


def _folder() -> Path:
    folder = Path(folder_paths.get_output_directory()) / "benchmark"
    folder.mkdir(exist_ok=True)
    return folder


def _model_path(file: str) -> Path:
    return Path(folder_paths.models_dir) / "diffusion_models" / file


def _schema(name: str, inputs: list[Any], outputs: Sequence[Any] = ()) -> io.Schema:
    """Return a node's schema; one without outputs is run for what it writes."""
    return io.Schema(
        node_id=f"LinVideoBenchmark{name}",
        category="LinVideo benchmark",
        inputs=inputs,
        outputs=list(outputs),
        is_output_node=not outputs,
    )


class Conditioning(io.ComfyNode):
    """seed, tokens, width -> a prompt of random numbers; another `again` makes the same again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        numbers = [io.Int.Input(name) for name in ("seed", "tokens", "width", "again")]
        return _schema("Conditioning", numbers, [io.Conditioning.Output()])

    @classmethod
    def execute(cls, seed: int, tokens: int, width: int, again: int) -> io.NodeOutput:
        """Draw the prompt [1, tokens, width]."""
        generator = torch.Generator().manual_seed(seed)
        return io.NodeOutput([[torch.randn(1, tokens, width, generator=generator), {}]])


class Latent(io.ComfyNode):
    """LATENT -> a file, one tensor for each of its streams."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _schema("Latent", [io.Latent.Input("latent"), io.String.Input("tag")])

    @classmethod
    def execute(cls, latent: dict[str, Any], tag: str) -> io.NodeOutput:
        """Write the latents as they are."""
        samples = latent["samples"]
        streams = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
        tensors = {str(i): stream.cpu().contiguous() for i, stream in enumerate(streams)}
        safetensors.torch.save_file(tensors, _folder() / f"{tag}.safetensors")
        keep_peaks()
        return io.NodeOutput()


class Quantised(io.ComfyNode):
    """A Wan checkpoint -> the same in one of ComfyUI's own quantised forms."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _schema("Quantised", [io.String.Input(name) for name in ("source", "file", "form")])

    @classmethod
    def execute(cls, source: str, file: str, form: str) -> io.NodeOutput:
        """Write the file; every matrix of the blocks is quantised where ComfyUI computes."""
        if form not in QUANT_ALGOS:
            raise ValueError(f"this ComfyUI has no {form}, but only {', '.join(QUANT_ALGOS)}")
        layout, device = QUANT_ALGOS[form]["comfy_tensor_layout"], _device()
        told = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
        tensors = safetensors.torch.load_file(_model_path(source))
        for name in [n for n, x in tensors.items() if n.startswith("blocks.") and x.ndim == 2]:
            stem = name.removesuffix("weight")
            made = QuantizedTensor.from_float(tensors.pop(name).to(device), layout)
            parts = made.state_dict("weight")
            tensors |= {stem + part: x.cpu().contiguous() for part, x in parts.items()}
            tensors[f"{stem}comfy_quant"] = told.clone()
        safetensors.torch.save_file(tensors, _model_path(file))
        return io.NodeOutput()


class MiniMaxH3(io.ComfyNode):
    """The sizes of a MiniMax-H3 as JSON -> a checkpoint of random weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _schema("MiniMaxH3", [io.String.Input("file"), io.String.Input("sizes")])

    @classmethod
    def execute(cls, file: str, sizes: str) -> io.NodeOutput:
        """Write the file in bf16, and in fp32 what ComfyUI keeps in it."""
        from comfy.ldm.minimax.model import MiniMaxH3Model

        settings = {"dtype": torch.bfloat16, "device": "meta", "operations": nn}
        shapes = MiniMaxH3Model(**json.loads(sizes), **settings).state_dict()
        tensors = {name: _draw(name, x).cpu() for name, x in shapes.items()}
        safetensors.torch.save_file(tensors, _model_path(file))
        return io.NodeOutput()


def _draw(name: str, like: Tensor) -> Tensor:
    """Return random numbers that keep the scale of what they multiply; norms are 1."""
    if name == "rope.inv_freq":
        return _ROTATION_BASE ** -(torch.arange(len(like)) / len(like))
    drawn = torch.empty(like.shape, dtype=like.dtype, device=_device())
    if like.ndim > 1:
        return drawn.normal_(std=like[0].numel() ** -0.5)
    return drawn.fill_(1.0) if name.endswith("weight") else drawn.normal_(std=0.02)


def _device() -> torch.device:
    return comfy.model_management.get_torch_device()


def keep_peaks() -> None:
    """Write down the most that PyTorch has given out and held since this was last asked."""
    device = _device()
    if device.type != "cuda":
        return
    peaks = {
        "allocated_gb": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 2**30,
    }
    (_folder() / "peaks.json").write_text(json.dumps(peaks), encoding="utf-8")
    torch.cuda.reset_peak_memory_stats(device)


def keep_words(server: PromptServer) -> None:
    """Write down what nodes say under themselves, beside the kept latents."""
    send: Callable[..., None] = server.send_progress_text

    def send_and_keep(text: str, *args: Any, **kwargs: Any) -> None:
        said = text if isinstance(text, str) else bytes(text).decode(errors="replace")
        with (_folder() / "words.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"words": said}) + "\n")
        send(text, *args, **kwargs)

    server.send_progress_text = send_and_keep


class Benchmarks(ComfyExtension):
    """The nodes, by ComfyUI's way of asking for them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes, and begin to listen."""
        keep_words(PromptServer.instance)
        return [Conditioning, Latent, Quantised, MiniMaxH3]
