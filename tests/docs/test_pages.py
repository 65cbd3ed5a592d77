"""Every Python block of the README and of docs/ runs as it is written, and every file that they name is there."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.docs.pages import BLOCK, PAGES, ROOT, blocks, write_models

NOTES = sorted((ROOT / "docs" / "notes").glob("*.md"))
TEXTS = [*PAGES, *NOTES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
RUN_ELSEWHERE = {"distributed.md"}  # test_distributed.py
WRITTEN_BY_READERS = {"served/memvp/"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages load."""
    folder = tmp_path_factory.mktemp("pages")
    write_models(folder)
    return folder


def _readme() -> dict[str, Any]:
    """What the README's blocks take for granted."""
    from transformers import LlamaConfig

    ids = torch.randint(3, 20, (2, 6))
    return {
        "x": torch.randn(2, 5, 32),
        "mlp": LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)),
        "visual_key": torch.randn(2, 10, 32),
        "visual_value": torch.randn(2, 10, 32),
        "ids": ids,
        "mask": torch.ones_like(ids),
        "labels": ids,
        "features": torch.randn(2, 256, 1024),
    }


def _training() -> dict[str, Any]:
    rows = [torch.randint(3, 20, (6,)) for _ in range(8)]
    images = [None if i == 3 else torch.randn(5, 1024) for i in range(8)]
    return {"dataset": [{"input_ids": r, "labels": r, "image_features": i} for r, i in zip(rows, images, strict=True)]}


GIVEN = {"README.md": _readme, "training.md": _training}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in RUN_ELSEWHERE or not blocks(page):
        return
    monkeypatch.chdir(models)
    names: dict[str, Any] = {"__name__": "__main__", **GIVEN.get(page.name, dict)()}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), names)
    if page.name == "README.md":  # the two blocks that it shows as equal
        torch.testing.assert_close(names["y"], names["expected"])


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_links_and_paths_exist(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)?(?:#[^)]*)?\)", text):
        if target and not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text):
        if named in WRITTEN_BY_READERS:
            continue
        bases = (ROOT, ROOT / "memvp_kernels", page.parent)
        assert any((base / named).exists() for base in bases), named
    for anchor in re.findall(r"\]\(([\w/.-]*)#([^)]+)\)", text):
        other = (page.parent / anchor[0] if anchor[0] else page).read_text()
        headings = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower() for line in other.splitlines() if line[:1] == "#"
        ]
        assert anchor[1] in {heading.replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_commands_exist(page: Path) -> None:
    text, targets = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    |; )make ([a-z][\w.-]*)", text, re.MULTILINE):
        rules = re.findall(r"^([\w.%-]+):", targets, re.MULTILINE)
        assert any(fnmatch.fnmatch(target, rule.replace("%", "*")) for rule in rules), target
    for program in re.findall(r"python3? ((?:[\w-]+/)+\w+\.py)", text):
        assert (ROOT / program).is_file(), program


def test_the_tree_of_the_design_page_is_the_tree() -> None:
    """Every name at the start of a line of its tree."""
    tree = re.search(r"^    memvp_kernels/\n(?:^    .*\n)+", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    assert tree is not None
    folders: list[str] = []
    for line in tree[0].splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip()) - 4) // 2
        folders = [*folders[:depth], name]
        assert (ROOT / "/".join(folders)).exists(), "/".join(folders)
