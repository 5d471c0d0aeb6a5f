"""Wan 2.1 and 2.2, text- and image-to-video diffusion transformers, for headless use.

Parameter names and shapes are those of the published checkpoints, so official and
ComfyUI-repackaged safetensors load by key name at any width and depth. Written for one device.
Architecture: Wan technical report (arXiv 2503.20314).
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels import norm_rotary
from ..kernels.tiles import Size, TokenGrid
from .attention import SoftmaxAttention
from .image_condition import CLIP_TOKENS, ImageCondition


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Architecture of a Wan checkpoint; every field can be read off its tensors' shapes.

    image_dim: width of the CLIP embeddings that Wan 2.1's image-to-video takes; 0: it takes none.
    """

    dim: int = 1536
    num_heads: int = 12
    num_layers: int = 30
    ffn_dim: int = 8960
    text_dim: int = 4096
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    image_dim: int = 0
    eps: float = 1e-6

    @property
    def condition_channels(self) -> int:
        """How many channels of an image condition are joined to the latents; 0: text-to-video."""
        return self.in_channels - self.out_channels

    def find_grid(self, latent_shape: Sequence[int]) -> Size:
        """Return the (frames, height, width) in tokens of latents of shape (C, F, H, W)."""
        sizes = zip(latent_shape[1:], self.patch_size, strict=True)
        return tuple(-(-length // patch) for length, patch in sizes)

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim {self.dim} does not split into {self.num_heads} heads of even width"
            )


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Return sinusoids [B, dim] fp32 of timesteps [B] in [0, 1000]: cosines, then sines."""
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=timesteps.device) / (dim // 2)
    angles = torch.outer(timesteps.double(), 10000.0**-exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rotary_embedding(grid: Size, head_dim: int, device: torch.device) -> Tensor:
    """Return the 3-D rotary angles of a token grid (F, H, W) as cos and sin, [2, L, D/2] fp32.

    The D/2 frequencies are split between frame, height and width; height and width get D//6 each.
    """
    spatial = head_dim // 6
    sizes = (head_dim // 2 - 2 * spatial, spatial, spatial)
    angles = []
    for axis, (length, size) in enumerate(zip(grid, sizes, strict=True)):
        exponents = torch.arange(size, dtype=torch.float64, device=device) / size
        positions = torch.arange(length, dtype=torch.float64, device=device)
        shape = [1, 1, 1, size]
        shape[axis] = length
        angles.append(torch.outer(positions, 10000.0**-exponents).view(shape).expand(*grid, size))
    joined = rearrange(torch.cat(angles, dim=-1), "f h w d -> (f h w) d")
    return torch.stack([joined.cos(), joined.sin()]).float()


def cast_once(x: Tensor) -> Tensor:
    """Return x in autocast's precision where that is on: each product would cast it for itself."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the whole width, before the heads are split."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x [..., dim] to unit mean square, then by the weight."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class _Projections(nn.Module):
    """The q, k, v, o projections and qk-norms that self- and cross-attention share."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.attention: nn.Module = SoftmaxAttention()

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (n d) -> b l n d", n=self.num_heads)


class WanSelfAttention(_Projections):
    """Self-attention over all video tokens; `attention` is the part that LinVideo replaces."""

    def forward(self, x: Tensor, rotary: Tensor, grid: TokenGrid) -> Tensor:
        """Map x [B, L, N*D], the tokens of a grid, to [B, L, N*D]."""
        query, key = (
            norm_rotary(x, norm.weight, rotary, self.num_heads, eps=norm.eps)
            for x, norm in ((self.q(x), self.norm_q), (self.k(x), self.norm_k))
        )
        out = self.attention(query, key, self._heads(self.v(x)), grid)
        return self.o(out.flatten(2))


class WanCrossAttention(_Projections):
    """Attention from video tokens to prompt tokens, and beside it to those of an image."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.takes_image = config.image_dim > 0
        if self.takes_image:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map x [B, L, N*D] with context [B, S, N*D] to [B, L, N*D].

        context: the prompt's tokens; those of an image, where the model takes one, come first.
        """
        query = self._heads(self.norm_q(self.q(x)))
        image, context = context.tensor_split([CLIP_TOKENS * self.takes_image], dim=1)
        key = self._heads(self.norm_k(self.k(context)))
        out = self.attention(query, key, self._heads(self.v(context)))
        if self.takes_image:
            key = self._heads(self.norm_k_img(self.k_img(image)))
            out = out + self.attention(query, key, self._heads(self.v_img(image)))
        return self.o(out.flatten(2))


class WanBlock(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = WanSelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = WanCrossAttention(config)
        self.norm2 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x: Tensor, modulation: Tensor, rotary: Tensor, context: Tensor, grid: TokenGrid
    ) -> Tensor:
        """Map x [B, L, dim]; modulation [B, 6, dim] comes from the timestep."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (self.modulation + modulation).to(x.dtype).split(1, dim=1)
        )
        normed = cast_once(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        x = torch.addcmul(x, self.self_attn(normed, rotary, grid), gate1)
        x = x + self.cross_attn(cast_once(self.norm3(x)), context)
        normed = cast_once(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        return torch.addcmul(x, self.ffn(normed), gate2)


class WanHead(nn.Module):
    """Final modulated projection from tokens to patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map tokens x [B, L, dim] with time [B, dim] to patches [B, L, out_channels * patch]."""
        shift, scale = (self.modulation + time[:, None]).to(x.dtype).split(1, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(nn.Module):
    """Wan: predicts the velocity of noisy latents.

    condition: the images of an image-to-video model.
    """

    condition: ImageCondition | None = None

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_channels, dim, config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.image_dim:
            width = config.image_dim
            parts = (nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim), nn.LayerNorm(dim))
            self.img_emb = nn.ModuleDict({"proj": nn.Sequential(nn.LayerNorm(width), *parts)})
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.head = WanHead(config)

    def init_weights(self) -> None:
        """Initialise for training from scratch: zero head, small modulations, Xavier elsewhere."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for layer in (embedding[0], embedding[2]):
                nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self.head):
            nn.init.normal_(module.modulation, std=self.config.dim**-0.5)
        nn.init.zeros_(self.head.head.weight)

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Predict the velocity `noise - x0`.

        latents: [B, C, F, H, W] without the condition's channels; H and W that the patch does not
            divide are padded and cropped.
        timesteps: [B] in [0, 1000], 1000 times sigma.
        prompt_embeds: [B, S, text_dim].

        Returns [B, C, F, H, W] in the latents' dtype.
        Raises ValueError where a shape does not fit the checkpoint.
        """
        self._check(latents, prompt_embeds)
        dtype = self.patch_embedding.weight.dtype
        size = latents.shape[2:]
        padding = [(-length) % p for length, p in zip(size, self.config.patch_size, strict=True)]
        latents, prompt_embeds, image = self._join_condition(latents, prompt_embeds)
        padded = F.pad(latents, (0, padding[2], 0, padding[1], 0, padding[0]), mode="circular")
        # Under autocast the residual stream stays in the weights' own precision, as in Wan itself.
        x = self.patch_embedding(padded.to(dtype)).to(dtype)
        grid = tuple(x.shape[2:])
        # A view would keep its channels-first order through all blocks: each norm would reorder it.
        x = rearrange(x, "b d f h w -> b (f h w) d").contiguous()
        context = self.text_embedding(prompt_embeds.to(dtype))
        if image is not None:
            image = self.img_emb["proj"](image.to(x.device, dtype)).to(context.dtype)
            context = torch.cat([image.expand(len(context), -1, -1), context], dim=1)
        context = cast_once(context)
        with torch.autocast(x.device.type, enabled=False):
            time = self.time_embedding(
                timestep_embedding(timesteps, self.config.freq_dim).to(dtype)
            )
            modulation = self.time_projection(time).unflatten(1, (6, -1))
        rotary = rotary_embedding(grid, self.config.dim // self.config.num_heads, x.device)
        for block in self.blocks:
            x = block(x, modulation, rotary, context, TokenGrid(grid))
        pt, ph, pw = self.config.patch_size
        f, h, w = grid
        out = rearrange(
            self.head(x, time),
            "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)",
            f=f, h=h, w=w, pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
        return out[:, :, : size[0], : size[1], : size[2]].to(latents.dtype)

    def _join_condition(
        self, latents: Tensor, prompt_embeds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return latents [B, in_channels, F, H, W], prompts, and images as CLIP sees them."""
        if not self.config.condition_channels:
            return latents, prompt_embeds, None
        prompt_embeds, given, clip_embeds = self.condition.pick(prompt_embeds)
        given = given.to(latents).expand(len(latents), -1, -1, -1, -1)
        return torch.cat([latents, given], dim=1), prompt_embeds, clip_embeds

    def _check(self, latents: Tensor, prompt_embeds: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.config.out_channels:
            raise ValueError(
                f"latents of shape {list(latents.shape)} given; this model takes "
                f"[B, {self.config.out_channels}, F, H, W]"
            )
        if self.config.condition_channels and self.condition is None:
            raise ValueError("an image-to-video model was given no condition; it needs an image")
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != self.config.text_dim:
            raise ValueError(
                f"prompt embeddings of shape {list(prompt_embeds.shape)} given; this model takes "
                f"[B, S, {self.config.text_dim}]: encode the prompts with this model's text encoder"
            )
