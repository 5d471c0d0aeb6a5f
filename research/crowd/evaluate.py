"""Compare the teacher with LINVIDEO files that were made from it, beside rendered clips.

    python -m research.crowd.evaluate --artifacts runs/transfer/linearized.safetensors
    torchrun --nproc-per-node 4 -m research.crowd.evaluate --num-samples 2000
    python -m research.crowd.evaluate --artifacts runs/transfer/linearized.safetensors \
        --densities 0.1,0.2,0.4 --keep-first-steps 4,8 --student-guidance 3.2,3.5
Every model samples the same captions, which no training has seen. `teacher` and the students start
from the same noise, `teacher_other` from other noise; `real` are rendered clips, `real_other` are
others of the same captions. So of the columns
    frechet_teacher   is to `teacher_other`, unpaired; the teacher's own is the floor
    frechet_real      is to `real_other`, unpaired; that of `real` is the floor
    fidelity, paired_frechet   are to `teacher`, of the same noise
    temporal_spectrum_db       is to `teacher_other`
    object ... pan, found, recall, position_error, speed_error   are of single videos: see `judge`
        and `tracks`; those of `real` are the best that these measures give
    share_of_teacher   is the least share of the teacher's own figure of object ... pan and found
    recall_share, frechet_over_floor   are recall and frechet_teacher over the teacher's own
A student is called by its file's folder and name: `transfer-linearized` is the file above. With
`--densities` teacher and students have rows besides with Sol-Attn in the layers that are softmax,
at every step; a student without such layers has none. With `--keep-first-steps` students have rows
besides whose first steps are the teacher's, as by the node's input of that name (which takes files
of LoRA alone), and with `--student-guidance` rows of other guidance scales than the teacher's. A
file that was distilled is sampled in its own few steps, without guidance, and has no such rows.
Repeating the command continues where it stopped; what was measured of a file is used again. With
`--record` the rows go to results/crowd.json, too, after each model: of 2,000 videos as
`evaluation_2000`. Rows of other names, densities, kept steps and guidance scales stay there if they
were measured alike: of the same teacher, judge, captions, noise, sampler and versions, and of the
same file where the name is the same. If not, they go.
"""

import contextlib
import copy
import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.record import (
    RESULTS_FOLDER,
    check_parts,
    describe_versions,
    show_rows,
    write_record,
)
from linvideo_core import artifact
from linvideo_core.evaluate import metrics
from linvideo_core.evaluate.sampler import count_layers, draw_prompts
from linvideo_core.evaluate.videos import save_strip
from linvideo_core.flow import Recipe, bind_guided, make_sigmas
from linvideo_core.kernels.softmax import SPARSE
from linvideo_core.models.attention_sites import compiled_blocks, shapes_of, softmax_by
from linvideo_core.models.families import identify
from linvideo_core.run.config import parse, run_command, to_flags
from linvideo_core.run.context import Run
from linvideo_core.run.devices import resolve_device, resolve_precision
from linvideo_core.run.errors import SettingError
from linvideo_core.run.files import write_tensors
from linvideo_core.run.folder import check_run, open_run
from linvideo_core.run.process_group import ProcessGroup
from linvideo_core.run.progress import TerminalCallbacks
from linvideo_core.teacher.config import TIME_COMPRESSION, TeacherConfig
from linvideo_core.teacher.teacher import Teacher, load_teacher
from linvideo_core.training.fsdp import run_together
from linvideo_core.training.trainer import seed_step

from .captions import CaptionsConfig, write_both
from .captions import parse as parse_captions
from .clips import NUM_FRAMES, Labels, decode_latents, encode_frames, render, stage
from .config import FREE_FIELDS, CrowdConfig, StoredModelConfig
from .judge import Judge, is_right, load_judge
from .rows import RECORD_NAME, RECORD_TITLE, Row, read_measures, read_rows, record
from .tracks import measure_tracks
from .train import WEIGHTS

