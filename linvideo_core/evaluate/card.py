"""The model card of LINVIDEO files: a README.md as the Hugging Face Hub reads it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..artifact.summary import describe, title
from ..run.files import write_text
from ..run.tables import show_table

CARD_NAME = "README.md"
SAMPLES_NAMES = ("samples.gif", "samples.mp4")
"""Of a comparison's videos: in grey, and in colour."""
PROJECT = "https://github.com/linvideo/linvideo"
REPO = "YOU/REPO"
"""Stands for the repository that the files go into."""

_METADATA = """---
library_name: linvideo
pipeline_tag: text-to-video
tags: [linvideo, linear-attention, comfyui, diffusers]
base_model_relation: adapter
base_model: # fill in, such as Wan-AI/Wan2.1-T2V-1.3B
license: # fill in: that of the base model
---
"""
_INTRODUCTION = f"""
Made with [LinVideo]({PROJECT}), which replaces chosen self-attention layers of a video model by
linear attention. This is no model of its own: it is applied to the weights it was made from, and
can be removed again.
"""
_USE = """
## Use

In ComfyUI with the LinVideo nodes: put the file into `models/linvideo` and choose it in *LinVideo
Linearize*. With diffusers, `pipe` being the base model's `WanPipeline`:

```python
from linvideo_core.pipelines import apply

applied = apply(pipe, "{name}")
```

A ComfyUI workflow offers the download if its LinVideo Linearize node has this in `properties`:

```json
{properties}
```
"""


def write_card(
    folder: Path, made: Mapping[Path, Artifact], evaluation: Mapping[str, Any] | None
) -> None:
    """Write README.md into a folder, from what files say of themselves and how they were measured.

    evaluation: what `save_comparison` returns, its pictures in the same folder; none: no measures.
    """
    parts = [_METADATA, f"# {next(iter(made)).stem}\n", _INTRODUCTION]
    for path, artifact in made.items():
        facts = "\n".join(f"- **{name}**: {text}" for name, text in describe(artifact).items())
        parts.append(f"\n## {path.name}: {title(artifact.header)}\n\n{facts}\n")
    if evaluation is not None:
        parts += _describe_evaluation(folder, evaluation)
    name = next(iter(made)).name
    parts.append(_USE.format(name=name, properties=json.dumps(download_of(name), indent=1)))
    write_text(folder / CARD_NAME, "".join(parts))


def download_of(name: str) -> dict[str, Any]:
    """Return the node's `properties` by which ComfyUI offers to download a file."""
    url = f"https://huggingface.co/{REPO}/resolve/main/{name}"
    return {"models": [{"name": name, "url": url, "directory": "linvideo"}]}


def upload_commands(folder: Path, paths: list[Path]) -> str:
    """Return the commands of huggingface_hub that publish files with the card of a folder."""
    patterns = [CARD_NAME, "evaluation.json", "*.png", *SAMPLES_NAMES]
    included = " ".join(f'--include "{pattern}"' for pattern in patterns)
    lines = [f"hf upload {REPO} {path}" for path in paths]
    return "\n".join([f"hf upload {REPO} {folder} . {included}", *lines]) + "\n"


def _describe_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> Iterator[str]:
    settings, rows = evaluation["settings"], evaluation["rows"]
    frames = "decoded videos" if evaluation.get("is_decoded") else "the mean latent channel"
    yield (
        f"\n## Measured\n\n{settings['num_samples']} videos a model, {settings['steps']} steps of "
        f"Euler, guidance {settings['guidance_scale']:g}, shift {settings['shift']:g}; motion and "
        f"spectra of {frames}. What each measure says: [training.md]({PROJECT}/blob/main/docs/"
        f"training.md#compare).\n\n```\n{show_table(rows)}```\n\n"
    )
    for name in (*SAMPLES_NAMES, "samples.png", "velocity_error.png", "layer_scores.png"):
        if (folder / name).exists():
            yield f"[{name}]({name})\n" if name.endswith(".mp4") else f"![{name}]({name})\n"
