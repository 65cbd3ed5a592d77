"""Turns result files into benchmarks/REPORT.md, its pictures, and the figures of the README.

    python benchmarks/report.py              # writes them
    python benchmarks/report.py --check      # writes nothing; fails when they are not what the files give
    python benchmarks/report.py --measure    # first measures this machine (or: make report); commit before, the rows name the commit

Nothing in the report is written by hand. Result files lie in benchmarks/results/<machine>/<program>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plots
import serving
import torch
from options import commit_of, device_name, slug
from rows import BASELINES, DIRTY, UNKNOWN_COMMIT, Row, cells, number, table

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
FEWEST_SAMPLES = 20

#: What a user runs, in this order where a case has several.
OURS = "MemVPModel"

#: By the first word of their names, the variants that are given what ours in that form is given.
_GIVEN = {"factored": ("factored", "official"), "plain": ("plain", "official", "concatenated", "liger")}

_PROGRAMS = {
    "latency": "Latency",
    "training": "Training step",
    "kernels": "Kernels and operator",
    "decode": "Decode step",
}
#: What each program is asked to measure on a CPU for the record; on a GPU all have their defaults.
MEASURE = {
    "latency": ["--compile", "--batch", "4", "--visual-tokens", "256"],
    "training": ["--compile", "--batch", "2", "--visual-tokens", "256"],
    "latency --sweep": [],
    "training --sweep": [],
    "kernels": ["--batch", "4"],
    "decode": ["--batch", "16", "1"],
}

_HEADLINE = {
    "case": "case",
    "prompt": "visual tokens in the prompt, ms",
    "official": "the paper's official form, ms",
    "ours": "**ours**, ms",
    "text": "text only, ms",
    "ratio": "prompt / ours",
}
_ROW = {
    "variant": "variant",
    "median_ms": "median ms",
    "spread": "p20 to p80",
    "speedup_vs_prompt": "× prompt",
    "speedup_vs_text": "× text only",
    "speedup_vs_matmul": "× matmul",
    "percent_of_roofline": "% of roofline",
    "tflops": "TFLOP/s",
    "gbs": "GB/s",
    "peak_mb": "peak MB",
    "image_mb": "MB per image",
    "host_us": "host µs",
    "first_call_s": "first call s",
    "error": "error",
    "verdict": "",
}
_LEGEND = (
    "× prompt, × text only and × matmul are over the fastest of that case's visual tokens in the prompt, text-only and bare "
    "matrix-product rows, eager or compiled. The roofline bound is that of a variant's own form. The first call is a variant's first "
    "in its case; kernels that an earlier case or a cache on disk had compiled are not compiled again."
)


@dataclass(frozen=True)
class Machine:
    """The result files of one machine, by program ("latency", "training-checkpointing", …)."""

    folder: Path
    documents: dict[str, dict[str, Any]]

    @property
    def environment(self) -> dict[str, Any]:
        """Of the first program; the report names each program's own commit and date."""
        return next(iter(self.documents.values()))["environment"]

    @property
    def is_gpu(self) -> bool:
        return bool(self.environment["device_type"] == "cuda")

    def rows(self, *programs: str, sweeps: bool = True) -> pd.DataFrame:
        """The rows of these programs, with whatever switches."""
        found = [
            pd.DataFrame(document["rows"])
            for program, document in self.documents.items()
            if program.split("-")[0] in programs and (sweeps or not program.endswith("-sweep"))
        ]
        return pd.concat([frame for frame in found if len(frame)], ignore_index=True) if found else pd.DataFrame()


def machines(results: Path) -> list[Machine]:
    """All machines with result files, GPUs first.

    Raises:
        ValueError: a file has rows that no report may quote.
    """
    found = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        documents = {
            path.stem: quotable(path) for path in sorted(folder.glob("*.json")) if path.stem != serving.PROGRAM
        }
        if documents:
            found.append(Machine(folder, documents))
    return sorted(found, key=lambda machine: (not machine.is_gpu, machine.folder.name))


