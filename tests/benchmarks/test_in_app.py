"""The benchmark of transfers in ComfyUI: its files, its reading of a log, rows that fail."""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.in_app import cli as in_app
from benchmarks.in_app import sampling
from benchmarks.in_app.cases import CASES, choose
from benchmarks.in_app.checkpoints import write_linear_layers, write_wan
from benchmarks.in_app.cli import InAppConfig
from benchmarks.in_app.comfyui_server import Installation, PromptError, Server, Stage
from benchmarks.in_app.headless import describe_transfer, train, write_prompts
from benchmarks.in_app.measuring import KINDS
from benchmarks.in_app.sampling import SamplingConfig
from benchmarks.in_app.workbench import opened, resident, watching
from benchmarks.models.random_models import draw_inputs
from benchmarks.models.sizes import SIZES
from benchmarks.record import RESULTS_FOLDER, read_record
from linvideo_core import artifact
from linvideo_core.models.attention import LinearAttention
from linvideo_core.models.wan import WanModel
from linvideo_core.run.config import override
from linvideo_core.run.errors import SettingError
from linvideo_core.transfer.config import TransferConfig

TINY = SIZES["tiny"]
LOG = """
LinVideo: sampling_teacher: 1 videos in 12.34 s
LinVideo: training: 8 steps in 25.30 s
another line, training: 9 steps in 1.00 s
"""


