"""The GPU machine's run: order, limits, and what is left when a part hangs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import decode
import gpu_report
import kernels
import latency
import pytest
import report as report_program
import sanitized
import sweep
import torch
import training
from gpu_report import Part
from harness import commit as commits
from harness import digest
from harness import parts as parts_module
from harness.cli import Setting, common_parser, settle
from harness.parts import RECORDING, RING_TESTS
from harness.program import Job
from harness.results import load

from tests.benchmarks.test_report import rows, write


def python(code: str) -> gpu_report.Callable[[Path, int], list[str]]:
    return lambda results, seconds: [sys.executable, "-c", code, str(results)]


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's name without a process that imports torch."""
    monkeypatch.setattr(gpu_report, "results_folder", lambda out, device: (out or Path("nowhere")) / "a-gpu")


def report(parts: list[Part], monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    monkeypatch.setattr(gpu_report, "parts", lambda device: parts)
    return gpu_report.main(["--out", str(out), *more])


def summary(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / "gpu-report-summary.json").read_text()))


def test_the_whole_run_fits_nine_minutes_the_most_valuable_first() -> None:
    parts = gpu_report.parts("cuda")
    assert sum(part.seconds for part in parts) <= 530  # of --total, and that under nine minutes
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[:4] == ["build", "diagnosis", "tests-cuda", "tests-triton"]
    assert names.index("latency") < names.index("training") < names.index("kernels") < names.index("sweep")
    assert set(RECORDING) <= set(names)


