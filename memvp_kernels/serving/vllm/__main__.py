"""``python -m memvp_kernels.serving.vllm export``: an adapter and its base become one folder that ``vllm serve`` takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from memvp_kernels.serving.vllm.folder import export


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(prog="python -m memvp_kernels.serving.vllm")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "export", help="write one folder that vllm serve takes", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("folder", help="to write")
    command.add_argument("--base", required=True, help="folder or repository of the language model, with its tokenizer")
    command.add_argument("--adapter", required=True, help="folder that MemVPModel.save_pretrained wrote")
    command.add_argument("--vision", help="folder or repository of the CLIP vision model, with its image processor")
    command.add_argument(
        "--copy", action="store_true", help="copy the files of base and vision model instead of linking them"
    )
    options = parser.parse_args(arguments)
    try:
        export(options.base, options.adapter, options.folder, vision=options.vision, copy=options.copy)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"export: {error}") from None
    print(f"vllm serve {options.folder}")


if __name__ == "__main__":
    main()
