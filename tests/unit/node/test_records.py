"""What is written down for the next agent."""

import os
from pathlib import Path

from isthmus.core.ids import LeaseId, TenantId
from isthmus.core.model import EndReason, Enforcement, Environment, Resources, Usage
from isthmus.node.messages import LeaseEnded
from isthmus.node.records import LOG_FILE, RECORD_FILE, LeaseRecord, Records, boot_id

LEASE = LeaseId("ls_a")
RECORD = LeaseRecord(
    boot="b",
    lease=LEASE,
    tenant=TenantId("t"),
    resources=Resources(),
    environment=Environment(preload=("numpy",)),
    lease_key=b"k",
    cores=(1,),
    enforcement=Enforcement(),
    started_ns=1,
    deadline_ns=2,
)
END = LeaseEnded(lease=LEASE, reason=EndReason.EXITED, detail="exit code 3", usage=Usage(calls=1))


def test_a_record_is_found_again(tmp_path: Path) -> None:
    Records(tmp_path).write(RECORD)
    assert list(Records(tmp_path).leases()) == [(LEASE, RECORD)]


def test_records_are_for_their_owner_only(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write(RECORD)
    assert (records.directory(LEASE) / RECORD_FILE).stat().st_mode & 0o077 == 0
    assert records.directory(LEASE).stat().st_mode & 0o077 == 0


def test_a_damaged_record_is_named_so_that_it_can_be_cleared(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write(RECORD)
    (records.directory(LEASE) / RECORD_FILE).write_bytes(b"\x93")
    (tmp_path / "leases" / "ls_empty").mkdir()
    assert list(records.leases()) == [(LEASE, None), ("ls_empty", None)]
    records.forget(LEASE)
    assert [lease for lease, _ in records.leases()] == ["ls_empty"]


def test_an_end_is_kept_until_it_is_forgotten(tmp_path: Path) -> None:
    Records(tmp_path).write_end(END)
    records = Records(tmp_path)
    (tmp_path / "ended" / "damaged.msgpack").write_bytes(b"\xc1")
    assert records.ends() == [END]
    records.forget_end(LEASE)
    records.forget_end(LEASE)
    assert records.ends() == []
    assert list((tmp_path / "ended").iterdir()) == []


def keep(records: Records, lease: str, text: str, end_s: int) -> None:
    directory = records.directory(LeaseId(lease))
    directory.mkdir()
    (directory / LOG_FILE).write_text(text)
    records.forget(LeaseId(lease))
    if text:
        os.utime(records.ended_log(LeaseId(lease)), (end_s, end_s))


def kept(records: Records) -> set[str]:
    return {path.stem for path in (records.state / "ended").iterdir()}


def test_what_a_lease_wrote_stays_when_it_is_forgotten(tmp_path: Path) -> None:
    records = Records(tmp_path)
    keep(records, "ls_a", "hello", 1)
    keep(records, "ls_silent", "", 2)
    assert not records.directory(LEASE).exists()
    assert records.ends() == []  # logs are no ends, and reading ends leaves them alone
    assert Records(tmp_path).ended_log(LEASE).read_text() == "hello"
    assert kept(records) == {"ls_a"}


def test_the_oldest_logs_of_ended_leases_go_first(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for lease, end_s in (("ls_c", 3), ("ls_a", 1), ("ls_b", 2), ("ls_d", 4)):
        keep(records, lease, "x" * 65536, end_s)
    records.write_end(END)
    records.trim_ended_logs()
    assert kept(records) == {"ls_a", "ls_b", "ls_c", "ls_d"}
    records.trim_ended_logs(logs_max=3)
    assert records.ends() == [END]
    records.forget_end(LEASE)
    assert kept(records) == {"ls_b", "ls_c", "ls_d"}
    records.trim_ended_logs(bytes_max=150_000)
    assert kept(records) == {"ls_c", "ls_d"}


def test_the_boot_has_a_name() -> None:
    assert boot_id() == boot_id() != ""
