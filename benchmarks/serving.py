"""Serving with vLLM at equal KV memory: an image as memory, as tokens of the prompt (vLLM's own LLaVA), and text alone.

    make serving                                  # in the environment of `make test-vllm`; 5 minutes on two CPU cores
    python benchmarks/serving.py                  # on a GPU machine with vLLM: LLaMA-7B's shape

Weights are random, which no time depends on. The three engines stand side by side and take turns; a ratio is within a turn. On a CPU
an engine has one thread, and its CPU time is taken, which no other program of the machine changes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from options import environment, slug
from plots import plot_program
from rows import table
from workload import PRESETS

HERE = Path(__file__).resolve().parent
PROGRAM = "serving"
Ask = Callable[[int, int], dict[str, float]]  # requests, tokens of each answer
VARIANTS = ("prompt", "memory", "text")
#: Layers and width of the CLIP that encodes the images, in proportion to the language model.
VISION = {"wide": (3, 128), "llama-7b": (24, 1024)}
BLOCK = 32  # tokens of a KV block: vLLM on a CPU takes multiples of it
PATCH = 14

#: What is measured, and whether more is better.
MEASURES = {"requests_per_s": True, "first_token_ms": False, "per_token_ms": False}
COLUMNS = {
    "visual_tokens": "visual tokens",
    "variant": "variant",
    "kv_blocks": "KV blocks per request",
    "concurrent": "at once",
    "requests_per_s": "requests/s",
    "requests_per_s_ratio": "× prompt",
    "first_token_ms": "first token, ms",
    "first_token_ms_ratio": "× prompt",
    "per_token_ms": "per token, ms",
    "per_token_ms_ratio": "× prompt",
}


def write_model(variant: str, folder: Path, *, preset: str, visual: int) -> None:
    """Configuration, tokenizer and adapter of a model whose weights the engine makes up.

    Args:
        visual: tokens of an image, a square number.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    shape, (layers, width) = PRESETS[preset], VISION[preset]
    image_token, side = shape.vocabulary - 1, PATCH * math.isqrt(visual)
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.pairs, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        image_size=side, patch_size=PATCH,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    words = {"<image>": image_token, **{f"w{i}": i for i in range(image_token)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", additional_special_tokens=["<image>"])
    fast.save_pretrained(folder)
    if variant == "prompt":
        names = {"image_token_index": image_token, "architectures": ["LlavaForConditionalGeneration"]}
        LlavaConfig(vision_config=vision, text_config=text, **names).save_pretrained(folder)
        LlavaProcessor(images, fast, patch_size=PATCH, vision_feature_select_strategy="default").save_pretrained(folder)
        return
    text.save_pretrained(folder)
    if variant == "memory":
        _add_memory(folder, vision, images, preset=preset, visual=visual)


def _add_memory(folder: Path, vision: Any, images: Any, *, preset: str, visual: int) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPVisionModel

    from memvp_kernels import MemVPConfig
    from memvp_kernels.models.memory.visual_memory import VisualMemory
    from memvp_kernels.serving.vllm.folder import export

    shape = PRESETS[preset]
    config = MemVPConfig(vision_dim=vision.hidden_size, projector_dim=shape.projector_width, num_slots=visual + 64)
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter, clip = (Path(scratch, name) for name in ("base", "adapter", "clip"))
        shutil.copytree(folder, base)
        adapter.mkdir()
        config.save(adapter / "memvp_config.json")
        memory = VisualMemory(config, width=shape.width, layers=shape.layers)
        save_file(memory.state_dict(), adapter / "memvp_model.safetensors")
        CLIPVisionModel(vision).save_pretrained(clip)
        images.save_pretrained(clip)
        export(base, adapter, folder, vision=clip, copy=True)


def serve(connection: Any, variant: str, visual: int, asked: argparse.Namespace) -> None:
    """An engine's process: for each (requests, tokens of an answer) that comes, what they took."""
    sys.path += os.environ.get("PYTHONPATH", "").split(os.pathsep)  # a spawned process begins with its parent's paths
    with tempfile.TemporaryDirectory() as folder:
        write_model(variant, Path(folder), preset=asked.preset, visual=visual)
        ask = _engine(folder, variant, visual, asked)
        connection.send("ready")
        while (wanted := connection.recv()) is not None:
            connection.send(ask(*wanted))


def _engine(folder: str, variant: str, visual: int, asked: argparse.Namespace) -> Ask:
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    length = visual + asked.text + asked.output
    llm = LLM(
        folder, load_format="dummy", dtype=asked.dtype, block_size=BLOCK, num_gpu_blocks_override=kv_blocks(visual, asked),
        max_model_len=length, max_num_seqs=asked.requests, max_num_batched_tokens=2048, enable_prefix_caching=False,
        gpu_memory_utilization=0.3, enforce_eager=asked.eager,
    )  # fmt: skip
    clock = time.process_time if asked.device.type == "cpu" else time.perf_counter
    draw, pixels = random.Random(0), np.random.default_rng(0)
    side, image_token = PATCH * math.isqrt(visual), PRESETS[asked.preset].vocabulary - 1
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    running: list[int] = []
    schedule = scheduler.schedule

    def counted(*arguments: Any, **options: Any) -> Any:
        step = schedule(*arguments, **options)
        running.append(len(scheduler.running))
        return step

    scheduler.schedule = counted

    def request() -> dict[str, Any]:
        prompt = [draw.randrange(image_token) for _ in range(asked.text)]
        if variant == "text":
            return {"prompt_token_ids": prompt}
        image = Image.fromarray(pixels.integers(0, 255, (side, side, 3), dtype=np.uint8))
        ids = [image_token, *prompt] if variant == "prompt" else prompt
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}

    def ask(count: int, tokens: int) -> dict[str, float]:
        requests = [request() for _ in range(count)]
        running.clear()
        begun = clock()
        llm.generate(requests, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return {"seconds": clock() - begun, "concurrent": statistics.median(running)}

    return ask


def kv_blocks(visual: int, asked: argparse.Namespace) -> int:
    """Of every variant's engine: what `asked.room` requests of the prompt form fill, and the one that vLLM keeps."""
    return 1 + asked.room * math.ceil((visual + asked.text + asked.output) / BLOCK)


@contextmanager
def engine(variant: str, visual: int, asked: argparse.Namespace) -> Iterator[Ask]:
    """`serve` in a process of its own, as a function."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, variant, visual, asked), daemon=False)
    process.start()
    theirs.close()

    def ask(count: int, tokens: int) -> dict[str, float]:
        ours.send((count, tokens))
        return received()

    def received() -> Any:
        try:
            return ours.recv()
        except EOFError:
            raise RuntimeError(f"the engine for {variant}, {visual} visual tokens, ended; its log is above") from None

    try:
        received()
        ask(2, 2)  # what is compiled or allocated at the first call
        yield ask
    finally:
        with suppress(BrokenPipeError):
            ours.send(None)
        process.join()


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per number of visual tokens and variant, each with its turns."""
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    with tqdm(total=len(asked.visual) * len(VARIANTS) * (1 + asked.turns), disable=asked.quiet or None) as bar:
        for visual in asked.visual:
            turns: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
            with ExitStack() as stack:
                engines = {}
                for variant in VARIANTS:
                    bar.set_description(f"{visual} visual tokens, {variant}: start")
                    engines[variant] = stack.enter_context(engine(variant, visual, asked))
                    bar.update()
                for _ in range(asked.turns):
                    for variant, ask in engines.items():
                        bar.set_description(f"{visual} visual tokens, {variant}")
                        turns[variant].append(turn(ask, asked))
                        bar.update()
            rows += summary(turns, visual, asked)
    return rows


def turn(ask: Ask, asked: argparse.Namespace) -> dict[str, float]:
    """Many requests together; then one by one, of which the fastest counts."""
    together = ask(asked.requests, asked.output)
    first, whole = (min(ask(1, n)["seconds"] for _ in range(asked.alone)) for n in (1, asked.output))
    return {
        "requests_per_s": asked.requests / together["seconds"],
        "concurrent": together["concurrent"],
        "first_token_ms": 1e3 * first,
        "per_token_ms": 1e3 * (whole - first) / (asked.output - 1),
    }


def summary(turns: dict[str, list[dict[str, float]]], visual: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the turns, and of the ratios within each turn: how many times as good as the prompt form."""
    rows = []
    for variant, found in turns.items():
        row: dict[str, Any] = {"visual_tokens": visual, "variant": variant}
        row["kv_blocks"] = math.ceil(((visual if variant == "prompt" else 0) + asked.text + asked.output) / BLOCK)
        row["concurrent"] = round(statistics.median(turn["concurrent"] for turn in found))
        for name, more in MEASURES.items():
            pairs = [(mine[name], theirs[name]) for mine, theirs in zip(found, turns["prompt"], strict=True)]
            row[name] = statistics.median(mine for mine, _ in pairs)
            ratios = [mine / theirs if more else theirs / mine for mine, theirs in pairs]
            row[f"{name}_ratio"], row[f"{name}_spread"] = statistics.median(ratios), [min(ratios), max(ratios)]
        rows.append({**row, "turns": found})
    return rows


def section(folder: Path) -> list[str]:
    """The report's part on what a machine served; nothing where it served nothing."""
    document = recorded(folder)
    if document is None:
        return []
    here = document["environment"]
    asked = here["workload"]
    shape = PRESETS[asked["preset"]]
    clock = " Times are the CPU time of an engine with one thread." if here["device_type"] == "cpu" else ""
    text = (
        f"The same LLaMA ({shape.layers} layers of {shape.width} × {shape.pairs}, {asked['dtype']}) with the image as memory, as tokens of the prompt (vLLM's own LLaVA) "
        f"and on text alone; {here['vllm']}{', eager' if asked['eager'] else ''}, torch {here['torch']}, commit "
        f"`{here['commit'][:12]}`, {here['date']}. Every engine has the KV blocks that {asked['room']} requests of the prompt form fill. "
        f"{asked['requests']} requests of {asked['text']} text tokens come together and get {asked['output']} tokens each; how many run at "
        "once is the median over the engine's steps. The times to the first token and per token are of requests that come one by one. "
        f"Medians of {asked['turns']} turns, interleaved; a ratio is taken within a turn, and above 1 the prompt form loses.{clock}"
    )
    return ["### Served by vLLM, at equal KV memory", text, table(document["rows"], COLUMNS, style="pipe")]


def draw(folder: Path) -> None:
    """The picture beside a machine's result file, where there is one."""
    document = recorded(folder)
    if document is not None:
        plot_program(document, folder / "plots" / f"{PROGRAM}.png")


def recorded(folder: Path) -> dict[str, Any] | None:
    """A machine's result file."""
    path = folder / f"{PROGRAM}.json"
    return json.loads(path.read_text()) if path.exists() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then a table, a JSON file and a picture."""
    asked = parse(arguments)
    os.environ.update(surroundings(asked.device))
    asked_for = ("preset", "dtype", "text", "output", "requests", "room", "alone", "turns", "eager")
    here = environment(asked) | {"vllm": vllm_version(), "workload": {name: getattr(asked, name) for name in asked_for}}
    here |= {"inputs": "noise"} | ({"threads": 1} if asked.device.type == "cpu" else {})
    document = {"environment": here, "rows": measure(asked)}
    print(table(document["rows"], COLUMNS))
    folder = asked.record / slug(here["device"]) if asked.record else asked.out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{PROGRAM}.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(folder)
    print(f"rows and picture: {folder}")
    return 0


def surroundings(device: torch.device) -> dict[str, str]:
    """Environment variables of the engines."""
    found = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if device.type == "cpu":
        found |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        if importlib.util.find_spec("torchvision") is None:  # then the Makefile has put one aside
            paths = [HERE / "torchvision_on_cpu", Path(sys.prefix) / "torchvision", os.environ.get("PYTHONPATH")]
            found["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    return found


def vllm_version() -> str:
    """Of the installed vLLM, which this process need not import."""
    found = importlib.metadata.packages_distributions()["vllm"][0]
    return f"{found} {importlib.metadata.version(found)}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; defaults by device."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=VISION, default="llama-7b" if on_gpu else "wide", help="model shape (%(default)s)")
    add("--dtype", default="bfloat16" if on_gpu else "float32", help="of the weights (%(default)s)")
    add(
        "--visual",
        type=int,
        nargs="+",
        default=[256, 64],
        metavar="n",
        help="tokens of an image, square numbers (256 64)",
    )
    add("--text", type=int, default=64, help="tokens of a prompt's text (%(default)s)")
    add("--output", type=int, default=32, help="tokens of an answer (%(default)s)")
    add("--requests", type=int, default=128 if on_gpu else 32, help="that come at once (%(default)s)")
    add(
        "--room",
        type=int,
        default=16 if on_gpu else 4,
        help="requests of the prompt form that the KV cache holds (%(default)s)",
    )
    add("--alone", type=int, default=5, help="requests that come one by one, per turn (%(default)s)")
    add("--turns", type=int, default=9 if on_gpu else 3, help="of every engine (%(default)s)")
    add(
        "--eager",
        action="store_true",
        default=not on_gpu,
        help="without torch.compile and CUDA graphs; on a CPU always",
    )
    add("--quick", action="store_true", help="few requests, one turn: does it all still run?")
    add("--commit", help="what the tree is a copy of, where it has no git (default: $MEMVP_COMMIT)")
    add("--out", type=Path, default=Path("out"), help="folder of serving.json and plots/serving.png (%(default)s)")
    add(
        "--record", action="store_const", const=HERE / "results", help="write into benchmarks/results/<machine> instead"
    )
    add("--quiet", action="store_true", help="no progress bar")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.visual, asked.requests, asked.turns, asked.alone = [16], 8, 1, 1
    if any(math.isqrt(n) ** 2 != n for n in asked.visual):
        parser.error(f"--visual: wanted square numbers, got {asked.visual}")
    asked.device, asked.program = torch.device("cuda" if on_gpu else "cpu"), PROGRAM
    return asked


if __name__ == "__main__":
    sys.exit(main())
