"""The decode kernels' source, executed on the CPU thread by thread, against the float64 reference by the 2x rule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests import tolerance
from tests.csrc import decode_cases
from tests.csrc.decode_cases import BF16, FP16, FP32, SMALL, make, small
from tests.csrc.emulate_decode import ACTIVATIONS, FORMS, Case, DecodeLibrary, EmulationError, Params, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library() -> DecodeLibrary:
    return DecodeLibrary()


def result(library: DecodeLibrary, arguments: dict[str, Any], **how: Any) -> torch.Tensor:
    case = Case(arguments)
    library.run(case, **how)
    return case.y


@pytest.mark.parametrize("form", ["pdl", "cooperative"])
@pytest.mark.parametrize("name", SMALL)
def test_matches_float64(library: DecodeLibrary, name: str, form: str) -> None:
    case = small(name, form=form)
    library.run(case, seed=3)
    case.check()


@pytest.mark.parametrize(
    "sizes",
    decode_cases.SWEEP,
    ids=lambda s: "-".join(str(s[k]) for k in ("tokens", "width", "pairs", "slots", "rank")),
)
@pytest.mark.slow
def test_sweep(library: DecodeLibrary, sizes: dict[str, Any]) -> None:
    dtype = BF16 if sizes["seed"] % 2 else FP16
    form = "cooperative" if sizes["pairs"] % 3 else "pdl"
    case = Case(make(**sizes, dtype=dtype), multiprocessors=1 + sizes["tokens"] % 5, form=form)
    library.run(case, seed=sizes["seed"] + 1, resident=1 + sizes["width"] % 6)
    case.check()


@pytest.mark.parametrize("form", ["pdl", "cooperative"])
@pytest.mark.parametrize("name", ["long_rows", "materialised", "factored", "odd_factored"])
def test_the_same_bits_under_any_schedule(library: DecodeLibrary, name: str, form: str) -> None:
    case, seen, early = small(name, form=form), set(), 0
    schedules = [("forward", 1, 4), ("reverse", 1, 4), *(("random", seed, 1 + seed) for seed in range(1, 7))]
    for order, seed, resident in schedules:
        case.y.fill_(float("nan"))
        early += library.run(case, order=order, seed=seed, resident=resident)
        seen.add(case.y.view(torch.int16).numpy().tobytes())
    assert len(seen) == 1
    assert (early > 0) == (library.plan(case.params)["cooperative_blocks"] == 0), (
        "no launch began before the one ahead of it had ended: the order that the device may take was not tried"
    )


@pytest.mark.parametrize(("activation", "gated"), list(itertools.product(ACTIVATIONS, (True, False))))
def test_activations(library: DecodeLibrary, activation: str, gated: bool) -> None:
    other = {"relu": "silu", "gelu": "relu", "gelu_tanh": "gelu", "silu": "gelu_tanh"}[activation]
    case = Case(
        make(
            tokens=2,
            width=16,
            pairs=24,
            gated=gated,
            slots=9,
            rank=8,
            positions=True,
            bias=True,
            activation=activation,
            visual_activation=other,
        )
    )
    library.run(case)
    case.check()


@pytest.mark.parametrize(("core", "basis"), [(FP32, BF16), (BF16, FP32), (FP32, FP32)])
def test_each_part_of_the_memory_may_be_wider(library: DecodeLibrary, core: torch.dtype, basis: torch.dtype) -> None:
    arguments = make(tokens=3, width=72, pairs=24, slots=18, rank=16, positions=True, memory_dtype=FP32)
    for name in ("visual_key", "visual_value", "value_position"):
        arguments[name] = arguments[name].to(core)
    for name in ("visual_basis", "key_position"):
        arguments[name] = arguments[name].to(basis)
    case = Case(arguments)
    assert library.is_fast(case)
    library.run(case)
    case.check()


@pytest.mark.parametrize("rank", [None, 16])
def test_out_of_range_means_no_memory(library: DecodeLibrary, rank: int | None) -> None:
    common = {
        "tokens": 4,
        "width": 40,
        "pairs": 24,
        "slots": 18,
        "images": 3,
        "rank": rank,
        "positions": True,
        "residual": True,
    }
    wrong = result(library, make(**common, index=[7, -5, 1, 2], lengths=[18, 19, -1]))
    text = make(**common, index=[-1, -1, -1, -1])
    assert torch.equal(wrong, result(library, text))
    assert torch.equal(
        wrong,
        result(
            library,
            {k: v for k, v in text.items() if not k.startswith(("visual", "key_p", "value_p"))}
            | {"x": text["x"][:, 0], "residual": text["residual"][:, 0]},
        ),
    )


def test_tokens_outside_of_every_sequence(library: DecodeLibrary) -> None:
    arguments = make(
        tokens=6, width=40, pairs=24, slots=18, images=1, rank=8, positions=True, cu_seqlens=[2, 4], index=[0]
    )
    out = result(library, arguments)
    inside = {**arguments, "x": arguments["x"][2:4], "cu_seqlens": torch.tensor([0, 2])}
    outside = {k: v for k, v in arguments.items() if not k.startswith(("visual", "key_p", "value_p", "cu"))}
    assert torch.equal(out[2:4], result(library, inside))
    assert torch.equal(out[[0, 1, 4, 5]], result(library, outside)[[0, 1, 4, 5]])


@pytest.mark.parametrize("rank", [None, 16])
def test_nan_stays_with_those_who_read_it(library: DecodeLibrary, rank: int | None) -> None:
    arguments = make(tokens=3, width=40, pairs=24, slots=18, images=3, rank=rank, lengths=[18, 18, 5], index=[0, 1, 2])
    clean = result(library, arguments)
    for name in ("visual_key", "visual_value"):
        arguments[name][0, 3] = float("nan")  # read by sequence 0
        arguments[name][2, 5] = float("nan")  # past the length of sequence 2
    out = result(library, arguments)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], clean[1:])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("rank", [None, 16])
def test_nan_in_what_all_share_stays_with_those_who_read_it(
    library: DecodeLibrary, rank: int | None, dtype: torch.dtype
) -> None:
    """Rows of the positions past a token's slots, and for a token without memory all of them and the basis."""
    arguments = make(
        tokens=3, width=72, pairs=24, slots=18, images=2, rank=rank, positions=True, lengths=[18, 5], index=[0, 1, -1],
        memory_dtype=dtype, residual=True,
    )  # fmt: skip
    exact, theirs = Case(arguments).expected
    for name in ("key_position", "value_position"):
        arguments[name][7] = float("inf")  # a slot that only sequence 0 has
    out = result(library, arguments)
    assert not out[0].isfinite().any()
    tolerance.assert_within_twice(out[1:], exact[1:], [t[1:] for t in theirs])
    for name in ("key_position", "value_position", *(("visual_basis",) if rank else ())):
        arguments[name].fill_(float("nan"))
    out = result(library, arguments)
    assert out[:2].isnan().all()
    tolerance.assert_within_twice(out[2:], exact[2:], [t[2:] for t in theirs])


