"""What nvcc made of the installed extension: every kernel of csrc/ for one architecture, read as `machine_code` reads Triton's."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from harness.machine_code import Machine, read, tool
from memvp_kernels.backends.cuda import extension

__all__ = ["extension_kernels"]


def extension_kernels(architecture: int) -> dict[str, Machine]:
    """The machine code of each kernel, by its name with template arguments.

    Raises:
        RuntimeError: the extension was not built, or not for this architecture.
    """
    built = extension.load()
    if built is None:
        raise RuntimeError("the CUDA extension was not built; python -m memvp_kernels says why")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tool("cuobjdump", "-xelf", "all", Path(str(built.__file__)).resolve(), folder=folder)
        cubins = [p for p in sorted(folder.glob("*.cubin")) if re.search(rf"\.sm_{architecture}a?\.", p.name)]
        if not cubins:
            raise RuntimeError(f"the CUDA extension was built for {built.archs}, not for sm_{architecture}")
        found = {name: machine for cubin in cubins for name, machine in read(cubin).items()}
    return dict(sorted(zip(_readable(found), found.values(), strict=True)))


def _readable(names: Iterable[str]) -> list[str]:
    """The names as their source has them, without namespaces and arguments; as they are where the machine has no c++filt."""
    program = shutil.which("c++filt")
    if program is None:
        return list(names)
    text = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |memvp::(\w+::)*|\([^()]*\)$", "", line) for line in text.splitlines()]
