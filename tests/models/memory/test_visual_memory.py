"""The memory itself: the official semantics, its factors, batches of every mixture, and images that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.memory.projector import Projector
from memvp_kernels.models.memory.visual_memory import VisualMemory
from memvp_kernels.models.patching import vision_adapters as vision
from tests.models.clip import pixels, vision_model
from tests.models.tiny import CONFIG, IMAGES, VISION, WIDTH, features, language_model, tokens, with_memory, wrapped


def _logits(model: MemVPModel, images: Any, ids: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(3) if ids is None else ids, image_features=images, **options).logits


@pytest.mark.parametrize(("inner", "rank"), [(6, 8), (7, 8), (8, 16), (128, 136)])
def test_factors_are_the_projector(inner: int, rank: int) -> None:
    projector = Projector(VISION, inner, WIDTH, dtype=torch.float64)
    image = torch.randn(5, VISION, dtype=torch.float64)
    valid = torch.tensor([True, True, False, True, True])
    rows, basis = projector.factors(image, valid), projector.basis()
    assert projector.rank == rank and rows.shape == (5, rank) and basis.shape == (rank, WIDTH)
    torch.testing.assert_close((rows @ basis)[valid], projector(image)[valid])
    assert not rows[2].any() and not rows[:, inner + 1 :].any() and not basis[inner + 1 :].any()


def test_the_start_is_the_official_one() -> None:
    model = MemVPModel(language_model(), MemVPConfig(vision_dim=VISION, num_slots=400))
    assert model.key_position.shape == model.value_position.shape == (400, WIDTH)
    assert model.key_position.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.value_position.any()


def test_the_papers_parameter_count() -> None:
    """3,879,040 of LLaMA-7B less its CLIP adapters (23 of 24 blocks run, all counted) and its unused embedding."""
    memory = VisualMemory(MemVPConfig(), width=4096, layers=32)
    counted = sum(p.numel() for p in memory.parameters())
    assert counted == 3_879_040 - 24 * 2 * 12 * 1024 - 2 * 4096


def test_dropout_drops_visual_activations_in_training_only() -> None:
    config = dataclasses.replace(CONFIG, dropout=0.5)
    images = features(4, 0, 10)
    model = wrapped(config=config).eval()
    quiet = _logits(model, images)
    assert torch.equal(quiet, _logits(model, images))
    torch.testing.assert_close(quiet, _logits(wrapped(), images))
    model.train()
    first, second = _logits(model, images), _logits(model, images)
    assert not torch.equal(first, second) and not torch.equal(first, quiet)
    torch.manual_seed(3)
    first = _logits(model, images)
    torch.manual_seed(3)
    assert torch.equal(first, _logits(model, images))


def test_mixed_batches_are_their_samples_alone() -> None:
    """Image, several images, none, an empty list; each as if it were alone."""
    model = wrapped()
    a, b, c = features(4, 3, 10)
    batch = [a, [b, a], None, [], c, b[:0]]
    together = _logits(model, batch, tokens(6))
    for i, alone in enumerate([a, torch.cat([b, a]), None, None, c, None]):
        torch.testing.assert_close(_logits(model, [alone], tokens(6)[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_tensor_is_a_list_of_its_rows(dtype: torch.dtype) -> None:
    stacked = torch.stack([*features(4, 4, 4)]).to(dtype)
    model = wrapped()
    assert torch.equal(_logits(model, stacked), _logits(model, [*stacked.float()]))
    assert not torch.equal(_logits(model, stacked), _logits(model, stacked.flip(0)))


def test_text_only_keeps_the_positions() -> None:
    model = wrapped()
    nothing = _logits(model, None)
    assert torch.equal(nothing, _logits(model, [None] * 3))
    torch.testing.assert_close(nothing, _logits(model, torch.zeros(3, 0, VISION)))
    assert not torch.allclose(nothing, language_model()(input_ids=tokens(3)).logits, atol=1e-3)


def test_text_only_batches_still_reach_every_parameter() -> None:
    """Zeros, not None: a rank with a text-only batch takes part in the gradient exchange like the others."""
    model = wrapped()
    model(input_ids=tokens(2), labels=tokens(2)).loss.backward()
    trainable = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
    assert all(grad is not None for _, grad in trainable)
    assert not any(grad.any() for n, grad in trainable if "projector" in n)
    assert all(grad.any() for n, grad in trainable if "position" in n)


def test_text_only_batches_reach_the_vision_models_adapters() -> None:
    clip = vision_model(VISION)
    vision.attach_adapters(clip, hidden_dim=3)
    model = with_memory(language_model(), vision_model=clip)
    for images in (None, [None, None]):
        model.zero_grad()
        model(input_ids=tokens(2), labels=tokens(2), pixel_values=images).loss.backward()
        gradients = [p.grad for p in clip.parameters() if p.requires_grad]
        assert gradients and all(g is not None and not g.any() for g in gradients)


def test_several_questions_about_one_image() -> None:
    model = wrapped()
    a, b = features(4, 10)
    index = torch.tensor([1, 0, 1])
    torch.testing.assert_close(_logits(model, [a, b], visual_index=index), _logits(model, [b, a, b]))
    none = _logits(model, [a, b], visual_index=torch.tensor([-1, 0, -1]))
    torch.testing.assert_close(none[0], language_model()(input_ids=tokens(3)).logits[0])


def test_gradients_reach_the_images() -> None:
    model = wrapped()
    image = torch.randn(3, 4, VISION, requires_grad=True)
    model(input_ids=tokens(3), labels=tokens(3), image_features=image).loss.backward()
    assert image.grad is not None and image.grad.abs().amax((1, 2)).min() > 0


def test_gradients_through_a_kept_core() -> None:
    """encode_images under gradients, then visual_core: the projector's gradient is the direct run's."""
    direct, through = wrapped(), wrapped()
    inputs = {"input_ids": tokens(3), "labels": tokens(3)}
    direct(image_features=features(4, 0, 10), **inputs).loss.backward()
    through(visual_core=through.encode_images(features(4, 0, 10)), **inputs).loss.backward()
    torch.testing.assert_close(*([p.grad for p in model.memory.parameters()] for model in (direct, through)))


def test_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {
        "memory.key_position", "memory.value_position",
        "memory.projector.fc1.weight", "memory.projector.fc1.bias",
        "memory.projector.fc2.weight", "memory.projector.fc2.bias",
    }  # fmt: skip
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.memory.parameters())
    total = count + sum(p.numel() for p in model.language_model.parameters())
    wanted = f"trainable params: {count:,} || all params: {total:,} || trainable%: {100 * count / total:.4f}\n"
    assert capsys.readouterr().out == wanted


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        *(
            ({"image_features": images}, error, f"image_features{message}")
            for images, error, message in (
                (torch.zeros(3, 4, VISION + 1), ValueError, r": wanted width vision_dim = 12, got \(3, 4, 13\)"),
                (torch.zeros(3, 11, VISION), ValueError, ": 11 visual tokens do not fit 10 slots"),
                (torch.zeros(4, VISION), ValueError, r": wanted \(B, n, 12\), got \(4, 12\)"),
                (torch.zeros(2, 4, VISION), ValueError, ": 2 images for 3 samples.*visual_index"),
                (torch.zeros(3, 4, VISION, dtype=torch.int64), TypeError, ".*floating-point features.*pixel_values"),
                ([None, None], ValueError, ": 2 images for 3 samples"),
                ([None, torch.zeros(4, 5), None], ValueError, r"\[1\]: wanted width vision_dim = 12"),
                ([None, torch.zeros(1, 4, VISION), None], ValueError, r"\[1\]: wanted \(n, 12\), got \(1, 4, 12\)"),
                ([[torch.zeros(6, VISION)] * 2, None, None], ValueError, r"\[0\]: 12 visual tokens do not fit 10"),
                ([[torch.zeros(6, VISION), 3], None, None], TypeError, r"\[0\]: wanted a tensor, a list of tensors"),
                ([[torch.zeros(VISION)], None, None], ValueError, r"\[0\]\[0\]: wanted \(n, 12\), got \(12,\)"),
                ("image.png", TypeError, ": wanted a tensor, a list with one entry per sample or None, got str"),
            )
        ),
        (
            {"image_features": IMAGES, "visual_core": torch.zeros(3, 10, 8)},
            ValueError,
            "image_features and visual_core were given",
        ),
        *(
            ({"visual_core": core}, error, f"visual_core: {message}")
            for core, error, message in (
                (torch.zeros(3, 10, 9), ValueError, r"wanted \(B, 10, 8\) from encode_images, got \(3, 10, 9\)"),
                (torch.zeros(1, 10, 8), ValueError, "1 images for 3 samples"),
                ([[0.0]], TypeError, r"wanted \(B, 10, 8\) from encode_images, got list"),
                (torch.zeros(3, 10, 8, dtype=torch.int64), TypeError, r"wanted .* got torch\.int64"),
            )
        ),
        *(
            ({"image_features": features(4), "visual_index": index}, error, f"visual_index: wanted {message}")
            for index, error, message in (
                (torch.tensor([0, 0]), ValueError, r"\(3,\) int32 or int64.* got \(2,\); -1 stands for"),
                ([0, 0, 0], TypeError, r"\(3,\) int32 or int64.* got list; torch.as_tensor"),
                (torch.zeros(3), TypeError, r".* got torch\.float32; cast it"),
                (torch.tensor([0, 0, 2**32]), ValueError, "values in"),
                (torch.tensor([0, 0, 1]), ValueError, "values in"),
            )
        ),
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, ValueError, "pixel_values: wanted a MemVPModel with vision_model="),
    ],
)
def test_images_that_do_not_fit(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrapped()(input_ids=tokens(3), **given)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="wanted image_features or pixel_values, got neither"):
        wrapped().encode_images()
    with pytest.raises(TypeError, match="config: wanted a MemVPConfig, got dict"):
        MemVPModel(language_model(), {})  # type: ignore[arg-type]


def test_something_else_than_a_vision_model_is_refused_before_anything_changes() -> None:
    base = language_model()
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(TypeError, match=r"CLIPVisionModel, got str"):
        MemVPModel(base, CONFIG, "openai/clip-vit-large-patch14")  # type: ignore[arg-type]
    assert [type(m) for m in base.modules()] == kinds and all(p.requires_grad for p in base.parameters())


def test_gradients_reach_pixels_through_a_frozen_vision_model() -> None:
    """Which pixels matter is a question that freezing does not answer with silence."""
    model = with_memory(language_model(), vision_model=vision_model(VISION))
    for images in (pixels(3).requires_grad_(), [pixels(1)[0].requires_grad_(), None, pixels(2).requires_grad_()]):
        model(input_ids=tokens(3), labels=tokens(3), pixel_values=images).loss.backward()
        asked = [image for image in images if image is not None] if isinstance(images, list) else [images]
        assert all(image.grad is not None and image.grad.abs().amax((-3, -2, -1)).min() > 0 for image in asked)
    assert all(p.grad is None for p in model.vision_model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_core_has_the_language_models_dtype(dtype: torch.dtype) -> None:
    """It is what the layers read: half the bytes for a server with a half-precision model, and the same answers."""
    model = with_memory(language_model().to(dtype))
    images = features(4, 0, 10)
    with torch.no_grad():
        core = model.encode_images(images)
    assert core.dtype == dtype
    assert torch.equal(_logits(model, None, visual_core=core), _logits(model, images))
    assert model.encode_images(images).dtype == torch.float32, "to train through, the projector's own"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_the_dtype_may_change_afterwards(first: torch.dtype, dtype: torch.dtype) -> None:
    """Of the whole model, and of the language model alone: what is cast once per call is cast to today's dtype."""
    whole = with_memory(language_model().to(first)).to(dtype)
    assert _logits(whole, features(4, 0, 10)).dtype == dtype
    whole(input_ids=tokens(3), labels=tokens(3), image_features=features(4, 0, 10)).loss.backward()
    if dtype != torch.float64:
        alone = with_memory(language_model().to(first))
        alone.language_model.to(dtype)
        assert _logits(alone, features(4, 0, 10)).dtype == dtype


