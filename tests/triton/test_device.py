"""The device functions that the kernels share, each alone: activations, the dropout mask, the geometry of sequences, forming memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memvp_kernels import reference
from memvp_kernels.backends.triton.device import activations, segments
from memvp_kernels.backends.triton.device.operands import POINTER, TMA, TMA_TRANSPOSED
from memvp_kernels.backends.triton.kernels.materialise import materialise_memory, shared_operand
from memvp_kernels.backends.triton.runtime import launch, tma
from tests import tolerance
from tests.cases import DEVICE

pytestmark = pytest.mark.device


@triton.jit
def activation_kernel(z, out, same, slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_z = tl.load(z + o)
    b_out, b_slope = activations.activate_derivative(b_z, ACTIVATION)
    tl.store(out + o, activations.activate(b_z, ACTIVATION))
    tl.store(same + o, b_out)
    tl.store(slope + o, b_slope)


#: The same function in PyTorch's float32, as one operation and by its formula in one or two ways: their error is the measure.
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "relu": (F.relu,),
    "gelu": (F.gelu, lambda z: reference.activate("gelu", z)),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z: reference.activate("gelu_tanh", z),
        lambda z: z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)),
    ),
    "silu": (F.silu, lambda z: reference.activate("silu", z)),
}
if DEVICE.type == "cuda":
    # The exponential of a GPU is 2^(z · log2 e), whose error grows with |z|: the rounded product is the exponent.
    def _sigmoid(z: Tensor) -> Tensor:
        return 1 / (1 + torch.exp2(-z * math.log2(math.e)))

    FORMS["silu"] += (lambda z: z * _sigmoid(z),)
    FORMS["gelu_tanh"] += (lambda z: z * _sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)),)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation_and_derivative(name: str) -> None:
    z = torch.cat([torch.linspace(-12, 12, 2**16 - 4), torch.tensor([0.0, -100.0, 100.0, float("nan")])]).to(DEVICE)
    out, same, slope = (torch.empty_like(z) for _ in range(3))
    activation_kernel[(16,)](z, out, same, slope, name, 2**12)
    assert torch.equal(out[:-1], same[:-1])

    def derived(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        point = z.to(dtype).requires_grad_()
        value = function(point)
        return value.detach(), torch.autograd.grad(value[:-1].sum(), point)[0]

    exact = derived(lambda t: reference.activate(name, t), torch.float64)
    theirs = [derived(form, torch.float32) for form in FORMS[name]]
    # Range by range: in one sum over all the values of an activation's flat side would hide behind those of the steep one.
    for low, high in itertools.pairwise((-101, -12.5, -6, -2, -0.5, 0.5, 2, 6, 12.5, 101)):
        here = (z >= low) & (z < high)
        for i, (what, mine) in enumerate((("value", out), ("slope", slope))):
            own = [t[i][here] for t in theirs]
            tolerance.assert_within_twice(mine[here], exact[i][here], own, f"{what} in [{low}, {high})")
    assert out[-1].isnan()


@triton.jit(do_not_specialize=["sequence", "S", "R"])
def reading_kernel(out, index, lengths, sequence, S, R, M: tl.constexpr):
    row = segments.memory_row(sequence, (None, index, lengths, 0, 0, S, R))
    tl.store(out, row)
    tl.store(out + 1, segments.valid_slots(row, lengths, M))


@pytest.mark.parametrize(
    ("index", "lengths", "expected"),
    [
        (None, None, (1, 7)),
        ([5, 2, 0], [1, 2, 3], (2, 3)),
        ([0, -1, 0], None, (-1, 0)),
        ([0, 3, 0], [7, 7, 7], (-1, 0)),
        (None, [7, 8, 7], (1, 0)),
        (None, [7, -2, 7], (1, 0)),
    ],
)
def test_what_is_out_of_range_is_no_memory(
    index: list[int] | None, lengths: list[int] | None, expected: tuple[int, int]
) -> None:
    def ints(values: list[int] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)

    out = torch.full((2,), -9, dtype=torch.int32, device=DEVICE)
    reading_kernel[(1,)](out, ints(index), ints(lengths), 1, 3, 3, 7)
    assert tuple(out.tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_memory_is_formed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    memory = torch.randn(3, 5, 37, device=DEVICE).transpose(0, 1)
    position = torch.randn(3, 37, device=DEVICE)
    lengths = torch.tensor([3, 0, 2, -1, 9], dtype=torch.int32, device=DEVICE)
    memory[0, 1, 0] = memory[2, 2, 5] = float("nan")
    rows = materialise_memory(memory, position, lengths, dtype, descriptors=True)
    expected = (memory + position).to(dtype)
    for row, slots in enumerate([3, 0, 2, 0, 0]):
        expected[row, slots:] = 0
    assert torch.equal(rows.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_memory_that_needs_nothing_is_not_copied() -> None:
    memory = torch.randn(2, 5, 40, device=DEVICE)
    assert materialise_memory(memory, None, None, torch.float32, descriptors=True) is memory
    basis = memory[0]
    assert shared_operand(basis, None, torch.float32) is basis
    unaligned = torch.randn(2, 5, 41, device=DEVICE)[..., 1:]
    assert materialise_memory(unaligned, None, None, torch.float32, descriptors=False) is unaligned
    assert tma.supports_tma(materialise_memory(unaligned, None, None, torch.float32, descriptors=True))


def test_a_pair_of_weights_needs_no_packing() -> None:
    storage = torch.randn(5, 8, 16, device=DEVICE)
    first, second = storage[3], storage[1]
    assert tma.can_pair(first, second)
    described = tma.make_pair_descriptor(first, second, (8, 16))
    assert described.base.data_ptr() == second.data_ptr()
    assert (described.shape, described.strides) == ([2, 8, 16], [2 * 8 * 16, 16, 1])
    assert not tma.can_pair(first, first)
    assert not tma.can_pair(first, storage[1].T.contiguous().T)


def test_what_a_descriptor_can_read() -> None:
    x = torch.randn(6, 40, device=DEVICE)
    assert tma.supports_tma(x)
    assert [tma.load_mode(t) for t in (x, x.T, x[:, ::2])] == [TMA.value, TMA_TRANSPOSED.value, POINTER.value]
    assert tma.load_mode(x, device_has_tma=False) == POINTER.value
    assert not tma.supports_tma(x[:, 1:])
    assert not tma.supports_tma(torch.randn(6, 41, device=DEVICE))
    assert not tma.supports_tma(x[:0])
    assert not tma.supports_tma(x[:1].expand(6, 40))
    assert tma.supports_tma(launch.empty_rows(6, 41, x))


@pytest.mark.parametrize("shape", [(6, 40), (1, 40), (6, 41), (3, 5, 40), (1, 1, 41)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_descriptor_is_the_one_that_triton_would_check(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Made without its constructor, which would refuse what `load_mode` refuses."""
    padded = torch.randn(*shape[:-1], 48, device=DEVICE).to(dtype)[..., : shape[-1]]
    forms = [(padded, TMA.value, padded)] + ([(padded.T, TMA_TRANSPOSED.value, padded)] if len(shape) == 2 else [])
    for tensor, form, stored in forms:
        assert tma.load_mode(tensor) == form
        block = tuple(16 * 2**i for i in range(len(shape)))
        out = tma.make_descriptor(tensor, block, form)
        strides = [s if n > 1 else out.strides[i] for i, (n, s) in enumerate(zip(shape, stored.stride(), strict=True))]
        checked = TensorDescriptor(stored, list(shape), strides, list(block if form == TMA.value else block[::-1]))
        for field in dataclasses.fields(TensorDescriptor):
            if field.name != "base":
                assert getattr(out, field.name) == getattr(checked, field.name), field.name
        assert out.base.data_ptr() == stored.data_ptr()


def test_what_is_remembered_of_an_operand_is_not_its_address() -> None:
    """A weight of one layout at two addresses, one of them unaligned, and another layout at the first one's address."""
    storage = torch.randn(2, 6 * 48, device=DEVICE)
    first, second = (s[: 6 * 40].view(6, 40) for s in storage)
    assert tma.make_descriptor(first, (16, 16)).base is first
    assert tma.make_descriptor(second, (16, 16)).base is second
    assert tma.make_descriptor(storage[0].view(6, 48), (16, 16)).shape == [6, 48]
    assert tma.supports_tma(first)
    assert not tma.supports_tma(storage[0][1 : 1 + 6 * 40].view(6, 40))
