"""Compare a linearized model with its teacher: `python -m linvideo_core.evaluate`.

Three models sample the same prompts from the same noise: the teacher, the teacher with the chosen
layers merely swapped for untrained linear attention, and the student.
    python -m linvideo_core.evaluate                                  # minutes on a laptop
    python -m linvideo_core.evaluate --preset full --record true      # a GPU; README's table
    python -m linvideo_core.evaluate --model wan.safetensors --prompts prompts.safetensors \
        --artifact linearized.safetensors
The folder `--out` then holds evaluation.json, samples.png, samples.gif and velocity_error.png.
"""

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import artifact as artifact_files
from . import evaluation, report
from .adapters import AttentionSite, identify, install, restore, shapes_of
from .attention import LinearAttention
from .config import option, parse, positive, run_command, to_json
from .demo import weights_path
from .demo.judge import Judge, load_judge
from .demo.prompts import parse_prompt
from .flow import VelocityFn, make_sigmas, sample_euler
from .models.denoiser import bind_guided
from .progress import Progress, TqdmProgress, silent
from .records import RESULTS_FOLDER, format_value, write_json, write_record
from .storage import write_text
from .subject import Subject, SubjectConfig, load_subject

logger = logging.getLogger(__name__)

RECORD_PATH = RESULTS_FOLDER / "transfer_demo.json"
GUIDANCE_SCALE = 3.0
SWAPPED_SEED = 0

_NUM_SHOWN = 4
_NUM_STATE_SAMPLES, _NUM_STATE_LEVELS = 32, 10

Row = dict[str, Any]
Students = Mapping[str, contextlib.AbstractContextManager[nn.Module]]
"""Name -> a context that yields the model; `contextlib.nullcontext(model)` for a ready one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """How the models are sampled."""

    num_samples: int = option(20, "videos that each model samples")
    steps: int = option(50, "Euler steps")
    guidance_scale: float = option(GUIDANCE_SCALE, "classifier-free guidance")
    shift: float = option(3.0, "warp of the noise levels: Wan takes 3 for 480p, 5 for 720p")
    batch_size: int = option(10, "videos sampled together")

    def __post_init__(self) -> None:
        positive(self, "steps", "shift", "batch_size")
        if self.num_samples < 2:
            raise ValueError(f"--num-samples {self.num_samples} given; 2 or more are needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which student is compared, and where the evidence goes."""

    subject: SubjectConfig = dataclasses.field(default_factory=SubjectConfig)
    comparison: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    artifact: Path | None = option(None, "LINVIDEO file; none: the embedded model's own")
    out: Path = option(Path("runs/evaluate"), "folder for tables and pictures")
    record: bool = option(False, "write results/transfer_demo.json, which README shows")
    seed: int = option(0, "seed of noise and prompts")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    precision: str = option(
        "auto", "of the matrix products; auto: bf16 on cuda", choices=("auto", "fp32", "bf16")
    )

    def __post_init__(self) -> None:
        if self.subject.model is not None and self.artifact is None:
            raise ValueError("--model was given without --artifact; give the file made for it")
        if self.record and (self.subject != SubjectConfig() or self.artifact is not None):
            raise ValueError(
                "--record true was given with --model, --prompts or --artifact; the record is of "
                "the embedded model and its own file alone"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "full": {"num_samples": 1000, "batch_size": 250, "out": Path("runs/evaluate-full")},
}


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """Evidence about several models that sampled the same prompts from the same noise.

    rows: one a model, the teacher first, its measures by name.
    velocity_rows: `model`, `sigma`, `velocity_error`, `velocity_cosine` of each student.
    frames: model -> [K, F, h, w] in [0, 1] of the first few samples, on the CPU; prompts: theirs.
    """

    rows: list[Row]
    velocity_rows: list[Row]
    frames: dict[str, Tensor]
    prompts: list[str]


