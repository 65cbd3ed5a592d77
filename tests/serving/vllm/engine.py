"""An engine in a process of its own: `answers` starts one, asks it round after round, and returns what it said.

Runner V2, which GPUs use, runs on a CPU where vLLM believes in a Triton for CPUs (`triton_stub`) whose kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
}  # fmt: skip


class Request(NamedTuple):
    """A prompt, and its image: features, a dict as vLLM takes it, or none."""

    prompt: list[int]
    image: Tensor | dict[str, Tensor] | None = None


class Answer(NamedTuple):
    tokens: list[int]
    cached: int


class Report(NamedTuple):
    """What an engine said.

    Attributes:
        rounds: of answers, in the order of the requests.
        counters: vLLM's metrics that count, by name, over all rounds.
        log: of the engine.
    """

    rounds: list[list[Answer]]
    counters: dict[str, int]
    log: str


def environment(runner: str) -> dict[str, str]:
    """Variables for a process with this model runner, "v1" or "v2"."""
    paths = [ROOT, Path(__file__).parent / "triton_stub"][: 1 + (runner == "v2")]
    found = {**os.environ, **ENVIRONMENT, "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
    found["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    return found | ({"TRITON_INTERPRET": "1"} if runner == "v2" else {})


def answers(
    folder: Path,
    rounds: Sequence[Sequence[Request]],
    *,
    tokens: int,
    runner: str = "v1",
    variables: Mapping[str, str] | None = None,
    **options: Any,
) -> Report:
    """Greedy float32 answers of an engine that serves `folder`.

    Args:
        tokens: of every answer.
        variables: environment variables of the engine.
        options: of vLLM's LLM; and `image_cache`, how many images its encoder's cache holds, which vLLM has no option for, and `lora`,
            the folder of an adapter that the requests of all rounds but the first use.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, said = Path(scratch, "asked.pt"), Path(scratch, "said.json")
        torch.save([[tuple(request) for request in requests] for requests in rounds], asked)
        defaults = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}
        command = [
            sys.executable,
            __file__,
            str(folder),
            str(asked),
            str(said),
            str(tokens),
            json.dumps(defaults | options),
        ]
        done = subprocess.run(
            command, env=environment(runner) | dict(variables or {}), capture_output=True, text=True, cwd=ROOT
        )
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        found = json.loads(said.read_text())
    assert ("Using V2 Model Runner" in log) == (runner == "v2"), "the other runner ran"
    return Report([[Answer(*a) for a in answers] for answers in found["rounds"]], found["counters"], log)


def _main(folder: str, asked: str, said: str, tokens: str, options: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
    from vllm.v1.metrics.reader import Counter

    given = json.loads(options)
    if "image_cache" in given:
        images, made = given.pop("image_cache"), EncoderCacheManager.__init__
        EncoderCacheManager.__init__ = lambda self, cache_size: made(self, images)
    lora = LoRARequest("lora", 1, given.pop("lora")) if "lora" in given else None
    llm = LLM(model=folder, skip_tokenizer_init=True, dtype="float32", disable_log_stats=False, **given)
    sampling = SamplingParams(temperature=0, max_tokens=int(tokens), detokenize=False, ignore_eos=True)
    rounds = []
    for requests in torch.load(asked):
        inputs = []
        for prompt, image in requests:
            data = {"image_features": image} if isinstance(image, Tensor) else image
            inputs.append(
                {"prompt_token_ids": prompt} | ({} if data is None else {"multi_modal_data": {"image": data}})
            )
        outputs = llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora if rounds else None)
        rounds.append([(list(o.outputs[0].token_ids), o.num_cached_tokens) for o in outputs])
    counters = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter)}
    Path(said).write_text(json.dumps({"rounds": rounds, "counters": counters}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