_NUM_SHOWN = 4
_OTHER_SEED = 1_000
MakeLatents = Callable[[slice, int], Tensor]
"""(rows, number of the batch) -> latents"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What all models share: captions, their labels and embeddings, the judge."""

    config: CrowdConfig
    run: Run
    teacher: Teacher
    judge: Judge
    index: list[int]
    labels: Labels

    def parts(self) -> list[slice]:
        """Return the batches."""
        size = self.config.comparison.batch_size
        return [slice(i, min(i + size, len(self.index))) for i in range(0, len(self.index), size)]

    def recipe_of(self, header: artifact.ArtifactHeader | None = None) -> Recipe:
        """Return how a file's model is sampled; none given: the teacher."""
        if header is not None and header.sigmas:
            sigmas = torch.tensor(header.sigmas)
            return Recipe(sigmas=sigmas, guidance_scale=1.0, is_few_step=True)
        settings = self.config.comparison
        sigmas = make_sigmas(settings.sampler_steps, settings.shift)
        return Recipe(sigmas=sigmas, guidance_scale=settings.guidance_scale)

    def sample(
        self,
        model: nn.Module,
        part: slice,
        number: int,
        seed: int,
        recipe: Recipe | None = None,
        *,
        first: nn.Module | None = None,
        first_steps: int = 0,
    ) -> Tensor:
        """Sample one batch; its noise comes from (seed, number).

        recipe: none for the teacher's. first: the model of so many first steps.
        """
        recipe = recipe or self.recipe_of()
        embeds = self.teacher.prompt_embeds[self.index[part]]
        noise = self.draw_noise(part, number, seed)
        negatives, how = self.teacher.negatives_for(embeds), {"precision": self.run.precision}
        velocities = [
            bind_guided(each, embeds, negatives, recipe.guidance_scale, **how)
            for each in (model, first or model)
        ]

        def velocity_fn(latents: Tensor, sigma: Tensor) -> Tensor:
            is_first = first_steps > 0 and bool(sigma[0] > recipe.sigmas[first_steps])
            return velocities[is_first](latents, sigma)

        with contextlib.ExitStack() as stack:
            for each in {model, first or model}:
                stack.enter_context(compiled(each, is_on=self.config.compile))
            return recipe.sample(velocity_fn, noise, seed=number, on_step=lambda *_: None)

    def draw_noise(self, part: slice, number: int, seed: int) -> Tensor:
        """Return the noise that a batch is sampled from; it comes from (seed, number)."""
        size = (len(self.index[part]), *self.teacher.latent_shape)
        return torch.randn(size, generator=seed_step(seed, number)).to(self.run.device)

    def render(self, part: slice, number: int, seed: int) -> Tensor:
        """Render one batch of the captions as latents, cut at random where videos are shorter."""
        seed = seed_step(seed, number).initial_seed()
        generator = torch.Generator(self.run.device).manual_seed(seed)
        scenes = stage(self.labels.take(part).to(self.run.device), generator)
        count, length = len(scenes.labels), self.teacher.latent_shape[1] * TIME_COMPRESSION
        start = torch.rand(count, 1, generator=generator, device=self.run.device)
        begin = (start * (NUM_FRAMES - length + 1)).floor()
        times = begin + torch.arange(length, device=self.run.device)
        return encode_frames(render(scenes, times).frames)

    @torch.no_grad()
    def measure(self, latents: Tensor, part: slice) -> dict[str, Tensor]:
        """Measure each video of a batch, and diversity and a few frames of all."""
        labels = self.labels.take(part).to(latents.device)
        frames = decode_latents(latents.float())
        answers = self.judge(latents.float())
        found = {**is_right(answers, labels), **measure_tracks(frames, labels)}
        found |= {"features": answers.features, "spectrum": metrics.temporal_spectrum(frames)}
        diversity = metrics.diversity(latents, self.index[part])
        found["diversity"] = torch.tensor([torch.nan if diversity is None else diversity])
        found["frames"] = metrics.to_bytes(frames[:_NUM_SHOWN])
        return found

    def measure_all(
        self, folder: Path, make: MakeLatents, *, paired_with: Path | None = None
    ) -> None:
        """Write a file of measures for every batch of this process that has none yet.

        paired_with: the teacher's folder, of the same noise, whose files also hold its latents;
            the fidelity to those is measured, or, where it is `folder` itself, they are kept.
        """
        folder.mkdir(parents=True, exist_ok=True)
        own = slice(self.run.processes.rank, None, self.run.processes.size)
        batches = [
            (folder / f"{number:05d}.safetensors", number, part)
            for number, part in [*enumerate(self.parts())][own]
        ]
        missing = [each for each in batches if not each[0].exists()]
        num_kept, callbacks = len(batches) - len(missing), self.run.callbacks
        callbacks.on_stage("evaluation", len(batches), num_kept, detail=folder.name)
        for num_done, (path, number, part) in enumerate(missing, num_kept + 1):
            begin = self._clock()
            latents = make(part, number)
            seconds = torch.tensor([(self._clock() - begin) / len(latents)])
            found = {"seconds": seconds, **self.measure(latents, part)}
            if paired_with == folder:
                found["latents"] = latents.half()
            elif paired_with is not None:
                reference = load_file(paired_with / path.name)["latents"].to(latents)
                found["fidelity"] = metrics.sample_distance(latents, reference)
            write_tensors(path, found)
            callbacks.on_step_end(num_done)
        self.run.processes.wait()

    def _clock(self) -> float:
        if self.run.device.startswith("cuda"):
            torch.cuda.synchronize(self.run.device)
        return time.monotonic()


