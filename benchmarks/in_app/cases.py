"""What is measured: each case is a row of the record, on its own."""

import dataclasses
from typing import Any

from linvideo_core.models.config import NO_TILE
from linvideo_core.run.errors import SettingError

from ..models.sizes import SIZES, Size

SMALL_CARD_GB = 23.5
"""What is free on a card of 24 GB that shows no picture."""

_LONG, _SHORT = 81, 33
_TINY = "tiny"

_H3_TINY = {
    "hidden_size": 192,
    "num_layers": 3,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 3,
    "ffn_hidden_size": 64,
    "text_dim": 40,
    "timestep_input_dim": 16,
    "time_embed_hidden_size": 24,
    "time_embed_dim": 24,
}
_H3_WIDE = {"num_layers": 4, "token_refiner_num_layers": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A row: what is run, on which model, how long, in a server of which flags.

    kind: which function measures it. free_gb: memory that the card has left; None: all.
    is_base_checked: whether the model is sampled before and after, to see that it comes back.
    sampling_steps: of the samplings that are timed, of the model and of its student; 0: none.
    tile: of the layers that a transfer makes hybrid; "": as it finds one by itself; none: they are
        linear.
    sizes: of a MiniMax-H3, by the names of its class.
    """

    name: str
    kind: str
    model: str
    dtype: str
    frames: int
    size: str = _TINY
    flags: tuple[str, ...] = ()
    free_gb: float | None = None
    steps: int = 4
    is_base_checked: bool = True
    sampling_steps: int = 0
    tile: str = ""
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def video(self) -> Size:
        """The published model and the video that it is used for."""
        return SIZES[self.size]

    @property
    def needs_gpu(self) -> bool:
        """Say whether it has no meaning on a CPU."""
        return bool(self.flags) or self.free_gb is not None

    def columns(self) -> dict[str, Any]:
        """Return the row's own columns."""
        free = () if self.free_gb is None else (f"{self.free_gb:g} GB free",)
        return {
            "what": self.name,
            "model": self.model,
            "dtype": self.dtype,
            "frames": self.frames,
            "where": "headless" if self.kind == "headless" else "comfyui",
            "flags": " ".join((*self.flags, *free)),
            "tile": None,
        }

    def on_cpu(self) -> "Case":
        """Return the same with a model and a video of next to no size."""
        tiny = dataclasses.replace(self, sizes=_H3_TINY if self.sizes else {}, size=_TINY)
        if self.kind == "demo":
            return tiny
        if self.kind == "minimax_h3":
            return dataclasses.replace(tiny, model="tiny MiniMax-H3", frames=22)
        video = tiny.video
        tile = self.tile if self.tile in ("", NO_TILE) else video.tiles[-1]
        return dataclasses.replace(tiny, model=video.model, frames=video.num_frames, tile=tile)


def _wan(name: str, dtype: str, frames: int, *, kind: str = "transfer", **others: Any) -> Case:
    kwargs = {"model": "Wan 1.3B", "size": "1.3b-480p", **others}
    return Case(name=name, kind=kind, dtype=dtype, frames=frames, **kwargs)


def _wan14(name: str, frames: int, **others: Any) -> Case:
    return _wan(name, "fp8_scaled", frames, model="Wan 14B", size="14b-480p", **others)


def _h3(name: str, model: str, frames: int, sizes: dict[str, int], **others: Any) -> Case:
    kwargs = {"model": f"MiniMax-H3, {model}", "frames": frames, "sizes": sizes, **others}
    return Case(name=name, kind="minimax_h3", dtype="bf16", **kwargs)


_CASES = [
    Case(name="demo", kind="demo", model="embedded", dtype="fp16", frames=28),
    _wan("1.3b-bf16", "bf16", _LONG, steps=8, sampling_steps=10),
    _wan("1.3b-linear", "bf16", _LONG, steps=8, sampling_steps=10, tile=NO_TILE),
    _wan(
        "1.3b-hybrid", "bf16", _LONG, steps=8, sampling_steps=10, tile=SIZES["1.3b-480p"].tiles[-1]
    ),
    _wan("1.3b-interrupt", "bf16", _SHORT, kind="interrupt", steps=6),
    *(
        _wan(f"1.3b-{dtype}", dtype, _SHORT)
        for dtype in ("fp8", "int8", "nvfp4", "fp16", "fp8_scaled", "gguf")
    ),
    _h3("h3-small", "random, small", 22, _H3_TINY),
    _h3("h3-wide", "4 of 50 layers", 124, _H3_WIDE, steps=2),
    _wan14("14b-81", _LONG, steps=2, is_base_checked=False),
    _wan14("14b-33", _SHORT, sampling_steps=4),
    _wan14("14b-33-24gb", _SHORT, steps=2, is_base_checked=False, free_gb=SMALL_CARD_GB),
    _wan("1.3b-headless", "bf16", _LONG, kind="headless", steps=8),
    *(_wan(f"1.3b-{flag}", "bf16", _SHORT, flags=(f"--{flag}",)) for flag in ("lowvram", "novram")),
]
# Those that share a server or a checkpoint stand beside each other.
CASES = {case.name: case for case in _CASES}


def choose(names: str) -> list[Case]:
    """Return the cases of a list such as "demo,14b-81", all of them for "".

    Raises SettingError for a name that none has.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if strangers := [name for name in wanted if name not in CASES]:
        raise SettingError(
            f"{{rows}} {strangers[0]} given; one of {', '.join(CASES)} is needed", "rows"
        )
    return [CASES[name] for name in wanted or CASES]
