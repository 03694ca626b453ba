"""Where prompts are sent: an SGLang engine of this process, or running servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import requests
from urllib3.util import Retry

from benchmarks import engine

T = TypeVar("T")
TIMEOUT = 1800  # seconds; a request waits behind all others in flight
# A server may close an idle connection at the moment it is used again; a greedy answer can be asked for once more.
RETRY = Retry(total=5, backoff_factor=0.5, allowed_methods=None)
CPU_OPTIONS = {**engine.CPU_OPTIONS, "max_total_tokens": 60_000}


class Endpoint(Protocol):
    """A server with CLAA. `device` names what it runs on."""

    device: str

    def info(self) -> dict[str, Any]:
        """What /server_info says."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, which may call `ask`, to its end."""

    async def ask(self, request: Mapping[str, Any], home: str | None = None) -> dict[str, Any]:
        """The answer to one body of /generate. Raises RuntimeError or ValueError with the server's words.

        home: requests with the same one go to the same server, as turns of a chat have to; None: by the prompt.
        """

    def flush(self) -> None:
        """Empty the prefix cache."""

    def alone(self) -> Endpoint:
        """One server of those there are, for what must not be spread over several: times, and what is cached."""


class EngineEndpoint:
    """`sgl.Engine` in this process, on the GPU if there is one. Everything may be pruned, however short."""

    def __init__(self, model: str, options: Mapping[str, Any]):
        gpu = engine.enter_device()
        self.device = gpu or "CPU engine"
        # No profile that happens to lie on this machine.
        defaults = {"log_level": "error", "random_seed": 0, "claa_min_prompt_tokens": 0, "claa_profile": "none"}
        known = {**({} if gpu else CPU_OPTIONS), **defaults, **options}
        self._engine = engine.start({"model_path": model, "enable_claa": True, **known}).engine

    def info(self) -> dict[str, Any]:
        return self._engine.get_server_info()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._engine.loop.run_until_complete(work)

    async def ask(self, request: Mapping[str, Any], home: str | None = None) -> dict[str, Any]:
        return await self._engine.async_generate(**request)

    def flush(self) -> None:
        if not self._engine.flush_cache().success:
            raise RuntimeError("the prefix cache cannot be emptied while requests run")

    def alone(self) -> EngineEndpoint:
        return self

    def close(self) -> None:
        self._engine.shutdown()


class UrlEndpoint:
    """Running servers that are alike, asked over HTTP from so many threads.

    A prompt goes to the same server every time, which has it in its prefix cache. claa: whether they are to serve CLAA.
    Raises ValueError for servers that are not alike, or where CLAA is not as it should be.
    """

    def __init__(self, urls: Sequence[str], in_flight: int, claa: bool = True):
        self.urls = [url.rstrip("/") for url in urls]
        self._claa = claa
        infos = [self._info(url) for url in self.urls]
        self.device = _device(self.urls[0], infos[0])
        if len({json.dumps((info["model_path"], info.get("claa", {}).get("config"))) for info in infos}) > 1:
            raise ValueError(f"{', '.join(self.urls)} differ in model or CLAA's configuration: give servers alike")
        self._threads = ThreadPoolExecutor(in_flight)
        self._session = requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=in_flight, max_retries=RETRY))

    def info(self) -> dict[str, Any]:
        return self._info(self.urls[0])

    def _info(self, url: str) -> dict[str, Any]:
        answer = requests.get(f"{url}/server_info", timeout=TIMEOUT)
        answer.raise_for_status()
        info = answer.json()
        if self._claa and "claa" not in info:
            raise ValueError(f"{url} serves no CLAA: start it with --enable-claa")
        if not self._claa and "claa" in info:
            raise ValueError(f"{url} serves CLAA and is no stock server: start it without --enable-claa")
        return info

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    async def ask(self, request: Mapping[str, Any], home: str | None = None) -> dict[str, Any]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._post, request, home)

    def _post(self, request: Mapping[str, Any], home: str | None) -> dict[str, Any]:
        url = self.urls[hash(home or tuple(request["input_ids"])) % len(self.urls)]
        answer = self._session.post(f"{url}/generate", json=request, timeout=TIMEOUT)
        if answer.status_code != 200:
            raise RuntimeError(f"/generate: HTTP {answer.status_code}: {answer.text}")
        return answer.json()

    def flush(self) -> None:
        for url in self.urls:
            requests.post(f"{url}/flush_cache", timeout=TIMEOUT).raise_for_status()

    def alone(self) -> UrlEndpoint:
        return self if len(self.urls) == 1 else UrlEndpoint(self.urls[:1], 1, self._claa)

    def close(self) -> None:
        self._threads.shutdown()


def _device(url: str, info: Mapping[str, Any]) -> str:
    """What a server runs on: on this machine the GPU's name, elsewhere what SGLang says ("cuda")."""
    device = str(info.get("device", "unknown"))
    if device != "cuda" or urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        return device
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else device


def request_body(
    input_ids: Sequence[int], claa: Mapping[str, Any] | None, max_new_tokens: int, top_logprobs: int = 0
) -> dict[str, Any]:
    """A greedy request; with `top_logprobs`, so many log probabilities of each output token come back.

    claa: its options; None for a stock server.
    """
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens}
    if claa is not None:
        sampling["custom_params"] = {"claa": dict(claa)}
    body: dict[str, Any] = {"input_ids": list(input_ids), "sampling_params": sampling}
    if top_logprobs:
        body |= {"return_logprob": True, "top_logprobs_num": top_logprobs}
    return body