def test_wide_positions_follow_a_float64_base() -> None:
    assert with_memory(language_model().double()).key_position.dtype == torch.float64
    assert with_memory(language_model().half()).key_position.dtype == torch.float32
    assert isinstance(wrapped().memory.key_position, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_core_reads_as_key_and_value_and_its_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    """As a key it gets -u² and as a value u² rounded to bfloat16; each rounded by itself, they would sum to zero."""
    u = 1 + 2**-7
    sizes: dict[str, Any] = {"vision_dim": VISION, "projector_dim": 2, "num_slots": 1, "layers": (0,)}
    config = MemVPConfig(**sizes, feature_scale=1.0, memory_scale=1.0, dropout=0.0)
    model = MemVPModel(language_model("t5").bfloat16(), config)
    model.memory.to(dtype)
    core = torch.zeros(1, 1, model.projector.rank, dtype=dtype)
    core[..., 1:3] = torch.tensor([1.015625, -u])
    core.requires_grad_()
    x, dy = torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, WIDTH, dtype=torch.bfloat16)
    x[..., 0], x[..., 1] = u, 1
    dy[..., 0] = dy[..., 2] = 1
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.zero_()
        model.projector.fc2.weight[:2] = torch.eye(2)
        model.projector.fc2.bias[2] = 1
    _, ffn = model.memory_ffns()[0]
    ffn.register_forward_pre_hook(lambda *_: x.bfloat16())
    ffn.register_forward_hook(lambda module, args, y: y.register_hook(lambda _: dy) and None)
    model(input_ids=tokens(1, 1), labels=tokens(1, 1), visual_core=core).loss.backward()
    assert core.grad is not None and core.grad[0, 0, 0].item() == -(2**-14)
