"""qk-norm and rotary embedding in one pass: the definition's value and gradient, anywhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from linvideo_core.kernels import norm_rotary
from linvideo_core.kernels.custom_ops import norm_rotary as fused
from tests.kernels.conftest import DEVICES

pytest.importorskip("triton", minversion="3.3")
ALL_DEVICES = [
    *DEVICES,
    # Not the current one.
    pytest.param(
        "cuda:1",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
        ],
    ),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_inputs(
    length: int, num_heads: int, head_dim: int = 128, *, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x of two videos, weight and rotary."""
    generator = torch.Generator().manual_seed(0)
    width = num_heads * head_dim
    x = torch.randn(2, length, width, generator=generator).to(device, dtype)
    weight = 1 + 0.2 * torch.randn(width, generator=generator)
    angles = 7 * torch.rand(length, head_dim // 2, generator=generator)
    rotary = torch.stack([angles.cos(), angles.sin()]).to(device)
    return x.requires_grad_(True), weight.to(device, dtype).requires_grad_(True), rotary


def definition(x: Tensor, weight: Tensor, rotary: Tensor, num_heads: int) -> Tensor:
    """Normalise and turn complex numbers, in fp64."""
    normed = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    pairs = torch.view_as_complex(normed.unflatten(-1, (num_heads, -1, 2)))
    turned = pairs * torch.complex(*rotary.double())[:, None]
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("device", ALL_DEVICES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("length", "num_heads"), [(1, 1), (9, 3), (2, 40)])
def test_it_is_its_definition_in_value_and_gradient(
    length: int, num_heads: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    inputs = make_inputs(length, num_heads, dtype=dtype, device=device)
    exact = [x.detach().double().requires_grad_(True) for x in inputs]
    expected = definition(*exact, num_heads)
    found = norm_rotary(*inputs, num_heads, backend=backend)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(expected.shape, generator=generator).to(found)
    expected.backward(upstream.double())
    found.backward(upstream)
    assert found.dtype == dtype and found.shape == expected.shape
    pairs = [
        (found, expected),
        *((x.grad, y.grad) for x, y in zip(inputs[:2], exact, strict=False)),
    ]
    for x, y in pairs:
        assert (x.double() - y).norm() <= TOLERANCE[dtype] * y.norm()


@pytest.mark.parametrize("device", ALL_DEVICES)
def test_a_slice_of_one_projection_is_read_in_place(device: str) -> None:
    x, weight, rotary = make_inputs(21, 2, dtype=torch.float32, device=device)
    packed = torch.cat([x, 2 * x, 3 * x], dim=2)
    found = norm_rotary(
        packed[:, :, x.shape[2] : 2 * x.shape[2]], weight, rotary, 2, backend="triton"
    )
    # The norm takes the factor away again.
    torch.testing.assert_close(found, norm_rotary(x, weight, rotary, 2, backend="triton"))


@pytest.mark.parametrize("device", ALL_DEVICES)
def test_rotation_matrices_are_read_in_place(device: str) -> None:
    x, weight, rotary = make_inputs(21, 2, dtype=torch.float32, device=device)
    cos, sin = rotary
    matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    column = matrices[..., 0].movedim(-1, 0)
    found = norm_rotary(x, weight, column, 2, backend="triton")
    expected = norm_rotary(x, weight, rotary, 2, backend="triton")
    assert not column.is_contiguous() and torch.equal(found, expected)


@pytest.mark.parametrize("device", ALL_DEVICES)
def test_the_operator_keeps_pytorchs_contract(device: str) -> None:
    inputs = make_inputs(9, 2, dtype=torch.float32, device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused, (*inputs, 2, 1e-6), test_utils=checks)


@pytest.mark.parametrize("device", ALL_DEVICES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_it_compiles_as_one_graph(backend: str, device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, weight, rotary = make_inputs(9, 2, dtype=torch.float32, device=device)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        return norm_rotary(x, weight, rotary, 2, backend=backend)

    expected = norm_rotary(x, weight, rotary, 2, backend=backend)
    torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, rotary = make_inputs(9, 2, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"\[B, L, 3 D\]"):
        norm_rotary(x, weight, rotary, 3)
    with pytest.raises(ValueError, match=r"\[2, 9, 64\] are expected"):
        norm_rotary(x, weight, rotary[:, :5], 2)
    with pytest.raises(ValueError, match=r"\[256\] and"):
        norm_rotary(x, weight[:-1], rotary, 2)
