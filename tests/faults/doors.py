"""The doors of a running embedded site, found from outside: its URL and key, its executors' addresses."""

import socket
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from isthmus.core.api import Grant, LeaseReply, LeaseRequest, SiteFile
from isthmus.core.discovery import KEY_FILE, SITE_FILE
from tests.faults import census


class Doors(NamedTuple):
    state: Path
    url: str
    key: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=30.0)

    def lease(self) -> Grant:
        """A lease of our own, outside any sdk."""
        body = msgspec.json.encode(LeaseRequest(wait_s=10.0))
        with self.client() as client:
            reply = client.post("/v1/leases", content=body)
        return msgspec.json.decode(reply.raise_for_status().content, type=LeaseReply).grants[0]

    def release(self, grant: Grant) -> None:
        with self.client() as client:
            client.delete(f"/v1/leases/{grant.lease}")


def find() -> Doors:
    """Of the one embedded site below this process."""
    (site,) = [process for process in census.descendants() if process.role == "site"]
    words = site.command.split()
    state = Path(words[words.index("--state") + 1])
    file = msgspec.json.decode((state / SITE_FILE).read_bytes(), type=SiteFile)
    return Doors(state, file.url, (state / KEY_FILE).read_text().strip())


def dial(address: str, timeout_s: float = 10.0) -> socket.socket:
    """A bare connection to `unix:PATH`, `tcp://HOST:PORT` or `http://HOST:PORT`."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        connection.connect(rest)
        return connection
    host, _, port = rest.removeprefix("//").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)