def compare(
    subject: Subject,
    students: Students,
    settings: CompareConfig,
    *,
    seed: int,
    precision: str = "fp32",
    progress: Progress = silent,
) -> Comparison:
    """Sample the teacher, then every student, and measure them; on the subject's device.

    A student's context is entered once, after the teacher was sampled: it may change
    `subject.model` in place as long as leaving it gives the teacher back.
    """
    bench = _Bench(subject, settings, seed=seed, precision=precision, progress=progress)
    teacher = bench.sample("teacher", subject.model, is_teacher=True)
    result = Comparison(
        rows=[bench.measure("teacher", teacher, teacher, None)],
        velocity_rows=[],
        frames={"teacher": teacher.frames[:_NUM_SHOWN].clone()},
        prompts=bench.prompts[:_NUM_SHOWN],
    )
    for name, context in students.items():
        with context as model:
            samples = bench.sample(name, model)
            velocity_rows = bench.compare_velocities(name, model)
        result.rows.append(bench.measure(name, samples, teacher, velocity_rows))
        result.velocity_rows += velocity_rows
        result.frames[name] = samples.frames[:_NUM_SHOWN].clone()
    return result


@contextlib.contextmanager
def swap(model: nn.Module, layers: Sequence[int], feature_dim: int) -> Iterator[nn.Module]:
    """Make layers linear without any training: initial feature maps, no weight changes."""
    _, sites = identify(shapes_of(model))
    chosen = [site for site in sites if site.layer in layers]
    generator = torch.Generator().manual_seed(SWAPPED_SEED)
    device = next(model.parameters()).device

    def make(site: AttentionSite) -> LinearAttention:
        linear = LinearAttention(site.num_heads, site.head_dim, feature_dim)
        linear.init_weights(generator)
        return linear.requires_grad_(False).to(device)

    originals = install(model, chosen, make)
    try:
        yield model
    finally:
        restore(model, chosen, originals)


@contextlib.contextmanager
def transfer_into(model: nn.Module, artifact: artifact_files.Artifact) -> Iterator[nn.Module]:
    """Turn a teacher into its student for a while."""
    applied = artifact_files.apply(artifact, model)
    try:
        yield model
    finally:
        applied.remove()


def save_pictures(comparison: Comparison, folder: Path) -> None:
    """Write samples.png, samples.gif and velocity_error.png."""
    report.save_strip(comparison.frames, comparison.prompts, folder / "samples.png")
    report.save_animation(comparison.frames, comparison.prompts, folder / "samples.gif")
    if comparison.velocity_rows:
        report.plot_velocity_error(comparison.velocity_rows, folder / "velocity_error.png")


def run(config: EvaluateConfig, progress: Progress = silent) -> dict[str, Any]:
    """Compare teacher, swapped and student; write tables and pictures into `config.out`.

    Returns what evaluation.json holds: `rows` and `velocity_rows` (see `Comparison`).
    Raises ValueError or FileNotFoundError, in one sentence, for bad input.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    path = config.artifact or weights_path("linearized.safetensors")
    artifact = artifact_files.load(path)
    subject = load_subject(config.subject).to(device)
    artifact_files.check(artifact, shapes_of(subject.model))
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "config.json", to_json(config))
    logger.info("comparing %s with its student on %s in %s", subject.name, device, precision)
    header = artifact.header
    students = {
        "swapped": swap(subject.model, header.layers, header.feature_dim),
        "student": transfer_into(subject.model, artifact),
    }
    comparison = compare(
        subject,
        students,
        config.comparison,
        seed=config.seed,
        precision=precision,
        progress=progress,
    )
    save_pictures(comparison, config.out)
    result = {"rows": comparison.rows, "velocity_rows": comparison.velocity_rows}
    write_json(config.out / "evaluation.json", result)
    if config.record:
        count = f"{len(header.layers)} of {header.num_layers}"
        write_record(
            RECORD_PATH,
            title=f"Embedded model, {count} layers linear, {config.comparison.num_samples} samples",
            command=describe_command(config),
            rows=comparison.rows,
            device=device,
        )
    return result


def resolve_device(name: str) -> str:
    """Return the device that "auto" stands for; refuse one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} given, which this machine lacks: {reason}") from error
    return name


def resolve_precision(name: str, device: str) -> str:
    """Return the precision that "auto" stands for."""
    if name != "auto":
        return name
    return "bf16" if device.startswith("cuda") else "fp32"


def describe_command(config: EvaluateConfig) -> str:
    """Return the command that measures a record again: every flag that decides its numbers."""
    words = ["python -m linvideo_core.evaluate"]
    for given, usual in ((config, EvaluateConfig()), (config.comparison, CompareConfig())):
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            if field.name not in ("comparison", "out", "device") and value != getattr(
                usual, field.name
            ):
                words.append(f"--{field.name.replace('_', '-')} {str(value).lower()}")
    return " ".join(words)


