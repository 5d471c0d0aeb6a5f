"""The fused kernels and their operator: the definition's value and gradient, wherever they run.

Without a GPU the kernels run in Triton's interpreter, which rounds to bf16 towards zero.
"""

import functools
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from linvideo_core import kernels
from linvideo_core.kernels import custom_ops, linear_attention, reference
from tests.kernels.conftest import TOLERANCE

pytest.importorskip("triton", minversion="3.3")
pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = ("query", "key", "value", "query_map", "key_map")


def make_inputs(
    query_length: int,
    key_length: int,
    *,
    head_dim: int = 64,
    ratio: int = 1,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """Return query, key, value of two heads and both maps of trained models' size."""
    generator = torch.Generator().manual_seed(0)
    lengths = (query_length, key_length, key_length)
    tokens = [torch.randn(batch, n, 2, head_dim, generator=generator).to(dtype) for n in lengths]
    half = ratio * head_dim // 2
    maps = [torch.randn(2, head_dim, half, generator=generator) / head_dim**0.5 for _ in "qk"]
    return tuple(x.to(device).requires_grad_(True) for x in (*tokens, *maps))


def error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Return the norm of the difference over the norm of what is expected, or over `scale`."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm()) / max(float(expected.norm()), scale, 1e-12)


def assert_is_the_definition(inputs: tuple[Tensor, ...], backend: str) -> None:
    exact = [x.detach().double().requires_grad_(True) for x in inputs]
    expected = reference.linear_attention(*exact)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(expected.shape, generator=generator).to(inputs[2])
    expected.backward(upstream.double())
    found = linear_attention(*inputs, backend=backend)
    found.backward(upstream)
    dtype = inputs[2].dtype
    assert found.dtype == dtype and found.shape == expected.shape
    assert error(found.detach(), expected.detach()) < TOLERANCE[dtype]
    # With one key the output is its value: all other gradients are zero and have no scale.
    scale = max(float(x.grad.norm()) for x in exact) if inputs[1].shape[1] == 1 else 0.0
    for name, x, y in zip(NAMES, inputs, exact, strict=True):
        assert x.grad.dtype == x.dtype
        assert error(x.grad, y.grad, scale) < TOLERANCE[dtype], name


KNOWN = [
    pytest.param(head_dim, ratio, dtype, id=f"D{head_dim}-x{ratio}-{dtype}")
    for head_dim in (64, 128)
    for ratio in (1, 2)
    for dtype in TOLERANCE
    if head_dim == 64 or dtype != torch.float32
]


@pytest.mark.parametrize(("head_dim", "ratio", "dtype"), KNOWN)
def test_fused_is_the_definition_in_value_and_gradient(
    head_dim: int, ratio: int, dtype: torch.dtype, device: str
) -> None:
    settings = {"head_dim": head_dim, "ratio": ratio, "dtype": dtype, "device": device}
    lengths = (63, 130) if device == "cuda" else (5, 17)
    assert_is_the_definition(make_inputs(*lengths, batch=1, **settings), "triton")


@pytest.mark.parametrize(
    ("lengths", "batch", "dtype"),
    [
        *itertools.product([(1, 33), (33, 1)], [2], [torch.float32, torch.bfloat16]),
        pytest.param((150, 150), 1, torch.float32, id="several splits"),
    ],
)
def test_fused_is_the_definition_at_any_length(
    lengths: tuple[int, int], batch: int, dtype: torch.dtype, device: str
) -> None:
    inputs = make_inputs(*lengths, batch=batch, dtype=dtype, device=device)
    assert_is_the_definition(inputs, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one_computes_too() -> None:
    assert torch.cuda.current_device() == 0
    assert_is_the_definition(make_inputs(63, 130, device="cuda:1"), "triton")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_any_strides_give_the_same(backend: str, device: str) -> None:
    query, key, value, *maps = make_inputs(20, 20, device=device)
    expected = linear_attention(query, key, value, *maps, backend=backend)
    # One projection for all three, heads before tokens, and a last axis that is not contiguous.
    packed = torch.stack([query, key, value], dim=2)
    sliced = packed.unbind(2)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    scattered = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (query, key, value)]
    for views in (sliced, by_head, scattered):
        found = linear_attention(*views, *maps, backend=backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_fused_is_the_same_bit_for_bit_every_time(device: str) -> None:
    gradients = []
    length = 500 if device == "cuda" else 70
    for _ in range(2):
        inputs = make_inputs(length, length, batch=1, dtype=torch.bfloat16, device=device)
        output = linear_attention(*inputs, backend="triton")
        output.square().sum().backward()
        gradients.append([output.detach(), *(x.grad for x in inputs)])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_values_far_from_one_neither_overflow_nor_vanish(backend: str, device: str) -> None:
    query, key, value, *maps = make_inputs(21, 21, device=device)
    expected = reference.linear_attention(query, key, value, *maps)
    for scale in (1e-4, 1e3):
        found = linear_attention(query, key, (scale * value).half(), *maps, backend=backend)
        assert error(found, scale * expected) < TOLERANCE[torch.float16]
    sharp = [40 * x for x in maps]
    found = linear_attention(query, key, value, *sharp, backend=backend)
    assert error(found, reference.linear_attention(query, key, value, *sharp)) < 1e-4


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_query_that_meets_no_key_is_finite(backend: str, device: str) -> None:
    query, key, value, *maps = make_inputs(21, 21, device=device)
    sharp = [1000 * x for x in maps]
    inputs = [x.detach().requires_grad_() for x in (query, key, 1e3 * value, *sharp)]
    output = linear_attention(*inputs, backend=backend)
    (1e3 * output).sum().backward()
    assert output.isfinite().all() and all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_frozen_map_gets_no_gradient(backend: str, device: str) -> None:
    *tokens, query_map, key_map = make_inputs(9, 21, device=device)
    query_map.requires_grad_(False)
    linear_attention(*tokens, query_map, key_map, backend=backend).sum().backward()
    assert query_map.grad is None and key_map.grad is not None
    linear_attention(*tokens, query_map, key_map.detach(), backend=backend).sum().backward()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MAX_CHUNK_FEATURES", 2 * 2 * 64 * 17)
    assert_is_the_definition(make_inputs(100, 61), "reference")
    inputs = make_inputs(100, 61)
    chunked = linear_attention(*inputs, feature_map="hedgehog_joint", backend="reference")
    torch.testing.assert_close(chunked, reference.linear_attention(*inputs, is_joint=True))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("arguments", [("triton",), ("reference",), ("reference", True)])
def test_the_operators_keep_pytorchs_contract(arguments: tuple[str, ...], device: str) -> None:
    query, key, value, *maps = make_inputs(9, 21, dtype=torch.bfloat16, device=device)
    if True in arguments:
        maps = [m[:1].detach().expand(query.shape[2], -1, -1) for m in maps]
    inputs = (query, key, value, *maps, *arguments)
    torch.library.opcheck(custom_ops.linear_attention, inputs, test_utils=CHECKS)


def test_a_second_copy_of_the_package_computes_beside_the_first() -> None:
    """As where the pack's folder and an installed core are imported in one process."""
    path = Path(kernels.__file__)
    places = [str(path.parent)]
    spec = importlib.util.spec_from_file_location(
        "copy_of_kernels", path, submodule_search_locations=places
    )
    second = sys.modules["copy_of_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    names = {str(m.custom_ops.linear_attention) for m in (kernels, second)}
    assert len(names) == 2
    results = []
    for module in (kernels, second, kernels):
        inputs = make_inputs(9, 21)
        output = module.linear_attention(*inputs)
        output.square().sum().backward()
        results.append([output.detach(), *(x.grad for x in inputs)])
    for each in zip(*results, strict=True):
        assert torch.equal(each[0], each[1]) and torch.equal(each[0], each[2])


def test_a_map_that_heads_share_is_one_a_head_with_its_gradients_summed(device: str) -> None:
    *tokens, query_map, key_map = make_inputs(9, 21, device=device)
    N = tokens[0].shape[2]
    shared = [m[:1].detach().requires_grad_(True) for m in (query_map, key_map)]
    copies = [m.detach().repeat(N, 1, 1).requires_grad_(True) for m in shared]
    found = linear_attention(*tokens, *(m.expand(N, -1, -1) for m in shared), backend="triton")
    expected = linear_attention(*tokens, *copies, backend="triton")
    assert torch.equal(found, expected)
    for out in (found, expected):
        out.square().sum().backward()
    for one, each in zip(shared, copies, strict=True):
        torch.testing.assert_close(one.grad, each.grad.sum(dim=0, keepdim=True))


def test_a_joint_map_is_the_references_alone_and_auto_takes_it_there(device: str) -> None:
    inputs = make_inputs(9, 21, device=device)
    with pytest.raises(ValueError, match="know the feature map 'hedgehog' alone"):
        linear_attention(*inputs, feature_map="hedgehog_joint", backend="triton")
    found = linear_attention(*inputs, feature_map="hedgehog_joint")
    torch.testing.assert_close(found, reference.linear_attention(*inputs, is_joint=True))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_it_compiles_as_one_graph_and_once(backend: str, device: str) -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=frames, fullgraph=True, dynamic=False)
    def compiled(*inputs: Tensor) -> Tensor:
        return linear_attention(*inputs, backend=backend).square()

    for _ in range(2):
        inputs = make_inputs(9, 9, batch=1, device=device)
        compiled(*inputs).sum().backward()
        gradients = [x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        linear_attention(*inputs, backend=backend).square().sum().backward()
        for x, gradient in zip(inputs, gradients, strict=True):
            torch.testing.assert_close(x.grad, gradient)
    assert frames.frame_count == 1


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[object, str]:
    """What the trials of the kernels found, as in a process that is new."""
    monkeypatch.setattr(kernels, "_tried", {})
    return kernels._tried


@pytest.mark.parametrize("recorder", ["fake tensors", "torch.compile", "kept for a checkpoint"])
def test_nothing_is_tried_where_pytorch_records_what_is_computed(
    recorder: str, tried: dict[object, str], device: str
) -> None:
    def attend(*inputs: Tensor) -> Tensor:
        return linear_attention(*inputs, backend="triton")

    inputs = make_inputs(9, 9, device=device)
    if recorder == "fake tensors":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert attend(*map(mode.from_tensor, inputs)).shape == inputs[0].shape
    elif recorder == "torch.compile":
        torch._dynamo.reset()
        torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs)
    else:
        kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mul.Tensor])
        checkpoint(attend, *inputs, use_reentrant=False, context_fn=kept).sum().backward()
    assert not tried
    attend(*inputs)
    assert list(tried.values()) == [""]


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_trial_within_a_checkpoint_leaves_its_gradients(
    is_reentrant: bool, tried: dict[object, str], device: str
) -> None:
    def attend(*inputs: Tensor) -> Tensor:
        return linear_attention(*inputs, backend="triton")

    inputs = make_inputs(9, 9, device=device)
    checkpoint(attend, *inputs, use_reentrant=is_reentrant).square().sum().backward()
    assert len(tried) == 1 + is_reentrant
    plain = make_inputs(9, 9, device=device)
    attend(*plain).square().sum().backward()
    for x, y in zip(inputs, plain, strict=True):
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_recomputed_activations_and_autocast_change_nothing(backend: str, device: str) -> None:
    def gradients(*, recompute: bool, autocast: bool) -> list[Tensor]:
        inputs = make_inputs(9, 9, batch=1, device=device)

        def attend(*inputs: Tensor) -> Tensor:
            return linear_attention(*inputs, backend=backend)

        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            if recompute:
                output = checkpoint(attend, *inputs, use_reentrant=False)
            else:
                output = attend(*inputs)
        output.square().sum().backward()
        return [output.detach(), *(x.grad for x in inputs)]

    plain = gradients(recompute=False, autocast=False)
    for x, y in zip(plain, gradients(recompute=True, autocast=True), strict=True):
        assert torch.equal(x, y)