PROGRAMS = {"decode": decode, "latency": latency, "training": training, "kernels": kernels, "sweep": sweep}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_program_understands_its_command(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program's own parser, up to where it would begin to measure."""
    begun: list[tuple[str, Setting, list[Job]]] = []

    def run(program: str, setting: Setting, jobs: list[Job]) -> NoReturn:
        begun.append((program, setting, jobs))
        raise InterruptedError

    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stems = []
    for part in gpu_report.parts(device):
        if part.name not in RECORDING:
            continue
        _python, script, *arguments = part.command(Path("r"), 100)
        module = PROGRAMS[Path(script).stem]
        monkeypatch.setattr(module, "run", run)
        with pytest.raises(InterruptedError):
            module.main([*arguments, "--continue"])
        program, setting, jobs = begun[-1]
        assert setting.json is not None
        # What the report looks for, and no two in one file.
        assert setting.json.stem == ("kernels-rings" if part.name == "rings" else program)
        stems.append(setting.json.stem)
        assert setting.seconds == 85  # of 100: nothing is begun that may not be finished
        assert setting.device.type == device
        assert setting.go_on
        assert len(jobs) > 0
        if device == "cuda":
            assert setting.preset_name == "llama-7b"
            assert setting.samples >= 20
            assert setting.dtype == torch.bfloat16
    assert len(set(stems)) == len(stems) == len(RECORDING)


def test_the_headline_case_comes_first() -> None:
    def first(name: str) -> str:
        (part,) = (part for part in gpu_report.parts("cuda") if part.name == name)
        arguments = ["--device", "cpu", *part.command(Path("r"), 100)[4:]]
        module = PROGRAMS[name]
        parser = common_parser("", program=name)
        setting = settle(parser.parse_args(arguments), cpu=module.CUDA, cuda=module.CUDA)
        if name == "decode":
            jobs = [job.template.case for job in decode.jobs(setting, list(decode.IMAGES))]
            assert jobs[:3] == [f"decode, {n}, an image each" for n in ("64 tokens", "16 tokens", "1 token")]
            return jobs[0]
        more = {"recompute": False, "checkpointing": False, "quantized": False} if name == "training" else {}
        return str(next(iter(module.jobs(setting, **more))).template.case)

    assert first("latency") == "model, first token 16×64, image 256"
    assert first("training") == "model, training step 16×64, image 256"
    assert first("decode").startswith("decode, 64 tokens")


def test_tests_of_different_kernels_run_in_different_processes() -> None:
    parts = {part.name: part for part in gpu_report.parts("cuda")}
    commands = {name: parts[name].command(Path("r"), 9) for name in ("tests-cuda", "tests-triton", "tests")}
    for name, place in (("tests-cuda", "tests/csrc"), ("tests-triton", "tests/triton")):
        tested = commands[name][commands[name].index(place) :]
        assert tested == [place, *(f"--ignore={of}" for of in RING_TESTS)]
    assert parts["tests-rings"].command(Path("r"), 9)[-len(RING_TESTS) :] == list(RING_TESTS)
    assert all((gpu_report.ROOT / place).exists() for place in RING_TESTS)
    assert commands["tests"][-3:] == ["tests", "--ignore=tests/csrc", "--ignore=tests/triton"]
    for command in commands.values():
        assert "gpu and not slow" in command
    assert parts["tests-cuda"].variables == {"MEMVP_TEST_INSTALLED": "1"}  # no second build
    for tool in ("memcheck", "racecheck"):
        assert parts[tool].variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = parts[tool].command(Path("r"), 9)
        assert command[1:7] == ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        assert "kns=_fwd_kernel" in command


def test_our_kernels_are_not_filtered_out() -> None:
    """Whatever a Triton kernel is named, the sanitizer's filter lets it through."""
    folder = gpu_report.ROOT / "memvp_kernels" / "backends" / "triton"
    names = [
        name for path in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    ]
    assert len(names) > 5
    assert [name for name in names if not any(part in name for part in parts_module._OUR_KERNELS)] == []


def test_a_hanging_part_is_stopped_and_what_it_wrote_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrote = "import sys, time, pathlib; pathlib.Path(sys.argv[1], 'partial.json').write_text('rows'); print('begun', flush=True); "
    monkeypatch.setattr(gpu_report, "STRETCH", 1)
    parts = [
        Part("hangs", 5, python(wrote + "time.sleep(60)")),
        Part("absent", 5, python(""), lambda: "not installed: something"),
        Part("fails", 5, python("print('why it failed'); raise SystemExit(3)")),
        Part("works", 5, python("import os; print(os.environ['MARK'])"), variables={"MARK": "seen"}),
        Part("refuses", 5, python("print('Error: Device not supported'); raise SystemExit(1)"), skipped_by=("Device not supported",)),
    ]  # fmt: skip
    assert report(parts, monkeypatch, tmp_path) == 1
    lines = summary(tmp_path)
    assert [line["status"] for line in lines] == ["stopped after 5 s", "skipped", "exit status 3", "ok", "skipped"]
    assert lines[1]["reason"] == "not installed: something"
    assert lines[4]["reason"] == "Device not supported"
    assert lines[0]["seconds"] < 20
    assert (tmp_path / "a-gpu" / "partial.json").read_text() == "rows"
    assert [path.name for path in (tmp_path / "a-gpu").iterdir()] == [
        "partial.json"
    ]  # rows alone: the folder can be copied
    log = (tmp_path / "gpu-report.log").read_text()
    assert "KeyboardInterrupt" in log  # it was asked before it was killed, and said where it was
    assert "seen" in log
    assert "why it failed" in capsys.readouterr().out  # the end of every part reaches the terminal


def test_what_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    line = gpu_report.run_part(Part("deaf", 5, python(deaf)), tmp_path, tmp_path / "log", seconds=2)
    assert line["status"] == "stopped after 2 s"
    assert line["seconds"] < 20


def test_a_part_gets_what_earlier_ones_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def remembers(results: Path, seconds: int) -> list[str]:
        given.append(seconds)
        return [sys.executable, "-c", ""]

    parts = [Part("skipped", 40, remembers, lambda: "no"), *(Part(str(n), 30, remembers) for n in range(2))]
    assert report(parts, monkeypatch, tmp_path, "--total", "500") == 0
    assert given[0] == 60  # twice its own, though 40 were left over
    assert given[1] > 45


def test_parts_write_where_the_caller_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in the repository's root, where a relative --out would be another folder."""
    monkeypatch.chdir(tmp_path)
    touch = python("import pathlib, sys; pathlib.Path(sys.argv[1], 'here').touch()")
    assert report([Part("touches", 9, touch)], monkeypatch, Path("out")) == 0
    assert (tmp_path / "out" / "a-gpu" / "here").exists()


def test_a_program_that_lost_its_gpu_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; raise SystemExit(0 if '--continue' in sys.argv else 75)"
    assert parts_module.AGAIN == 75
    assert report([Part("latency", 30, python(code))], monkeypatch, tmp_path, "--commit", "a" * 40) == 0
    assert [line["status"] for line in summary(tmp_path)] == ["ok"]


def test_stopping_the_run_stops_its_part(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` and job schedulers send it: the part is interrupted, not left behind on the GPU."""
    code = f"""
import sys
sys.path.insert(0, {str(gpu_report.HERE)!r})
import gpu_report
from gpu_report import Part
from pathlib import Path
child = "import os, sys, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
gpu_report.parts = lambda device: [Part("hangs", 60, lambda results, seconds: [sys.executable, "-c", child])]
gpu_report.results_folder = lambda out, device: out / "a-gpu"
gpu_report.main(["--out", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "gpu-report.log"
    until = time.monotonic() + 60
    while not (log.exists() and "pid" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    child = int(log.read_text().split("pid ")[1].split()[0])
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()
    assert "KeyboardInterrupt" in log.read_text()
    assert "rows:" in printed
    assert summary(tmp_path)[-1]["status"] == "begun, and then the run was cut"


def test_nothing_begins_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report([Part("late", 5, python("raise SystemExit(3)"))], monkeypatch, tmp_path, "--total", "1") == 0
    assert summary(tmp_path)[0]["reason"] == "the run's time is up"


@pytest.fixture
def copied_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree without git."""
    monkeypatch.setattr(commits, "first_line", lambda command: None)
    monkeypatch.setenv("MEMVP_COMMIT", "")


@pytest.mark.usefixtures("copied_tree")
def test_a_run_for_the_record_does_not_begin_without_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = Part("latency", 9, python("import os; print('commit of the part', os.environ['MEMVP_COMMIT'])"))
    with pytest.raises(SystemExit, match="pass --commit"):
        report([says], monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match="hexadecimal"):
        report([says], monkeypatch, tmp_path, "--commit", "main")
    assert not (tmp_path / "gpu-report-summary.json").exists()
    assert report([Part("tests", 9, python(""))], monkeypatch, tmp_path) == 0  # nothing is recorded
    capsys.readouterr()
    assert report([says], monkeypatch, tmp_path, "--commit", "0123abc" * 5) == 0
    assert "UNCOMMITTED" not in capsys.readouterr().out
    assert f"commit of the part {'0123abc' * 5}" in (tmp_path / "gpu-report.log").read_text()
    monkeypatch.setenv("MEMVP_COMMIT", "0123abc-dirty")
    assert report([says], monkeypatch, tmp_path) == 0
    assert capsys.readouterr().out.count("UNCOMMITTED CHANGES") == 2  # at the start, and where the rows are


@pytest.mark.usefixtures("copied_tree")
def test_what_a_run_leaves_can_be_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--out of a copied tree, through report.py: a schema, a name or a stray file that does not fit shows here."""
    machine = {"device": "A GPU", "device_type": "cuda", "commit": "a" * 40}
    rows_of = "case", "prefill", {"prompt": 4.0, "factored-auto": 1.0}
    write(tmp_path / "source", "latency", rows(*rows_of), **machine)
    copy = "import shutil, sys; shutil.copy({!r}, sys.argv[1])".format(str(tmp_path / "source" / "latency.json"))
    out = tmp_path / "out"
    assert report([Part("latency", 9, python(copy))], monkeypatch, out, "--commit", "a" * 40) == 0
    shutil.copytree(out / "a-gpu", tmp_path / "results" / "a-gpu")
    for results in (tmp_path / "results", out):  # copied, or as it is
        found = digest.machines(results)
        assert [machine.folder.name for machine in found] == ["a-gpu"]
        assert "## A GPU" in report_program.report(found)


def test_the_kernels_part_runs_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program by the road of the GPU run, every Triton launch by the interpreter: a changed launcher shows here, not there."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_report.main(["--device", "cpu", "--only", "kernels", "--out", str(tmp_path)]) == 0
    document = load(tmp_path / "a-gpu" / "kernels.json")
    assert [row["status"] for row in document["rows"] if row["variant"] == "triton"] == ["ok"] * 7
    assert [row["status"] for row in document["rows"] if row["variant"] == "library"] == ["ok"] * 4
    assert document["environment"]["triton_interpreted"] is True


def test_the_sanitized_calls_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitized.main(["--device", "cpu", "--backends", "torch", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": ok") == 4
    assert all(name in printed for name in ("visual_key", "key_position", "visual_basis"))  # gradients, too


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = sanitized.results

    def results(function: Any, given: Any, **options: Any) -> Any:
        found = original(function, given, **options)
        if "device" in options:  # the backend's own
            found["key_position"][3] = 0
        return found

    monkeypatch.setattr(sanitized, "results", results)
    assert sanitized.main(["--device", "cpu", "--backends", "torch"]) == 1
    assert "WRONG" in capsys.readouterr().out
