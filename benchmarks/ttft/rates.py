"""TTFT under load: requests that arrive at random times, at several rates, from SGLang's benchmark client.

Two HTTP servers, stock and pruned, live side by side; at each rate the client (`python -m sglang.benchmark.serving`, as
it is) sends the same requests to one and then to the other. Prompts are random ids of one length, arrivals are Poisson.
The client is a process that stays, as importing SGLang takes it longer than many a run.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from benchmarks import shapes
from benchmarks.ttft.run import Run
from benchmarks.ttft.variants import STOCK, TTFT, keep, options
from claa_sglang.tools.servers import Server, launched

OUTPUT_TOKENS = 16
START_SECONDS, CLIENT_SECONDS = 400, 1800


def measure(run: Run, servers: dict[str, dict[str, Any]], chunk: int) -> None:
    """Start "stock" and "claa" of `servers` (engine options by name), and send every rate to both. Raises OutOfTime."""
    settings = run.settings
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="claa-rates-")))
        model = Path(servers["stock"]["model_path"])
        if not (model / "tokenizer.json").exists():
            shapes.write_tokenizer(model, run.model.config["vocab_size"])
        started = {name: stack.enter_context(_launched(servers[name])) for name in ("stock", "claa")}
        for server in started.values():
            server.wait(START_SECONDS)
        urls = {name: server.url for name, server in started.items()}
        cases = [(STOCK, urls["stock"], None)]
        cases += [(keep(rate), urls["claa"], options(rate)) for rate in settings.keep_rates]
        for name, url, claa in cases:
            _check(name, url, _sampling(claa), settings.rate_tokens, run.model.config["vocab_size"])
        # Leaving it ends the client, also one that hangs.
        client = stack.enter_context(multiprocessing.get_context("spawn").Pool(1, _import_client))
        took = 0.0
        for index, rate in enumerate(tqdm(settings.rates, desc="rates", unit="rate")):
            expected = max(took, settings.rate_requests / rate * len(cases))
            run.budget.check(expected)
            started = run.budget.used
            point = {"scenario": "rates", "tokens": settings.rate_tokens, "chunk": chunk, "rate": rate}
            series = {name: run.result.series_of(**point, quantity=TTFT, variant=name) for name, _, _ in cases}
            for name, url, claa in cases if index % 2 else cases[::-1]:
                series[name].samples += _send(
                    client, url, model, settings.rate_tokens, settings.rate_requests, rate, _sampling(claa), home
                )
            took = run.budget.used - started
            run.save()


def flags(engine_options: Mapping[str, Any]) -> list[str]:
    """Command-line flags of `sglang.launch_server` for options of `sglang.Engine`; True is a flag without a value."""
    result: list[str] = []
    for name, value in engine_options.items():
        flag = "--" + name.replace("_", "-")
        result += [flag] if value is True else [flag, str(value)]
    return result


def _launched(engine_options: Mapping[str, Any]) -> contextlib.AbstractContextManager[Server]:
    """A server that may not be ready yet; the client needs its tokenizer."""
    return launched(*flags({name: value for name, value in engine_options.items() if name != "skip_tokenizer_init"}))


def _check(name: str, url: str, sampling: dict[str, Any], tokens: int, vocab_size: int) -> None:
    """Warm up, and raise RuntimeError unless the server prunes what it is to prune."""
    for round in range(2):
        prompt = [(100 + round + 7 * index) % vocab_size for index in range(tokens)]
        answer = requests.post(url + "/generate", json={"input_ids": prompt, "sampling_params": sampling}, timeout=600)
        answer.raise_for_status()
        report = answer.json()["meta_info"].get("claa", {})
        if report.get("pruned", False) != (name != STOCK):
            raise RuntimeError(f"{name}: not the request that was to be measured: {report}")


def _send(
    client: Pool,
    url: str,
    model: Path,
    tokens: int,
    count: int,
    rate: float,
    sampling: dict[str, Any],
    home: Path,
) -> list[float]:
    """TTFT in seconds of `count` requests at `rate` per second. Raises RuntimeError where one failed."""
    out = home / "client.jsonl"
    out.unlink(missing_ok=True)
    command = ["sglang.benchmark.serving", "--backend", "sglang", "--base-url", url]
    command += ["--model", str(model), "--tokenizer", str(model), "--dataset-name", "random-ids", "--tokenize-prompt"]
    command += ["--random-input-len", str(tokens), "--random-output-len", str(OUTPUT_TOKENS)]
    command += ["--random-range-ratio", "1", "--num-prompts", str(count), "--request-rate", str(rate), "--seed", "1"]
    command += ["--warmup-requests", "0", "--flush-cache", "--disable-tqdm", "--output-details"]
    command += ["--output-file", str(out), "--extra-request-body", json.dumps({"sampling_params": sampling})]
    status, printed = client.apply_async(_run_client, (command,)).get(CLIENT_SECONDS)
    if status or not out.exists():
        raise RuntimeError(f"the benchmark client failed ({status}):\n{printed[-5000:]}")
    details = json.loads(out.read_text().splitlines()[-1])
    if failed := [error for error in details["errors"] if error]:
        raise RuntimeError(f"{len(failed)} of {count} requests failed, the first with: {failed[0][-2000:]}")
    return details["ttfts"]


def _import_client() -> None:
    """In its process, before anything is measured."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import sglang.benchmark.serving  # noqa: F401


def _run_client(command: list[str]) -> tuple[str | int | None, str]:
    """In its process: (exit status, what it printed) of `python -m` with this command line."""
    from sglang.benchmark import serving

    sys.argv, printed, status = command, io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            serving.cli_main()
        except SystemExit as exit:
            status = exit.code
    return status, printed.getvalue()


def _sampling(claa: dict[str, Any] | None) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    return params if claa is None else {**params, "custom_params": {"claa": claa}}
