"""API keys, tenants' quotas and the audit trail: who may speak to the site, and what they did.

A key is `isk_<id><secret>` with 256 random bits. Only its SHA-256 is stored: a slow password hash protects
secrets that people choose and that can be guessed, and costs milliseconds on each request; 256 random bits
cannot be guessed. The id finds the row, so that the digests are compared once and in constant time.

Invariant: a secret leaves this module once, in the reply that creates it; it is never stored, logged or
audited. Not here: lease tokens (`isthmus.core.tokens`) and what a role may do (`operations.py`).
"""

import hashlib
import hmac
import os
import secrets
import sqlite3
from pathlib import Path
from typing import Literal

import msgspec

from isthmus.core.api import KeySummary, NewKey
from isthmus.core.clock import Clock
from isthmus.core.databases import open_database
from isthmus.core.errors import (
    AuthError,
    InvalidRequestError,
    NotFoundError,
    SiteUnavailableError,
)
from isthmus.core.ids import KeyId, TenantId, new_id
from isthmus.core.model import Principal, Quota, Record

SECRET_PREFIX = "isk_"
_ID_CHARACTERS = 16
_SECRET_CHARACTERS = len(SECRET_PREFIX) + _ID_CHARACTERS + 43  # 43: 256 bits in base64url
LAST_USED_PERIOD_S = 60.0  # a key's last use is written at most this often
KEYS_MAX = 100_000
AUDIT_ROWS_MAX = 1_000_000
AUDIT_TRIM_ROWS = 1000  # appended between two trims
LOCAL_TENANT = TenantId("local")

