"""MiniMax-H3 as ComfyUI computes it: one sequence a call, never a mask, references in a payload.

Every token sees every other: text, references, audio and video are one sequence of one sample, so
linear attention runs over all of it. The payload's references are part of how the model is used.

Video and sound are one packed vector for the core and two streams for the model. As ComfyUI's
samplers do, the sound is carried on the video's schedule: at the video's noise level t the vector
holds `t / t_a` times the sound's own state at its level t_a. Then one noise level holds for the
whole vector, and its velocity is what the model returns for the carried streams.

For training, blocks and attention are computed from the same weights without what has no gradient:
ComfyUI's own write into tensors that a backward pass needs, and turn queries and keys by an
operator that has none. Before a training both are seen to give the same.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....linvideo_core.kernels.softmax import SPARSE_BLOCK
from ....linvideo_core.kernels.tiles import TokenGrid
from ....linvideo_core.models.attention import SoftmaxAttention
from ..attention_override import attend_as_pytorch
from . import PROMPT, HostFamily, Video, check_sides, given_size, refuse_mask

USUAL_SIZE = {"width": 1344, "height": 768, "frames": 124}
"""Of ComfyUI's own empty latent for this model."""

_PAYLOAD, _TAGS = "minimax_payload", "text_token_tags"
_TEXT_TAG = 1
_FRAMES_A_SECOND, _SOUND_A_SECOND = 24, 40
_SPACE_RATIO = 16
# Five latents hold 17 frames; two more, the first ones, hold 5.
_GROUP, _FRAMES_OF_GROUP, _HEAD, _FRAMES_OF_HEAD = 5, 17, 2, 5
_SHIFT_OPTIONS = "minimax_h3_"
_MAX_DIFFERENCE = 1e-2

