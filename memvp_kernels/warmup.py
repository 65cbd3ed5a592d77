"""Compiles a model's Triton kernels ahead of time, so that its first calls do not wait.

    python -m memvp_kernels warmup --shapes llama-7b
    python -m memvp_kernels warmup --shapes llama-7b --architecture 90 --archive kernels.tar.xz     on a machine without a GPU
    python -m memvp_kernels warmup --unpack kernels.tar.xz                                          on the machine with it

Nothing runs. Kernels go to Triton's cache (TRITON_CACHE_DIR, or ~/.triton/cache), which finds them by Triton's version and build (one for
each Python version), the kernels' sources, the architecture, and every argument's type and divisibility by 16. Where one of these
differs, a call compiles as if there were no cache. Tiles depend on the number of tokens in powers of two, and on the GPU's
multiprocessors: the data sheet's where it is not here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memvp_kernels.problem import SHARED, Problem, Segments

__all__ = ["main"]

#: d and F of gated FFNs, by model.
SHAPES = {
    "llama-7b": (4096, 11008),
    "llama-13b": (5120, 13824),
    "llama-3-8b": (4096, 14336),
    "qwen2.5-7b": (3584, 18944),
    "mistral-7b": (4096, 14336),
}
_TOKENS = ("16x512", "16x64", "1x512", "1x64", "16x1", "1x1")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit status is 1 when a kernel did not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m memvp_kernels warmup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", default=["llama-7b"], metavar="SHAPE", help=f"dxF, or one of {', '.join(SHAPES)}")
    add("--tokens", nargs="+", default=_TOKENS, metavar="SxT", help=f"sequences and their length ({' '.join(_TOKENS)})")
    add("--slots", type=int, default=320, help="M, slots of an image's memory (320)")
    add("--rank", type=int, default=136, help="r of the factored memory (136: the paper's projector of 128, padded)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--inference", action="store_true", help="without the kernels of training")
    add("--architecture", type=int, choices=(80, 86, 89, 90, 100, 103, 120), help="of the GPU, where it is not here")
    add("--archive", type=Path, help="pack what was compiled into this file")
    add("--unpack", type=Path, metavar="ARCHIVE", help="put an archive's kernels into the cache, and do nothing else")
    options = parser.parse_args(arguments)
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    if options.unpack is not None:
        print(f"{_unpack(options.unpack, cache)} kernels in {cache}")
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    multiprocessors = None
    if options.architecture is None:
        if not torch.cuda.is_available():
            parser.error("--architecture: wanted one, because this machine has no GPU")
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        options.architecture = 10 * properties.major + properties.minor
        multiprocessors = properties.multi_processor_count
    with tempfile.TemporaryDirectory() as empty:
        if options.archive is not None:  # into an empty cache, so that nothing else is packed
            cache = Path(empty)
            os.environ["TRITON_CACHE_DIR"] = empty
        failed = _compile(options, multiprocessors)
        if options.archive is not None:
            with tarfile.open(options.archive, "w:xz") as archive:
                archive.add(cache, arcname=".")
            print(f"{options.archive}: {options.archive.stat().st_size / 1e6:.1f} MB")
    for name, error in failed.items():
        print(f"{name} does not compile: {error}", file=sys.stderr)
    return int(bool(failed))


def _compile(options: argparse.Namespace, multiprocessors: int | None) -> dict[str, str]:
    """Compiles every pass; the errors by kernel."""
    from memvp_kernels.backends.triton.runtime.offline import offline

    sizes = [SHAPES[s] if s in SHAPES else tuple(map(int, s.split("x"))) for s in options.shapes]
    tokens = [tuple(map(int, t.split("x"))) for t in options.tokens]
    cases = [(size, of) for size in sizes for of in tokens]
    with offline(options.architecture, multiprocessors) as launched:
        for (width, pairs), (sequences, length) in _progress(cases):
            memory = {"slots": options.slots, "rank": options.rank}
            x = torch.empty(sequences * length, width, dtype=getattr(torch, options.dtype))
            _passes(_problem(x, pairs, sequences, **memory), training=not options.inference)
    compiled = {launch.kernel.hash for launch in launched if launch.kernel is not None}
    print(f"sm_{options.architecture}: {len(compiled)} kernels")
    return {launch.name: launch.error for launch in launched if launch.error}


def _progress(cases: list[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    return tqdm(cases, unit="shape", desc="compiling")


def _problem(x: Tensor, pairs: int, sequences: int, *, slots: int, rank: int) -> Problem:
    """A gated FFN over the memory as `MemVPModel` gives it, on tensors that nobody fills."""
    rows, width = x.shape
    key, value = (x.new_empty(rank + slots, width) for _ in range(2))
    core = x.new_empty(sequences, slots, rank)
    index = torch.empty(sequences, dtype=torch.int32)
    return Problem(
        x=x, residual=None, key=x.new_empty(pairs, width), value=x.new_empty(width, pairs).T, gate=x.new_empty(pairs, width),
        key_bias=None, gate_bias=None, value_bias=None, visual_key=core, visual_value=core, visual_basis=key[:rank],
        key_position=key[rank:], value_position=value[rank:], key_operand=key, value_operand=value, seed=None,
        segments=Segments(rows=rows, sequences=sequences, length=rows // sequences, index=index),
        activation="silu", visual_activation="silu", visual_scale=0.1, dropout_p=0.0,
    )  # fmt: skip


def _passes(problem: Problem, *, training: bool) -> None:
    """A call with and without an image; a training step in the first layer that reads the memory, and in later ones."""
    from memvp_kernels.backends.triton import backward, forward
    from memvp_kernels.backends.triton.forward import without_memory

    text = without_memory(problem)
    for each in (problem, text):
        forward(each, save_hidden=False, save_scores=False)
    if not training:
        return
    pre = problem.x.new_empty(2, problem.rows, problem.pairs)
    grad, scores = torch.empty_like(problem.x), problem.x.new_empty(problem.rows, problem.slots)
    for each in (problem, text):
        forward(each, save_hidden=True, save_scores=True)
    sums = {name: torch.empty(getattr(problem, name).shape) for name in SHARED}
    for needs, given in ((("x", *SHARED), {}), (("x", *SHARED), sums), (SHARED, sums)):
        backward(problem, grad, pre, scores, frozenset(needs), given)
    backward(text, grad, pre, None, frozenset(("x",)))


def _unpack(archive: Path, cache: Path) -> int:
    """Extracts an archive; Triton's group files name their kernels' files by absolute paths, which are made this cache's."""
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        packed.extractall(cache, filter="data")
        groups = [cache / name for name in packed.getnames() if Path(name).name.startswith("__grp__")]
    for group in groups:
        files = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str((group.parent / name).resolve()) for name in files}}))
    return len(groups)
