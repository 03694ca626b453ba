"""What a run leaves behind: every raw sample, and what is needed to judge or repeat it. One JSON file."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

VERSION = 1  # raised when older files can no longer be read as they are


class Series(msgspec.Struct, kw_only=True):
    """All samples of one thing. Those with the same index, of series that differ in `variant` only, are from one round.

    scenario: one of catalogue.SCENARIOS, or "rates". tokens: of a prompt. chunk: of the engines, in tokens.
    quantity: what was measured; seconds unless it says otherwise. variant: who was measured (variants.py).
    rate: requests per second, of scenario "rates" only, whose samples are single requests.
    """

    scenario: str
    tokens: int
    chunk: int
    quantity: str
    variant: str
    samples: list[float]
    rate: float | None = None


class Record(msgspec.Struct, kw_only=True):
    """A run.

    command, date: how and when (UTC). model: name. shape: its config.json. itemsize: bytes per weight and per cached
    number. device: GPU, or the processor under the CPU engine. bandwidth: bytes per second the memory of the GPU can
    move; None without a GPU. prune_layer: p. settings: every option, as given or by default. engines: seconds each took
    to start, its attention backend and options. claa: what the pruned engine says of itself. errors: points that
    failed, and why; rounds they had finished stay. stopped: why the run ended early, "" if it did not.
    """

    command: str
    date: str
    model: str
    shape: dict[str, Any]
    itemsize: int
    device: str
    bandwidth: float | None
    prune_layer: int
    settings: dict[str, Any]
    versions: dict[str, str]
    engines: list[dict[str, Any]] = []
    claa: dict[str, Any] = {}
    series: list[Series] = []
    errors: list[str] = []
    stopped: str = "not finished"
    version: int = VERSION

    def add(self, point: dict[str, Any], samples: dict[tuple[str, str], float]) -> None:
        """Append one round: `samples` by (quantity, variant), of the series that `point` names the rest of."""
        for (quantity, variant), value in samples.items():
            self.series_of(**point, quantity=quantity, variant=variant).samples.append(value)

    def series_of(self, **key: Any) -> Series:
        """The series with these values, made if it is not there."""
        for series in self.series:
            if all(getattr(series, name) == value for name, value in key.items()):
                return series
        self.series.append(Series(**key, samples=[]))
        return self.series[-1]


def save(record: Record, path: Path) -> None:
    """Write `record` to `path`; whoever stops the run leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix(".part")
    temp.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    temp.replace(path)


def load(path: Path) -> Record:
    """Read a file of `save`. Raises ValueError for anything else, naming the file."""
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a result of bench_ttft: {error}") from error
    if record.version != VERSION:
        raise ValueError(
            f"{path}: format {record.version}, this is {VERSION}: render it with the revision that wrote it"
        )
    return record


def provenance(argv: list[str]) -> dict[str, Any]:
    """Command, date and versions."""
    names = ("claa-sglang", "sglang", "torch", "triton")
    return {
        "command": " ".join(["python -m benchmarks.bench_ttft", *argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
    }


def device() -> tuple[str, float | None]:
    """(name, memory bandwidth in bytes per second or None): of the GPU, or else of the processor.

    The bandwidth is memory clock times bus width, twice per clock: what the memory can do, which no program reaches.
    """
    import torch

    if not torch.cuda.is_available():
        from benchmarks.cpu_cost import cpu_model

        return f"CPU engine on {cpu_model()}, {os.cpu_count()} cores", None
    properties = torch.cuda.get_device_properties(0)
    hertz = 1000 * properties.memory_clock_rate
    return properties.name, 2 * hertz * properties.memory_bus_width / 8
