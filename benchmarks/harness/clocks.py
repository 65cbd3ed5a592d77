"""The SM clock, the power draw and the temperature while samples are taken, on a GPU."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from harness.percentile import percentile

__all__ = ["ClockLog", "summarise"]

_INTERVAL_S = 0.05

#: SM clock in MHz, power in W, temperature in °C.
Reading = tuple[float, float, float]


class ClockLog:
    """Reads the clocks within its windows; on a CPU, and where nothing can read them, it stays empty.

    >>> log = ClockLog(torch.device("cpu"))
    >>> with log.window() as readings:
    ...     pass
    >>> summarise(readings), log.summary()
    ({}, {})

    Args:
        device: whose.
        read: () → a reading, or None for now; default: NVML through torch, without it nvidia-smi.
    """

    def __init__(self, device: torch.device, read: Callable[[], Reading | None] | None = None) -> None:
        self._read = read or (_reader(device) if device.type == "cuda" else None)
        self._all: list[Reading] = []

    @contextlib.contextmanager
    def window(self) -> Iterator[list[Reading]]:
        """A thread reads for as long as it is open; the readings are in the list afterwards."""
        found: list[Reading] = []
        if self._read is None:
            yield found
            return
        closed = threading.Event()
        thread = threading.Thread(target=self._poll, args=(found, closed), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            closed.set()
            thread.join()
            self._all += found

    def _poll(self, found: list[Reading], closed: threading.Event) -> None:
        assert self._read is not None
        while True:
            reading = self._read()
            if reading is not None:
                found.append(reading)
            if closed.wait(_INTERVAL_S):
                return

    def summary(self) -> dict[str, float]:
        """Of all windows so far."""
        return summarise(self._all)


def summarise(readings: Sequence[Reading]) -> dict[str, float]:
    """Median, lowest and highest SM clock in MHz, median power in W, highest temperature in °C; {} without readings."""
    if not readings:
        return {}
    clocks, power, temperature = zip(*readings, strict=True)
    return {
        "sm_clock_mhz": percentile(clocks, 0.5),
        "sm_clock_min_mhz": min(clocks),
        "sm_clock_max_mhz": max(clocks),
        "power_w": percentile(power, 0.5),
        "temperature_c": max(temperature),
    }


def parse(line: str) -> Reading | None:
    """nvidia-smi's "clock, power, temperature"; None where it says [N/A]."""
    try:
        clock, power, temperature = (float(part) for part in line.split(","))
    except ValueError:
        return None
    return clock, power, temperature


def _reader(device: torch.device) -> Callable[[], Reading | None] | None:
    def nvml() -> Reading | None:
        watts = torch.cuda.power_draw(device) / 1000
        return float(torch.cuda.clock_rate(device)), watts, float(torch.cuda.temperature(device))

    try:  # needs the package nvidia-ml-py
        nvml()
    except Exception:
        program = shutil.which("nvidia-smi")
        return None if program is None else _smi(program, device)
    return nvml


def _smi(program: str, device: torch.device) -> Callable[[], Reading | None]:
    # By UUID: nvidia-smi ignores CUDA_VISIBLE_DEVICES, so an index would name another GPU.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    fields = "clocks.sm,power.draw,temperature.gpu"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", identity]

    def read() -> Reading | None:
        try:
            return parse(subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip())
        except (OSError, subprocess.SubprocessError):
            return None

    return read
