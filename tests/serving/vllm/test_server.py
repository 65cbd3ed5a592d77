"""vLLM's OpenAI server over loopback: pictures in, the answers of MemVPModel.generate out, a sentence for what is refused."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from memvp_kernels import MemVPModel
from memvp_kernels.serving.vllm import save_for_vllm
from tests.serving import tiny
from tests.serving.vllm.engine import ROOT, environment

TEXT = " ".join(f"w{i}" for i in range(40, 60))
TOKENS = 12


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8))


def url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Server:
    """An API server and its log."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = log
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "memvp",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
        ]  # fmt: skip
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, env=environment("v1"), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
            )

    def wait(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
            except OSError:
                time.sleep(1)
            else:
                return
        raise AssertionError(self._log.read_text()[-4000:])

    def chat(self, *images: str) -> tuple[int, dict[str, Any]]:
        """Status and answer of one question with these images."""
        content = [{"type": "text", "text": TEXT}, *({"type": "image_url", "image_url": {"url": i}} for i in images)]
        body = {
            "model": "memvp", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture(scope="module")
def model() -> MemVPModel:
    return tiny.model(pictures=True)


@pytest.fixture(scope="module")
def server(model: MemVPModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    save_for_vllm(model, folder)
    tiny.save_tokenizer(folder)
    running = Server(folder, folder.parent / "server.log")
    try:
        running.wait(300)
        yield running
    finally:
        running.stop()


def test_pictures_cost_no_prompt_tokens(server: Server, model: MemVPModel) -> None:
    prompt = [1, *range(40, 60)]
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for seed in (None, 1, 2, 1):
        images = [] if seed is None else [picture(seed)]
        status, answer = server.chat(*map(url, images))
        assert status == 200, answer
        pixels = {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]} if images else {}
        assert answer["choices"][0]["token_ids"] == tiny.answer(model, prompt, TOKENS, **pixels)
        assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_what_is_refused_leaves_the_server_running(server: Server) -> None:
    broken = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    for images in ((url(picture(1)), url(picture(2))), (broken,)):
        status, answer = server.chat(*images)
        assert status == 400 and "image" in answer["error"]["message"].lower(), answer
    assert server.chat(url(picture(3)))[0] == 200
