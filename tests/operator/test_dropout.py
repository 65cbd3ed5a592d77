"""Dropout: the published generator, the right rate, the same mask in the backward, repeatable by the seed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from memvp_kernels import autograd, fused_ffn
from memvp_kernels.autograd import draw_seed
from memvp_kernels.backends.torch import dropout
from memvp_kernels.philox import keep_mask, philox4x32
from tests import cases, relatives, tolerance
from tests.cases import DEVICE

pytestmark = pytest.mark.device
run = functools.partial(fused_ffn, backend="torch")  # the Triton kernels' dropout is tested beside them

# Known answers of philox4x32-10 (Salmon et al. 2011, the generator's own test vectors): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    seed = torch.tensor([(key[0] | key[1] << 32) - (1 << 64 if key[1] >> 31 else 0)], device=DEVICE)
    words = philox4x32(seed, tuple(torch.tensor([c], device=DEVICE) for c in counter))  # type: ignore[arg-type]
    assert tuple(int(w) for w in words) == result


def test_mask_depends_on_token_and_slot_alone() -> None:
    seed = torch.tensor([1234567890123], device=DEVICE)
    large = keep_mask(seed, 40, 23, 0.3)
    assert torch.equal(large[:17, :10], keep_mask(seed, 17, 10, 0.3))
    assert not torch.equal(large, keep_mask(seed + 1, 40, 23, 0.3))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("draw", [keep_mask, dropout.keep_mask], ids=["philox", "torch backend"])
def test_rate(draw: Callable[..., torch.Tensor], p: float) -> None:
    keep = draw(torch.tensor([99], device=DEVICE), 500, 320, p).double()
    n = keep.numel()
    # Five standard deviations of a binomial: a fair generator fails one seed in two million, and this seed is fixed.
    assert abs(keep.mean().item() - (1 - p)) <= 5 * (p * (1 - p) / n) ** 0.5


@pytest.fixture
def fixed_seed(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    seed = torch.tensor([424242], device=DEVICE)
    monkeypatch.setattr(autograd, "draw_seed", lambda device: seed)
    return seed


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("p", [0.25, 1.0])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "memvp") for name in ("index-factored", "packed_index_lengths-plain", "lengths-factored")),
        *((name, "adem") for name in ("index-plain", "packed_index_lengths-factored")),
    ],
)
def test_replayed_exactly_in_the_backward(
    name: str, method: str, p: float, recompute: bool, fixed_seed: torch.Tensor
) -> None:
    """An order statistic comes first: it looks at scores, and dropout at activations."""
    a = relatives.build(name, method, torch.float32, DEVICE) | {"dropout_p": p, "recompute": recompute}
    rows = a["x"].shape[:-1].numel()
    tolerance.check(run, a, keep=dropout.keep_mask(fixed_seed, rows, a["visual_key"].shape[-2], p))


def test_two_calls_differ_and_the_manual_seed_repeats_them() -> None:
    a = cases.build("one_each-plain", torch.float32, DEVICE) | {"dropout_p": 0.5}
    torch.manual_seed(1)
    one, two = run(**a), run(**a)
    torch.manual_seed(1)
    again = run(**a)
    assert not torch.equal(one, two)
    assert torch.equal(one, again)


def test_zero_draws_nothing() -> None:
    a = cases.build("one_each-plain", torch.float32, DEVICE)
    torch.manual_seed(1)
    run(**a)
    after = torch.rand(3, device=DEVICE)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3, device=DEVICE))


def test_seed_stays_on_its_device() -> None:
    seed = draw_seed(DEVICE)
    assert seed.device.type == DEVICE.type
    assert seed.shape == (1,)
    assert seed.dtype == torch.int64
