"""Ask a served MemVP model the same question about several images; see docs/serving.md."""

from __future__ import annotations

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI


def main() -> None:
    """One request per image, and one without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="picture files")
    parser.add_argument("--question", default="What is in the image?", help="asked about each of them")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server")
    parser.add_argument("--model", default="memvp", help="as --served-model-name says")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key="none")
    for image in [*options.images, None]:
        content: list[dict[str, object]] = [{"type": "text", "text": options.question}]
        if image is not None:
            kind = mimetypes.guess_type(image)[0] or "image/png"
            data = base64.b64encode(image.read_bytes()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
        answer = client.chat.completions.create(
            model=options.model,
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
            max_tokens=options.tokens,
            temperature=0,
        )
        usage = answer.usage.prompt_tokens if answer.usage else "?"
        print(f"{image or 'no image'} ({usage} prompt tokens): {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
