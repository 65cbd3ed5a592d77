"""Streamed data on two processes, every form of images: each sample beside its own whole image, or an error."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from memvp_kernels import MemVPModel
from tests.models.clip import vision_model
from tests.models.parallel.processes import Group, free_port, meet
from tests.models.tiny import CONFIG, VISION, language_model, with_memory
from tests.models.tools import arguments

SAMPLES, FIRST = 8, 3  # sample i is token FIRST + i; its image is of the number i

Row = dict[str, Any]


def _features(row: Row, n: int = 8) -> torch.Tensor:
    return torch.full((n, VISION), float(row["sample"]))


def _pixels(row: Row) -> torch.Tensor:
    return torch.full((3, 8, 8), float(row["sample"]))


FORMS: dict[str, Callable[[list[Row]], dict[str, Any]]] = {
    "features": lambda rows: {"image_features": torch.stack([_features(r) for r in rows])},
    "pixels": lambda rows: {"pixel_values": torch.stack([_pixels(r) for r in rows])},
    "list": lambda rows: {"image_features": [_features(r, 1 + r["sample"]) for r in rows]},
    "list of lists": lambda rows: {"image_features": [[_features(r, 4), _features(r, 2)] for r in rows]},
    "list with None": lambda rows: {"image_features": [None if r["sample"] % 2 else _features(r) for r in rows]},
    "pixel list": lambda rows: {"pixel_values": [_pixels(r).expand(2, -1, -1, -1) for r in rows]},
    "index": lambda rows: {
        "image_features": torch.stack([_features(r) for r in reversed(rows)]),
        "visual_index": torch.arange(len(rows)).flip(0),
    },
}
TENSORS = ("features", "pixels")


class _Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Row]:
        for i in range(SAMPLES):
            ids = torch.full((5,), FIRST + i)
            yield {"input_ids": ids, "labels": ids, "sample": i}


def _collate(form: str) -> Callable[[list[Row]], dict[str, Any]]:
    def collate(rows: list[Row]) -> dict[str, Any]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        return batch | FORMS[form](rows)

    return collate


def _numbers(image: Any) -> list[float]:
    """The distinct numbers in an image, and how many rows of features it has."""
    if image is None:
        return []
    image = torch.cat(list(image)) if isinstance(image, list) else image
    return [*image.unique().tolist(), len(image) if image.shape[-1] == VISION else 0]


def _seen(batch: dict[str, Any]) -> list[tuple[int, list[float]]]:
    images = batch.get("image_features", batch.get("pixel_values"))
    samples = [int(row[0]) - FIRST for row in batch["input_ids"]]
    index = batch.get("visual_index", range(len(samples)))
    return [(sample, _numbers(images[int(i)])) for sample, i in zip(samples, index, strict=True)]


def _train(port: int, kind: str, form: str, accelerator: dict[str, Any], accumulate: int = 1) -> Any:
    """What this rank's model was given, or the error."""
    import transformers

    from memvp_kernels.models.trainer import MemVPTrainer

    meet(port)
    torch.manual_seed(0)
    model = with_memory(language_model().train(), CONFIG, vision_model=vision_model(VISION))
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _, args, batch: seen.extend(_seen(batch)), with_kwargs=True)
    args = arguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        max_steps=2 if accumulate == 1 else 1,
        gradient_accumulation_steps=accumulate,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        accelerator_config=accelerator,
    )
    cls = MemVPTrainer if kind == "MemVPTrainer" else transformers.Trainer
    trainer = cls(model=model, args=args, train_dataset=_Stream(), data_collator=_collate(form))
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return seen


def _check(form: str, answers: list[Any]) -> None:
    rows = {row["sample"]: row for row in _Stream()}
    for seen in answers:
        assert len(seen) == 4, seen
        for sample, numbers in seen:
            batch = FORMS[form]([rows[sample]])
            assert numbers == _numbers(batch.get("image_features", batch.get("pixel_values"))[0]), (form, seen)
    assert set(answers[0][0][1]) != set(answers[1][0][1]) or form == "list with None"


@pytest.mark.parametrize("form", FORMS)
def test_our_trainer(apart: Group, form: str) -> None:
    _check(form, apart.run(_train, free_port(), "MemVPTrainer", form, {}))


@pytest.mark.parametrize(
    ("kind", "form"),  # accelerate itself refuses a None
    [("MemVPTrainer", "list"), *(("Trainer", form) for form in FORMS if form != "list with None")],
)
def test_one_process_that_reads_for_all(apart: Group, form: str, kind: str) -> None:
    """accelerate's default for streams: tensors with one row per sample survive, lists and an index are refused."""
    answers = apart.run(_train, free_port(), kind, form, {"dispatch_batches": True})
    if form in TENSORS:
        _check(form, answers)
    else:
        assert all("dispatch" in answer for answer in answers), answers


def test_an_epoch_shorter_than_an_update(apart: Group) -> None:
    """Trainer has read past its end before the first forward, and the loader is no longer active."""
    answers = apart.run(_train, free_port(), "Trainer", "list", {}, 3)
    assert all("dispatch" in answer for answer in answers), answers


def test_replicas_of_data_parallel_refuse_lists() -> None:
    """It cuts lists in the same way; a replica is what it calls."""
    model = with_memory(language_model())
    replica: MemVPModel = model._replicate_for_data_parallel()  # type: ignore[operator]
    ids = torch.full((2, 5), FIRST)
    with pytest.raises(ValueError, match=r"image_features: nn\.DataParallel cuts the tensors inside a list"):
        replica(input_ids=ids, image_features=[torch.ones(3, VISION), None])
    features = torch.ones(2, 3, VISION)
    assert torch.equal(
        replica(input_ids=ids, image_features=features).logits, model(ids, image_features=features).logits
    )
