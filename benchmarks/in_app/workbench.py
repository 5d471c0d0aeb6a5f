"""What cases share: the server that runs, the checkpoints that are written, memory to compare."""

import contextlib
import time
from pathlib import Path

import torch

from ..models.sizes import Size
from . import checkpoints
from .comfyui_server import CPU_FLAGS, Installation, Server, run_server
from .memory_meter import resident, smaller_card, used_on_gpu

QUANTISED = {"int8": "int8_tensorwise", "nvfp4": "nvfp4"}
"""ComfyUI's name of a quantised form."""

_LOADED_AS = {"fp8": ("bf16", "fp8_e4m3fn")}


class UnavailableError(Exception):
    """Why a case cannot be measured on this machine."""


class Workbench:
    """A folder with a server's models and results, and the server, started when it is needed.

    One runs at a time, until a case needs other flags or another size of card.
    deadline: in `time.monotonic` seconds, of the case at work.
    """

    def __init__(self, installation: Installation, out: Path, device: str) -> None:
        self.installation, self.out, self.device = installation, out, device
        self.folder = out / "comfyui"
        self.deadline = time.monotonic()
        self._running = contextlib.ExitStack()
        self._server: Server | None = None
        self._kind: tuple[tuple[str, ...], float | None] | None = None
        self._before = 0
        self._num_servers = 0

    @property
    def models(self) -> Path:
        """Return where the server looks for diffusion models."""
        return self.folder / "models" / "diffusion_models"

    def server(self, flags: tuple[str, ...] = (), free_gb: float | None = None) -> Server:
        """Return a running server of these flags on a card with so much memory left."""
        kind = (flags, free_gb)
        if self._server is None or not self._server.is_alive or self._kind != kind:
            self.stop()
            self._running.enter_context(smaller_card(free_gb))
            self.begin_memory()
            own = CPU_FLAGS if self.device == "cpu" else ()
            self._num_servers += 1
            log = self.out / f"server-{self._num_servers}.log"
            starting = run_server(self.installation, self.folder, log, (*own, *flags))
            self._server, self._kind = self._running.enter_context(starting), kind
        return self._server

    def stop(self) -> None:
        """Stop the server, if one runs."""
        self._server = None
        self._running.close()

    def tidy(self) -> None:
        """Let the server forget the case that has ended, well or not."""
        if self._server is None:
            return
        try:
            self._server.free_memory()
        except OSError:
            self.stop()

    def begin_memory(self) -> None:
        """Take what the GPU holds now as no process's that is started from here on."""
        if self.device == "cuda":
            # What this process draws checkpoints with must not count as the server's.
            torch.zeros(1, device="cuda")
            torch.cuda.empty_cache()
            self._before = used_on_gpu()

    def read_memory(self, process_id: int) -> int | None:
        """Return the bytes that the only process measured takes, on a CPU those in its memory."""
        if self.device == "cuda":
            return used_on_gpu() - self._before
        return resident(process_id)

    def checkpoint(self, size: Size, dtype: str) -> tuple[str, str]:
        """Return a Wan's file name, written unless it is there, and the dtype to load it in.

        Raises ValueError or UnavailableError where it cannot be written here.
        """
        form, weight_dtype = _LOADED_AS.get(dtype, (dtype, "default"))
        file = f"wan-{size.name}-{form}.{checkpoints.SUFFIXES.get(form, 'safetensors')}"
        path = self.models / file
        if path.exists():
            return file, weight_dtype
        path.parent.mkdir(parents=True, exist_ok=True)
        if form in QUANTISED:
            source, _ = self.checkpoint(size, "bf16")
            inputs = {"source": source, "file": file, "form": QUANTISED[form]}
            self._write("LinVideoBenchmarkQuantised", inputs)
        else:
            checkpoints.write_wan(path, size, form, self.device)
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return file, weight_dtype

    def write_minimax_h3(self, file: str, sizes: str) -> None:
        """Write a random MiniMax-H3, unless it is there."""
        if not (self.models / file).exists():
            self._write("LinVideoBenchmarkMiniMaxH3", {"file": file, "sizes": sizes})

    def _write(self, node: str, inputs: dict[str, str]) -> None:
        server = self.server()
        server.run({"write": {"class_type": node, "inputs": inputs}}, self.deadline)
        server.free_memory()