def test_inf_and_nan_in_weights_propagate(library: DecodeLibrary) -> None:
    arguments = make(tokens=2, width=40, pairs=24, gated=False, activation="relu")
    arguments["key"][5, 3] = float("nan")
    assert result(library, arguments).isnan().all()


@pytest.mark.parametrize("sizes", [
    {"tokens": 0}, {"tokens": 0, "slots": 5}, {"pairs": 0}, {"slots": 3, "images": 0, "index": [-1] * 3}, {"slots": 3, "lengths": [0, 0]},
    {"slots": 3, "rank": 8, "lengths": [0, 0]}, {"pairs": None, "slots": 3, "index": [-1] * 3}, {"pairs": None, "slots": 3, "rank": 8, "index": [-1] * 3},
    {"width": 8, "pairs": 8, "tokens": 1}, {"width": 1, "pairs": 1, "slots": 1, "rank": 1, "gated": False},
], ids=str)  # fmt: skip
def test_empty_and_smallest(library: DecodeLibrary, sizes: dict[str, Any]) -> None:
    case = Case(make(**{"tokens": 3, **sizes}))
    library.run(case)
    if case.y.numel():
        case.check()


def test_any_strides(library: DecodeLibrary) -> None:
    arguments = make(tokens=3, width=40, pairs=24, slots=18, images=2, rank=8, positions=True, residual=True)
    arguments["key"] = arguments["key"].T.contiguous().T
    arguments["gate"] = torch.stack([arguments["gate"]] * 2, 1)[:, 1]
    arguments["value"] = torch.stack([arguments["value"]] * 2, 2)[:, :, 0]
    arguments["visual_key"] = arguments["visual_key"][:1].expand(2, 18, 8)
    arguments["visual_value"] = arguments["visual_value"].transpose(0, 2).contiguous().transpose(0, 2)
    arguments["residual"] = arguments["residual"].expand(3, 1, 40)[..., ::2].repeat_interleave(2, -1)
    case = Case(arguments)
    assert not library.is_fast(case)
    library.run(case)
    case.check()


