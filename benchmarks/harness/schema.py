"""What a result file must hold. A row without environment, commit and correctness is refused, on writing and on reading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["SCHEMA", "problems"]

_NUMBER = {"type": ["number", "null"]}
_COUNT = {"type": ["integer", "null"], "minimum": 0}
_TIME = {"type": ["number", "null"], "exclusiveMinimum": 0}

#: JSON Schema (2020-12) of a result file. What one row's fields mean to one another is in `problems`.
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "memvp_kernels benchmark results",
    "type": "object",
    "required": ["environment", "rows"],
    "properties": {
        "environment": {
            "type": "object",
            "required": ["program", "date", "commit", "device", "device_type", "memvp_kernels", "python", "torch"],
            "properties": {
                "program": {"type": "string", "minLength": 1},
                "date": {"type": "string", "minLength": 1},
                "commit": {"type": "string", "minLength": 1},
                "device": {"type": "string", "minLength": 1},
                "device_type": {"type": "string", "minLength": 1},
                "memvp_kernels": {"type": "string", "minLength": 1},
                "python": {"type": "string", "minLength": 1},
                "torch": {"type": "string", "minLength": 1},
                "roofs": {"type": "object"},
                "clocks": {"type": "object"},
            },
        },
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [
                    "case",
                    "variant",
                    "status",
                    "dtype",
                    "error",
                    "error_allowed",
                    "median_ms",
                    "p20_ms",
                    "p80_ms",
                    "samples",
                    "speedup_vs_prompt",
                ],
                "properties": {
                    "case": {"type": "string", "minLength": 1},
                    "variant": {"type": "string", "minLength": 1},
                    "status": {"enum": ["ok", "wrong", "skipped", "failed"]},
                    "reason": {"type": "string"},
                    "dtype": {"type": "string", "minLength": 1},
                    "error": _NUMBER,
                    "error_allowed": _NUMBER,
                    "median_ms": _TIME,
                    "p20_ms": _TIME,
                    "p80_ms": _TIME,
                    "samples": _COUNT,
                    "timing": {"type": ["string", "null"]},
                    "first_call_s": _NUMBER,
                    "speedup_vs_prompt": _NUMBER,
                    "speedup_vs_text": _NUMBER,
                    "speedup_vs_matmul": _NUMBER,
                    "beside_ms": _TIME,
                    "level": {"type": ["string", "null"]},
                    "phase": {"type": ["string", "null"]},
                    "preset": {"type": ["string", "null"]},
                    "layers": _COUNT,
                    "sequences": _COUNT,
                    "text_length": _COUNT,
                    "visual_tokens": _COUNT,
                    "peak_memory_bytes": _COUNT,
                    "memory_per_image_bytes": _COUNT,
                    "cache_per_image_bytes": _COUNT,
                    "flops": _COUNT,
                    "bytes": _COUNT,
                    "floor_ms": _TIME,
                    "percent_of_floor": _NUMBER,
                    "tflops": _NUMBER,
                    "gbs": _NUMBER,
                    "host_us": _NUMBER,
                    "sm_clock_mhz": _NUMBER,
                    "power_w": _NUMBER,
                },
            },
        },
    },
}

_TIMES = ("median_ms", "p20_ms", "p80_ms")
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "null": (type(None),),
}


def problems(document: Any) -> list[str]:
    """Everything that is wrong with a result file's content; [] for a good one."""
    found = _mismatches(document, SCHEMA, "")
    if found:
        return found
    for index, row in enumerate(document["rows"]):
        found += [f"rows[{index}] ({row['case']}, {row['variant']}): {text}" for text in _row_problems(row)]
    return found


def _row_problems(row: Mapping[str, Any]) -> list[str]:
    """What the fields of one row say to one another: no speed without correctness, no gap without a reason."""
    found = []
    status = row["status"]
    if status == "ok":
        found += [
            f"status ok without {name}" for name in (*_TIMES, "error", "error_allowed", "samples") if row[name] is None
        ]
        if not found:
            if not row["error"] <= row["error_allowed"]:
                found.append(f"status ok, but its error {row['error']} is over the allowed {row['error_allowed']}")
            if not row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]:
                found.append(f"percentiles out of order: {[row[name] for name in _TIMES]}")
    else:
        found += [
            f"status {status}, but it gives {name}" for name in (*_TIMES, "speedup_vs_prompt") if row[name] is not None
        ]
        if not row.get("reason"):
            found.append(f"status {status} without a reason")
    return found


def _mismatches(value: Any, schema: Mapping[str, Any], place: str) -> list[str]:
    """The part of JSON Schema that SCHEMA uses."""
    place = place or "document"
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{place}: wanted one of {schema['enum']}, got {value!r}"]
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, bool) or not isinstance(value, tuple(t for kind in kinds for t in _TYPES[kind])):
        return [f"{place}: wanted {' or '.join(kinds)}, got {value!r:.80}"]
    found: list[str] = []
    if isinstance(value, float) and not math.isfinite(value):
        found.append(f"{place}: wanted a finite number, got {value}")
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        found.append(f"{place}: must not be empty")
    if isinstance(value, (int, float)):
        if value < schema.get("minimum", value):
            found.append(f"{place}: wanted at least {schema['minimum']}, got {value}")
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            found.append(f"{place}: wanted more than {schema['exclusiveMinimum']}, got {value}")
    if isinstance(value, dict):
        found += [f"{place}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, part in schema.get("properties", {}).items():
            if name in value:
                found += _mismatches(value[name], part, f"{place}.{name}" if place != "document" else name)
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += _mismatches(item, schema["items"], f"{place}[{index}]")
    return found