def compiled(model: nn.Module, *, is_on: bool) -> contextlib.AbstractContextManager:
    """Return the context in which a model's blocks are compiled, if they are to be."""
    if not is_on:
        return contextlib.nullcontext()
    return compiled_blocks([model], identify(shapes_of(model))[1])


def open_sampling(config: CrowdConfig, run: Run) -> Sampling:
    """Load the teacher, its captions and the judge onto the run's device."""
    teacher = load_teacher(
        TeacherConfig(
            model=config.model,
            prompts=config.prompts,
            num_frames=config.num_frames,
            height=256,
            width=256,
        )
    )
    settings = config.comparison
    index = draw_prompts(
        len(teacher.prompts), settings.num_samples, config.seed, repeats=settings.seeds_per_prompt
    )
    return Sampling(
        config=config,
        run=run,
        teacher=teacher.to(run.device),
        judge=load_judge(config.judge, run.device),
        index=index,
        labels=parse_captions([teacher.prompts[i] for i in index]),
    )


def open_with_captions(config: StoredModelConfig) -> Sampling:
    """Write captions, open the teacher, the stored judge and what samples them."""
    write_both(CaptionsConfig(out=config.out))
    crowd = CrowdConfig(
        comparison=config.comparison,
        model=config.model,
        judge=WEIGHTS / "judge.safetensors",
        prompts=config.out / "held_out.safetensors",
        seed=config.seed,
    )
    device = resolve_device(config.device)
    return open_sampling(crowd, Run(device=device, precision=resolve_precision("auto", device)))


def measure_references(sampling: Sampling, folder: Path) -> None:
    """Sample and measure the teacher, and rendered clips, each twice, in folders below `folder`."""
    model, seed = sampling.teacher.model, sampling.config.seed
    other = seed + _OTHER_SEED
    for name, number in (("real", seed), ("real_other", other)):
        sampling.measure_all(folder / name, lambda p, i, s=number: sampling.render(p, i, s))
    twins = folder / "teacher"
    sampling.measure_all(twins, lambda p, i: sampling.sample(model, p, i, seed), paired_with=twins)
    sampling.measure_all(folder / "teacher_other", lambda p, i: sampling.sample(model, p, i, other))