def test_strided_output_leaves_its_surroundings_alone(library: DecodeLibrary) -> None:
    arguments = make(tokens=3, width=40, pairs=24, slots=18, rank=8)
    buffer = torch.full((4, 64), 7.0, dtype=BF16)
    library.run(Case(arguments, y=buffer[:3, :40]))
    assert torch.equal(buffer[:3, :40], result(library, arguments))
    assert (buffer[3] == 7).all() and (buffer[:, 40:] == 7).all()


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 40, 132])
def test_any_number_of_multiprocessors(library: DecodeLibrary, multiprocessors: int) -> None:
    case = Case(make(tokens=3, width=136, pairs=200, slots=18, rank=8, positions=True), multiprocessors=multiprocessors)
    library.run(case)
    case.check()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 65}, "at most 64 tokens"),
        ({"type": 2}, "bfloat16 or float16"),
        ({"key_type": 1}, "one dtype"),
        ({"bias_type": 1}, "dtype of x or float32"),
        ({"length": 0}, "length"),
        ({"width": -1}, "negative"),
        ({"multiprocessors": 0}, "multiprocessors"),
        ({"no_value": True}, "key and value"),
        ({"no_visual_value": True}, "visual_key and visual_value"),
        ({"no_key": True}, "go together"),
        ({"no_x": True}, "x is missing"),
    ],
)  # fmt: skip
def test_limits_are_named(library: DecodeLibrary, change: dict[str, Any], says: str) -> None:
    case = Case(make(tokens=3, slots=18, bias=True))
    p = case.params
    for name, value in change.items():
        if name == "key_type":
            p.key.type = value
        elif name == "bias_type":
            p.key_bias.type = value
        elif name.startswith("no_"):
            getattr(p, name[3:]).data = None
        else:
            setattr(p, name, value)
    text = library.unsupported(case)
    assert text is not None and says in text
    with pytest.raises(EmulationError, match=says):
        library.run(case)


def llama(tokens: int, width: int, pairs: int, multiprocessors: int) -> Params:
    """A factored step of these sizes, with addresses that nobody reads."""
    p = Case(make(tokens=1, width=8, pairs=8, slots=8, rank=8, positions=True)).params
    p.tokens = p.sequences = p.memories = tokens
    p.width, p.pairs, p.slots, p.rank, p.length, p.multiprocessors = width, pairs, 320, 136, 1, multiprocessors
    p.value.strides[1] = pairs
    for name in ("x", "key", "gate", "visual_basis", "key_position", "value_position"):
        getattr(p, name).data, getattr(p, name).strides[0] = 4096, width
    p.value.data = 4096
    return p


