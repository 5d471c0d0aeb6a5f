"""Where a command computes and how precisely: `auto` decides once, here; the command says it."""

from typing import Any

from .config import option
from .errors import SettingError, shown_value


def device_option() -> Any:
    """Declare the config field `device`."""
    return option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")


def precision_option() -> Any:
    """Declare the config field `precision`."""
    text = "of the matrix products; auto: bf16 on cuda, fp32 elsewhere"
    return option("auto", text, choices=("auto", "fp32", "bf16"))


def resolve_device(name: str) -> str:
    """Return the device that "auto" stands for; refuse one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError("it is not a device that computes")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        found = ", ".join(["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))])
        raise SettingError(
            f"{{device}} {shown_value(name)} given, which PyTorch cannot use here; it has {found}: "
            "give one of these, or auto",
            "device",
        ) from error
    return name


def is_same_kind(one: str, other: str) -> bool:
    """Say whether two names may stand for devices of a kind, whichever of several: cuda or cpu."""
    kinds = {name.partition(":")[0] for name in (one, other)}
    return len(kinds - {"auto"}) < 2


def count_device_bytes(device: str) -> int | None:
    """Return the memory of a GPU in bytes; None for what is no GPU."""
    import torch

    if not device.startswith("cuda"):
        return None
    return torch.cuda.get_device_properties(device).total_memory


def resolve_precision(name: str, device: str) -> str:
    """Return the precision that "auto" stands for on a device."""
    if name != "auto":
        return name
    return "bf16" if device.startswith("cuda") else "fp32"