def place_measures(folder: Path, name: str, path: Path | None) -> Path:
    """Return where below `folder` the measures of a LINVIDEO file lie; path: none: the teacher."""
    return folder / "-".join([name, *([digest_of(path)] if path else [])])


def measure_file(
    sampling: Sampling,
    measures: Path,
    path: Path | None,
    recipe: Recipe | None = None,
    density: float | None = None,
    first_steps: int = 0,
) -> None:
    """Sample and measure the model of a LINVIDEO file.

    measures: as `place_measures` says, below the folder that `measure_references` filled. path:
    none: the teacher. recipe: how it is sampled; none: as the file says. density: of Sol-Attn in
    its softmax layers; none: they are dense. first_steps: so many are the teacher's.
    """
    model, seed = sampling.teacher.model, sampling.config.seed
    made = artifact.load(path) if path else None
    recipe = recipe or sampling.recipe_of(made.header if made else None)
    first = {"first": copy.deepcopy(model), "first_steps": first_steps} if first_steps else {}
    with contextlib.ExitStack() as stack:
        if made is not None:
            stack.enter_context(artifact.apply(made, model))
        if density is not None:
            sites = identify(shapes_of(model))[1]
            stack.enter_context(softmax_by(model, sites, SPARSE, density))
        sampling.measure_all(
            measures,
            lambda p, i: sampling.sample(model, p, i, seed, recipe, **first),
            paired_with=measures.parent / "teacher",
        )


def describe_model(sampling: Sampling, name: str, path: Path | None) -> Row:
    """Return what a model is: kinds of layers, what computes softmax ones, how it is sampled.

    path: its file; none: the teacher. Where no softmax layers are left, backend and density are
    none. Raises ArtifactError for a file that does not fit the teacher.
    """
    model, made = sampling.teacher.model, artifact.load(path) if path else None
    with artifact.apply(made, model) if made else contextlib.nullcontext():
        counts = count_layers(model)
    header = made.header if made else None
    tile, recipe = header.tile if header else None, sampling.recipe_of(header)
    is_softmax = counts["linear_layers"] + counts["hybrid_layers"] < counts["layers"]
    return {
        "model": name,
        "file": digest_of(path) if path else None,
        **counts,
        "tile": tile,
        "attention_mass": header.attention_mass if tile else None,
        "softmax_backend": "default" if is_softmax else None,
        "density": 1.0 if is_softmax else None,
        "steps": len(recipe.sigmas) - 1,
        "guidance_scale": recipe.guidance_scale,
    }


def list_rows(
    sampling: Sampling,
) -> tuple[dict[str, Row], list[tuple[str, Path | None, dict[str, Any]]]]:
    """Return what each model is by its row's name, and (name, file, how `measure_file` samples it).

    Of the latter the teacher and rendered clips have none. Raises as `describe_model`.
    """
    config = sampling.config
    artifacts = config.list_artifacts()
    paths = {"teacher": None, **artifacts}
    models = {name: describe_model(sampling, name, path) for name, path in paths.items()}
    models["real"] = {**dict.fromkeys(models["teacher"]), "model": "real"}
    waiting = [(name, path, {}) for name, path in artifacts.items()]

    def add(name: str, label: str, columns: Row, how: dict[str, Any]) -> None:
        row = f"{name}-{label}"
        if row in models:
            raise SettingError(
                f"{{artifacts}} {config.artifacts} given, and two rows would be called {row}; "
                "rename a file",
                "artifacts",
            )
        models[row] = models[name] | columns
        waiting.append((row, paths[name], how))

    for name, path in artifacts.items():
        if artifact.load(path).header.sigmas:
            continue
        for steps in config.list_first_steps():
            add(name, f"first-{steps}", {"keep_first_steps": steps}, {"first_steps": steps})
        for scale in config.list_guidance_scales():
            recipe = dataclasses.replace(sampling.recipe_of(), guidance_scale=scale)
            add(name, f"guidance-{scale:g}", {"guidance_scale": scale}, {"recipe": recipe})
    for label, density in config.list_densities().items():
        columns = {"softmax_backend": SPARSE, "density": density}
        for name in paths:
            if models[name]["softmax_backend"] is not None:
                add(name, f"sparse-{label}", columns, {"density": density})
    return models, waiting


