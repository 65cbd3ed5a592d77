"""The report is generated from the files, says what they say, and nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import report
from harness import digest, plots, table
from harness.schema import SCHEMA
from harness.timer import Timing

from tests.benchmarks.test_schema import good_row

README = f"# A project\n\n{report.BEGIN}\nold\n{report.END}\n\nmore\n"


def rows(
    case: str, phase: str, medians: dict[str, float], *, level: str = "model", visual_tokens: int = 256
) -> list[dict[str, Any]]:
    found = []
    for variant, median in medians.items():
        row = good_row(
            case=case, variant=variant, level=level, phase=phase, preset="llama-7b", layers=32, sequences=16, text_length=64,
            visual_tokens=visual_tokens, memory_per_image_bytes=10**6, cache_per_image_bytes=0, peak_memory_bytes=10**9,
        )  # fmt: skip
        row.take(Timing(tuple(median * (1 + i / 1000) for i in range(-10, 11)), "cuda-graph", 4))
        row.speedup_vs_prompt = medians["prompt"] / median if "prompt" in medians else None
        found.append(vars(row))
    return found


def write(folder: Path, program: str, found: list[dict[str, Any]], **changes: Any) -> None:
    environment: dict[str, Any] = dict.fromkeys(SCHEMA["properties"]["environment"]["required"], "x")
    environment |= {
        "program": program, "device": "Imaginary GPU", "device_type": "cuda", "torch": "2.11.0", "commit": "a" * 40,
        "roofs": {"matmul_tflops": 100.0, "copy_gbs": 1000.0, "stream_gbs": 1100.0},
        "clocks": {"sm_clock_mhz": 1800.0, "power_w": 600.0},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{program}.json").write_text(json.dumps({"environment": environment | changes, "rows": found}))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "imaginary-gpu"
    first = rows(
        "model, first token 16×64, image 256",
        "prefill",
        {"prompt": 50.0, "text": 10.0, "official-eager": 12.0, "factored-auto": 11.0},
    )
    other = rows(
        "model, first token 16×64, image 576",
        "prefill",
        {"prompt": 90.0, "text": 10.0, "factored-auto": 11.5},
        visual_tokens=576,
    )
    lost = rows(
        "ffn, decode 16×1, image 256", "decode", {"prompt": 1.0, "text": 1.0, "factored-auto": 1.5}, level="ffn"
    )
    write(folder, "latency", [*first, *other, *lost])
    step = rows(
        "model, training step 16×64, image 256", "training", {"prompt": 400.0, "text": 95.0, "factored-auto": 100.0}
    )
    write(folder, "training", step, commit="b" * 40)
    return tmp_path / "results"


def arguments(results: Path) -> list[str]:
    readme = results.parent / "README.md"
    if not readme.exists():
        readme.write_text(README)
    return ["--results", str(results), "--report", str(results.parent / "REPORT.md"), "--readme", str(readme)]


def test_writes_report_readme_and_pictures(results: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.main(arguments(results)) == 0
    text = (results.parent / "REPORT.md").read_text()
    assert "## Imaginary GPU" in text
    assert "| model, first token 16×64, image 256 | 50.0 | 11.0 | 10.0 | 12.0 | 4.55 |" in text
    assert "aaaaaaaaaaaa" in text
    assert "bbbbbbbbbbbb" in text  # each program names its own commit
    assert "1800 MHz, 600 W" in text
    assert "No GPU results" not in text
    drawn = sorted(path.name for path in (results / "imaginary-gpu" / "plots").glob("*.png"))
    assert drawn == [
        "latency.png", "memory-per-image.png", "percent-of-floor.png", "speedup-visual-tokens.png", "training.png",
    ]  # fmt: skip
    assert all(f"plots/{name}" in text for name in drawn)
    readme = (results.parent / "README.md").read_text()
    assert readme.startswith("# A project")
    assert readme.endswith("\n\nmore\n")
    assert "old" not in readme
    assert "Imaginary GPU" in readme
    assert "4.00" in readme  # the training step


def test_the_papers_ratios_stand_beside_ours(results: Path) -> None:
    lines = digest.paper_beside_ours(digest.machines(results)[0])
    found = {(line["ratio"], line["case"].split(",")[1].split("16")[0].strip()): line["here"] for line in lines}
    assert found[("1.75×", "training step")] == pytest.approx(4.0)
    assert found[("1.82×", "first token")] == pytest.approx(50 / 11)
    assert found[("4.80×", "first token")] == pytest.approx(5.0)


def test_ours_is_what_a_user_runs_and_the_prompt_the_faster_of_eager_and_compiled(tmp_path: Path) -> None:
    case = rows(
        "model, per token 16×1, image 256",
        "decode",
        {
            "prompt": 50.0,
            "prompt-compile": 40.0,
            "text": 9.0,
            "text-compile": 8.0,
            "factored-auto": 10.0,
            "MemVPModel": 20.0,
        },
    )
    write(tmp_path / "gpu", "latency", case)
    (line,) = digest.headline(digest.machines(tmp_path)[0])
    assert (line["ours_ms"], line["prompt_ms"], line["text_ms"]) == pytest.approx((20.0, 40.0, 8.0))
    assert line["speedup_vs_prompt"] == pytest.approx(2.0)


def test_losses_compare_what_was_timed_together(tmp_path: Path) -> None:
    """The clock fell between the two: over ours as it was beside it, the compiled form wins, over ours' own row it would lose."""
    case = rows("ffn, prefill", "prefill", {"factored-auto": 10.0, "official-compile": 11.0}, level="ffn")
    case[1]["beside_ms"] = 12.0
    (line,) = digest.losses(case)
    assert line["faster"] == "official-compile"
    assert line["ratio"] == pytest.approx(12 / 11)
    case[1]["beside_ms"] = None
    assert digest.losses(case) == []


