"""The SM clock and the power draw while a measurement runs, read from nvidia-smi where there is one."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from types import TracebackType
from typing import IO

import torch

from harness.timer import percentile

__all__ = ["ClockLog"]

_INTERVAL_MS = 200


class ClockLog:
    """Context manager that logs clocks for as long as it is open; without nvidia-smi it logs nothing.

    >>> with ClockLog(torch.device("cpu")) as log:
    ...     pass
    >>> log.summary()
    {}
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: subprocess.Popen[str] | None = None
        self._output: IO[str] | None = None

    def __enter__(self) -> ClockLog:
        program = shutil.which("nvidia-smi") if self._device.type == "cuda" else None
        if program is not None:
            # By UUID: nvidia-smi ignores CUDA_VISIBLE_DEVICES, so an index would name another GPU.
            identity = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            self._output = tempfile.TemporaryFile("w+")
            fields = "clocks.sm,power.draw,temperature.gpu"
            command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", identity]
            try:
                self._process = subprocess.Popen(
                    [*command, "-lms", str(_INTERVAL_MS)],
                    stdout=self._output,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            except OSError:
                self._process = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def summary(self) -> dict[str, float]:
        """Median, lowest and highest SM clock in MHz, median power in W, highest temperature in °C; {} when nothing was read."""
        if self._output is None:
            return {}
        self._output.seek(0)
        return summarise(self._output.read())


def summarise(log: str) -> dict[str, float]:
    """The figures of an nvidia-smi log with the lines "clock, power, temperature"; lines it cannot read are left out."""
    readings = []
    for line in log.splitlines():
        try:
            clock, power, temperature = (float(part) for part in line.split(","))
        except ValueError:
            continue
        readings.append((clock, power, temperature))
    if not readings:
        return {}
    clocks = [reading[0] for reading in readings]
    return {
        "sm_clock_mhz": percentile(clocks, 0.5),
        "sm_clock_min_mhz": min(clocks),
        "sm_clock_max_mhz": max(clocks),
        "power_w": percentile([reading[1] for reading in readings], 0.5),
        "temperature_c": max(reading[2] for reading in readings),
    }
