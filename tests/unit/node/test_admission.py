"""Who may connect to an executor, and what both sides of the control line prove."""

import asyncio

import pytest

from isthmus.core import tokens
from isthmus.core.ids import ExecutorId, LeaseId, NodeId, TenantId
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric.frames import CODEC_VERSION, FRAME_VERSION, Hello, Refusal, Welcome
from isthmus.node.assignments import Assignment, Ready, pack, unpack
from isthmus.node.connection import BACKOFF_MAX_S, agent_proof, backoff, site_proof
from isthmus.node.executor import Admission, version_mismatch
from isthmus.node.fencing import nested_token
from isthmus.node.launching import rest_url

KEY = b"k" * 32
ASSIGNMENT = Assignment(
    executor=ExecutorId("ex_a"),
    lease=LeaseId("ls_a"),
    tenant=TenantId("t"),
    node=NodeId("n"),
    lease_key=KEY,
    page="",
    log="",
    listen="",
    site="http://site",
    sys_path=(),
    sys_path_first=True,
    cores=1,
    spin_s=0.0,
)


def _hello(**fields: object) -> Hello:
    values = {"token": nested_token(ASSIGNMENT), "python": python_version(), "isthmus": ISTHMUS_VERSION}
    return Hello(**{**values, **fields})  # type: ignore[arg-type]


def test_a_token_of_the_lease_opens_the_door() -> None:
    welcome = Admission(ASSIGNMENT)(_hello())
    assert isinstance(welcome, Welcome)
    assert (welcome.executor, welcome.credits > 0) == ("ex_a", True)


@pytest.mark.parametrize("token", ["", "a.b", "x" * 5000])
def test_any_other_token_is_refused_as_such(token: str) -> None:
    refusal = Admission(ASSIGNMENT)(_hello(token=token))
    assert isinstance(refusal, Refusal)
    assert refusal.code == "TokenError"


@pytest.mark.parametrize(
    ("field", "theirs", "ours"),
    [
        ("python", "cpython-2.7", python_version()),
        ("frame_version", 99, FRAME_VERSION),
        ("codec_version", 98, CODEC_VERSION),
    ],
)
def test_a_version_mismatch_names_both(field: str, theirs: object, ours: object) -> None:
    words = version_mismatch(_hello(**{field: theirs}))
    assert str(theirs) in words
    assert str(ours) in words
    refusal = Admission(ASSIGNMENT)(_hello(**{field: theirs}))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.message) == ("HandshakeError", words)


def test_nested_tokens_are_good_for_their_lease_only() -> None:
    token = nested_token(ASSIGNMENT)
    assert tokens.verify(token, KEY, LeaseId("ls_a"), 0.0).tenant == "t"
    with pytest.raises(tokens.TokenError):
        tokens.verify(token, KEY, LeaseId("ls_b"), 0.0)


def test_a_proof_of_one_side_does_not_serve_the_other() -> None:
    assert agent_proof(KEY, b"s", b"a") != site_proof(KEY, b"s", b"a")
    assert agent_proof(KEY, b"s", b"a") != agent_proof(KEY, b"s2", b"a")


def test_dialling_backs_off_to_a_bound() -> None:
    waits: list[float] = []

    async def sleep(duration_s: float) -> None:
        waits.append(duration_s)

    for attempt in range(100):
        asyncio.run(backoff(attempt, sleep))
    assert waits[0] < waits[5]
    assert max(waits) <= BACKOFF_MAX_S


def test_the_site_is_reached_by_http_where_its_agents_dial() -> None:
    assert rest_url("ws://127.0.0.1:80/agent") == "http://127.0.0.1:80"
    assert rest_url("wss://site/agent") == "https://site"


def test_packets_survive_the_way() -> None:
    assert unpack(pack(ASSIGNMENT)) == ASSIGNMENT
    assert unpack(pack(Ready(address="unix:x"))) == Ready(address="unix:x")
