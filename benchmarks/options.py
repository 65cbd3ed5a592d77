"""What the benchmark programs are asked, and what they measure on: options, machine, versions, commit."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rows import DIRTY, UNKNOWN_COMMIT, Row
from workload import PRESETS, Preset, source

import memvp_kernels

_ROOT = Path(__file__).resolve().parents[1]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_QUICK = {"batch": (2,), "text_length": (8,), "visual_tokens": (16,)}
_SWEEP = {
    "cpu": {"batch": (4,), "text_length": (64, 16), "visual_tokens": (256, 64)},
    "cuda": {"batch": (16,), "text_length": (64, 16, 256), "visual_tokens": (256, 64, 576)},
}
_SWEEP_LAYERS = {"cpu": 2, "cuda": 4}
_SWEEP_VARIANTS = ("text", "official-eager", "factored-auto", "factored-torch", "MemVPModel")
#: Without arguments a CPU run begins no case after these, and so ends within 90 seconds on slow machines too.
_CPU_SECONDS = 60.0

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Setting:
    """The options, with every default filled in; `json` and `plot` are None where not to be written.

    Attributes:
        program: names the run in its file, with its switches.
        batch, text_length, visual_tokens: the values of each to run.
        compiled: whether torch.compile forms take part.
        only: names of variants to run, or None for all.
        sweep: one size varies at a time, on a few layers and variants.
        seconds: no case and no variant is begun after these; None: no limit.
        go_on: keep the rows that the result file has, and measure what it lacks.
        commit: what the tree is a copy of, where it has no git.
    """

    program: str
    device: torch.device
    dtype: torch.dtype
    preset_name: str
    preset: Preset
    layers: int
    batch: tuple[int, ...]
    text_length: tuple[int, ...]
    visual_tokens: tuple[int, ...]
    samples: int
    compiled: bool
    only: tuple[str, ...] | None
    sweep: bool
    seconds: float | None
    go_on: bool
    commit: str | None
    json: Path | None
    plot: Path | None
    quiet: bool

    @property
    def element(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize

    def sizes(self) -> list[tuple[int, int, int]]:
        """(batch, text length, visual tokens): the first of each, then what differs from it in one size and, but for a sweep, in more."""
        lists = (self.batch, self.text_length, self.visual_tokens)

        def differing(size: tuple[int, ...]) -> int:
            return sum(n != own[0] for n, own in zip(size, lists, strict=True))

        return sorted((size for size in product(*lists) if not self.sweep or differing(size) < 2), key=differing)

    def at(self, size: tuple[int, int, int], *, level: str) -> Setting:
        """The setting for one of `sizes`: on a CPU, where compiling takes long, only the model's first case has compiled forms."""
        if self.device.type == "cuda" or (size == self.sizes()[0] and level == "model"):
            return self
        return dataclasses.replace(self, compiled=False)

    def wants(self, variant: str) -> bool:
        """Whether `--variants` lets it take part; the baselines of the speedups always do."""
        return self.only is None or variant in self.only or variant in ("prompt", "matmul")

    def row(self, case: str, size: tuple[int, int, int], **fields: Any) -> Row:
        """A row's fields that all variants of a case share; "model" in a sweep's case becomes "2 layers"."""
        case = case.replace("model", f"{self.layers} layers", 1) if self.sweep else case
        fields |= dict(zip(("sequences", "text_length", "visual_tokens"), size, strict=True))
        return Row(
            case=case, variant="", dtype=str(self.dtype).removeprefix("torch."), preset=self.preset_name, **fields
        )


