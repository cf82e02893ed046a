"""Speak to a site: find it, ask it, turn its refusals into failures of the command.

Plain `http.client`: a command lives for milliseconds and sends a handful of requests.
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from isthmus.cli.failures import EXIT_NOT_FOUND, EXIT_NOT_RUNNING, Failure, failure_of

START_ONE = "start one with `isthmus up --detach`"
ASK_THERE = "check the URL, and whether that site runs"
TIMEOUT_S = 90.0  # a lease request may wait for a minute


class Site:
    """`remedy`: what to do when it does not answer."""

    def __init__(self, url: str, key: str, remedy: str = ASK_THERE) -> None:
        self.url = url
        self.key = key
        self.remedy = remedy

    def get(self, *path: str, **query: object) -> Any:
        return self.ask("GET", *path, query=query)

    def put(self, *path: str, body: object) -> Any:
        return self.ask("PUT", *path, body=body)

    def post(self, *path: str, body: object = None) -> Any:
        return self.ask("POST", *path, body=body)

    def delete(self, *path: str) -> Any:
        return self.ask("DELETE", *path)

    def ask(
        self, method: str, *path: str, body: object = None, query: dict[str, object] | None = None
    ) -> Any:
        """The decoded answer. Each part of the path is escaped. Raises Failure."""
        for part in path:
            if "/" in part or part in ("", ".", ".."):  # a server would read it as other parts of the path
                raise Failure(f"no id or name is {part!r}", EXIT_NOT_FOUND)
        target = "/v1/" + "/".join(quote(part, safe="") for part in path)
        if query:
            target += "?" + urlencode(query)
        data = None if body is None else json.dumps(body).encode()
        status, answer = self._exchange(method, target, data)
        try:
            document = json.loads(answer)
        except ValueError as error:
            raise Failure(f"{self.url} does not speak isthmus (status {status}); check the URL") from error
        if status >= 400:
            told = document.get("error", {})
            raise failure_of(
                told.get("code", ""), told.get("message", f"{self.url} answered status {status}")
            )
        return document

    def _exchange(self, method: str, target: str, data: bytes | None) -> tuple[int, bytes]:
        import http.client

        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        headers = {"authorization": f"Bearer {self.key}"}
        if data is not None:
            headers["content-type"] = "application/json"
        try:
            connection.request(method, parts.path.rstrip("/") + target, data, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            words = f"the site at {self.url} does not answer ({error or type(error).__name__})"
            raise Failure(f"{words}; {self.remedy}", EXIT_NOT_RUNNING) from error
        finally:
            connection.close()


def open_site(state: Path | None) -> Site:
    """The site of this state directory, else the one that `isthmus.connect()` would find. Raises Failure."""
    from isthmus.core import discovery, settings

    loaded = settings.load()
    found = discovery.local_site(state) if state is not None else discovery.discover(loaded)
    if found is None:
        raise Failure(
            f"no site is running in {loaded.state_path}; start one with `isthmus up --detach`",
            EXIT_NOT_RUNNING,
        )
    local = state is not None or found == discovery.find_local(loaded.state_path)
    return Site(found.url, found.key, START_ONE if local else ASK_THERE)