Role = Literal["admin", "operator", "user"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    key TEXT PRIMARY KEY, digest BLOB NOT NULL,
    tenant TEXT NOT NULL, role TEXT NOT NULL, label TEXT NOT NULL,
    created_s REAL NOT NULL, used_s REAL NOT NULL DEFAULT 0, revoked INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS quotas (tenant TEXT PRIMARY KEY, quota BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS audit (
    number INTEGER PRIMARY KEY, at_s REAL NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL,
    role TEXT NOT NULL, action TEXT NOT NULL, status INTEGER NOT NULL, detail TEXT NOT NULL
) STRICT;
"""


class AuditRow(Record, frozen=True):
    """One request that changed something, or tried to. `action`: method, path; `detail`: an error code."""

    at_s: float
    tenant: TenantId
    name: str
    role: str
    action: str
    status: int
    detail: str = ""


class _Key(msgspec.Struct):
    key: KeyId
    digest: bytes
    tenant: TenantId
    role: Role
    label: str
    created_s: float
    used_s: float
    revoked: bool


class KeyStore:
    """One site's keys. All methods are short and belong to the site's event loop thread; reads never touch
    the disk.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._clock = clock
        self._database = open_database(path, _SCHEMA, "NORMAL", "all API keys")
        self._audited = 0
        self._keys = {row[0]: _load(row) for row in self._database.execute("SELECT * FROM keys")}
        quotas = self._database.execute("SELECT tenant, quota FROM quotas")
        self._quotas = {
            TenantId(tenant): msgspec.msgpack.decode(quota, type=Quota) for tenant, quota in quotas
        }

    def close(self) -> None:
        self._database.close()

    def create(self, new: NewKey) -> KeySummary:
        """A new key; the reply is the only place that ever holds its secret. Raises InvalidRequestError."""
        _check_name(new.tenant)
        if not new.label.isprintable() or len(new.label) > 200:
            raise InvalidRequestError("a key's label has at most 200 printable characters")
        if len(self._keys) >= KEYS_MAX:
            raise InvalidRequestError(f"this site holds {KEYS_MAX} keys already")
        key_id = KeyId(new_id("key"))
        secret = f"{SECRET_PREFIX}{_id_part(key_id)}{secrets.token_urlsafe(32)}"
        key = _Key(key_id, _digest(secret), new.tenant, new.role, new.label, self._clock.now(), 0.0, False)
        self._write(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)", msgspec.structs.astuple(key), durable=True
        )
        self._keys[key_id] = key
        return msgspec.structs.replace(_summary(key), secret=secret)

    def authenticate(self, secret: str) -> Principal:
        """Who holds this secret. Raises AuthError without saying what was wrong with it, except for
        revocation.
        """
        key_part = secret[len(SECRET_PREFIX) : len(SECRET_PREFIX) + _ID_CHARACTERS]
        key = self._keys.get(KeyId(f"key_{key_part}"))
        digest = _digest(secret) if len(secret) == _SECRET_CHARACTERS and secret.isascii() else b""
        if key is None or not hmac.compare_digest(digest, key.digest):
            raise AuthError("unknown API key; `isthmus login URL` stores the right one")
        if key.revoked:
            raise AuthError(f"API key {key.key} was revoked; ask an administrator of the site for a new one")
        self._note_use(key)
        return Principal(
            tenant=key.tenant, role=key.role, name=key.label or key.key, quota=self.quota(key.tenant)
        )

    def summaries(self, tenant: TenantId | None = None) -> list[KeySummary]:
        return [_summary(key) for key in self._keys.values() if tenant in (None, key.tenant)]

    def find(self, key_id: KeyId) -> KeySummary:
        key = self._keys.get(key_id)
        if key is None:
            raise NotFoundError(f"no key {key_id}; `isthmus token list` shows all")
        return _summary(key)

    def revoke(self, key_id: KeyId) -> KeySummary:
        """From now on the key opens nothing. Idempotent; the row stays, so that audits can name it."""
        self.find(key_id)
        self._write("UPDATE keys SET revoked = 1 WHERE key = ?", (key_id,), durable=True)
        self._keys[key_id].revoked = True
        return _summary(self._keys[key_id])

    def tenants(self) -> set[TenantId]:
        """Those that hold a key, or have a quota."""
        return {key.tenant for key in self._keys.values() if not key.revoked} | set(self._quotas)

    def quota(self, tenant: TenantId) -> Quota:
        return self._quotas.get(tenant, Quota())

    def set_quota(self, tenant: TenantId, quota: Quota) -> None:
        """Raises InvalidRequestError when this can be no tenant's name."""
        _check_name(tenant)
        packed = msgspec.msgpack.encode(quota)
        self._write("INSERT OR REPLACE INTO quotas VALUES (?, ?)", (tenant, packed), durable=True)
        self._quotas[tenant] = quota

    def record(self, row: AuditRow) -> None:
        """Append to the audit trail, which keeps the newest AUDIT_ROWS_MAX rows."""
        self._write(
            "INSERT INTO audit (at_s, tenant, name, role, action, status, detail)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            msgspec.structs.astuple(row),
        )
        self._audited += 1
        if self._audited % AUDIT_TRIM_ROWS == 0:
            newest = "SELECT max(number) FROM audit"
            self._write(f"DELETE FROM audit WHERE number <= ({newest}) - ?", (AUDIT_ROWS_MAX,))

    def audit(self, limit: int = 1000) -> list[AuditRow]:
        """The newest rows, newest first."""
        columns = "at_s, tenant, name, role, action, status, detail"
        query = f"SELECT {columns} FROM audit ORDER BY number DESC LIMIT ?"
        rows = self._database.execute(query, (limit,))
        return [AuditRow(**dict(zip(AuditRow.__struct_fields__, row, strict=True))) for row in rows]

    def _note_use(self, key: _Key) -> None:
        now_s = self._clock.now()
        if now_s - key.used_s >= LAST_USED_PERIOD_S:
            key.used_s = now_s
            self._write("UPDATE keys SET used_s = ? WHERE key = ?", (now_s, key.key))

    def _write(self, statement: str, values: tuple[object, ...], durable: bool = False) -> None:
        """`durable` waits for the disk; the rest may lose its last moments to a power cut, not to a crash."""
        self._database.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        try:
            self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise SiteUnavailableError(f"cannot write down keys: {error}; is the disk full?") from error


def own_key(store: KeyStore, path: Path) -> str:
    """The site's own administrator key in `path`, readable by its user only; made anew if it is no good."""
    try:
        secret = path.read_text("ascii").strip()
        store.authenticate(secret)
        return secret
    except (FileNotFoundError, UnicodeDecodeError, AuthError):
        created = store.create(NewKey(tenant=LOCAL_TENANT, role="admin", label="site"))
    write_secret(path, created.secret.encode())
    return created.secret


def keep_secret(path: Path) -> bytes:
    """32 random bytes that survive restarts in a file readable by its user only."""
    try:
        secret = bytes.fromhex(path.read_text("ascii"))
    except (FileNotFoundError, UnicodeDecodeError, ValueError):
        secret = b""
    if len(secret) != 32:
        secret = secrets.token_bytes(32)
        write_secret(path, secret.hex().encode())
    return secret


def write_secret(path: Path, data: bytes) -> None:
    """Atomically, and never readable by others, not even for a moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)


def _check_name(tenant: str) -> None:
    if not tenant.isprintable() or not 0 < len(tenant) <= 64 or "/" in tenant:
        raise InvalidRequestError("a tenant's name has 1 to 64 printable characters, none of them a slash")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _id_part(key_id: KeyId) -> str:
    return key_id.removeprefix("key_")


def _load(row: tuple[object, ...]) -> _Key:
    return msgspec.convert(dict(zip(_Key.__struct_fields__, row, strict=True)), _Key, strict=False)


def _summary(key: _Key) -> KeySummary:
    return KeySummary(
        key=key.key,
        tenant=key.tenant,
        role=key.role,
        label=key.label,
        created_s=key.created_s,
        revoked=key.revoked,
    )
