"""What the documents show a client: every snippet runs, every sample report is one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests import documents
from tests.engine_server import Server
from tests.route_bodies import MODEL
from tests.routes_server import claa_of, options, text

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def served(routes_server: Server) -> Server:
    return routes_server


# --- what the documents show ---


def as_served(code: str, url: str) -> str:
    """A client snippet that asks the server at `url` for its model, whatever port and model the document names."""
    code = re.sub(r"https?://(?:localhost|127\.0\.0\.1|0\.0\.0\.0)(?::\d+)?", url, code)
    return re.sub(r"(\bmodel[\"']?\s*[=:]\s*)[\"'][^\"']+[\"']", rf'\1"{MODEL}"', code)


CLIENTS = [block for block in documents.blocks("python") if as_served(block.text, "") != as_served(block.text, "x")]


@pytest.mark.parametrize("block", CLIENTS, ids=lambda block: block.where)
def test_client_snippets_of_the_documents_run(
    served: Server, block: documents.Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(documents.ROOT)
    exec(compile(as_served(block.text, served.url), block.where, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), f"{block.where}: it prints nothing"


def test_sample_reports_of_the_documents_have_the_keys_of_a_report(served: Server) -> None:
    pruned = claa_of(served.generate(text=text("documents"), sampling_params=options(return_kept=True)))
    dense = claa_of(served.generate(text=text("documents"), sampling_params=options(enabled=False)))
    known = {True: {*pruned, "reason", "steps"}, False: {*dense}}
    for block in documents.blocks("json"):
        for report in reports_in(json.loads(block.text)):
            unknown = {*report} - known[report["pruned"]]
            assert not unknown, f"{block.where}: a report has no {', '.join(sorted(unknown))}"
            needed = known[report["pruned"]] - {"kept", "reason", "steps"}
            assert needed <= {*report}, f"{block.where}: a report also has {', '.join(sorted(needed - {*report}))}"


def reports_in(value: Any) -> Iterator[dict[str, Any]]:
    """The reports anywhere inside a JSON value."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from reports_in(inner)
    if isinstance(value, dict) and "pruned" in value:
        yield value


def test_a_snippet_is_made_to_ask_the_served_model() -> None:
    shown = 'OpenAI(base_url="http://localhost:30000/v1")\npost("http://127.0.0.1:1/x", json={"model": "M/1", "n": 1})'
    assert as_served(shown, "http://h:7") == (
        f'OpenAI(base_url="http://h:7/v1")\npost("http://h:7/x", json={{"model": "{MODEL}", "n": 1}})'
    )
    assert as_served("create(model='a', n=1)", "u") == f'create(model="{MODEL}", n=1)'
    assert list(reports_in({"meta_info": {"claa": {"pruned": False}}, "n": [1]})) == [{"pruned": False}]
