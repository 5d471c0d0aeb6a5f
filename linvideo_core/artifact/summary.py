"""What an artifact says of itself, in words for a reader."""

from collections.abc import Iterable

from torch import Tensor

from .header import Artifact, ArtifactHeader
from .usage import Usage

_MAX_TEXT, _MAX_ORIGIN = 400, 80


def headline(header: ArtifactHeader) -> str:
    """Say how many of the model's layers are linear."""
    count, total = len(header.layers), header.num_layers
    return f"{count} of {total} layers {'is' if count == 1 else 'are'} linear"


def describe(artifact: Artifact) -> dict[str, str]:
    """Return what a reader wants to know of an artifact: name -> printable text, in order."""
    header = artifact.header
    facts = {
        "model": header.fingerprint,
        "weights": header.weights_digest,
        "linear layers": ", ".join(map(str, header.layers)),
        "trained": f"{header.objective}, {_count(header.steps, 'step')}",
        "feature maps": _describe_maps(header),
        "weight changes": _describe_changes(artifact),
        "size": ", ".join(f"{name} {show_bytes(n)}" for name, n in count_bytes(artifact).items()),
        "video": describe_size(header.usage),
        "sampling": _describe_sampling(header),
    }
    made = (f"{name} {value}" for name, value in header.provenance.items())
    facts["made with"] = ", ".join(_printable(text, _MAX_ORIGIN) for text in made) or "not said"
    return {name: _printable(text, _MAX_TEXT) for name, text in facts.items()}


def describe_size(usage: Usage) -> str:
    """Say at which size of video a file was made."""
    frames = f"{usage.num_frames} frames" if usage.num_frames else ""
    size = f"{usage.width} x {usage.height}" if usage.width and usage.height else ""
    return ", ".join(part for part in (size, frames) if part) or "not said"


def count_bytes(artifact: Artifact) -> dict[str, int]:
    """Return the bytes of an artifact's tensors: linear layers' own, and weight changes.

    Gates and windows count as feature maps. As the tensors are in memory: of a loaded file, its
    tensors' bytes on disk.
    """
    low_rank = (factor for pair in artifact.low_rank.values() for factor in pair)
    maps = (x for layer in artifact.feature_maps for x in artifact.linear_tensors(layer).values())
    return {
        "feature maps": _sum_bytes(maps),
        "weight changes": _sum_bytes([*artifact.deltas.values(), *low_rank]),
    }


def show_bytes(count: int) -> str:
    """Show a number of bytes in the largest unit that leaves a whole figure."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _describe_sampling(header: ArtifactHeader) -> str:
    """Say what a file is bound to, then what it was made at."""
    bound, usage = "any number of steps", header.usage
    if header.sigmas:
        grid = ", ".join(f"{sigma:.4g}" for sigma in header.sigmas)
        bound = f"{_count(len(header.sigmas) - 1, 'step')}: sigmas {grid}"
    steps = "" if header.sigmas or usage.steps is None else _count(usage.steps, "step")
    made = [" of ".join(part for part in (steps, usage.sampler) if part)]
    if usage.guidance_scale is not None:
        made.append(f"guidance {usage.guidance_scale:g}")
    if usage.shift is not None:
        made.append(f"shift {usage.shift:g}")
    if usage.sigma_from is not None:
        made.append(f"noise levels from {usage.sigma_from:g} to {usage.sigma_to:g}")
    said = ", ".join(part for part in made if part)
    return f"{bound}; made at {said}" if said else bound


def _describe_maps(header: ArtifactHeader) -> str:
    parts = [header.feature_map, f"{header.feature_dim} features a head"]
    if header.map_sharing == "shared":
        parts.append("one map for all heads")
    if header.output_gate:
        parts.append("an output gate")
    if header.window:
        parts.append(f"a local softmax over {_count(header.window, 'token')}")
    return ", ".join(parts)


def _describe_changes(artifact: Artifact) -> str:
    parts = []
    if artifact.low_rank:
        weights = _count(len(artifact.low_rank), "weight")
        parts.append(f"LoRA of rank {artifact.header.lora_rank} on {weights}")
    if artifact.deltas:
        parts.append(f"{_count(len(artifact.deltas), 'weight')} changed as a whole")
    return ", ".join(parts) or "none"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _sum_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _printable(text: str, max_length: int) -> str:
    """Make one line of a text, whatever it holds, and cut it to a length that can be read."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= max_length else line[: max_length - 1] + "…"
