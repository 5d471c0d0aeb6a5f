"""How each kind of case is measured: what is queued, and what is read off the result."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from linvideo_core import artifact

from ..kernels.agreement import relative_error
from . import graphs, headless
from .cases import Case
from .comfyui_server import PACK, PromptError, Server, Stage, find_error
from .workbench import Workbench, watching

TEMPLATE = PACK / "workflows" / "3 Make a file (no download).json"

_TRAINING = "training"
_SHORT_DEMO = {
    "steps": 4,
    "batch_size": 1,
    "warm_start_steps": 2,
    "num_videos": 2,
    "sampler_steps": 8,
}
# Of latents by a file from those by the transfer that made it: a GPU may round otherwise.
_MAX_APPLIED_ERROR = 0.01
# The width of MiniMax-H3's prompts, unless a case says otherwise.
_H3_TEXT_DIM = 5120

Found = dict[str, Any]


def measure_transfer(case: Case, bench: Workbench, found: Found) -> None:
    """Make a file of a Wan, sample with it, apply it anew, and see that the model comes back."""
    graph = _load_wan(case, bench)
    server = bench.server(case.flags, case.free_gb)
    _measure_in_server(case, bench, server, graph, len(case.video.layers), found)


def measure_minimax_h3(case: Case, bench: Workbench, found: Found) -> None:
    """The same of a MiniMax-H3."""
    file = f"{case.name}.safetensors"
    if not (bench.models / file).exists():
        bench.write("MiniMaxH3", file=file, sizes=json.dumps(case.sizes))
    video = (64, 64) if "hidden_size" in case.sizes else (832, 480)
    text_dim = case.sizes.get("text_dim", _H3_TEXT_DIM)
    graph = graphs.load_minimax_h3(file, text_dim, *video, case.frames)
    target = case.sizes["num_layers"] // 2
    _measure_in_server(case, bench, bench.server(), graph, target, found)


def measure_demo(case: Case, bench: Workbench, found: Found) -> None:
    """Run the template that makes a file of the embedded model, then judge the student."""
    server = bench.server()
    is_short = bench.device == "cpu"
    settings = _settings(server) | _SHORT_DEMO if is_short else None
    nodes = json.loads(TEMPLATE.read_text(encoding="utf-8"))["nodes"]
    (values,) = (node["widgets_values"] for node in nodes if node["type"] == "LinVideo")
    _train(server, graphs.transfer_demo("demo", values[2], settings), bench, found)
    made = _file_of(server, "demo")
    found |= judge(made, bench, is_short=is_short)


def measure_interrupt(case: Case, bench: Workbench, found: Found) -> None:
    """Interrupt a training, see how soon it ends and what the node says, and continue it."""
    graph = _load_wan(case, bench)
    server = bench.server(case.flags, case.free_gb)
    steps = 5 * case.steps if bench.device == "cpu" else case.steps
    graph |= _transfer(case, server, steps, len(case.video.layers))
    graph |= graphs.sample("linear", 2, case.name)
    started = server.queue(graph)
    folder = server.folder / "output" / "linvideo" / case.name / _TRAINING
    _wait_for(folder / "metrics.jsonl", server, started, bench.deadline)
    begin = time.monotonic()
    server.ask("/interrupt", {})
    history = server.wait(started, bench.deadline)
    seconds = time.monotonic() - begin
    if find_error(history) != "the graph was interrupted":
        raise PromptError(f"it was to be interrupted: {find_error(history) or 'it has finished'}")
    said = server.folder / "output" / "benchmark" / "words.jsonl"
    lines = said.read_text(encoding="utf-8").splitlines() if said.exists() else ['{"words": null}']
    found |= {"interrupt_seconds": seconds, **json.loads(lines[-1]), "steps": steps}
    _train(server, graph, bench, found)
    continued = next(stage.count for stage in found["stages"] if stage.name == _TRAINING)
    found["ok"] = continued < steps


def measure_headless(case: Case, bench: Workbench, found: Found) -> None:
    """Train with the same settings without ComfyUI; no server takes memory meanwhile."""
    file, _ = bench.checkpoint(case.video, case.dtype)
    bench.stop()
    out = bench.out / "headless"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    prompts = out / "prompts.safetensors"
    headless.write_prompts(prompts, case.video)
    settings = _short(case, case.steps) | {"target": len(case.video.layers), "lora_rank": 32}
    values = headless.describe_transfer(case.video, case.frames, settings) | {
        "frozen": case.dtype if bench.device == "cuda" else "fp32",
        "model": bench.models / file,
        "prompts": prompts,
        "out": out / "run",
        "device": bench.device,
    }
    bench.begin_memory()
    begin = time.monotonic()
    result = out / "result.json"
    seconds, peak = headless.measure(values, result, bench.read_memory, bench.deadline)
    found |= {"seconds_per_step": seconds, "peak_gb": peak.gb, "ok": True, "steps": case.steps}
    found |= {"tile": values["tile"], "seconds": time.monotonic() - begin}


KINDS = {
    "transfer": measure_transfer,
    "minimax_h3": measure_minimax_h3,
    "demo": measure_demo,
    "interrupt": measure_interrupt,
    "headless": measure_headless,
}
"""Kind of a case -> what measures it.