@pytest.mark.parametrize("multiprocessors", [46, 108, 114, 132, 148])
@pytest.mark.parametrize(("width", "pairs"), [(2048, 5632), (4096, 11008), (4096, 14336), (5120, 13824), (8192, 28672)])
def test_plan_keeps_every_multiprocessor_busy(
    library: DecodeLibrary, width: int, pairs: int, multiprocessors: int
) -> None:
    for tokens in (1, 4, 16, 64):
        params = llama(tokens, width, pairs, multiprocessors)
        params.shared_bytes = 100 << 10  # the smallest chip
        least = library.plan(params)["first_shared"]
        assert least <= 98 << 10
        params.shared_bytes = 228 << 10
        plan = library.plan(params)
        assert plan["second_shared"] <= 98 << 10
        assert plan["first_shared"] + plan["second_shared"] + 2048 <= 228 << 10, "one block of each does not fit"
        assert (plan["first_shared"] > least) == (tokens == 64), "room for one more stage"
        for pipeline, row_pairs, k in (("hidden", pairs, width), ("value", width // 2, pairs)):
            each, blocks, splits, slices = (
                plan[f"{pipeline}_{number}"]
                for number in ("pairs_per_block", "row_blocks", "splits", "slices_per_split")
            )
            assert each * blocks >= row_pairs and splits * slices * 64 >= k
            rounds = -(-blocks * splits // multiprocessors)
            busiest, mean = rounds * each * slices * 64, row_pairs * k / multiprocessors
            assert busiest <= 1.09 * mean, f"{tokens} tokens, {pipeline}: {plan}"


@pytest.mark.parametrize("multiprocessors", [46, 108, 132])
@pytest.mark.parametrize(("width", "pairs"), [(2048, 5632), (4096, 11008), (8192, 28672)])
def test_plan_of_one_launch(library: DecodeLibrary, width: int, pairs: int, multiprocessors: int) -> None:
    for tokens in (1, 4, 16, 17):
        params = llama(tokens, width, pairs, multiprocessors)
        params.form, params.shared_bytes = FORMS["cooperative"], 164 << 10
        plan = library.plan(params)
        if tokens > 16:
            assert plan["cooperative_blocks"] == 0, "many tokens go by three launches"
            continue
        assert 0.95 * multiprocessors < plan["cooperative_blocks"] <= multiprocessors, (
            "a block on each multiprocessor, and no more: they wait for one another"
        )
        assert plan["cooperative_shared"] <= 99 << 10
        assert plan["core_blocks"] == -(-tokens // 4), "a block for four images"
        blocks = plan["value_row_blocks"] * plan["value_splits"]
        rounds = -(-blocks // (multiprocessors - plan["core_blocks"]))
        each = plan["value_pairs_per_block"] * plan["value_slices_per_split"] * 64
        mean = width // 2 * pairs / (multiprocessors - plan["core_blocks"])
        assert rounds * each <= 1.09 * mean, f"{tokens} tokens: {plan}"


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
@pytest.mark.parametrize("width", [2048, 4096, 8192])
def test_plan_of_materialised_images(library: DecodeLibrary, width: int, tokens: int) -> None:
    p = llama(tokens, width, 11008, 132)
    p.rank, p.visual_basis.data = 0, None
    for name in ("visual_key", "visual_value", "value_position"):
        getattr(p, name).data = 4096
    for name in ("visual_key", "visual_value"):
        getattr(p, name).strides[0], getattr(p, name).strides[1] = 320 * width, width
    plan = library.plan(p)
    assert plan["first_shared"] <= 98 << 10 and plan["second_shared"] <= 98 << 10
    for pipeline, rows, k in (("scores", 320, width), ("values", width, 320)):
        blocks, tall, each = (
            plan[f"{pipeline}_{number}"] for number in ("row_blocks", "pairs_per_block", "slices_per_split")
        )
        assert 2 * tall * blocks >= rows > 2 * tall * (blocks - 1) and each * 64 >= k
        assert 2 * tall * blocks <= 1.25 * rows, "rows of a block that do not exist"
        assert tokens * blocks <= 264 or tall >= 64, "more blocks than fit, though a block could be taller"


def test_workspace_is_small(library: DecodeLibrary) -> None:
    # 64 tokens of LLaMA-7B: activations 1.4 MB, scores and visual 0.2 MB, partial sums 1 MB for each part of k
    params = llama(64, 4096, 11008, 132)
    splits = library.plan(params)["value_splits"]
    assert library.workspace_bytes(params) < (1.8 + 1.05 * splits) * 2**20
