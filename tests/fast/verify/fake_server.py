"""An HTTP server that answers as SGLang with CLAA does, or wrongly in one way.

Its "model" is a hash of the prompt, and of what was asked of CLAA. It has a prefix cache by key, finds needles, says
how long it would take, and remembers what it was asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests import http_server

VOCABULARY = 300
KEEP_RATE = 0.25
SECONDS = 0.005  # of a request
TTFT = {"pruned": 0.2, "dense": 0.5}  # seconds, as `meta_info` says: the clock would say what else runs
LEAD = 1.0  # nats of the first choice over the second
TINY_LEAD = 1e-6


class Fake:
    """What the server is and does. fault: what it does wrong, see `wrong` and the places that name one.

    tokenizer: whether it has one. key: that it wants. info: more of its /server_info.
    """

    def __init__(
        self,
        fault: str = "",
        *,
        tokenizer: bool = True,
        key: str | None = None,
        claa: bool = True,
        info: dict[str, Any] | None = None,
    ):
        self.fault, self.tokenizer, self.key = fault, tokenizer, key
        config = {"window": 8, "min_prompt_tokens": 64}
        self.info = {
            **{"model_path": "somewhere/model", "dtype": "float32", "kv_cache_dtype": "auto", "dp_size": 1},
            **{"max_total_num_tokens": 100_000, "max_req_input_len": 20_000, "version": "0.5.23"},
            **({"claa": {"config": config}} if claa else {}),
            **({} if tokenizer else {"skip_tokenizer_init": True}),
            **(info or {}),
        }
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.entered = 0
        self._cache: dict[tuple[str, bool], list[list[Any]]] = {}
        self._running: set[int] = set()
        self._lock = threading.Lock()

    def get(self, path: str) -> Any:
        return {"/server_info": self.info, "/model_info": {"tokenizer_path": "/nowhere/at/all"}}.get(path)

    def generate(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        if body.get("token_ids_logprob") == [-1]:
            return 400, {"error": {"message": f"out-of-vocabulary token id -1; valid range is [0, {VOCABULARY})."}}
        if self.fault == "breaks" and len(self.asked) > 4:
            return 500, {"error": {"message": "planted"}}
        number, others = self._enter(body)
        prompt = body.get("input_ids") or body["text"].split()
        sampling = body["sampling_params"]
        options = sampling["custom_params"]["claa"]
        pruned = options.get("enabled", True) and self.fault != "never prunes"
        pruned = pruned or (self.fault == "the switch is ignored" and len(self.asked) % 3 == 0)
        rate = options.get("keep_rate", KEEP_RATE) if pruned else 1
        time.sleep(SECONDS)
        with self._lock:
            others |= self._running - {number}
            self._running.discard(number)
            replica = number % self.info["dp_size"]  # requests go round
            key = "" if self.fault == "keys are ignored" else f"{body['extra_key']} {replica}"
            cached = self._look_up(prompt, key, pruned)
        tokens = _tokens(prompt, rate)[: sampling["max_new_tokens"]]
        kept = list(range(0, len(prompt), round(1 / rate)))
        lead, tokens = self.wrong(tokens, pruned, rate, cached, others, number)
        if self.fault == "a hit keeps others" and pruned and cached:
            kept = [place + 1 for place in kept]
        report = {"pruned": pruned, "prompt_tokens": len(prompt), "early_cached_tokens": cached}
        report |= {"kept": kept} if options.get("return_kept") and pruned else {}
        report |= {} if pruned else {"reason": "disabled by request" if "enabled" in options else "planted reason"}
        meta: dict[str, Any] = {"prompt_tokens": len(prompt), "cached_tokens": cached, "completion_tokens": len(tokens)}
        meta["ttft"] = TTFT["pruned" if pruned != (self.fault == "pruned is slow") else "dense"]
        meta |= {} if self.fault == "no report" else {"claa": report}
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[-0.5, token, None] for token in tokens]
            meta["output_top_logprobs"] = [
                [[-0.5, token, None], [-0.5 - lead, (token + 1) % VOCABULARY, None]] for token in tokens
            ]
            if lead == TINY_LEAD:  # the token before is as likely
                for top in meta["output_top_logprobs"]:
                    top.append([-0.5 - lead, (top[0][1] - 1) % VOCABULARY, None])
            if self.fault == "a hit is far off" and cached:
                meta["output_token_logprobs"][0][0] -= 0.1
        self.entered += len(prompt) - cached + len(tokens)
        found = {"output_ids": tokens, "meta_info": meta}
        return 200, found | ({"text": self._said(body, pruned)} if self.tokenizer else {})

    def wrong(
        self, tokens: list[int], pruned: bool, rate: float, cached: int, others: set[int], number: int
    ) -> tuple[float, list[int]]:
        """The lead of first choices, and the tokens as they are said."""
        changed = {
            "dense changes": not pruned and number % 2 == 0,
            "dense changes beside pruned": not pruned and others,
            "a dense hit differs": not pruned and cached,
            "a pruned hit differs": pruned and cached,
            "answers leak": pruned and others,
            "keep rate 1 drops": pruned and rate == 1,
            "a near-tie on a hit": cached,
        }.get(self.fault)
        said = [*tokens[:-1], (tokens[-1] + 1) % VOCABULARY] if changed else tokens
        return (TINY_LEAD if self.fault == "a near-tie on a hit" else LEAD), said

    def _said(self, body: dict[str, Any], pruned: bool) -> str:
        found = re.search(r"magic number for \w+ is (\d+)", body.get("text", ""))
        lost = (self.fault == "pruned loses needles" and pruned) or self.fault == "finds nothing"
        return f" {found[1]}." if found and not lost else " I do not know."

    def _enter(self, body: dict[str, Any]) -> tuple[int, set[int]]:
        with self._lock:
            self.asked.append(body)
            number = len(self.asked)
            self._running.add(number)
            return number, self._running - {number}

    def _look_up(self, prompt: list[Any], key: str, pruned: bool) -> int:
        """Prompt tokens that are cached under the key; the prompt is, from now on."""
        before = self._cache.setdefault((key, pruned), [])
        cached = max((len(os.path.commonprefix([one, prompt[:-1]])) for one in before), default=0)
        before.append(prompt)
        return 0 if self.fault == "nothing is cached" else cached


def _tokens(prompt: list[Any], rate: float) -> list[int]:
    digest = hashlib.sha256(f"{prompt} {rate}".encode()).digest()
    return list(digest)


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    """Serve it; yields the URL."""

    class Handler(http_server.Quiet):
        def _answer(self, status: int, value: Any, stream: bool = False) -> None:
            text = value if isinstance(value, str) else json.dumps(value)
            body = (f"data: {text}\n\ndata: [DONE]\n\n" if stream else text).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refused(self) -> bool:
            fake.paths.append(self.path)
            refused = fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}"
            if refused:
                self._answer(401, {"error": "Unauthorized"})
            return refused

        def do_GET(self) -> None:
            if not self._refused():
                found = fake.get(self.path)
                self._answer(*((404, {"detail": "Not Found"}) if found is None else (200, found)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._refused():
                status, found = fake.generate(body)
                self._answer(status, found, bool(body.get("stream")) and status == 200)

    with http_server.serving(Handler) as url:
        yield url
