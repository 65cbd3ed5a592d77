"""What MemVP costs over several GPUs, on paper: bytes held and sent and FLOPs per GPU, and images per GPU in memory.

    python benchmarks/scaling.py                          # the tables of docs/distributed.md
    python benchmarks/scaling.py --write docs/distributed.md  # put them there, between their markers
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
    held,
    image_bytes,
    prompt_bytes,
    training_collectives,
    training_flops,
)
from harness.presets import PRESETS
from harness.table import markdown, text

MODELS = {"llama-7b": "7B", "llama-13b": "13B", "llama-70b": "70B"}
_GB, _MB, _KB = 1e9, 1e6, 1e3
_MODE_NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "tp": "TP"}
_OF_THE_MEMORY = ("adapter's gradients", "gradient of the cores", "gradient of p^k, p^v", "gradient of the basis")


def training_rows(*, gpus: int, sequences: int, length: int) -> list[dict[str, Any]]:
    """One row per model and mode: what a GPU holds, computes and sends in one step."""
    rows = []
    for key, label in MODELS.items():
        preset = PRESETS[key]
        for mode, name in _MODE_NAMES.items():
            layout = Layout(mode, gpus)
            bytes_held = held(preset, layout, sequences=sequences, length=length)
            collectives = list(training_collectives(preset, layout, sequences=sequences, length=length))
            memory = [c for c in collectives if c.name in _OF_THE_MEMORY]
            prompt = training_collectives(preset, layout, sequences=sequences, length=length, visual_tokens=256)
            rows.append(
                {
                    "model": label,
                    "mode": name,
                    "base": (bytes_held["base"] + bytes_held["gathered"]) / _GB,
                    "rest": (bytes_held["adapter"] + bytes_held["activations"]) / _GB,
                    "tflop": training_flops(preset, layout, sequences=sequences, length=length) / 1e12,
                    "messages": sum(c.times for c in collectives),
                    "moved": sum(c.moved for c in collectives) / _GB,
                    "adapter": sum(c.moved for c in memory) / _MB,
                    "prompt": sum(c.moved for c in prompt) / _GB if mode == "tp" else None,
                }
            )
    return rows


TRAINING_COLUMNS = {
    "model": "model",
    "mode": "mode",
    "base": "base held, GB",
    "rest": "adapter, activations, GB",
    "tflop": "TFLOP per GPU",
    "messages": "messages",
    "moved": "sent per GPU, GB",
    "adapter": "of it for the memory, MB",
    "prompt": "sent with the image in the prompt, GB",
}


def serving_rows(*, gpu_memory: float) -> list[dict[str, Any]]:
    """Images that fit beside the weights, as cores and as keys and values of the prompt."""
    rows = []
    for key, label in (*MODELS.items(), ("llama3-8b", "8B")):
        preset = PRESETS[key]
        for gpus in (1, 8):
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


def base_rows() -> list[dict[str, Any]]:
    """The frozen base in bfloat16 and in nf4."""
    return [
        {"model": label, "bf16": base_bytes(PRESETS[key]) / _GB, "nf4": base_bytes(PRESETS[key], nf4=True) / _GB}
        for key, label in MODELS.items()
    ]


def tables(*, gpu_memory: float, sequences: int, length: int) -> dict[str, tuple[list[dict[str, Any]], dict[str, str]]]:
    """Every table of the document by the name of its marker."""
    found = {"training": (training_rows(gpus=8, sequences=sequences, length=length), TRAINING_COLUMNS)}
    found["serving"] = (serving_rows(gpu_memory=gpu_memory), SERVING_COLUMNS)
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
