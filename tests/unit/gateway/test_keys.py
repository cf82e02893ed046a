import hashlib
import stat

import pytest

from isthmus.core.api import NewKey
from isthmus.core.clock import SystemClock
from isthmus.core.errors import AuthError, InvalidRequestError, NotFoundError
from isthmus.core.ids import KeyId, TenantId
from isthmus.core.model import Quota
from isthmus.gateway import keys
from isthmus.gateway.keys import AuditRow, KeyStore, keep_secret, own_key

PHYSICS = TenantId("physics")


@pytest.fixture
def open_store(tmp_path):
    """Opens the same store as often as asked, as restarts of a site do."""
    stores = []

    def open_again():
        stores.append(KeyStore(tmp_path / "keys.sqlite3", SystemClock()))
        return stores[-1]

    yield open_again
    for store in stores:
        store.close()


def test_a_key_opens_what_its_tenant_and_role_may(open_store):
    store = open_store()
    created = store.create(NewKey(tenant=PHYSICS, role="operator", label="Ada's laptop"))
    principal = store.authenticate(created.secret)
    assert (principal.tenant, principal.role, principal.name) == (PHYSICS, "operator", "Ada's laptop")


def test_a_key_survives_a_restart_but_its_secret_is_nowhere_on_disk(open_store, tmp_path):
    store = open_store()
    secret = store.create(NewKey(tenant=PHYSICS)).secret
    store.close()
    assert open_store().authenticate(secret).tenant == PHYSICS
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in on_disk
    assert secret[-43:].encode() not in on_disk
    assert hashlib.sha256(secret.encode()).digest() in on_disk


def test_only_the_reply_that_creates_a_key_holds_its_secret(open_store):
    store = open_store()
    created = store.create(NewKey(tenant=PHYSICS))
    assert created.secret.startswith("isk_")
    assert [key.secret for key in store.summaries()] == [""]
    assert store.find(created.key).secret == ""


@pytest.mark.parametrize("spoil", [lambda s: "", lambda s: "isk_", lambda s: s[:-1], lambda s: s + "x",
                                   lambda s: s[:-1] + ("a" if s[-1] != "a" else "b"), lambda s: "ü" * len(s),
                                   lambda s: s.upper(), lambda s: "isk_" + "0" * 59])  # fmt: skip
def test_a_wrong_secret_opens_nothing(open_store, spoil):
    store = open_store()
    secret = store.create(NewKey(tenant=PHYSICS)).secret
    with pytest.raises(AuthError):
        store.authenticate(spoil(secret))


def test_a_revoked_key_opens_nothing_also_after_a_restart(open_store):
    store = open_store()
    created = store.create(NewKey(tenant=PHYSICS))
    assert store.revoke(created.key).revoked
    assert store.revoke(created.key).revoked
    with pytest.raises(AuthError, match="revoked"):
        store.authenticate(created.secret)
    with pytest.raises(AuthError, match="revoked"):
        open_store().authenticate(created.secret)


def test_a_key_that_does_not_exist_cannot_be_revoked(open_store):
    with pytest.raises(NotFoundError):
        open_store().revoke(KeyId("key_0000000000000000"))


@pytest.mark.parametrize("tenant", ["", "x" * 65, "new\nline"])
def test_a_senseless_tenant_gets_no_key(open_store, tenant):
    with pytest.raises(InvalidRequestError):
        open_store().create(NewKey(tenant=TenantId(tenant)))


def test_a_label_cannot_speak_to_the_terminal_that_shows_it(open_store):
    with pytest.raises(InvalidRequestError):
        open_store().create(NewKey(tenant=PHYSICS, label="\x1b]0;owned\x07"))


def test_quotas_survive_a_restart_and_come_with_the_principal(open_store):
    store = open_store()
    secret = store.create(NewKey(tenant=PHYSICS)).secret
    store.set_quota(PHYSICS, Quota(cores=8))
    assert store.authenticate(secret).quota == Quota(cores=8)
    assert open_store().authenticate(secret).quota == Quota(cores=8)


def test_the_audit_shows_the_newest_first_and_keeps_a_bounded_number(open_store, monkeypatch):
    monkeypatch.setattr(keys, "AUDIT_ROWS_MAX", 2)
    monkeypatch.setattr(keys, "AUDIT_TRIM_ROWS", 5)
    store = open_store()
    rows = [
        AuditRow(at_s=float(i), tenant=PHYSICS, name="n", role="user", action=f"POST /{i}", status=200)
        for i in range(5)
    ]
    for row in rows[:-1]:
        store.record(row)
    assert store.audit(limit=3) == rows[3:0:-1]
    store.record(rows[-1])
    assert store.audit() == rows[:2:-1]


def test_the_sites_own_key_is_kept_while_it_works_and_is_private(open_store, tmp_path):
    store = open_store()
    first = own_key(store, tmp_path / "key")
    assert own_key(store, tmp_path / "key") == first
    assert store.authenticate(first).role == "admin"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    store.revoke(store.summaries()[0].key)
    assert own_key(store, tmp_path / "key") != first


def test_a_kept_secret_is_the_same_again_and_made_anew_when_damaged(tmp_path):
    first = keep_secret(tmp_path / "site.key")
    assert len(first) == 32
    assert keep_secret(tmp_path / "site.key") == first
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
    (tmp_path / "site.key").write_text("not hex")
    assert keep_secret(tmp_path / "site.key") != first