def quotable(path: Path) -> dict[str, Any]:
    """A result file whose rows name their commit, have enough samples, and no time without a passed check."""
    document: dict[str, Any] = json.loads(path.read_text())
    environment = document["environment"]
    if environment["commit"] == UNKNOWN_COMMIT:
        raise ValueError(f"{path}: measured outside a checkout; pass --commit (or set MEMVP_COMMIT) and measure again")
    if environment.get("triton_interpreted"):
        raise ValueError(
            f"{path}: measured under Triton's interpreter, whose speed says nothing; unset TRITON_INTERPRET"
        )
    for row in document["rows"]:
        name = f"{path}: {row['case']}, {row['variant']}"
        if (row["status"] == "ok") != (row["median_ms"] is not None):
            raise ValueError(f"{name}: a time goes with status ok, and with no other")
        if row["status"] == "ok" and not row["error"] <= row["error_allowed"]:
            raise ValueError(f"{name}: a time, but its error {row['error']} is over the allowed {row['error_allowed']}")
        if row["status"] == "ok" and row["samples"] < FEWEST_SAMPLES:
            raise ValueError(f"{name}: fewer than {FEWEST_SAMPLES} samples; measure without --quick")
    return document


def fastest(rows: pd.DataFrame, *variants: str) -> float | None:
    """The median of the fastest of these variants."""
    found = rows[rows.variant.isin(variants)].median_ms
    return float(found.min()) if len(found) else None


