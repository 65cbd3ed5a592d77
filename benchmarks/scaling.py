"""What MemVP costs over several GPUs, on paper: bytes held and sent and FLOPs per GPU, and images per GPU in memory.

    python benchmarks/scaling.py                          # the tables of docs/scaling.md
    python benchmarks/scaling.py --write docs/scaling.md  # put them there, between their markers
    python benchmarks/scaling.py --gpu-memory 80 --sequences 8 --length 1024

Nothing is timed and nothing here is a measurement; the formulas are in harness/distributed.py.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from harness.distributed import (
    Layout,
    base_bytes,
    decode_collectives,
    held,
    image_bytes,
    prompt_bytes,
    slots_overhead,
    training_collectives,
    training_flops,
)
from harness.presets import PRESETS, Preset
from harness.table import markdown, text

GPUS = (1, 2, 4, 8, 16, 32, 64)
MODELS = {"llama-7b": "7B", "llama-13b": "13B", "llama-70b": "70B"}
_GB, _MB, _KB = 1e9, 1e6, 1e3
_MODE_NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "tp": "TP"}
_OF_THE_MEMORY = ("adapter's gradients", "gradient of the cores", "gradient of p^k, p^v", "gradient of the basis")


def training_rows(preset: Preset, *, sequences: int, length: int) -> list[dict[str, Any]]:
    """One row per number of GPUs and mode: what a GPU holds, computes and sends in one step."""
    rows = []
    for gpus in GPUS:
        for mode in ("ddp",) if gpus == 1 else _MODE_NAMES:
            layout = Layout(mode, gpus)
            replicas = mode == "tp" and layout.data > 1
            bytes_held = held(preset, layout, sequences=sequences, length=length)
            collectives = list(training_collectives(preset, layout, sequences=sequences, length=length))
            adapter = [
                c
                for c in collectives
                if c.name.startswith(("adapter", "gradient of the cores", "gradient of p^k", "gradient of the basis"))
            ]
            prompt = training_collectives(preset, layout, sequences=sequences, length=length, visual_tokens=256)
            rows.append(
                {
                    "gpus": gpus,
                    "mode": _MODE_NAMES[mode] + (f" {layout.tensor} × DP {layout.data}" if replicas else ""),
                    "base": (bytes_held["base"] + bytes_held["gathered"]) / _GB,
                    "rest": (bytes_held["adapter"] + bytes_held["activations"]) / _GB,
                    "tflop": training_flops(preset, layout, sequences=sequences, length=length) / 1e12,
                    "messages": sum(c.times for c in collectives),
                    "moved": sum(c.moved for c in collectives) / _GB,
                    "adapter": sum(c.moved for c in adapter) / _MB,
                    "prompt": sum(c.moved for c in prompt) / _GB if mode == "tp" else None,
                }
            )
    return rows


TRAINING_COLUMNS = {
    "gpus": "GPUs",
    "mode": "mode",
    "base": "base held, GB",
    "rest": "adapter, activations, GB",
    "tflop": "TFLOP per GPU",
    "messages": "collectives",
    "moved": "sent per GPU, GB",
    "adapter": "of it for the memory, MB",
    "prompt": "image in the prompt, GB",
}


def collective_rows(preset: Preset, *, gpus: int, sequences: int, length: int) -> list[dict[str, Any]]:
    """Each kind of message of a training step and of a decoded token."""
    rows = []
    for mode, name in _MODE_NAMES.items():
        layout = Layout(mode, gpus)
        steps = {
            "training step": training_collectives(preset, layout, sequences=sequences, length=length),
            "decoded token": decode_collectives(preset, layout, sequences=sequences * layout.tensor),
        }
        for step, collectives in steps.items():
            for c in collectives:
                rows.append(
                    {
                        "mode": name,
                        "step": step,
                        "name": c.name,
                        "kind": c.kind,
                        "payload": c.payload / _MB,
                        "times": c.times,
                        "moved": c.moved / _MB,
                    }
                )
    return rows


COLLECTIVE_COLUMNS = {
    "mode": "mode",
    "step": "in a",
    "name": "what",
    "kind": "collective",
    "payload": "whole tensor, MB",
    "times": "times",
    "moved": "sent per GPU, MB",
}


def serving_rows(*, gpu_memory: float) -> list[dict[str, Any]]:
    """Images that fit beside the weights, as cores and as keys and values of the prompt."""
    rows = []
    for key, label in (*MODELS.items(), ("llama3-8b", "8B")):
        preset = PRESETS[key]
        for gpus in (1, 2, 8):
            layout = Layout("tp", gpus)
            free = gpu_memory * _GB - held(preset, layout, sequences=0, length=0)["base"]
            core, cache = image_bytes(preset), prompt_bytes(preset) // layout.tensor
            rows.append(
                {
                    "model": f"{label} ({'GQA' if preset.kv_heads < preset.heads else 'MHA'})",
                    "gpus": gpus,
                    "weights": (gpu_memory * _GB - free) / _GB,
                    "bare": image_bytes(preset, stored=False) / _KB,
                    "core": core / _KB,
                    "cache": cache / _MB,
                    "cores": int(free // core) if free > 0 else None,
                    "caches": int(free // cache) if free > 0 else None,
                }
            )
    return rows


SERVING_COLUMNS = {
    "model": "model",
    "gpus": "TP",
    "weights": "weights, GB",
    "bare": "core, bare, KB",
    "core": "core, stored, KB",
    "cache": "KV cache of 256 tokens, MB",
    "cores": "images as cores",
    "caches": "images in the prompt",
}


def split_rows() -> list[dict[str, Any]]:
    """What the split by slots repeats, against the FFN it runs in."""
    rows = []
    for key, label in MODELS.items():
        preset = PRESETS[key]
        for tensor in (2, 4, 8):
            again = 4 * preset.width * preset.rank * (1 - 1 / tensor)
            local = 6 * preset.width * preset.pairs / tensor
            rows.append(
                {
                    "model": label,
                    "tp": tensor,
                    "memory": 100 * slots_overhead(preset, tensor=tensor),
                    "ffn": 100 * again / local,
                    "gathered": 2 * (tensor - 1) / tensor * preset.rank * 2,
                    "ratio": again / (2 * (tensor - 1) / tensor * preset.rank * 2),
                }
            )
    return rows


SPLIT_COLUMNS = {
    "model": "model",
    "tp": "TP",
    "memory": "repeated, % of the memory's share",
    "ffn": "repeated, % of the FFN's share",
    "gathered": "bytes per token a full split would send",
    "ratio": "FLOPs saved per byte sent",
}


def base_rows() -> list[dict[str, Any]]:
    """The frozen base in bfloat16 and in nf4."""
    return [
        {"model": label, "bf16": base_bytes(PRESETS[key]) / _GB, "nf4": base_bytes(PRESETS[key], nf4=True) / _GB}
        for key, label in MODELS.items()
    ]


def tables(*, gpu_memory: float, sequences: int, length: int) -> dict[str, tuple[list[dict[str, Any]], dict[str, str]]]:
    """Every table of the document by the name of its marker."""
    found = {
        f"training {key}": (training_rows(PRESETS[key], sequences=sequences, length=length), TRAINING_COLUMNS)
        for key in MODELS
    }
    found["collectives"] = (
        collective_rows(PRESETS["llama-7b"], gpus=8, sequences=sequences, length=length),
        COLLECTIVE_COLUMNS,
    )
    found["serving"] = (serving_rows(gpu_memory=gpu_memory), SERVING_COLUMNS)
    found["split"] = (split_rows(), SPLIT_COLUMNS)
    found["base"] = (base_rows(), {"model": "model", "bf16": "bfloat16, GB", "nf4": "nf4, GB"})
    return found


def written(document: str, found: dict[str, tuple[list[dict[str, Any]], dict[str, str]]]) -> str:
    """The document with each table between `<!-- table: name -->` and `<!-- end -->` made anew.

    Raises:
        ValueError: a marker without a table, or a table without a marker.
    """
    marked = set(re.findall(r"<!-- table: (.+?) -->", document))
    if marked != set(found):
        raise ValueError(f"markers {sorted(marked)} in the document, tables {sorted(found)}; each needs the other")

    def replaced(match: re.Match[str]) -> str:
        rows, columns = found[match[1]]
        return f"<!-- table: {match[1]} -->\n{markdown(rows, columns)}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", replaced, document, flags=re.DOTALL)


def main() -> None:
    """Print the tables, or write them into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB of one GPU, for serving (default 80)")
    parser.add_argument("--sequences", type=int, default=4, help="per GPU and training step (default 4)")
    parser.add_argument("--length", type=int, default=512, help="text tokens of each (default 512)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into FILE instead of printing them")
    options = parser.parse_args()
    found = tables(gpu_memory=options.gpu_memory, sequences=options.sequences, length=options.length)
    if options.write is not None:
        options.write.write_text(written(options.write.read_text(), found))
        return
    for name, (rows, columns) in found.items():
        print(f"\n{name}\n{text(rows, columns)}")


if __name__ == "__main__":
    main()