It puts into the last argument what the row says beside the case's own columns, and `stages` as the
log says, as soon as it is known: a case that fails later keeps what it has.
"""


def judge(made: Path, bench: Workbench, *, is_short: bool) -> Found:
    """Compare a file of the embedded model with its teacher, by the core's own command."""
    out = bench.out / "evaluate"
    samples, steps = (2, 8) if is_short else (100, 50)
    words = f"--num-samples {samples} --batch-size {samples} --sampler-steps {steps}".split()
    words += ["--artifact", str(made), "--out", str(out), "--device", bench.device]
    command = [sys.executable, "-m", "linvideo_core.evaluate", *words]
    left = max(1.0, bench.deadline - time.monotonic())
    try:
        finished = subprocess.run(command, cwd=PACK, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("the time limit was reached and evaluate stopped") from error
    if finished.returncode:
        raise RuntimeError(f"evaluate: {finished.stderr.strip().splitlines()[-1]}")
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    rows = {row["model"]: row for row in evaluation["rows"]}
    student = {name: rows["student"][name] for name in ("digit", "motion", "velocity_error")}
    return student | {f"teacher_{name}": rows["teacher"][name] for name in ("digit", "motion")}


def _load_wan(case: Case, bench: Workbench) -> graphs.Nodes:
    file, weight_dtype = bench.checkpoint(case.video, case.dtype)
    return graphs.load_wan(file, weight_dtype, case.video, case.frames)


def _measure_in_server(
    case: Case,
    bench: Workbench,
    server: Server,
    graph: graphs.Nodes,
    target: int,
    found: Found,
) -> None:
    """Sample the model, make a file of it, sample with that, sample the model again.

    Where the model is sampled again, so is the file before, applied in a graph of its own. The tile
    is the file's.

    graph: what gives `model`, `positive`, `negative` and `latent`.
    """
    base, linear, applied = (f"{case.name}_{what}" for what in ("base", "linear", "applied"))
    if case.is_base_checked:
        # The first sampling after a model was loaded may differ from all later ones.
        for number in (1, 2):
            sampled = {**graph, **graphs.sample("model", 2, base)}
            server.run(graphs.again(sampled, number), bench.deadline)
    training = _transfer(case, server, case.steps, target)
    sampled = {**graph, **training, **graphs.sample("linear", 2, linear)}
    found["steps"] = case.steps
    _train(server, sampled, bench, found)
    made = _file_of(server, case.name)
    found["tile"] = artifact.load(made).header.tile
    latents = _read_latents(server, linear)
    if case.sampling_steps:
        _time_sampling(case, server, {**graph, **training}, bench.deadline, found)
    found["ok"] = is_finite = all(bool(x.isfinite().all()) for x in latents)
    if case.is_base_checked:
        file = graphs.apply_file(made.name)
        server.run({**graph, **file, **graphs.sample("linear", 2, applied)}, bench.deadline)
        again = _read_latents(server, applied)
        error = max(map(relative_error, again, latents))
        is_finite &= all(bool(x.isfinite().all()) for x in again)
        before = _read_latents(server, base)
        server.run(graphs.again({**graph, **graphs.sample("model", 2, base)}, 3), bench.deadline)
        is_restored = all(map(torch.equal, before, _read_latents(server, base)))
        change = max(map(relative_error, latents, before))
        found |= {"change": change, "applied_error": error, "base_restored": is_restored}
        found["ok"] = is_finite and is_restored and change > 0 and error < _MAX_APPLIED_ERROR


def _time_sampling(
    case: Case, server: Server, graph: graphs.Nodes, deadline: float, found: Found
) -> None:
    """Time sampling with the model and with the linearized one, each the second time."""
    for source, column in (("model", "base_sampling_step"), ("linear", "linear_sampling_step")):
        for seed in (7, 8):
            # Another seed alone: the transfer's result stays in ComfyUI's cache.
            sampled = graphs.sample(source, case.sampling_steps, f"{case.name}_timed", seed=seed)
            begin = time.monotonic()
            server.run({**graph, **sampled}, deadline)
            found[column] = (time.monotonic() - begin) / case.sampling_steps


def _train(server: Server, graph: graphs.Nodes, bench: Workbench, found: Found) -> None:
    """Run a graph with a transfer; find its seconds, its peak and what the log says of it.

    Of one that fails, the peak and the stages until then.
    """
    since, begin = server.log_size(), time.monotonic()
    with watching(lambda: bench.read_memory(server.process.pid)) as peak:
        try:
            server.run(graph, bench.deadline)
        finally:
            stages = server.stages(since)
            found |= {
                "seconds_per_step": _seconds_per_step(stages),
                "peak_gb": peak.gb,
                "seconds": time.monotonic() - begin,
                "stages": stages,
            }
    if found["seconds_per_step"] is None:
        raise RuntimeError("the server's log does not say how long the training took")
    found["ok"] = True


def _seconds_per_step(stages: list[Stage]) -> float | None:
    trained = [stage for stage in stages if stage.name == _TRAINING]
    return trained[-1].seconds / trained[-1].count if trained else None


def _file_of(server: Server, name: str) -> Path:
    return server.folder / "models" / "linvideo" / f"{name}.safetensors"


def _short(case: Case, steps: int) -> dict[str, int | str]:
    lengths = {"steps": steps, "sampler_steps": 8, "num_videos": 1, "warm_start_steps": 2}
    return {**lengths, "tile": case.tile}


def _transfer(case: Case, server: Server, steps: int, target: int) -> graphs.Nodes:
    settings = {"target": target, "learning_rate": 1e-4, **_short(case, steps)}
    return graphs.transfer(case.name, _settings(server), settings)


def _settings(server: Server) -> dict[str, Any]:
    """Return all inputs of LinVideo Transfer Settings as it is added."""
    (node,) = server.ask("/object_info/LinVideoTransferSettings").values()
    return {name: told[1].get("default") for name, told in node["input"]["required"].items()}


def _read_latents(server: Server, tag: str) -> list[torch.Tensor]:
    path = server.folder / "output" / "benchmark" / f"{tag}.safetensors"
    return list(load_file(path).values())


def _wait_for(path: Path, server: Server, prompt_id: str, deadline: float) -> None:
    """Wait until a file is there; what ends or takes too long before that is an error."""
    while not path.exists():
        history = server.ask(f"/history/{prompt_id}")
        if prompt_id in history:
            raise PromptError(find_error(history[prompt_id]) or "it ended before it was trained")
        if time.monotonic() > deadline:
            server.wait(prompt_id, deadline)
        time.sleep(0.02)
