"""What a study of `research.crowd.experiments` still has to do, and how long that takes."""

import dataclasses
import statistics
from collections import Counter

from ..declared_runs import to_flags
from .config import WHOLE
from .study import Study

# Of one H200. A guided step of one of 40 videos together was measured on a card of its own, and
# what compiled blocks save of it. The others are guessed, of batches of 32: a warm start's 80 steps
# by its states, a training besides its steps, a step, timing a kind of training besides its steps,
# the start, and what compiling takes.
_H200_SECONDS = {
    "guided_step": 0.053 / 20,
    "stored": 6.0,
    "pool": 10.0,
    "training": 3.0,
    "step": 0.1,
    "kind": 5.0,
    "start": 20.0,
    "compile": 40.0,
}
_COMPILED = 0.036 / 0.053
# Of a call's time, what is saved where all layers are linear (half of it where half are): of whole
# clips, one at a time on a CPU.
_SAVED = 0.47


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is missing.

    trainings: how many, one of two spans as two. warm_starts: how many, by their states.
    kinds: of training, to be timed.
    videos: whole ones of the teacher that take as long as all that are sampled of students.
    shared: the teacher's own, to compare with and to learn from; stored ones count as if none were
        there.
    """

    trainings: int
    warm_starts: Counter[str]
    kinds: int
    videos: float
    shared: float


def count_work(study: Study) -> Work:
    """Count what is missing of a study."""
    comparison = study.config.comparison
    trainings, warm_starts, of_students = {}, {}, 0.0
    for each in study.missing():
        place = ""
        for training, settings in each.trainings.items():
            place += " ".join([training, *to_flags(settings)])
            trainings[each.seed, place] = each.arm.num_spans if training == each.arm.training else 1
        warm_starts[each.seed, str(each.warm_start)] = each.warm_start["states"]
        calls = each.arm.count_calls(comparison.sampler_steps) / (2 * comparison.sampler_steps)
        length = sum(each.num_frames) / WHOLE
        of_students += calls * length * (1 - _SAVED * each.arm.linear_share)
    of_teacher = 2 * sum(num_frames for _, num_frames in study.references()) / WHOLE
    return Work(
        trainings=sum(trainings.values()),
        warm_starts=Counter(warm_starts.values()),
        kinds=len(study.kinds()),
        videos=of_students * comparison.num_samples,
        shared=of_teacher * comparison.num_samples + sum(study.count_stored().values()),
    )


def predict_seconds(work: Work, study: Study, num_cards: int, device: str) -> float:
    """Return how long work takes.

    Seconds of a video and of a training are those of rows that are there, over the runs at a time
    that they shared a card with. Without any they are an H200's; on a CPU they are left out, all
    but those of the trainings' steps.
    """
    config, sampler_steps = study.config, study.config.comparison.sampler_steps
    usual = _H200_SECONDS if device == "cuda" else dict.fromkeys(_H200_SECONDS, 0.0)
    first = usual["start"] + (usual["compile"] if config.compile else 0.0)
    step = statistics.median(study.paces.values()) if study.paces else usual["step"]
    timing = work.kinds * (usual["kind"] + config.pace_steps * step)
    rows = study.rows.read()
    trained = [row["run_seconds"] / row["jobs"] for row in rows if "steps" in row]
    if trained:
        sampled = [r["seconds_per_video"] / r["jobs"] for r in rows if r["name"] == "teacher"]
        per_training, per_video = map(statistics.median, (trained, sampled))
        warm_starts = 0.0
    else:
        per_training = 60 * config.minutes_per_run + usual["training"] / config.jobs
        share = _COMPILED if config.compile else 1.0
        per_video = usual["guided_step"] * sampler_steps * share
        warm_starts = sum(count * usual[states] for states, count in work.warm_starts.items())
    each = work.trainings * per_training + work.videos * per_video + warm_starts
    # While one card times, the others sample what runs share.
    shared = max(0.0, work.shared * per_video - (num_cards - 1) * timing)
    return first + timing + (shared + each) / num_cards


def forecast(study: Study, num_cards: int, device: str) -> str:
    """Say how much is missing, and how long it takes by what is known."""
    config, work = study.config, count_work(study)
    videos = work.videos + work.shared
    seconds = predict_seconds(work, study, num_cards, device)
    is_known = device == "cuda" or any("steps" in row for row in study.rows.read())
    return (
        f"{work.trainings} trainings of {config.minutes_per_run:g} minutes are missing, and as "
        f"many videos to sample as {videos:,.0f} of the teacher: about {seconds:.0f} seconds "
        f"on {num_cards} devices, {config.jobs} runs at a time on each"
        + ("" if is_known else ", without the videos")
    )
