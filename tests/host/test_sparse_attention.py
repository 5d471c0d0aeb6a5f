"""ComfyUI's Model Sparse Attention before or after ours: linear layers are linear, others sparse.

Its kernels want a GPU and long sequences. Here PyTorch's attention stands in for them, of which the
tests are told by the layers that it serves.
"""

import contextlib
import unittest
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import comfy.sample
import torch
from comfy.ldm.modules.attention import attention_pytorch
from linvideo_pack.nodes.patching.apply import linearize
from stage import collect_warnings, complaint
from torch import Tensor, nn
from variants import FHW, build, make_artifact, minimax_h3, random_tensor

try:
    import comfy_extras.nodes_sparse_attention as code
except ImportError:
    code = None

_WAN = {"dim": 256, "ffn_dim": 96, "num_heads": 2, "num_layers": 3, "cross_attn_norm": True}


def _wan() -> tuple[Any, Tensor, int]:
    patcher = build("comfy.ldm.wan.model", "WanModel", _WAN)
    return patcher, random_tensor(1, 16, *FHW), 4096


def _h3() -> tuple[Any, Any, int]:
    return *minimax_h3(), 40


CASES = {"wan": _wan, "minimax_h3": _h3}
"""What makes a model of three layers, its noise and the width of its prompts."""


@contextlib.contextmanager
def _sparse_layers() -> Iterator[list[int]]:
    """Let the node's kernels run here; the list holds the layers that they serve, in order."""
    if code is None:
        raise unittest.SkipTest("needs ComfyUI >= 0.35.0: Model Sparse Attention")
    served: list[int] = []

    def h3(attention: Any, x: Tensor, freqs: Tensor, options: dict, _: Any, index: int) -> Tensor:
        served.append(index)
        options = {**options, "optimized_attention_override": lambda f, *a, **k: f(*a, **k)}
        return type(attention).forward(attention, x, freqs, transformer_options=options)

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        served.append(-1)
        by_head = (x.transpose(1, 2) for x in (q, k, v))
        options = {"skip_reshape": True, "skip_output_reshape": True}
        return attention_pytorch(*by_head, q.shape[2], **options).transpose(1, 2)

    kernels = SimpleNamespace(sol_attn=attend)
    stand_ins = {
        "h3_eligible": lambda *_: True,
        "h3_sparse_attention": h3,
        "ck": kernels,
        "_ineligible": lambda q, k, v, _: None if q.shape == k.shape else "cross-attention",
    }
    kept = {name: getattr(code, name) for name in stand_ins}
    vars(code).update(stand_ins)
    try:
        yield served
    finally:
        vars(code).update(kept)


def _sparse(model: Any) -> Any:
    selection = {"selection": "sol-attn", "tau": 1.3}
    window = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}
    return code.BlockSparseAttention.execute(model, selection, **window).result[0]


def _sample(model: Any, noise: Any, width: int, steps: int = 1) -> list[Tensor]:
    conditioning = [[random_tensor(1, 5, width, seed=4), {}]]
    settings = (steps, 1.0, "euler", "simple", conditioning, conditioning, noise * 0.5)
    latents = comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=1)
    return latents.unbind() if latents.is_nested else [latents]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def test_before_or_after_it_linear_layers_are_linear(case: str) -> None:
    patcher, *inputs = CASES[case]()
    artifact = make_artifact(patcher)
    expected = _sample(linearize(patcher, artifact), *inputs)
    with _sparse_layers() as served:
        softmax = _difference(_sample(_sparse(patcher), *inputs), expected)
        assert len(served) == 3, served
        with collect_warnings() as messages:
            for model in (
                _sparse(linearize(patcher, artifact)),
                linearize(_sparse(patcher), artifact),
            ):
                served.clear()
                difference = _difference(_sample(model, *inputs), expected)
                print(f"{difference:.1e} from linear layers, of softmax ones {softmax:.1e}")
                # The node rounds Wan's queries, keys and values to bf16.
                assert difference <= softmax / 10, (difference, softmax)
                # Layers 0 and 2 are linear.
                assert served == [1 if case == "minimax_h3" else -1], served
    assert not any("not run" in message for message in messages), messages


def test_first_steps_that_run_the_model_as_it_came_in_are_sparse_in_every_layer() -> None:
    patcher, *inputs = CASES["minimax_h3"]()
    with _sparse_layers() as served:
        model = linearize(_sparse(patcher), make_artifact(patcher), keep_first_steps=1)
        _sample(model, *inputs, steps=2)
    assert served == [0, 1, 2, 1], served


def test_a_node_that_computes_a_layers_attention_itself_ends_every_sampling() -> None:
    for case, name in (("wan", "self_attn.q"), ("minimax_h3", "attn.qkv_proj")):
        try:
            patcher, *inputs = CASES[case]()
        except unittest.SkipTest:
            continue
        model = linearize(patcher, make_artifact(patcher))
        project = model.model.diffusion_model.blocks[2].get_submodule(name)

        def replace(args: dict, _: dict, project: nn.Module = project) -> dict:
            project(torch.zeros(1, project.in_features).to(args["img"]))
            return args

        model.set_model_patch_replace(replace, "dit", "double_block", 2)
        for _ in range(2):
            assert "layer 2 was run 0 times" in complaint(RuntimeError, _sample, model, *inputs)
        assert not project._forward_pre_hooks