def test_what_a_row_knows_is_in_its_table(tmp_path: Path) -> None:
    case = rows("kernel core", "kernel core", {"matmul": 2.0, "triton": 1.0, "torch": 3.0}, level="kernel")
    case[0] |= {"note": "the products alone"}
    case[1] |= {
        "speedup_vs_matmul": 2.0,
        "tflops": 70.0,
        "gbs": 100.0,
        "first_call_s": 1.5,
        "sm_clock_mhz": 1700.0,
        "power_w": 500.0,
    }
    case[1] |= {"timing": "cuda-events", "note": "no CUDA graph: it synchronises"}
    case[2] |= {"tflops": 1.0, "gbs": 900.0}
    write(tmp_path / "gpu", "kernels", case)
    text = report.report(digest.machines(tmp_path))
    heading = next(line for line in text.splitlines() if line.startswith("| variant"))
    assert all(name in heading for name in ("× matmul", "rate", "first call s"))
    assert "× prompt" not in heading  # no row says anything about it
    (triton,) = (line for line in text.splitlines() if line.startswith("| triton"))
    assert "70.0 TFLOP/s" in triton
    assert "1.50" in triton
    assert "900 GB/s" in next(line for line in text.splitlines() if line.startswith("| torch"))
    assert "**kernel core**, float32, 1700 MHz, 500 W, cuda-graph where not noted" in text
    assert "matmul: the products alone; triton: cuda-events; triton: no CUDA graph: it synchronises" in text


def test_uncommitted_changes_are_said_aloud(tmp_path: Path) -> None:
    write(tmp_path / "gpu", "latency", rows("c", "prefill", {"prompt": 1.0}), commit="a" * 40 + "-dirty")
    text = report.report(digest.machines(tmp_path))
    assert "**Measured with uncommitted changes**" in text
    assert "`aaaaaaaaaaaa-dirty`" in text


def test_a_switch_has_a_file_and_a_section_of_its_own(results: Path) -> None:
    step = rows(
        "model, training step 16×64, image 256, checkpointing", "training", {"prompt": 600.0, "factored-auto": 150.0}
    )
    write(results / "imaginary-gpu", "training-checkpointing", step)
    machine = digest.machines(results)[0]
    text = report.report([machine])
    assert "#### Training step, checkpointing" in text
    assert text.index("#### Training step\n") < text.index("#### Training step, checkpointing")
    assert [line["case"] for line in digest.headline(machine)][-1].endswith("checkpointing")


def sizes(found: list[dict[str, Any]], **sizes: int) -> list[dict[str, Any]]:
    return [row | sizes for row in found]


