"""Traffic for a pruned server that is short of everything: SGLang's own benchmark client, some of it hanging up.

Shared by `benchmarks.load` and `benchmarks.soak`. The client is `python -m sglang.benchmark.serving`, run in this
process through its command line. Two of its functions are wrapped while it runs: the one that sends a request, to give
it a name and its options and to abort a seeded few in the middle; and the one that reads each chunk of an answer, to
keep the tokens and the report, of which the client itself keeps the text only.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import requests

from benchmarks.cpu_cost import ROOT, cpu_model
from claa_sglang.tools import small_model
from tests import tiny_models
from tests.answers import ONE_THREAD, STRICT, check_idle
from tests.engine_server import Server, server

FLAGS = (
    "--enable-claa",
    *("--claa-policy", "always"),
    *("--claa-min-prompt-tokens", "256"),  # within the lengths sent: requests over one prefix are pruned and dense
    *("--chunked-prefill-size", "128"),
    *("--max-total-tokens", "3000"),  # the longest request takes about 800, and up to 32 are let in
    # Lets requests in before there is room for all of their answers: up to 95 % of the pool is in use.
    *("--schedule-conservativeness", "0.1"),
)
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
# One thread also for a real model: two would wait for each other wherever something else runs.
ENVIRONMENT = {**STRICT, **RETRACT, **ONE_THREAD}
PROFILE = ROOT / "claa_sglang" / "profiles" / f"{small_model.NAME}.json"
MODELS = ("tiny", small_model.NAME)
CONCURRENCY = 32
ABORTED_SHARE = 0.05
ABORTS = ("disconnect", "abort_request")


@contextlib.contextmanager
def pressed_server(model: str, home: Path) -> Iterator[Server]:
    """A pruned server with too small a pool, forced retractions, small chunks and strict accounting in every step.

    model: one of MODELS. home: where the tiny model is made.
    """
    small = small_model.prepare(ROOT / small_model.DEFAULT_DIR)
    path = tiny_models.build_with_tokenizer(home, small) if model == "tiny" else small
    profile = () if model == "tiny" else ("--claa-profile", str(PROFILE))
    with server(path, *FLAGS, *profile, env=ENVIRONMENT) as running:
        yield running


@dataclass
class Call:
    """One request of the client: what was sent and what came back."""

    rid: str
    path: str  # "/generate" or "/v1/chat/completions"
    prompt: Any  # text, token ids or messages
    params: dict[str, Any]  # sampling parameters, of /generate
    abort: str | None = None  # how the client gives up on it, one of ABORTS
    abort_after: int = 0  # tokens; 0: after `patience`, when it may still wait or be in its prompt
    patience: float = 0.0  # seconds
    tokens: list[int] = field(default_factory=list)  # of /generate
    text: str = ""
    finish: str | None = None  # why the server ended it; None if it never said
    report: dict[str, Any] = field(default_factory=dict)  # meta_info["claa"]
    error: str = ""

    @property
    def complete(self) -> bool:
        """Whether the whole answer came, also where an abort came too late."""
        return not self.error and self.finish in ("length", "stop")

    @property
    def wrong(self) -> str:
        """What is wrong with it, "" if nothing. A request that was given up on may end in any way."""
        if self.abort or (self.complete and not self.params):
            return ""
        if not self.complete:
            return self.error or f"ended with {self.finish}"
        wanted = self.params["max_new_tokens"]
        return "" if len(self.tokens) == wanted else f"{len(self.tokens)} tokens of {wanted}"


class Client:
    """SGLang's benchmark client, aimed at one server. `calls` is what the present run has sent, `sent` counts all runs.

    The same seed gives the same requests, and the same ones are given up on after as many tokens.
    """

    def __init__(self, running: Server, log: Path, seed: int = 0, progress: bool = True):
        from sglang.benchmark import serving  # seconds, and half a gigabyte

        self.serving = serving
        self.server = running
        self.log = log
        self.progress = progress
        self.seed = seed
        self.model = running.get("/model_info").json()["model_path"]
        self.sent = 0
        self.calls: dict[str, Call] = {}
        self._reached: dict[str, asyncio.Event] = {}

    def run(self, *options: str, backend: str = "sglang") -> list[Call]:
        """Run the client with `options` to its end; the calls it made. Its prints go to the log."""
        self.calls, self._reached = {}, {}
        argv = ["serving", "--backend", backend, "--base-url", self.server.url]
        argv += ["--model", self.model, "--tokenizer", self.model]
        argv += ["--temperature", "0", "--max-concurrency", str(CONCURRENCY), "--warmup-requests", "0"]
        argv += ["--output-file", os.devnull, "--seed", str(self.seed * 100_000 + self.sent), *options]
        argv += [] if self.progress else ["--disable-tqdm"]
        table = self.serving.ASYNC_REQUEST_FUNCS
        sending = self._sending(table[backend], self.serving._BACKEND_API_PATHS[backend])
        reading = self._reading(self.serving._record_server_prompt_len)
        with (
            self.log.open("a") as log,
            contextlib.redirect_stdout(log),
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(table, {backend: sending}),
            mock.patch.object(self.serving, "_record_server_prompt_len", reading),
        ):
            self.serving.cli_main()
        return list(self.calls.values())

    def _sending(self, original: Callable[..., Any], path: str) -> Callable[..., Any]:
        async def send(request_func_input: Any, pbar: Any = None) -> Any:
            call = self._new_call(request_func_input, path)
            named = {**request_func_input.extra_request_body, "rid": call.rid}
            if call.params:
                named["sampling_params"] = call.params
            sent = dataclasses.replace(request_func_input, extra_request_body=named)
            task = asyncio.ensure_future(original(sent, pbar=None))
            if call.abort:
                await self._give_up(call, task)
            try:
                output = await task
            except asyncio.CancelledError:
                output = self.serving.RequestFuncOutput.init_new(sent)
                output.error = "the client hung up"
            call.error = output.error
            call.text = output.generated_text
            if pbar:
                pbar.update(1)
            return output

        return send

    def _new_call(self, request: Any, path: str) -> Call:
        rid = f"call-{self.sent}"
        self.sent += 1
        params: dict[str, Any] = {}
        if path == "/generate":
            params = {"temperature": 0, "max_new_tokens": request.output_len, "ignore_eos": True}
            params["custom_params"] = {"claa": {"return_kept": True}}
        call = Call(rid, path, request.prompt, params)
        dice = random.Random(f"{self.seed} {rid}")
        if dice.random() < ABORTED_SHARE:
            call.abort = dice.choice(ABORTS)
            call.abort_after = dice.choice((0, dice.randrange(1, max(2, request.output_len))))
            call.patience = 0.5 * dice.random()
        self.calls[rid] = call
        self._reached[rid] = asyncio.Event()
        return call

    async def _give_up(self, call: Call, task: asyncio.Future[Any]) -> None:
        """Wait until it is time, or the answer is there; then hang up, or ask the server to stop."""
        if call.abort_after:
            reached = asyncio.ensure_future(self._reached[call.rid].wait())
            await asyncio.wait({task, reached}, return_when=asyncio.FIRST_COMPLETED)
            reached.cancel()
        else:
            await asyncio.wait({task}, timeout=call.patience)
        if task.done():
            return
        if call.abort == "disconnect":
            task.cancel()
        else:
            url = f"{self.server.url}/abort_request"
            await asyncio.to_thread(requests.post, url, json={"rid": call.rid}, timeout=60)

    def _reading(self, original: Callable[..., None]) -> Callable[..., None]:
        def read(data: dict[str, Any], output: Any) -> None:
            original(data, output)
            meta = data.get("meta_info") or {}
            call = self.calls.get(meta.get("id") or data.get("id") or "")
            if call is None:
                return
            if meta:
                call.tokens = data.get("output_ids") or call.tokens
                call.report = meta.get("claa") or call.report
                reason = (meta.get("finish_reason") or {}).get("type")
            else:
                reason = next((choice.get("finish_reason") for choice in data.get("choices") or ()), None)
            call.finish = reason or call.finish
            produced = meta.get("completion_tokens", 1)  # a chat's chunks do not count: its first one will do
            if produced >= call.abort_after:
                self._reached[call.rid].set()

        return read


def leaks(running: Server) -> str:
    """What is still held when every client is gone, "" if nothing. Empties the prefix cache."""
    deadline = time.monotonic() + 60
    try:
        # Hanging up is noticed by and by.
        while running.get("/server_info").json()["claa"]["late_slots"]["held"] and time.monotonic() < deadline:
            time.sleep(0.5)
        check_idle(running)
    except (AssertionError, requests.RequestException) as error:
        return f"{type(error).__name__}: {error}"[:1000]
    return ""


def retractions(log: str) -> dict[str, int]:
    """Requests retracted, from the server's log: on purpose, and for want of memory."""
    counts = {"forced": 0, "pool full": 0}
    for line in log.splitlines():
        _, found, rest = line.partition("#retracted_reqs: ")
        if found:
            counts["forced" if "Testing retraction" in line else "pool full"] += int(rest.split(",")[0])
    return counts


def provenance(module: str, argv: Sequence[str]) -> dict[str, Any]:
    """What a result needs beside it: command, date, versions, machine, and the server's settings."""
    return {
        "command": " ".join(["python -m", module, *argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {name: version(name) for name in ("claa-sglang", "sglang", "torch")}
        | {"python": platform.python_version()},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "flags": FLAGS,
        "environment": ENVIRONMENT,
        "concurrency": CONCURRENCY,
        "aborted_share": ABORTED_SHARE,
    }
