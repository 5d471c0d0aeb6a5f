"""What cases share: the server that runs, the checkpoints that are written, memory to compare."""

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from linvideo_core.run.lock import locked

from ..models.sizes import Size
from . import checkpoints
from .comfyui_server import CPU_FLAGS, Installation, Server, run_server

GB = 2**30
"""Bytes of a GB as cards are sold by it."""

_QUANTISED = {"int8": "int8_tensorwise", "nvfp4": "nvfp4"}
# Dtype of a row -> the form of the file, and what the loader makes of it.
_LOADED_AS = {"fp8": ("bf16", "fp8_e4m3fn")}
_EVERY_SECONDS = 0.1


class UnavailableError(Exception):
    """Why a case cannot be measured on this machine."""


@dataclasses.dataclass
class Peak:
    """The largest number of bytes that was seen, in GB of 2^30; None where nothing can be read."""

    gb: float | None = None


@contextlib.contextmanager
def watching(read: Callable[[], int | None]) -> Iterator[Peak]:
    """Read memory ten times a second while a block runs."""
    peak, is_done = Peak(), threading.Event()

    def poll() -> None:
        while True:
            if (num_bytes := read()) is not None:
                peak.gb = max(peak.gb or 0.0, num_bytes / GB)
            if is_done.wait(_EVERY_SECONDS):
                return

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_done.set()
        thread.join()


def used_on_gpu() -> int:
    """Return the bytes of the GPU that all processes together use now."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def resident(process_id: int) -> int | None:
    """Return the bytes of CPU memory of a process; None where the system does not tell."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = status.partition("VmRSS:")[2].split()
    return 1024 * int(found[0]) if found else None


@contextlib.contextmanager
def smaller_card(free_gb: float | None) -> Iterator[None]:
    """Take so much of the GPU that what is free is as on a smaller card; None: take nothing.

    Whatever allocates there, PyTorch or a host's own memory, then meets the end of the card.

    Raises ValueError where the GPU has less than that free.
    """
    if free_gb is None:
        yield
        return
    free, _ = torch.cuda.mem_get_info()
    if (taken := free - int(free_gb * GB)) < 0:
        raise ValueError(f"{free_gb:g} GB are to be left free and the GPU has {free / GB:.1f}")
    taken_memory = torch.empty(taken, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del taken_memory
        torch.cuda.empty_cache()


@contextlib.contextmanager
def opened(installation: Installation, out: Path, device: str) -> Iterator["Workbench"]:
    """Set up a workbench in a folder where no other run is at work; take it away in the end.

    What a killed run has left of its own, which may be a large checkpoint, goes first.
    Raises SettingError where another run is at work.
    """
    with locked(out):
        bench = Workbench(installation, out.absolute(), device)
        try:
            yield bench
        finally:
            bench.stop()
            shutil.rmtree(bench.folder, ignore_errors=True)


class Workbench:
    """A folder with a server's models and results, and the server, started when it is needed.

    One runs at a time, until a case needs other flags or another size of card.
    deadline: in `time.monotonic` seconds, of the case at work.
    """

    def __init__(self, installation: Installation, out: Path, device: str) -> None:
        self.installation, self.out, self.device = installation, out, device
        # A name that nobody else gives a folder: what is there is removed.
        self.folder = out / "linvideo-benchmark-server"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.models = self.folder / "models" / "diffusion_models"
        self.deadline = time.monotonic()
        self._running = contextlib.ExitStack()
        self._server: Server | None = None
        self._kind: tuple[tuple[str, ...], float | None] | None = None
        self._before = 0
        self._num_servers = 0

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
        try:
            if self._server is not None:
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
        return used_on_gpu() - self._before if self.device == "cuda" else resident(process_id)

    def checkpoint(self, size: Size, dtype: str) -> tuple[str, str]:
        """Return a Wan's file name, written unless it is there, and the dtype to load it in.

        Raises ValueError or UnavailableError where it cannot be written here.
        """
        if dtype == checkpoints.GGUF and self.installation.gguf_pack is None:
            raise UnavailableError("a pack that loads GGUF is needed: give --gguf-pack")
        form, weight_dtype = _LOADED_AS.get(dtype, (dtype, "default"))
        suffix = "gguf" if form == checkpoints.GGUF else "safetensors"
        file = f"wan-{size.name}-{form}.{suffix}"
        if (self.models / file).exists():
            return file, weight_dtype
        self.models.mkdir(parents=True, exist_ok=True)
        if form in _QUANTISED:
            source, _ = self.checkpoint(size, "bf16")
            self.write("Quantised", source=source, file=file, form=_QUANTISED[form])
        else:
            checkpoints.write_wan(self.models / file, size, form, self.device)
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return file, weight_dtype

    def write(self, node: str, **inputs: str) -> None:
        """Write a checkpoint that only ComfyUI can write, by one of `comfyui_nodes`."""
        server = self.server()
        graph = {"write": {"class_type": f"LinVideoBenchmark{node}", "inputs": inputs}}
        server.run(graph, self.deadline)
        server.free_memory()
