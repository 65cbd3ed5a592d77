"""The decode step under the sanitizers, and the mutations that they must notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc import gemm_mutations
from tests.csrc.decode_cases import SMALL, small
from tests.csrc.decode_mutations import MUTATIONS, QUICK, build_cases, run_cases
from tests.csrc.emulate_decode import SOURCES, compiler, write_cases

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

# A thread sanitizer run costs forty times a plain one: the cases that between them reach every kernel.
FOR_THREADS = (
    "text_gated", "long_rows", "materialised", "factored", "value_contiguous", "odd_materialised",
    "odd_factored", "split_k", "tokens_30", "tokens_64",
)  # fmt: skip


@pytest.fixture(scope="module")
def all_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cases") / "all"
    write_cases(file, [small(name) for name in SMALL])
    return file


@pytest.fixture(scope="module")
def thread_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cases") / "threads"
    write_cases(file, [small(name) for name in FOR_THREADS])
    return file


# Two schedules: a step's phases in each of their forms.
@pytest.mark.parametrize(("build", "schedules"), [("address", 2), ("thread", 2)])
def test_clean_under_the_sanitizer(
    build: str, schedules: int, tmp_path: Path, all_cases: Path, thread_cases: Path
) -> None:
    done = run_cases(build_cases(tmp_path, build), build, thread_cases if build == "thread" else all_cases, schedules)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
    assert "cases passed" in done.stdout


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MUTATIONS])
def test_mutation_is_noticed(name: str, tmp_path: Path, all_cases: Path, thread_cases: Path) -> None:
    mutation = MUTATIONS[name]
    program = build_cases(tmp_path, mutation.build, mutation)
    done = run_cases(program, mutation.build, thread_cases if mutation.build == "thread" else all_cases, 4)
    assert done.returncode != 0, f"not noticed: {done.stdout}"
    report = done.stdout + done.stderr
    assert "case " in report or f"{mutation.build.capitalize()}Sanitizer" in report, report[:2000]


def test_every_mutation_has_its_place() -> None:
    """The text that it replaces, as often as it says: the runs themselves are `slow`."""
    for name, mutation in (*MUTATIONS.items(), *gemm_mutations.MUTATIONS.items()):
        assert (SOURCES / mutation.file).read_text().count(mutation.old) == mutation.count, name
