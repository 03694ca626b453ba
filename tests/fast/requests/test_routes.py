"""The table of routes is SGLang's own list: a route that is added or taken away fails here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from claa_sglang.requests import routes
from tests import route_bodies

GROUPS = (
    tuple(route.path for route in routes.PRUNES),
    routes.DENSE,
    routes.OTHER_MODELS,
    routes.HEALTH,
    routes.NO_PROMPT,
)


def installed(found: Iterable[Any]) -> Iterator[str]:
    """Paths of a FastAPI app's routes, those of the routers that it includes too."""
    for route in found:
        if hasattr(route, "path"):
            yield route.path
        else:
            yield from installed(route.original_router.routes)


def test_every_route_of_sglang_is_in_one_group() -> None:
    from sglang.srt.entrypoints.http_server import app

    listed = [path for group in GROUPS for path in group]
    assert sorted(listed) == sorted(set(installed(app.routes)))


def test_every_route_that_prunes_has_a_request_in_the_engine_tests() -> None:
    assert route_bodies.paths() == {route.path for route in routes.PRUNES}