def test_the_sweep_draws_the_curves(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[tuple[str, list[float], list[float]]] = []
    medians = {"prompt": 8.0, "factored-auto": 2.0}
    swept = rows("a", "prefill", medians)
    swept += sizes(rows("b", "prefill", {**medians, "prompt": 12.0}, visual_tokens=576))
    swept += sizes(rows("c", "prefill", {**medians, "prompt": 4.0}), text_length=256)
    swept += sizes(
        rows("d", "prefill", {**medians, "prompt": 99.0}, visual_tokens=576), text_length=256
    )  # neither curve's
    write(results / "imaginary-gpu", "sweep", swept)
    from matplotlib.axes import Axes

    original = Axes.plot

    def plot(self: Any, x: Any, y: Any, **options: Any) -> Any:
        drawn.append((options["label"], list(x), list(y)))
        return original(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    report.draw(digest.machines(results)[0])
    assert ("factored-auto", [256, 576], [4.0, 6.0]) in drawn
    assert ("factored-auto", [64, 256], [4.0, 2.0]) in drawn


def test_losing_shapes_are_named(results: Path) -> None:
    machine = digest.machines(results)[0]
    lost = digest.losses(machine.rows("latency"))
    assert [(line["case"], line["faster"]) for line in lost] == [("ffn, decode 16×1, image 256", "prompt")]
    assert "| ffn, decode 16×1, image 256 | 1.50 | prompt | 1.00 | 1.50 |" in report.report([machine])


def test_without_a_gpu_the_report_says_so(tmp_path: Path) -> None:
    assert "**No GPU results are committed yet.**" in report.report([])
    assert "Nothing has been measured yet" in report.figures([])
    step = rows("model, training step 2×64, image 256", "training", {"prompt": 4.0, "factored-torch": 1.0})
    write(tmp_path / "results" / "cpu", "training", step, device="Some CPU, 2 cores", device_type="cpu", clocks={})
    found = digest.machines(tmp_path / "results")
    assert "**No GPU results are committed yet.**" in report.report(found)
    assert "nothing here claims a speed on one" in report.figures(found)


def test_check_notices_what_was_edited(results: Path) -> None:
    assert report.main([*arguments(results), "--check"]) == 1  # nothing written yet
    report.main(arguments(results))
    assert report.main([*arguments(results), "--check"]) == 0
    path = results.parent / "REPORT.md"
    path.write_text(path.read_text().replace("4.55", "9.55"))
    assert report.main([*arguments(results), "--check"]) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"commit": "unknown"}, "outside a checkout.*--commit"), ({"triton_interpreted": True}, "interpreter")],
)
def test_unquotable_files_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write(tmp_path / "gpu", "latency", rows("c", "prefill", {"prompt": 1.0}), **changes)
    with pytest.raises(ValueError, match=said):
        digest.machines(tmp_path)


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    found = rows("c", "prefill", {"prompt": 1.0})
    found[0]["samples"] = 3
    write(tmp_path / "gpu", "latency", found)
    with pytest.raises(ValueError, match="fewer than 20 samples"):
        digest.machines(tmp_path)


def test_a_readme_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="wanted one block"):
        report.with_figures("# nothing here", report.figures([]))


def test_without_matplotlib_nothing_is_drawn_and_nothing_breaks(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    documents = list(digest.machines(results)[0].documents.values())
    path = results / "picture.png"
    assert not plots.plot_speedups(documents, path)
    assert not plots.plot_memory(documents, path)
    assert not plots.plot_floor(documents, path)
    assert not plots.plot_sweep(documents, path, against="visual_tokens", label="x")
    assert not path.exists()
    assert "not installed" in capsys.readouterr().err
    assert report.main(arguments(results)) == 0


def test_tables_align_words_left_and_figures_right() -> None:
    lines = table.text([{"a": "x", "b": 1.0}, {"a": "long", "b": None}], {"a": "name", "b": "ms"}).splitlines()
    assert lines == ["name    ms", "----  ----", "x     1.00", "long     –"]
    assert table.markdown([{"b": 2.5}], {"b": "ms"}) == "| ms |\n|---:|\n| 2.50 |"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1234.5, "1234"),
        (99.99, "100"),
        (12.34, "12.3"),
        (0.00123, "0.00123"),
        (1.5e-7, "1.5e-07"),
        (2e7, "2.0e+07"),
    ],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert table.number(value) == shown


def test_the_committed_report_is_what_the_files_give() -> None:
    """REPORT.md and the README's figures are generated: whoever commits a result file runs report.py."""
    assert report.main(["--check"]) == 0