def timed_cases(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The timed rows of each case, in the order measured."""
    timed = rows[rows.status == "ok"] if len(rows) else rows
    return list(timed.groupby("case", sort=False)) if len(timed) else []


def headline(machine: Machine) -> list[dict[str, Any]]:
    """One line per case of the whole model: the prompt form, the official form and text only, each eager or compiled, whichever is
    faster; ours; and the ratio."""
    lines = []
    for case, rows in timed_cases(machine.rows("latency", "training", sweeps=False)):
        mine, prompt = fastest(rows, OURS), fastest(rows, *BASELINES["prompt"])
        if mine is None or prompt is None:
            continue
        lines.append(
            {
                "case": case,
                "prompt": prompt,
                "official": fastest(rows, "official-eager", "official-compile"),
                "ours": mine,
                "text": fastest(rows, *BASELINES["text"]),
                "ratio": prompt / mine,
            }
        )
    return lines


def losses(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Cases in which ours is slower than the best other way: of a model any, of an FFN any that is given the same memory."""
    found = []
    for case, group in timed_cases(rows):
        words = group.variant.str.split("-").str[0]
        others = ~group.variant.map(plots.is_ours) & ~words.isin(["text", "matmul"])
        duels = {name: others & words.isin(given) for name, given in _GIVEN.items()}
        if (group.variant == OURS).any():
            duels = {OURS: others}
        for name, rivals in duels.items():
            mine = group[group.variant.isin([name, f"{name}-auto", f"{name}-torch"])].sort_values("variant")
            if mine.empty or not rivals.any():
                continue
            best = group.loc[group[rivals].median_ms.idxmin()]
            times = {"ours": float(mine.iloc[0].median_ms), "its": float(best.median_ms)}
            if times["its"] < times["ours"]:
                found.append({"case": case, **times, "faster": best.variant, "ratio": times["ours"] / times["its"]})
    return found


def report(found: Sequence[Machine]) -> str:
    """REPORT.md."""
    parts = [
        "# Benchmarks: what was measured\n\n"
        "Generated by `python benchmarks/report.py` from the files under `benchmarks/results/`; do not edit. Times are medians "
        f"of at least {FEWEST_SAMPLES} samples, interleaved among the variants of a case, in milliseconds; × is the other variant's "
        "time over this one's, so under 1 the other one wins. A variant is timed only after its output was compared with float64. "
        "Weights are random, inputs are photographs and English text."
    ]
    if not any(machine.is_gpu for machine in found):
        parts.append(
            "**No GPU results are committed yet.** Nothing below or elsewhere in this project claims a speed on a GPU; "
            "`make gpu-report` on a machine with one measures it, and `python benchmarks/report.py` puts it here."
        )
    if not found:
        parts.append("No results are committed at all yet: `make report` measures this machine.")
    return "\n\n".join(parts + [section(machine) for machine in found]) + "\n"


def section(machine: Machine) -> str:
    """What one machine measured."""
    parts = [f"## {machine.environment['device']}", origins(machine)]
    if any(document["environment"]["commit"].endswith(DIRTY) for document in machine.documents.values()):
        parts.append(
            "**Measured with uncommitted changes** where the commit says -dirty: nobody else can measure that again."
        )
    lines = headline(machine)
    if lines:
        text = (
            "Ours is `MemVPModel` with the defaults. All columns run the same transformers LlamaForCausalLM: with visual tokens in front "
            "of the text, with the paper's two branches in each FFN, and on the text alone; each eager or with torch.compile, whichever is "
            "faster."
        )
        parts += ["### Whole model, against visual tokens in the prompt", text, table(lines, _HEADLINE, style="pipe")]
    parts += serving.section(machine.folder)
    pictures = sorted((machine.folder / "plots").glob("*.png"))
    parts += [f"![{picture.stem}](results/{machine.folder.name}/plots/{picture.name})" for picture in pictures]
    lost = losses(machine.rows(*_PROGRAMS))
    columns = {"case": "case", "ours": "ours, ms", "faster": "faster", "its": "its ms", "ratio": "ours over it"}
    parts += [
        "### Where ours is not the fastest",
        table(lost, columns, style="pipe") if lost else "In no case measured.",
    ]
    parts.append(f"### All rows\n\n{_LEGEND}")
    if not machine.is_gpu:
        parts.append(
            "Host time per call is not told apart on a CPU, where a call ends when its work does; `make bench` measures it."
        )
    for program in sorted(machine.documents, key=lambda name: ([*_PROGRAMS].index(name.split("-")[0]), name)):
        kind, *switches = program.split("-")
        parts.append(f"#### {', '.join([_PROGRAMS[kind], *switches])}")
        rows = [Row(**row) for row in machine.documents[program]["rows"]]
        parts += [case_table(case, list(group)) for case, group in itertools.groupby(rows, lambda row: row.case)]
    return "\n\n".join(parts)


def case_table(case: str, rows: Sequence[Row]) -> str:
    """One case: what holds for all its rows above the table, notes below it."""
    shown = []
    for row in rows:
        spread = f"{number(row.p20_ms)} to {number(row.p80_ms)}" if row.p20_ms and row.p80_ms else None
        shown.append({**cells(row), "spread": spread})
    columns = {key: text for key, text in _ROW.items() if any(cell[key] not in (None, "") for cell in shown)}
    timed = [row for row in rows if row.status == "ok"]
    said = [rows[0].dtype, *dict.fromkeys(str(row.timing) for row in timed)]
    said += dict.fromkeys(f"{row.sm_clock_mhz:.0f} MHz" for row in timed if row.sm_clock_mhz)
    notes: dict[str, list[str]] = {}
    for row in timed:
        notes.setdefault(row.note, []).append(row.variant)
    told = [f"{'all' if len(who) == len(timed) else ', '.join(who)}: {note}" for note, who in notes.items() if note]
    return "\n\n".join(
        [f"**{case}**, {', '.join(said)}", table(shown, columns, style="pipe"), *(["; ".join(told)] if told else [])]
    )


def origins(machine: Machine) -> str:
    """When, at which commit and on what each program ran."""
    lines = []
    for program, document in machine.documents.items():
        environment = document["environment"]
        peaks = [number(environment["peaks"][name]) for name in ("matmul_tflops", "copy_gbs", "stream_gbs")]
        line = {"program": program, "date": environment["date"], "commit": f"`{short(environment)}`"}
        line["versions"] = versions(environment)
        line["peaks"] = "{} TFLOP/s, copy {} GB/s, read {} GB/s".format(*peaks)
        load = environment.get("load")
        line["load"] = f"{load[0]:.1f} of {environment['cores']} cores" if load else None
        lines.append(line)
    columns = {key: key for key in lines[0]} | {"peaks": "peaks measured in the run", "load": "load before it"}
    return table(
        lines,
        {key: text for key, text in columns.items() if any(line[key] is not None for line in lines)},
        style="pipe",
    )


def versions(environment: dict[str, Any]) -> str:
    names = {"torch": "torch", "triton": "Triton", "transformers": "transformers", "cuda": "CUDA", "driver": "driver"}
    return ", ".join(f"{text} {environment[name]}" for name, text in names.items() if environment.get(name))


def short(environment: dict[str, Any]) -> str:
    commit = str(environment["commit"])
    return commit[:12] + (DIRTY if commit.endswith(DIRTY) else "")


def figures(found: Sequence[Machine]) -> str:
    """The README's block: the first GPU's headline, or the first machine's where no GPU has been measured."""
    shown = next((machine for machine in found if headline(machine)), None)
    if shown is None:
        return f"{BEGIN}\nNothing has been measured yet: `make report`.\n{END}"
    measured = [shown.documents[name]["environment"] for name in ("latency", "training") if name in shown.documents]
    commits = ", ".join(sorted({f"`{short(environment)}`" for environment in measured}))
    presets = " and ".join(shown.rows("latency", "training").preset.unique())
    parts = [
        f"Measured on {measured[0]['device']} ({versions(measured[0])}, commit {commits}), whole model, {presets} shape, random "
        "weights, medians in ms:",
        table(headline(shown), _HEADLINE, style="pipe"),
    ]
    if not shown.is_gpu:
        parts.append("No GPU has been measured yet, and nothing here claims a speed on one.")
    picture = f"benchmarks/results/{shown.folder.name}/plots/latency-sweep.png"
    if (shown.folder / "plots" / "latency-sweep.png").exists():
        parts.append(f"![speedup over visual tokens in the prompt]({picture})")
    parts.append("All rows, losing ones included: [benchmarks/REPORT.md](benchmarks/REPORT.md).")
    return "\n".join([BEGIN, "\n\n".join(parts), END])


def with_figures(readme: str, block: str) -> str:
    """The README with its block replaced.

    Raises:
        ValueError: the README has no place for it.
    """
    changed, count = re.subn(f"{BEGIN}.*?{END}", lambda _: block, readme, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md: wanted one block between {BEGIN} and {END}, found {count}")
    return changed


def measure(results: Path, device: torch.device) -> int:
    """Runs the programs one after the other into results/<machine>; 1 when one of them failed."""
    commit = commit_of()
    if commit == UNKNOWN_COMMIT:
        sys.exit("this tree has no git, and rows must name their commit: set MEMVP_COMMIT to what it is a copy of")
    if commit.endswith(DIRTY):
        print(f"UNCOMMITTED CHANGES: rows will name {commit}, which is not what is measured", file=sys.stderr)
    folder = results / slug(device_name(device))
    status = 0
    for program, sizes in MEASURE.items():
        name, *switches = program.split()
        stem = "-".join([name, *(switch.removeprefix("--") for switch in switches)])
        command = [sys.executable, str(HERE / f"{name}.py"), *switches, "--device", str(device)]
        command += [] if device.type == "cuda" else sizes
        command += ["--json", str(folder / f"{stem}.json"), "--plot", "none"]
        print("+", " ".join(command), flush=True)
        begun = time.monotonic()
        status |= subprocess.run(command).returncode
        print(f"{program}: {time.monotonic() - begun:.0f} s", flush=True)
    return int(status != 0)


def main(arguments: list[str] | None = None) -> int:
    """Measures where asked, then writes, or with --check compares; 1 when a program failed or a file is out of date."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    files = {"results": HERE / "results", "report": HERE / "REPORT.md", "readme": HERE.parent / "README.md"}
    texts = ("folder of <machine>/<program>.json", "file to write", "file whose figures to write")
    for (name, default), text in zip(files.items(), texts, strict=True):
        shown = default.relative_to(HERE.parent)
        parser.add_argument(f"--{name}", type=Path, default=default, help=f"{text} (default: {shown})")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    parser.add_argument("--measure", action="store_true", help="measure this machine first, with all programs")
    parser.add_argument("--device", help="to measure (default: a GPU where there is one)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    status = measure(options.results, device) if options.measure else 0
    found = machines(options.results)
    if not options.check:
        for machine in found:
            for program, document in machine.documents.items():
                plots.plot_program(document, machine.folder / "plots" / f"{program}.png")
            serving.draw(machine.folder)
    wanted = {options.report: report(found)}
    if options.readme.exists():
        wanted[options.readme] = with_figures(options.readme.read_text(), figures(found))
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if options.check:
            print(f"{path} is not what the result files give: run python benchmarks/report.py", file=sys.stderr)
        else:
            path.write_text(wanted[path])
            print(f"wrote {path}")
    return int(status or (options.check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main())
