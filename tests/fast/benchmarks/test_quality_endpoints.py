"""Which server a prompt is sent to; the servers here only count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from benchmarks.quality.endpoints import UrlEndpoint, request_body
from tests.http_server import Quiet, serving


@contextmanager
def counting(info: dict[str, Any], hang_up_every: int = 0) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """A server with this /server_info; yields its URL and the prompts it was sent.

    hang_up_every: it closes the connection instead of answering every so many prompts; 0: never.
    """
    seen: list[tuple[int, ...]] = []

    class Handler(Quiet):
        def _answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._answer(info)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(tuple(request["input_ids"]))
            if hang_up_every and len(seen) % hang_up_every == 0:
                self.close_connection = True
                return
            self._answer({"text": "7", "meta_info": {}})

    with serving(Handler) as url:
        yield url, seen


def info(window: int = 8) -> dict[str, Any]:
    return {"model_path": "m", "device": "cpu", "claa": {"config": {"window": window}}}


def test_a_prompt_goes_to_the_server_that_has_it_cached() -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(counting(info())) for _ in range(2)]
        endpoint = UrlEndpoint([url for url, _ in servers], in_flight=4)
        prompts = [[n, n + 1] for n in range(40)]

        async def ask() -> None:
            for prompt in prompts * 3:
                assert (await endpoint.ask(request_body(prompt, {}, 1)))["text"] == "7"

        endpoint.run(ask())
        endpoint.close()
        (_, first), (_, second) = servers
        assert sorted(first + second) == sorted(tuple(prompt) for prompt in prompts * 3)
        assert len(set(first)) > 5 and len(set(second)) > 5 and not set(first) & set(second)


def test_a_connection_that_the_server_closes_costs_nothing() -> None:
    with counting(info(), hang_up_every=3) as (url, seen):
        endpoint = UrlEndpoint([url], in_flight=2)

        async def ask() -> list[dict[str, Any]]:
            return [await endpoint.ask(request_body([n], {}, 1)) for n in range(10)]

        assert [answer["text"] for answer in endpoint.run(ask())] == ["7"] * 10
        assert len(seen) > 10 and set(seen) == {(n,) for n in range(10)}
        endpoint.close()


@pytest.mark.parametrize(
    ("other", "reason"), [(info(window=16), "give servers alike"), ({"model_path": "m"}, "--enable-claa")]
)
def test_servers_must_be_alike_and_serve_claa(other: dict[str, Any], reason: str) -> None:
    with counting(info()) as (ours, _), counting(other) as (theirs, _), pytest.raises(ValueError, match=reason):
        UrlEndpoint([ours, theirs], in_flight=1)


def test_the_loop_is_the_endpoints_own() -> None:
    with counting(info()) as (url, seen):
        endpoint = UrlEndpoint([url + "/"], in_flight=1)
        assert endpoint.run(asyncio.sleep(0, "done")) == "done" and endpoint.device == "cpu" and not seen
        endpoint.close()


def test_turns_of_a_chat_go_to_one_server() -> None:
    """Their ids differ, and so does not say where the earlier turns are cached."""
    with ExitStack() as stack:
        servers = [stack.enter_context(counting(info())) for _ in range(2)]
        endpoint = UrlEndpoint([url for url, _ in servers], in_flight=2)

        async def ask() -> None:
            for chat in range(20):
                for turn in range(4):
                    await endpoint.ask(request_body([chat, *range(turn)], {}, 1), f"chat {chat}")

        endpoint.run(ask())
        at = [{prompt[0] for prompt in seen} for _, seen in servers]
        assert all(at) and not at[0] & at[1] and len(at[0] | at[1]) == 20
        endpoint.close()


def test_times_are_of_one_server() -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(counting(info())) for _ in range(2)]
        endpoint = UrlEndpoint([url for url, _ in servers], in_flight=2)
        alone = endpoint.alone()
        for number in range(20):
            alone.run(alone.ask(request_body([number], {}, 1)))
        assert [len(seen) for _, seen in servers] == [20, 0] and alone.alone() is alone
        alone.close()
        endpoint.close()


def test_stock_serves_no_claa() -> None:
    with counting(info()) as (ours, _), pytest.raises(ValueError, match="start it without --enable-claa"):
        UrlEndpoint([ours], in_flight=1, claa=False)
    with counting({"model_path": "m", "device": "cpu"}) as (theirs, seen):
        stock = UrlEndpoint([theirs], in_flight=1, claa=False)
        stock.run(stock.ask(request_body([1, 2], None, 1)))
        assert seen == [(1, 2)] and request_body([1, 2], None, 1)["sampling_params"].keys() == {
            "temperature",
            "max_new_tokens",
        }
        stock.close()
