"""SGLang's attention backends that late views were written for, and what each of them needs: the one list of them.

A backend is added here. Start-up refusals, `benchmarks.backends` and docs/combinations.md read this table.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class AttentionBackend(NamedTuple):
    """One backend, as `--attention-backend` names it.

    Attributes:
        device: where it has been run with pruned requests.
        decode_graphs: whether its late layers decode through captured CUDA graphs.
        plan_waits: whether the host waits for the device when it plans a batch, and once more for each prune.
        pages: whether it was run with pages larger than a token. fp8: with KV rows of fp8 e4m3.
        kept: whether it was run with early layers that decode over kept tokens. observe: with requests that are ranked
            and drop nothing.
    """

    name: str
    device: Literal["cpu", "cuda"]
    decode_graphs: bool
    plan_waits: bool
    pages: bool
    fp8: bool
    kept: bool
    observe: bool = False


BACKENDS = (
    AttentionBackend(
        "torch_native", "cpu", decode_graphs=False, plan_waits=False, pages=True, fp8=False, kept=True, observe=True
    ),
    AttentionBackend("fa3", "cuda", decode_graphs=True, plan_waits=False, pages=True, fp8=False, kept=True),
    AttentionBackend("flashinfer", "cuda", decode_graphs=True, plan_waits=True, pages=False, fp8=False, kept=False),
    AttentionBackend("triton", "cuda", decode_graphs=True, plan_waits=False, pages=True, fp8=True, kept=True),
)
NAMES = tuple(backend.name for backend in BACKENDS)
WITH_PAGES = tuple(backend.name for backend in BACKENDS if backend.pages)
WITH_KEPT = tuple(backend.name for backend in BACKENDS if backend.kept)
WITH_OBSERVE = tuple(backend.name for backend in BACKENDS if backend.observe)
WITH_FP8 = tuple(backend.name for backend in BACKENDS if backend.fp8)


def of_device(device: str) -> tuple[str, ...]:
    """Names of those that were run on "cpu" or "cuda"."""
    return tuple(backend.name for backend in BACKENDS if backend.device == device)
