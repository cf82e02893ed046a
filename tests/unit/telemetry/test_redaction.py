import json
import logging
import secrets

import pytest
import structlog

from isthmus.core.ids import LeaseId, NodeId, TenantId
from isthmus.core.tokens import Claims, sign
from isthmus.telemetry import logs
from isthmus.telemetry.redaction import REDACTED, redact_event, redact_text

KEY = f"isk_0123456789abcdef{secrets.token_urlsafe(32)}"
LEASE = LeaseId("ls_0123456789abcdef")
TOKEN = sign(Claims(lease=LEASE, tenant=TenantId("t"), node=NodeId("n"), expires_s=1e9), b"k" * 32)


@pytest.mark.parametrize("secret", [KEY, TOKEN, f"lease:{LEASE}:{TOKEN}"], ids=["key", "token", "bearer"])
@pytest.mark.parametrize(
    "place", ["{}", "Authorization: Bearer {}", "GET /x?key={}&y=1", "['{}', 3]", "failed: {}!"]
)
def test_a_secret_is_taken_out_of_any_text(secret, place):
    assert secret not in redact_text(place.format(secret))
    assert REDACTED in redact_text(place.format(secret))


def test_ordinary_words_stay():
    words = "lease ls_0123456789abcdef on node n1 ended after 3.5 s: file /tmp/a.b/c.py"
    assert redact_text(words) == words


@pytest.mark.parametrize(
    "event",
    [
        {"api_key": "short"},
        {"a": {"lease_key": b"bytes"}},
        {"a": [{"token": "t"}]},
        {"headers": {"Authorization": "x y"}},
    ],
    ids=str,
)
def test_a_field_that_is_named_like_a_secret_loses_its_value(event):
    told = json.dumps(redact_event(None, "info", event))
    assert REDACTED in told
    assert all(word not in told for word in ("short", "bytes", '"t"', "x y"))


def test_bytes_are_counted_not_shown():
    assert redact_event(None, "info", {"body": b"secret"}) == {"body": "6 bytes"}


def test_an_endless_structure_ends():
    loop: dict[str, object] = {}
    loop["again"] = loop
    assert "again" in redact_event(None, "info", loop)


@pytest.fixture
def _logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest.mark.usefixtures("_logging_as_before")
def test_the_log_file_holds_json_lines_without_secrets_from_both_kinds_of_loggers(tmp_path):
    path = tmp_path / "logs" / "site.log"
    logs.configure(path)
    structlog.get_logger("ours").info("hello", key=KEY, lease=LEASE)
    try:
        raise ValueError(f"bad key {KEY}")
    except ValueError:
        logging.getLogger("theirs").exception("failed with %s", KEY)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["logger"] for line in lines] == ["ours", "theirs"]
    assert lines[0]["lease"] == LEASE
    assert "ValueError" in lines[1]["exception"]
    assert KEY not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