def compare(
    config: CrowdConfig, run: Run, on_rows: Callable[[list[Row]], None] = lambda rows: None
) -> list[Row]:
    """Sample and measure all models; return a row for each, in the first process alone.

    on_rows: called there with the rows so far: of clips and the teacher, then after each model.
    """
    sampling = open_sampling(config, run)
    # What does not fit is told before anything is sampled, and before the folder is this run's.
    models, waiting = list_rows(sampling)
    with run.processes.in_turn():
        open_run(config.out, config, ignore=FREE_FIELDS)
    # Measures are of these weights and captions: others begin afresh.
    folder = config.out / "-".join(["of", *digests_of(config).values()])
    files: dict[str, Path] = {}

    def tell() -> list[Row]:
        if not run.processes.is_first:
            return []
        rows = [models[row.pop("model")] | row for row in read_rows(folder, files)]
        on_rows(rows)
        return rows

    measure_references(sampling, folder)
    rows = tell()
    for name, path, how in waiting:
        files[name] = place_measures(folder, name, path)
        measure_file(sampling, files[name], path, **how)
        rows = tell()
    if rows:
        shown = slice(0, min(_NUM_SHOWN, config.comparison.batch_size))
        folders = {name: folder / name for name in ("real", "teacher")} | files
        save_strip(
            {name: read_measures(path)["frames"][shown] for name, path in folders.items()},
            [sampling.teacher.prompts[i] for i in sampling.index[shown]],
            config.out / "crowd.png",
        )
    return rows


def settings_of(config: CrowdConfig) -> Row:
    """Return all that decides the measures of a model: settings, and digests of files."""
    return {
        **dataclasses.asdict(config.comparison),
        "num_frames": config.num_frames,
        "compile": config.compile,
        "seed": config.seed,
        **digests_of(config),
        "versions": describe_versions(),
    }


def digests_of(config: CrowdConfig) -> dict[str, str]:
    """Return what tells the teacher, the judge and the captions from others."""
    return {name: digest_of(getattr(config, name)) for name in ("model", "judge", "prompts")}


def command_of(config: CrowdConfig) -> str:
    """Return the command line that measures the rows again."""
    flags = to_flags(config, without=("out", "device"))
    return f"python -m research.crowd.evaluate {flags}".strip()


def digest_of(path: Path) -> str:
    """Return eight hexadecimal digits that tell a file from others."""
    return hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()


def main(processes: ProcessGroup) -> None:
    """Read the command line, compare with bars, write crowd.json after each model, show it."""
    config = parse(CrowdConfig, None, description=__doc__)
    device = processes.place(resolve_device(config.device))
    with processes.in_turn():
        if config.record:
            check_parts(RESULTS_FOLDER / RECORD_NAME, device)
        check_run(config.out, config, ignore=FREE_FIELDS)
    precision = resolve_precision("auto", device)

    def keep(rows: list[Row]) -> None:
        source = {"command": command_of(config), "device": device}
        write_record(config.out / RECORD_NAME, title=RECORD_TITLE, rows=rows, **source)
        if config.record:
            record(rows, settings_of(config), **source)

    with TerminalCallbacks(is_shown=processes.is_first) as callbacks:
        how = {"precision": precision, "callbacks": callbacks, "processes": processes}
        rows = compare(config, Run(device=device, **how), keep)
    if processes.is_first:
        sys.stdout.write(show_rows(rows))


if __name__ == "__main__":
    run_command(lambda: run_together(main))