# What ComfyUI answers over HTTP, and that a graph failed once so many have not.
HOST = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    num_graphs = 0

    def do_GET(self):
        is_good = Handler.num_graphs <= NUM_GOOD
        failed = {"node_type": "any", "exception_type": "any", "exception_message": "no more"}
        messages = [] if is_good else [("execution_error", failed)]
        history = {"status": {"messages": messages}, "outputs": {}}
        self.answer({self.path.removeprefix("/history/"): history})

    def do_POST(self):
        Handler.num_graphs += self.path == "/prompt"
        self.answer({"prompt_id": "graph"})

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def write_host(root: Path, version: str, num_good: int) -> None:
    """Write what looks like a ComfyUI, whose graphs fail after so many."""
    root.mkdir(exist_ok=True)
    (root / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (root / "main.py").write_text(HOST.replace("NUM_GOOD", str(num_good)))


@pytest.fixture
def broken_host(tmp_path: Path) -> Path:
    """A checkout that looks like ComfyUI and ends as soon as it is started."""
    root = tmp_path / "host"
    root.mkdir()
    (root / "comfyui_version.py").write_text('__version__ = "1.2.3"\n')
    (root / "main.py").write_text("raise SystemExit('no such thing as a lunch')\n")
    return root


def test_rows_that_fail_say_why_and_one_measured_again_replaces_its_own_alone(
    broken_host: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    config = InAppConfig(
        comfyui=broken_host,
        cpu=True,
        out=tmp_path / "out",
        rows="demo,1.3b-fp8,1.3b-gguf,14b-33-24gb",
    )
    record = in_app.run(config, lambda row: told.append(row["what"]))
    by_name = {row["what"]: row for row in record["rows"]}
    assert list(by_name) == told == ["demo", "1.3b-fp8", "1.3b-gguf", "14b-33-24gb"]
    assert all("no such thing as a lunch" in by_name[name]["error"] for name in told[:2])
    assert [by_name[name]["ok"] for name in told] == [False, False, None, None]
    assert "--gguf-pack" in by_name["1.3b-gguf"]["error"]
    assert record["command"] == "python -m benchmarks.in_app --comfyui PATH --cpu"
    assert record["details"]["parts"]["demo"]["comfyui"] == "1.2.3"
    record = in_app.run(dataclasses.replace(config, rows="demo"))
    assert [row["what"] for row in record["rows"]] == told


def test_bad_input_is_refused_in_one_sentence(broken_host: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--rows nothing given; one of demo, "):
        InAppConfig(rows="demo,nothing")
    with pytest.raises(ValueError, match="--comfyui was not given"):
        in_app.run(InAppConfig(cpu=True, out=tmp_path))
    with pytest.raises(ValueError, match="holds no comfy"):
        in_app.run(InAppConfig(comfyui=tmp_path, cpu=True, out=tmp_path))
    for python in ("/nonexistent", tmp_path, broken_host / "main.py"):
        with pytest.raises(ValueError, match=f"--python {python} given, which cannot be run"):
            in_app.run(
                InAppConfig(comfyui=broken_host, python=Path(python), cpu=True, out=tmp_path)
            )


def test_samplings_are_refused_without_a_host_and_its_end_is_told(
    broken_host: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--steps 0 given"):
        SamplingConfig(steps=0)
    with pytest.raises(ValueError, match="--kernels sparse,fast given, and fast is none: some of"):
        SamplingConfig(kernels="sparse,fast")
    with pytest.raises(ValueError, match="'sparse linear' is none: some of"):
        SamplingConfig(kernels="cuDNN", rows="sparse linear")
    with pytest.raises(ValueError, match="--comfyui was not given"):
        sampling.run(SamplingConfig(cpu=True, out=tmp_path / "out"))
    config = SamplingConfig(comfyui=broken_host, cpu=True, out=tmp_path / "out")
    with pytest.raises(PromptError, match="no such thing as a lunch"):
        sampling.run(config)


def test_a_run_that_ends_early_leaves_its_rows_and_none_of_an_earlier_run_of_its_place(
    tmp_path: Path,
) -> None:
    def sample(version: str, *, num_ways: int, rows: str = "") -> list[tuple[str, str, int]]:
        # A graph to warm up and one that is timed.
        write_host(config.comfyui, version, 2 * num_ways)
        with contextlib.suppress(PromptError):
            sampling.run(dataclasses.replace(config, rows=rows))
        found = read_record(config.path)["rows"]
        layers = [row["linear_layers"] + row["hybrid_layers"] for row in found]
        return [(r["where"], r["what"], n) for r, n in zip(found, layers, strict=True)]

    config = SamplingConfig(comfyui=tmp_path / "host", cpu=True, steps=2, out=tmp_path / "out")
    guided = [("ComfyUI 1.0", "sampling", n) for n in (0, 2, 4)]
    few = [("ComfyUI 1.0", "few_steps", n) for n in (2, 4)]
    assert sample("1.0", num_ways=5) == [*guided, *few]
    assert len(sample("2.0", num_ways=5)) == 2 * len([*guided, *few])
    before = read_record(config.path)["rows"]
    # A run that fails at once has measured nothing.
    sample("2.0", num_ways=0)
    assert read_record(config.path)["rows"] == before
    # Few steps are compared with the run's own first row: those of another run go with it.
    mixed = [*guided, ("ComfyUI 2.0", "sampling", 0), *few]
    assert sample("2.0", num_ways=1) == mixed
    # A chosen row is put in place of itself alone, with the seconds that it is compared with.
    chosen = ("ComfyUI 2.0", "few_steps", 2)
    for _ in range(2):
        assert sample("2.0", num_ways=2, rows="default linear few steps") == [*mixed, chosen]
    row = read_record(config.path)["rows"][-1]
    assert row["speedup"] == pytest.approx(row["baseline_seconds"] / row["seconds"])


def test_what_a_killed_run_has_left_is_taken_away_and_two_runs_do_not_share_a_folder(
    broken_host: Path, tmp_path: Path
) -> None:
    left = tmp_path / "linvideo-benchmark-server" / "models" / "large.safetensors"
    left.parent.mkdir(parents=True)
    left.touch()
    installation = Installation(root=broken_host, python=Path(sys.executable))
    with opened(installation, tmp_path, "cpu") as bench:
        assert bench.folder.is_dir() and not left.exists()
        with pytest.raises(SettingError, match="in use by"), opened(installation, tmp_path, "cpu"):
            pass
    assert not [*tmp_path.glob("linvideo*")]


def test_the_file_that_is_sampled_with_fits_its_model(tmp_path: Path) -> None:
    write_linear_layers(tmp_path / "models" / "random.safetensors", TINY)
    found = artifact.load(tmp_path / "models" / "random.safetensors")
    model = WanModel(TINY.config)
    with artifact.apply(found, model):
        kinds = [type(block.self_attn.attention) for block in model.blocks]
    assert [kind is LinearAttention for kind in kinds] == [
        layer in TINY.layers for layer in range(TINY.config.num_layers)
    ]


def test_with_a_tile_every_layer_of_the_file_is_hybrid(tmp_path: Path) -> None:
    write_linear_layers(tmp_path / "hybrid.safetensors", TINY, tile="1x3x4")
    model = WanModel(TINY.config)
    with artifact.apply(artifact.load(tmp_path / "hybrid.safetensors"), model):
        tiles = [block.self_attn.attention.form.tile for block in model.blocks]
        latents, prompt, _ = draw_inputs(TINY, "cpu")
        assert model(latents, torch.full((1,), 500.0), prompt).isfinite().all()
    assert tiles == TINY.config.num_layers * ["1x3x4"]


def test_a_file_of_few_steps_has_the_noise_levels_of_its_model(tmp_path: Path) -> None:
    write_linear_layers(tmp_path / "few.safetensors", TINY, 4)
    sigmas = artifact.load(tmp_path / "few.safetensors").header.sigmas
    assert sigmas == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_hybrid_layers_are_sampled_by_the_default_alone_in_all_steps_and_in_few() -> None:
    assert [str(way) for way in sampling.list_ways(["cuDNN"])] == [
        "default softmax", "default linear", "default hybrid", "cuDNN softmax", "cuDNN linear",
        "default linear few steps", "default hybrid few steps", "cuDNN linear few steps",
    ]  # fmt: skip
    assert SamplingConfig(kernels="default").list_kernels() == []
    assert SamplingConfig(size="14b-720p").hybrid_tile == "7x15x16"
    assert SamplingConfig(tile="1x10x11").hybrid_tile == "1x10x11"
    with pytest.raises(ValueError, match="--tile 5x6x8 given, and a video is 5 x 6 x 8 tokens"):
        SamplingConfig(cpu=True, tile="5x6x8")


@pytest.mark.parametrize(
    ("steps", "baseline", "speedup"),
    [(50, "default, 50 guided steps", 25), (5, "default, 50 guided steps by 5 measured", 250)],
)
def test_few_steps_are_compared_with_fifty_of_the_default_and_say_how_many_were_measured(
    steps: int, baseline: str, speedup: float
) -> None:
    default = {"what": "sampling", "steps": steps, "seconds": 100.0}
    few = {"what": "few_steps", "steps": 4, "seconds": 4.0}
    found = sampling.compare(few, default)
    told = {"baseline": baseline, "baseline_seconds": 4 * speedup, "speedup": speedup}
    assert found == told
    guided = default | {"seconds": 50.0}
    told = {"baseline": "default", "baseline_seconds": 100, "speedup": 2}
    assert sampling.compare(guided, default) == told


def test_every_row_of_the_page_can_be_measured() -> None:
    page = read_record(RESULTS_FOLDER / "in_app.json")
    assert {row["what"] for row in page["rows"]} <= {case.name for case in choose("")}
    assert [case.name for case in choose("14b-81, demo")] == ["14b-81", "demo"]
    assert {case.kind for case in CASES.values()} == KINDS.keys()


def test_the_log_tells_of_stages_after_a_place(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("LinVideo: training: 2 steps in 1.00 s\n")
    server = Server(process=None, address="", folder=tmp_path, log=log)
    since = server.log_size()
    with log.open("a") as file:
        file.write(LOG)
    assert server.stages(since) == [
        Stage("sampling_teacher", 1, 12.34),
        Stage("training", 8, 25.3),
    ]


def test_every_form_of_a_checkpoint_stands_for_the_same_weights(tmp_path: Path) -> None:
    read: dict[str, dict[str, torch.Tensor]] = {}
    for form in ("bf16", "fp16", "fp8_scaled"):
        write_wan(tmp_path / f"{form}.safetensors", TINY, form, "cpu")
        read[form] = load_file(tmp_path / f"{form}.safetensors")
    assert read["bf16"].keys() == read["fp16"].keys()
    for name in ("blocks.1.self_attn.q.weight", "blocks.0.ffn.0.weight"):
        scale = read["fp8_scaled"][f"{name.removesuffix('weight')}scale_weight"]
        weight = read["fp8_scaled"][name]
        assert weight.dtype == torch.float8_e4m3fn and scale.shape == (1,)
        assert_close(weight.float() * scale, read["fp16"][name].float(), 0.04)
    for name in ("head.head.weight", "blocks.0.norm3.weight", "patch_embedding.weight"):
        assert read["fp8_scaled"][name].dtype == torch.float16
        assert_close(read["fp8_scaled"][name].float(), read["fp16"][name].float(), 1e-3)


def test_a_file_that_the_disk_has_no_room_for_is_not_begun(tmp_path: Path) -> None:
    huge = dataclasses.replace(TINY, config=dataclasses.replace(TINY.config, ffn_dim=2**38))
    with pytest.raises(ValueError, match="and the disk has"):
        write_wan(tmp_path / "huge.safetensors", huge, "bf16", "cpu")
    assert not list(tmp_path.iterdir())


def test_a_peak_is_seen_while_it_lasts() -> None:
    used = 1
    with watching(lambda: used * 2**30) as peak:
        used = 3
        watched_until(lambda: peak.gb == 3)
        used = 2
    assert peak.gb == 3


def test_the_memory_of_a_process_is_told_where_the_system_does() -> None:
    if (found := resident(os.getpid())) is None:
        pytest.skip("this system does not tell how much memory a process has")
    assert found > 2**20


def test_the_headless_transfer_has_the_settings_of_the_nodes_and_runs(tmp_path: Path) -> None:
    settings = {"steps": 8, "sampler_steps": 8, "num_videos": 1, "warm_start_steps": 2, "tile": ""}
    values = describe_transfer(TINY, 17, {**settings, "target": 2, "lora_rank": 32})
    config = override(TransferConfig(), values)
    assert (config.training.steps, config.training.batch_size) == (8, 1)
    assert config.trajectories.num_trajectories == 1 and config.trajectories.sampler_steps == 8
    assert config.training.activation_checkpointing and config.trajectories.shift == TINY.shift
    assert config.selection.target == 2 and config.teacher.num_frames == 17
    assert config.student.form.tile == "2x2x2"
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("model", "prompts")}
    write_wan(paths["model"], TINY, "bf16", "cpu")
    write_prompts(paths["prompts"], TINY)
    run = {"steps": 2, "out": tmp_path / "run", "device": "cpu"}
    train({**values, **paths, **run}, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["seconds_per_step"] > 0


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


def watched_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_true() and time.monotonic() < end:
        time.sleep(0.05)
