"""What one probe found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """A line of the report, and more lines below it.

    ok: False where a server would not start; None where nothing was decided, such as on a machine without a GPU.
    """

    name: str
    ok: bool | None
    text: str
    more: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """As it is printed."""
        mark = {True: "ok", False: "NO", None: "--"}[self.ok]
        return [
            f"{mark:2}  {self.name}: {self.text}",
            *(f"      {line}" for text in self.more for line in text.splitlines()),
        ]


def found(name: str, probe: Callable[[], Finding]) -> Finding:
    """What `probe` finds; what it fails with is a line, not a traceback. SGLang ends a bad command line by leaving."""
    try:
        return probe()
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return Finding(name, False, f"could not be checked: {_told(error)}")


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, SystemExit) else f"{type(error).__name__}: {text}"


def is_ready(findings: Iterable[Finding]) -> bool:
    """Whether nothing speaks against a start."""
    return all(finding.ok is not False for finding in findings)
