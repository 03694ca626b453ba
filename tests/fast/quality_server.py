"""A stand-in for the server of benchmarks.eval_quality: right more often the more it keeps."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claa_sglang.tasks.record import Prompt

PROMPTS = [
    Prompt(task=task, source="prose", length=1024, seed=i, input_ids=[10 * j, i, *range(98)], answers=["7"])
    for j, task in enumerate(("a", "b"))
    for i in range(20)
]


class Server:
    """Answers "7" to dense requests, and to pruned ones if the prompt's second token is below 20 * keep rate."""

    device = "a test"

    def __init__(self) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self.running = self.most = 0
        self.fail_after = math.inf
        self.before: list[int] = []  # the ids of the last request, which are all that is cached
        self.seconds = 0.0

    def info(self) -> dict[str, Any]:
        config = {"window": 8, "profile": None, "steps": [{"prune_layer": 3}]}
        return {"model_path": "somewhere/tiny", "claa": {"config": config}, "dtype": "float32"}

    def run(self, work: Any) -> Any:
        return asyncio.run(work)

    def flush(self) -> None:
        self.before = []

    def close(self) -> None:
        pass

    def alone(self) -> Server:
        return self

    async def ask(self, request: Mapping[str, Any], home: str | None = None) -> dict[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if len(self.bodies) >= self.fail_after:
            raise RuntimeError("/generate: HTTP 500: planted")
        self.bodies.append(request)
        claa, ids = request["sampling_params"].get("custom_params", {}).get("claa", {}), request["input_ids"]
        await asyncio.sleep(self.seconds)
        rate = claa.get("keep_rate", 1.0)
        pruned = claa.get("enabled", True)
        report = {"pruned": pruned, "prompt_tokens": len(ids), "kept_tokens": int(rate * len(ids)), "keep_rate": rate}
        cached = len(os.path.commonprefix([self.before, ids[:-1]]))
        self.before = ids
        meta: dict[str, Any] = {"claa": {**report, "early_cached_tokens": cached}, "cached_tokens": cached}
        if pruned:
            kept = list(range(10, 10 + int(rate * len(ids))))
            kept[0] -= 0 < cached < len(ids) - 1  # a partial hit keeps another token
            meta["claa"] |= {
                "ranker": f"{claa.get('ranker', 'claa')}:x",
                "late_computed_tokens": len(kept),
                "kept": kept,
            }
        if request.get("top_logprobs_num"):
            meta["output_top_logprobs"] = [[(math.log(rate / 2), 5, None), (math.log(0.1), 6, None)]]
        return {"text": " 7" if ids[1] < 20 * rate else " 8", "meta_info": meta}


def result(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "q.json").read_text())
