"""A real agent for the tests of a module, a lease for each of them, and a client of it."""

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from isthmus.core.model import EndReason
from isthmus.node.messages import (
    EndLease,
)
from tests.live.node_peer import (
    Client,
    Site,
    ended,
    running_node,
    start_lease,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_node(tmp_path_factory.mktemp("node")) as (site, _):
        yield site


lease_numbers = iter(range(10**6))


@pytest.fixture
def lease(site: Site) -> Iterator[str]:
    name = f"ls_{next(lease_numbers)}"
    address_of[name] = start_lease(site, name).address
    yield name
    site.done(EndLease, lease=name, reason=EndReason.RELEASED)
    ended(site, name)


address_of: dict[str, str] = {}


@pytest.fixture
def client(lease: str) -> Iterator[Client]:
    with Client(address_of[lease], lease) as client:
        yield client


TWICE = """
#include <stdint.h>
#include <string.h>
int32_t twice(const void *in, uint64_t in_bytes, void *out, uint64_t *out_bytes) {
    if (2 * in_bytes > *out_bytes) return 7;
    memcpy(out, in, in_bytes);
    memcpy((char *)out + in_bytes, in, in_bytes);
    *out_bytes = 2 * in_bytes;
    return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("library")
    (directory / "twice.c").write_text(TWICE)
    target = str(directory / "twice.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, directory / "twice.c"], check=True)
    return target


def define_twice(client: Client, library: str) -> int:
    return client.define(
        None, name="twice", kind="native", library=library, symbol="twice", result_bytes_max=8
    )


def await_running(client: Client) -> None:
    """The frames are out; the executor needs a moment more to begin."""
    client.domain.poll(0.1)