Segments = Sequence[tuple[int, int, int]]
"""The sequence in pieces, in order: first token, end, and the row of the modulation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoundVideo(Video):
    """A video [B, C, F, H, W] with its sound [B, C, 2, T], joined to latents [B, 1, 1, 1, n].

    shapes: of one video and one sound, without B.
    sound_scale: how much larger the sound is carried at noise level 0.
    options: of the model's `transformer_options`, those that tell its noise schedules.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    sound_scale: float
    options: dict[str, Any]

    @classmethod
    def find(cls, model: Any, inputs: dict[str, Any]) -> "SoundVideo":
        """Return the video that a ModelPatcher is to learn with; see `Video.find`."""
        diffusion_model = model.model.diffusion_model
        channels = (diffusion_model.latents_dim, diffusion_model.audio_latents_dim)
        shapes = _find_shapes(channels, inputs)
        options = model.model_options.get("transformer_options", {})
        return cls(
            latent_shape=(1, 1, 1, sum(map(math.prod, shapes))),
            patch_size=tuple(diffusion_model.patch_size),
            shapes=shapes,
            sound_scale=getattr(model.get_model_object("model_sampling"), "audio_scale", 1.0),
            options={name: x for name, x in options.items() if name.startswith(_SHIFT_OPTIONS)},
        )

    @staticmethod
    def measure(shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return frames, height and width in pixels of a video's latents (C, F, H, W)."""
        _, F, H, W = shape
        num_frames = (F - _HEAD) // _GROUP * _FRAMES_OF_GROUP + _FRAMES_OF_HEAD
        return num_frames, _SPACE_RATIO * H, _SPACE_RATIO * W

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """(C, F, H, W) of the latents that become the picture."""
        return self.shapes[0]

    def count_tokens(self, num_prompt_tokens: int) -> int:
        """Return L: prompt, sound and video are one sequence."""
        sizes = zip(self.shapes[0][1:], self.patch_size, strict=True)
        num_of_video = math.prod(-(-size // side) for size, side in sizes)
        return num_prompt_tokens + math.prod(self.shapes[1][1:]) + num_of_video

    @property
    def encoding(self) -> dict[str, Any]:
        """Further arguments with which ComfyUI encodes conditioning for such latents."""
        return {"latent_shapes": [(1, *shape) for shape in self.shapes]}

    def read_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a call; a prompt's tokens get a last number, their tag plus one.

        What else differs with the prompt, the layout of the sequence, the model makes by itself.
        """
        payload = {name: x for name, x in inputs[_PAYLOAD].items() if name not in ("layout", _TAGS)}
        if "audio_scale" in payload:
            payload["audio_scale"] = self.sound_scale
        prompt, tags = inputs[PROMPT], inputs[_PAYLOAD].get(_TAGS)
        marks = prompt.new_full((1, prompt.shape[1], 1), 1 + _TEXT_TAG)
        if tags is not None:
            marks = (1 + tags).to(prompt).reshape(marks.shape)
        return {**inputs, PROMPT: torch.cat([prompt, marks], dim=-1), _PAYLOAD: payload}

    def join_prompts(self, prompts: list[Tensor]) -> Tensor:
        """Return prompts [1, S, T] as one tensor [P, longest S, T]; added tokens are all 0."""
        longest = max(prompt.shape[1] for prompt in prompts)
        pad = nn.functional.pad
        return torch.cat([pad(p, (0, 0, 0, longest - p.shape[1])) for p in prompts])

    def call(
        self,
        diffusion_model: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        options: dict[str, Any],
        inputs: dict[str, Any],
    ) -> Tensor:
        """Return the velocity of latents [B, 1, 1, 1, n], one sample after the other.

        prompt_embeds: [B, S, T] with the marks of `read_inputs`; see `Video.call` for the others.
        """
        velocities = []
        for sample, timestep, tokens in zip(latents, timesteps, prompt_embeds, strict=True):
            tokens = tokens[tokens[:, -1] > 0]
            payload = {**inputs[_PAYLOAD], _TAGS: tokens[:, -1].long() - 1}
            streams = diffusion_model(
                self._part(sample.reshape(1, -1)),
                timestep.reshape(1),
                context=tokens[None, :, :-1],
                transformer_options={**options, **self.options},
                **{_PAYLOAD: payload},
            )
            velocities.append(torch.cat([stream.flatten() for stream in streams]))
        return torch.stack(velocities).view_as(latents)

    def show(self, latents: Tensor) -> Tensor:
        """Return the video alone, [B, C, F, H, W]."""
        return self._part(latents.flatten(1))[0]

    def _part(self, packed: Tensor) -> list[Tensor]:
        """Return video and sound of packed vectors [B, n]."""
        streams = packed.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [x.unflatten(1, shape) for x, shape in zip(streams, self.shapes, strict=True)]


def _find_shapes(channels: tuple[int, int], inputs: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    if (latent := inputs.get("latent")) is not None:
        shapes = _shapes_of(latent["samples"])
        if [shape[0] for shape in shapes] != [*channels] or [*map(len, shapes)] != [4, 3]:
            raise ValueError(
                f"latents of shapes {[list(shape) for shape in shapes]} given, but this model "
                f"takes a video [{channels[0]}, frames, height, width] with its sound "
                f"[{channels[1]}, 2, length]: connect Empty MiniMax H3 AV Latent"
            )
        refuse_mask(latent)
        return shapes
    size = given_size(inputs, USUAL_SIZE)
    check_sides(size, 2 * _SPACE_RATIO)
    num_groups = max(0, -(-(size["frames"] - _FRAMES_OF_HEAD) // _FRAMES_OF_GROUP))
    num_frames = num_groups * _FRAMES_OF_GROUP + _FRAMES_OF_HEAD
    height, width = (size[side] // _SPACE_RATIO for side in ("height", "width"))
    length = round(num_frames / _FRAMES_A_SECOND * _SOUND_A_SECOND)
    return (
        (channels[0], num_groups * _GROUP + _HEAD, height, width),
        (channels[1], 2, length),
    )


def _shapes_of(samples: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a LATENT's streams, without B."""
    is_nested = getattr(samples, "is_nested", False)
    streams: Sequence[Tensor] = samples.unbind() if is_nested else [samples]
    return tuple(tuple(stream.shape[1:]) for stream in streams)


def prepare_for_training(diffusion_model: nn.Module) -> None:
    """Give each block of a copy, which nothing else uses, a forward that can be differentiated.

    Raises ValueError where this ComfyUI computes its blocks in another way.
    """
    _check_agreement(diffusion_model.blocks[0])
    for block in diffusion_model.blocks:
        block.__dict__["forward"] = MethodType(_run_block, block)


def run_attention(
    attention: nn.Module,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    rope_freqs: Tensor | None = None,
    *,
    transformer_options: Any = None,
    in_training: bool = False,
) -> Tensor | None:
    """Return what the attention's own forward gives for tokens x [L, C]; see `HostFamily`.

    rope_freqs: [1, L, 1, R, 2, 2], rotations of the first R and the next R numbers of a head.
    in_training: where it is not, None, which leaves all to the class's own forward.
    """
    if not in_training or rope_freqs is None:
        return None
    shape = (3, attention.heads, attention.head_dim)
    query, key, value = attention.qkv_proj(x).unflatten(-1, shape).unsqueeze(0).unbind(2)
    # The first column of a rotation is (cos, sin).
    cos, sin = rope_freqs[..., 0].float().unbind(-1)
    query = _norm_and_rotate(query, attention.q_norm, cos, sin)
    key = _norm_and_rotate(key, attention.k_norm, cos, sin)
    # A copy: what the three share need not wait for the backward pass.
    attended = attend(query, key, value.contiguous())
    return attention.out_proj(attended[0].flatten(1))


def _norm_and_rotate(x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm each head of x [1, L, N, D] and turn its first 2 R numbers, in fp32.

    cos, sin: [1, L, 1, R].
    """
    normed = F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)
    R = cos.shape[-1]
    first, second, rest = normed.split([R, R, normed.shape[-1] - 2 * R], dim=-1)
    turned = (first * cos - second * sin, first * sin + second * cos, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _run_block(
    self: nn.Module,
    x: Tensor,
    t_emb: Tensor,
    mod_segments: Segments,
    rope_freqs: Tensor,
    transformer_options: Any = None,
) -> Tensor:
    """Return a block's output for tokens x [L, C]; called as its class's own forward is."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.adaln_proj(t_emb)
    options = {"transformer_options": transformer_options}
    h = _modulate(self.norm1(x), shift, scale, mod_segments)
    x = _add_gated(x, gate, self.attn(h, rope_freqs=rope_freqs, **options), mod_segments)
    h = _modulate(self.norm2(x), ffn_shift, ffn_scale, mod_segments)
    return _add_gated(x, ffn_gate, self.mlp(h), mod_segments)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """Return `(1 + scale) x + shift` of tokens [L, C], each with its segment's row."""
    shift, scale = shift.to(x.dtype), 1 + scale.to(x.dtype)
    parts = zip(_split(x, segments), segments, strict=True)
    return torch.cat([part * scale[row] + shift[row] for part, (_, _, row) in parts])


def _add_gated(x: Tensor, gate: Tensor, change: Tensor, segments: Segments) -> Tensor:
    """Return `x + gate change` of tokens [L, C], each with its segment's row."""
    gate = gate.to(x.dtype)
    parts = zip(_split(x, segments), _split(change, segments), segments, strict=True)
    return torch.cat([torch.addcmul(old, new, gate[row]) for old, new, (_, _, row) in parts])


def _split(x: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    return x.split([end - start for start, end, _ in segments])


@torch.no_grad()
def _check_agreement(block: nn.Module) -> None:
    """Compare a block's own forward with ours, on a few random tokens."""
    x, t_emb, rotations = _draw_call(block)
    segments = [(0, 2, 0), (2, 6, 2)]
    options = {"optimized_attention_override": attend_as_pytorch}
    own = type(block).forward(block, x.clone(), t_emb, segments, rotations, options)
    attended = run_attention(block.attn, SoftmaxAttention(), x, rotations, in_training=True)
    own_attended = block.attn(x.clone(), rope_freqs=rotations, transformer_options=options)
    ours = _run_block(block, x, t_emb, segments, rotations, options)
    for found, expected in ((ours, own), (attended, own_attended)):
        if not (found - expected).norm() <= _MAX_DIFFERENCE * expected.norm():
            raise ValueError(
                "this ComfyUI computes MiniMax-H3 in a way that LinVideo does not know, so that no "
                "transfer can run on it: update LinVideo, or apply a saved file"
            )


def _draw_call(block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return six tokens, one time's embedding and rotations of a quarter of a head's numbers."""
    generator, like = torch.Generator().manual_seed(0), block.norm1.weight
    num_pairs = block.attn.head_dim // 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    cos, sin = draw(6, num_pairs).cos(), draw(6, num_pairs).sin()
    rotations = torch.stack([cos, -sin, sin, cos], dim=-1).view(1, 6, 1, num_pairs, 2, 2)
    return draw(6, *like.shape), draw(1, block.adaln_proj.linear.in_features), rotations


def find_grid(
    diffusion_model: nn.Module, size: tuple[int, ...], inputs: Mapping[str, Any]
) -> TokenGrid:
    """Return where the video's tokens lie: at the end, behind all others; see `HostFamily`."""
    sizes = zip(size, diffusion_model.patch_size, strict=True)
    return TokenGrid(tuple(-(-length // patch) for length, patch in sizes), before=None)


def find_sinks(options: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, int]]:
    """Return the blocks of text, references and sound, which stand before the video's.

    All queries see them exactly; those of the sound, and of what follows it, see everything so, as
    with ComfyUI's Model Sparse Attention.

    Raises RuntimeError where ComfyUI does not say what stands where.
    """
    layout = options.get("minimax_h3_layout")
    if layout is None or layout.seq_len != num_tokens:
        raise RuntimeError(
            "this ComfyUI does not tell attention where MiniMax-H3's video begins, which sparse "
            "attention must know: update ComfyUI to 0.35 or newer"
        )
    starts = {kind: start for start, _, kind in reversed(layout.segments)}
    end = -(-starts["video"] // SPARSE_BLOCK)
    first_of_sound = starts.get("audio", 0) // SPARSE_BLOCK
    return {"sink_blocks": (0, end), "sink_q": (min(first_of_sound, end), end)}


FAMILY = HostFamily(
    name="minimax_h3",
    attention_module="comfy.ldm.minimax.model",
    attention_class="Attention",
    find_joining_inputs=lambda diffusion_model, inputs: [],
    find_grid=find_grid,
    of_known_grid=("MiniMaxH3Model",),
    run_fused=run_attention,
    video=SoundVideo,
    refines_prompts=True,
    find_sinks=find_sinks,
    prepare_for_training=prepare_for_training,
)