def show_table(rows: Sequence[Row]) -> str:
    """Lay rows out for a terminal: a line a measure, a column a model."""
    names = [name for name in rows[0] if name != "model"]
    left = max(map(len, names)) + 2
    lines = [" " * left + "".join(f"{row['model']:>12}" for row in rows)]
    for name in names:
        values = "".join(f"{format_value(row.get(name)):>12}" for row in rows)
        lines.append(f"{name.replace('_', ' '):<{left}}{values}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compare with progress bars, show the table."""
    config, is_dry_run = parse(
        EvaluateConfig, argv, description=__doc__.splitlines()[0], presets=PRESETS
    )
    if is_dry_run:
        sys.stdout.write(to_json(config))
        return
    with TqdmProgress() as progress:
        result = run(config, progress)
    sys.stdout.write(f"\n{show_table(result['rows'])}\npictures and tables: {config.out}\n")


@dataclasses.dataclass(kw_only=True)
class _Samples:
    """What one model made, on the CPU: latents, frames, what the judge sees in them, time."""

    latents: Tensor
    frames: Tensor
    features: Tensor
    digit_logits: Tensor | None
    motion_logits: Tensor | None
    seconds: float


class _Bench:
    """What all models share: prompts, noise, noise levels, the judge, the teacher's states."""

    def __init__(
        self,
        subject: Subject,
        settings: CompareConfig,
        *,
        seed: int,
        precision: str,
        progress: Progress,
    ) -> None:
        self.subject = subject
        self.settings = settings
        self.precision = precision
        self.progress = progress
        self.device = subject.prompt_embeds.device
        self.sigmas = make_sigmas(settings.steps, settings.shift)
        self.prompt_index = draw_prompts(len(subject.prompts), settings.num_samples, seed)
        self.prompts = [subject.prompts[i] for i in self.prompt_index]
        self.noise = draw_noise(subject.latent_shape, settings.num_samples, seed)
        self.judge: Judge | None = load_judge(self.device) if subject.is_demo else None
        self.labels = _read_labels(self.prompts) if subject.is_demo else None
        levels = torch.linspace(0, settings.steps - 1, min(_NUM_STATE_LEVELS, settings.steps))
        self.levels = levels.round().long().tolist()
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def bind(self, model: nn.Module, part: slice) -> VelocityFn:
        """Return the guided velocity function of a model for some of the samples."""
        prompt_embeds = self.subject.prompt_embeds[self.prompt_index[part]]
        return bind_guided(
            model,
            prompt_embeds,
            self.subject.negative_embeds.expand_as(prompt_embeds),
            self.settings.guidance_scale,
            precision=self.precision,
        )

    def sample(self, name: str, model: nn.Module, *, is_teacher: bool = False) -> _Samples:
        """Sample all prompts; the teacher's states in the first batch are kept."""
        count, size = self.settings.num_samples, self.settings.batch_size
        made: list[_Samples] = []
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            on_step = self._watch(f"sampling {name}", part, keep=is_teacher and start == 0)
            velocity_fn = self.bind(model, part)
            noise = self.noise[part].to(self.device)
            if start == 0:
                # The first call compiles and tunes kernels: that is not the model's own time.
                with torch.no_grad():
                    velocity_fn(noise, self.sigmas[:1].to(self.device).expand(len(noise)))
            started = self._clock()
            latents = sample_euler(velocity_fn, noise, self.sigmas, on_step=on_step)
            made.append(self._judge(latents, self._clock() - started))
        return _join(made)

    def compare_velocities(self, name: str, model: nn.Module) -> list[Row]:
        """Compare a student's velocity with the teacher's at the kept states."""
        states, references = (torch.stack(part) for part in zip(*self.states.values(), strict=True))
        sigmas = self.sigmas[list(self.states)]
        velocity_fn = self.bind(model, slice(0, states.shape[1]))
        errors, cosines = evaluation.velocity_error_by_sigma(
            velocity_fn, states, references, sigmas
        )
        columns = (x.tolist() for x in (sigmas, errors.mean(dim=1), cosines.mean(dim=1)))
        return [
            {"model": name, "sigma": sigma, "velocity_error": error, "velocity_cosine": cosine}
            for sigma, error, cosine in zip(*columns, strict=True)
        ]

    def measure(
        self, name: str, samples: _Samples, teacher: _Samples, velocity_rows: list[Row] | None
    ) -> Row:
        """Return the row of one model; `velocity_rows` is None for the teacher itself."""
        row: Row = {"model": name}
        statistics = evaluation.feature_statistics(samples.features)
        if self.labels is not None:
            digits, directions = self.labels
            row["digit_accuracy"] = evaluation.accuracy(samples.digit_logits, digits)
            row["motion_accuracy"] = evaluation.accuracy(samples.motion_logits, directions)
        if self.judge is not None:
            real = (self.judge.real_mean, self.judge.real_cov)
            row["frechet_to_real"] = evaluation.frechet_distance(*statistics, *real)
        of_teacher = evaluation.feature_statistics(teacher.features)
        row["frechet_to_teacher"] = (
            0.0 if samples is teacher else evaluation.frechet_distance(*statistics, *of_teacher)
        )
        distance = evaluation.sample_distance(samples.latents, teacher.latents)
        row["distance_to_teacher"] = distance.mean().item()
        row |= _measure_motion(samples.frames, teacher.frames)
        for key, perfect in (("velocity_error", 0.0), ("velocity_cosine", 1.0)):
            values = [r[key] for r in velocity_rows] if velocity_rows else [perfect]
            row[key] = sum(values) / len(values)
        return row | {"seconds": samples.seconds}

    def _watch(
        self, stage: str, part: slice, *, keep: bool
    ) -> Callable[[int, Tensor, Tensor], None]:
        batches_before = part.start // self.settings.batch_size
        num_batches = -(-self.settings.num_samples // self.settings.batch_size)
        steps = self.settings.steps

        def on_step(i: int, latents: Tensor, velocity: Tensor) -> None:
            if keep and i in self.levels:
                few = slice(0, _NUM_STATE_SAMPLES)
                self.states[i] = (latents[few].clone(), velocity[few].clone())
            self.progress(stage, batches_before * steps + i + 1, num_batches * steps)

        return on_step

    @torch.no_grad()
    def _judge(self, latents: Tensor, seconds: float) -> _Samples:
        frames = self.subject.decode(latents).float()
        if self.judge is None:
            digit_logits = motion_logits = None
            features = evaluation.latent_features(latents)
        else:
            digit_logits, motion_logits, features = (x.cpu() for x in self.judge(frames))
        return _Samples(
            latents=latents.cpu(),
            frames=frames.cpu(),
            features=features.cpu(),
            digit_logits=digit_logits,
            motion_logits=motion_logits,
            seconds=seconds,
        )

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def draw_prompts(num_prompts: int, num_samples: int, seed: int) -> list[int]:
    """Return the prompt of each sample: all of them in random order, then all of them again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-num_samples // num_prompts)
    order = [torch.randperm(num_prompts, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[:num_samples].tolist()


def draw_noise(latent_shape: tuple[int, int, int, int], num_samples: int, seed: int) -> Tensor:
    """Return noise [num_samples, C, F, H, W] on the CPU, each sample's the same at any number."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(latent_shape, generator=generator) for _ in range(num_samples)])


def _read_labels(prompts: list[str]) -> tuple[Tensor, Tensor] | None:
    """Return digits and directions [B] that prompts ask for, or None where one does not say."""
    try:
        digits, directions = torch.tensor([parse_prompt(prompt) for prompt in prompts]).T
    except ValueError as error:
        logger.warning("digit and motion accuracy are left out: %s", error)
        return None
    return digits, directions


def _measure_motion(frames: Tensor, teacher_frames: Tensor) -> Row:
    """Return motion relative to the teacher's and flicker; nothing for fewer than three frames."""
    if frames.shape[1] < 3:
        return {}
    motion, teacher_motion = (
        evaluation.motion_energy(clips).mean().item() for clips in (frames, teacher_frames)
    )
    return {
        "motion_ratio": motion / teacher_motion if teacher_motion else None,
        "flicker": evaluation.flicker(frames).mean().item(),
    }


def _join(parts: list[_Samples]) -> _Samples:
    def cat(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("latents", "frames", "features", "digit_logits", "motion_logits")
    return _Samples(**{name: cat(name) for name in names}, seconds=sum(p.seconds for p in parts))


if __name__ == "__main__":
    run_command(main)