def test_queries_in_fp32_beside_values_in_bf16_are_taken(device: str) -> None:
    query, key, value, *maps = make_inputs(21, 21, device=device)
    found = linear_attention(query, key, value.bfloat16(), *maps, backend="triton")
    assert found.dtype == torch.bfloat16
    assert error(found, reference.linear_attention(query, key, value, *maps)) < 2e-2


@pytest.mark.gpu
def test_a_cuda_graph_replays_it(tried: dict[object, str]) -> None:
    inputs = make_inputs(500, 500, dtype=torch.bfloat16, device="cuda")
    inputs = [x.detach() for x in inputs]
    expected = linear_attention(*inputs)
    tried.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = linear_attention(*inputs)
    assert not tried
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "reference"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)],
)
def test_auto_is_fused_on_a_gpu_and_the_reference_on_a_cpu_whatever_triton_says(
    device: str, backend: str
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = make_inputs(63, 63, dtype=dtype, device=device)
    assert torch.equal(linear_attention(*inputs), linear_attention(*inputs, backend=backend))


@pytest.mark.parametrize(
    ("settings", "backend", "said"),
    [
        ({"head_dim": 32}, "triton", r"head dims \(64, 128\)"),
        ({"ratio": 4}, "triton", "as many or twice as many"),
        ({"head_dim": 128}, "triton", "no float32 at head dim 128"),
        ({}, "cuda", "'cuda' given; one of auto, triton, reference"),
    ],
)
def test_a_backend_is_refused_where_it_cannot_run(
    settings: dict[str, int], backend: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        linear_attention(*make_inputs(5, 5, **settings), backend=backend)


def test_dtypes_that_are_no_numbers_of_a_model_and_no_tokens_are_refused() -> None:
    query, *rest = (x.detach() for x in make_inputs(5, 5))
    for refused, words in (
        (query.to(torch.int32), "fp16, bf16 or fp32"),
        (query.to(torch.complex64), "fp16, bf16 or fp32"),
        (query.half(), "query and key alike"),
        (query[:, :0], "at least one token"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_attention(refused, *rest)
