"""Options that the benchmark programs share, and what they fall back to on the device at hand."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from harness.presets import PRESETS, Preset

__all__ = ["BY_NAME", "ROADS", "Setting", "common_parser", "settle"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OUT = Path("out")
#: Without arguments a CPU run ends within 90 seconds, on slow machines by beginning no case after these.
DEFAULT_CPU_SECONDS = 60.0
#: Roads of the Triton backend that no GPU has run yet. Variants on them take part where they are named, so that a kernel that hangs
#: costs no other's rows.
BY_NAME = ("gluon", "wgmma")
#: All roads of its large steps.
ROADS = ("fused", "library", *BY_NAME)
#: Sizes that run in seconds anywhere.
QUICK = {"batch": (2,), "text_length": (8,), "visual_tokens": (16,)}


@dataclass(frozen=True)
class Setting:
    """The options, with every default filled in.

    Attributes:
        device, dtype: measured.
        preset_name, preset: the model's shape.
        layers: decoder layers of the stack.
        batch, text_length, visual_tokens: the values of each to run.
        samples: per variant.
        compiled: whether torch.compile forms take part.
        only: names of variants to run, or None for all.
        seconds: no case and no variant is begun after this many seconds; None: no limit.
        go_on: keep the rows that the result file has, and measure what it lacks.
        json, plot: files to write; None: not.
        quiet: no progress bar.
    """

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
    seconds: float | None
    go_on: bool
    json: Path | None
    plot: Path | None
    quiet: bool

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def element(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize

    def sizes(self) -> list[tuple[int, int, int]]:
        """(batch, text length, visual tokens): the first of each, then what differs from it in one size, in two, in three."""
        lists = (self.batch, self.text_length, self.visual_tokens)
        return sorted(
            product(*lists), key=lambda size: sum(n != first[0] for n, first in zip(size, lists, strict=True))
        )

    def at(self, size: tuple[int, int, int], *, level: str) -> Setting:
        """The setting for one of `sizes`: on a CPU, where a compilation takes many seconds, compiled forms run at the first alone,
        and there in the whole model (`level` "model"), whose FFN is what is compiled."""
        if self.device.type == "cuda" or (size == self.sizes()[0] and level == "model"):
            return self
        return dataclasses.replace(self, compiled=False)

    def wants(self, variant: str) -> bool:
        """Whether `--variants` lets it take part; the baselines of the speedups always do."""
        if self.only is None:
            return not variant.endswith(BY_NAME)
        return variant in self.only or variant in ("prompt", "matmul")


def common_parser(
    description: str, *, program: str, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.ArgumentParser:
    """A parser with the shared options.

    Args:
        description: of --help.
        program: names the files that are written by default.
        parents: parsers of the program's own options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=list(parents)
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="model shape (default: llama-7b on a GPU, tiny on a CPU)"
    )
    parser.add_argument("--batch", type=_positive, nargs="+", metavar="S", help="sequences, each with its own image")
    parser.add_argument("--text-length", type=_positive, nargs="+", metavar="T", help="text tokens of each sequence")
    parser.add_argument("--visual-tokens", type=_positive, nargs="+", metavar="n", help="tokens of an image")
    parser.add_argument(
        "--layers", type=_positive, help="decoder layers of the model (default: the preset's; 8 at most on a CPU)"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these, and what they are measured by")
    parser.add_argument(
        "--samples", type=_positive, help="per variant (default: 20; 3 with --quick); the report takes 20 or more"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes and few samples: does it all still run?"
    )
    compiled = parser.add_mutually_exclusive_group()
    compiled.add_argument(
        "--compile",
        dest="compiled",
        action="store_true",
        default=None,
        help="with torch.compile forms (default on a GPU)",
    )
    compiled.add_argument("--no-compile", dest="compiled", action="store_false", default=None)
    parser.add_argument("--seconds", type=float, help="begin no case or variant after this many seconds")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="keep the rows of --json, and measure what it lacks"
    )
    parser.add_argument("--json", type=Path, default=_OUT / f"{program}.json", help="result file; 'none' writes none")
    parser.add_argument("--plot", type=Path, default=_OUT / f"{program}.png", help="picture; 'none' draws none")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def settle(
    options: argparse.Namespace,
    *,
    cpu: Mapping[str, tuple[int, ...]],
    cuda: Mapping[str, tuple[int, ...]],
) -> Setting:
    """Fills in what was not asked for.

    Args:
        options: parsed.
        cpu, cuda: values of batch, text_length and visual_tokens on either device.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("--device: wanted a GPU, but PyTorch sees none; leave the option out to run on the CPU")
        if device.index is not None:
            torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    on_gpu = device.type == "cuda"
    name = options.preset or ("smallest" if options.quick else "llama-7b" if on_gpu else "tiny")
    preset = PRESETS[name]
    asked = options.quick or any(
        (options.preset, options.batch, options.text_length, options.visual_tokens, options.layers)
    )
    defaults = QUICK if options.quick else cuda if on_gpu else cpu
    layers = options.layers or (1 if options.quick else preset.layers if on_gpu else min(preset.layers, 8))
    return Setting(
        device=device,
        dtype=DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")],
        preset_name=name,
        preset=preset,
        layers=layers,
        batch=tuple(options.batch or defaults["batch"]),
        text_length=tuple(options.text_length or defaults["text_length"]),
        visual_tokens=tuple(options.visual_tokens or defaults["visual_tokens"]),
        samples=options.samples or (3 if options.quick else 20),
        compiled=on_gpu and not options.quick if options.compiled is None else options.compiled,
        only=tuple(options.variants) if options.variants else None,
        seconds=DEFAULT_CPU_SECONDS if options.seconds is None and not on_gpu and not asked else options.seconds,
        go_on=options.go_on,
        json=_path(options.json),
        plot=_path(options.plot),
        quiet=options.quiet,
    )


def _path(path: Path) -> Path | None:
    return None if str(path) == "none" else path


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted at least 1, got {number}")
    return number