def parser(
    description: str, *, program: str, parents: Sequence[argparse.ArgumentParser] = (), sweep: bool = False
) -> argparse.ArgumentParser:
    """The options that the programs share; `program` names the files that are written by default."""
    found = argparse.ArgumentParser(description=description, parents=list(parents))
    add = found.add_argument
    add("--preset", choices=sorted(PRESETS), help="model shape (default: llama-7b on a GPU, tiny on a CPU)")
    add(
        "--batch",
        type=_positive,
        nargs="+",
        metavar="S",
        help="sequences, each with its own image (default: by device)",
    )
    add("--text-length", type=_positive, nargs="+", metavar="T", help="text tokens of each (default: by device)")
    add("--visual-tokens", type=_positive, nargs="+", metavar="n", help="tokens of an image (default: by device)")
    add("--layers", type=_positive, help="decoder layers (default: the preset's on a GPU, at most 8 on a CPU)")
    add("--dtype", choices=sorted(_DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    add("--variants", nargs="+", metavar="NAME", help="only these, and the baseline (default: all)")
    add("--samples", type=_positive, help="per variant (default: 20, 3 with --quick); the report wants 20 or more")
    add("--quick", action="store_true", help="the smallest sizes and few samples: does it all still run?")
    if sweep:
        text = f"vary one size at a time, on few layers (default: {_SWEEP_LAYERS['cpu']} on a CPU, {_SWEEP_LAYERS['cuda']} on a GPU)"
        add("--sweep", action="store_true", help=text)
    found.set_defaults(sweep=False)
    compiled = found.add_mutually_exclusive_group()
    default = "(default: on a GPU, unless --quick)"
    compiled.add_argument("--compile", dest="compiled", action="store_true", help=f"with torch.compile forms {default}")
    compiled.add_argument("--no-compile", dest="compiled", action="store_false", help="without them")
    found.set_defaults(compiled=None)
    limit = f"begin no case or variant after these (default: {_CPU_SECONDS:.0f} on a CPU without sizes or --quick, else none)"
    add("--seconds", type=float, help=limit)
    add("--continue", dest="go_on", action="store_true", help="keep the rows of --json, and measure what it lacks")
    add("--commit", help="what the tree is a copy of, where it has no git (default: $MEMVP_COMMIT)")
    add("--out", type=Path, default=Path("out"), help="folder of the files below (default: out)")
    add("--json", type=Path, help=f"result file, 'none' for none (default: OUT/{program}.json)")
    add("--plot", type=Path, help=f"picture, 'none' for none (default: OUT/{program}.png)")
    add("--quiet", action="store_true", help="no progress bar")
    found.set_defaults(program=program)
    return found


def settle(options: argparse.Namespace, *, cpu: Sizes, cuda: Sizes) -> Setting:
    """Fills in what was not asked for; `cpu` and `cuda` are the batch, text_length and visual_tokens of either device."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("--device: wanted a GPU, but PyTorch sees none; leave the option out to run on the CPU")
    if on_gpu:
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    sized = (options.preset, options.batch, options.text_length, options.visual_tokens, options.layers)
    limited = not on_gpu and not options.quick and not options.sweep and not any(sized)
    name = options.preset or ("smallest" if options.quick else "llama-7b" if on_gpu else "tiny")
    preset = PRESETS[name]
    sizes = _QUICK if options.quick else _SWEEP[device.type] if options.sweep else cuda if on_gpu else cpu
    layers = 1 if options.quick else preset.layers if on_gpu else min(preset.layers, 8)
    layers = min(layers, _SWEEP_LAYERS[device.type]) if options.sweep else layers
    program = f"{options.program}-sweep" if options.sweep else options.program
    only = options.variants or (_SWEEP_VARIANTS if options.sweep else None)
    compiled = on_gpu and not options.quick and not options.sweep if options.compiled is None else options.compiled

    def path(given: Path | None, suffix: str) -> Path | None:
        return None if str(given) == "none" else given or options.out / f"{program}.{suffix}"

    return Setting(
        program=program,
        device=device,
        dtype=_DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")],
        preset_name=name,
        preset=preset,
        layers=options.layers or layers,
        batch=tuple(options.batch or sizes["batch"]),
        text_length=tuple(options.text_length or sizes["text_length"]),
        visual_tokens=tuple(options.visual_tokens or sizes["visual_tokens"]),
        samples=options.samples or (3 if options.quick else 20),
        compiled=compiled,
        only=tuple(only) if only else None,
        sweep=options.sweep,
        seconds=_CPU_SECONDS if options.seconds is None and limited else options.seconds,
        go_on=options.go_on,
        commit=options.commit,
        json=path(options.json, "json"),
        plot=path(options.plot, "png"),
        quiet=options.quiet,
    )


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted at least 1, got {text}")
    return int(text)


def commit_of(said: str | None = None) -> str:
    """The checked-out commit, with "-dirty" when tracked files differ from it; without git what --commit or MEMVP_COMMIT says.

    Raises:
        ValueError: what was said is no commit.
    """
    git = ["git", "-C", str(_ROOT)]
    top, head = _first_line([*git, "rev-parse", "--show-toplevel"]), _first_line([*git, "rev-parse", "HEAD"])
    if head is not None and top is not None and Path(top).resolve() == _ROOT:
        # Results do not count as changes: a run that wrote latency.json may be followed by one that writes training.json.
        written = (":!benchmarks/results", ":!benchmarks/REPORT.md", ":!README.md")
        changed = _first_line([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *written])
        return head + (DIRTY if changed else "")
    found = said or os.environ.get("MEMVP_COMMIT") or UNKNOWN_COMMIT
    if found != UNKNOWN_COMMIT and not re.fullmatch(rf"[0-9a-f]{{7,40}}({DIRTY})?", found):
        raise ValueError(f'commit: wanted 7 to 40 hexadecimal digits, "{DIRTY}" after them or not, got {found!r}')
    return found


def environment(setting: Setting) -> dict[str, Any]:
    """The machine, the versions and the commit as plain JSON values."""
    found: dict[str, Any] = {
        "program": setting.program,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit_of(setting.commit),
        "device": device_name(setting.device),
        "device_type": setting.device.type,
        "memvp_kernels": memvp_kernels.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton_interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "inputs": source(),
    }
    for package in ("triton", "transformers", "liger-kernel", "peft", "numpy", "scikit-learn"):
        try:
            found[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package.replace("-", "_")] = None
    if setting.device.type != "cuda":
        return found | {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": list(os.getloadavg())}
    properties = torch.cuda.get_device_properties(setting.device)
    return found | {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "device_memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    model = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{model} CPU, {os.cpu_count()} cores"


def slug(name: str) -> str:
    """A folder name: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
