"""A live server over HTTP, for commands that ask one: what goes wrong is one line that says what to do."""

from __future__ import annotations

from typing import Any

import requests

from claa_sglang.tools.ask_error import AskError, one_line

INFO_TIMEOUT = 30.0  # seconds


class Connection:
    """To one server.

    url: with its scheme. api_key: None for a server without one. timeout: seconds for one answer. error: what its
    methods raise, of AskError.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0, error: type[AskError] = AskError):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.answered = False
        self._key = api_key
        self._error = error

    def server_info(self) -> dict[str, Any]:
        """What /server_info says, of a server with CLAA."""
        info = self.get("/server_info")
        if "claa" not in info:
            raise self._error(f"{self.url} serves no CLAA: start it with --enable-claa")
        return info

    def get(self, path: str) -> dict[str, Any]:
        """The object that a GET answers with."""
        answer = self.send("GET", path)
        if answer.status_code in (401, 403):
            wanted = "wants an API key: give it with --api-key" if self._key is None else "refuses the given --api-key"
            raise self._error(f"{self.url} {wanted}")
        if answer.status_code == 404:
            raise self._error(f"{self.url} has no {path}, so it is no SGLang server: correct --url")
        return self.json(answer, path)

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """The object that a POST answers with."""
        return self.json(self.send("POST", path, body), path)

    def json(self, answer: requests.Response, path: str) -> dict[str, Any]:
        """The object in an answer of `path`."""
        if answer.status_code != 200:
            raise self._error(f"{path}: HTTP {answer.status_code}: {one_line(answer.text)}")
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._error(f"{self.url}{path} does not answer as SGLang does: correct --url")
        return found

    def send(self, method: str, path: str, body: Any = None) -> requests.Response:
        """Whatever answers, with any status."""
        timeout = self.timeout if method == "POST" else INFO_TIMEOUT
        try:
            answer = requests.request(method, self.url + path, json=body, timeout=timeout, headers=self.headers)
        except requests.RequestException as error:
            raise self.unreachable(path, error) from error
        self.answered |= method == "POST"
        return answer

    def unreachable(self, path: str, error: Exception) -> AskError:
        """What to raise where nothing answered."""
        if isinstance(error, requests.Timeout):
            return self._error(f"{self.url}{path}: no answer in time: give more seconds with --timeout")
        if isinstance(error, requests.ConnectionError):
            more = " any more: look at its log" if self.answered else ": start a server, or correct --url"
            return self._error(f"no server answers at {self.url}{more}")
        return self._error(f"{self.url}{path}: {one_line(str(error))}: correct --url, such as http://127.0.0.1:30000")
