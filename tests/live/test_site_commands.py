"""Every command against a real site: what programs read (--json), what people read, and the exit codes."""

import functools
import json

import pytest

from tests.live.commands import commander
from tests.live.sites import running_site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    further = {"ISTHMUS_LEASING__LICENSES__MATLAB": "4", "ISTHMUS_NODE__BANDWIDTH": "10Gbit/s"}
    with running_site(tmp_path_factory.mktemp("commands") / "state", **further) as running:
        yield running


@pytest.fixture
def elsewhere(monkeypatch, capsys, tmp_path):
    """Runs a command without naming a site."""
    return commander(monkeypatch, capsys, home=tmp_path)


@pytest.fixture
def isthmus(site, elsewhere):
    """Runs a command for this site."""
    return functools.partial(elsewhere, ISTHMUS_STATE=str(site.state))


@pytest.fixture
def as_json(isthmus):
    def run(*arguments):
        code, words, complaint = isthmus(*arguments, "--json")
        assert (code, complaint) == (0, "")
        return json.loads(words)

    return run


@pytest.fixture
def lease(site):
    with site.client() as client:
        granted = client.post("/v1/leases", json={"wait_s": 20}).json()["grants"][0]["lease"]
        yield granted
        client.delete(f"/v1/leases/{granted}")


@pytest.mark.parametrize(
    "command",
    ["status", "nodes", "leases", "leases --ended", "functions", "calls", "usage", "licenses", "config",
     "fabric", "token list", "tenant list", "tenant quota someone", "policy show", "policy dry-run"],
)  # fmt: skip
def test_a_command_that_shows_something_has_words_and_a_document(isthmus, as_json, command):
    code, words, complaint = isthmus(*command.split())
    assert (code, complaint) == (0, "")
    assert words.strip()
    assert as_json(*command.split()) is not None


def test_a_lease_can_be_seen_explained_and_released(isthmus, as_json, lease):
    (row,) = [row for row in as_json("leases") if row["lease"] == lease]
    assert row["state"] == "active"
    assert lease in isthmus("leases").words
    assert f"Lease {lease} is active" in isthmus("explain", lease).words
    assert as_json("explain", lease)["outcome"] == "grant"
    assert isthmus("logs", lease) == (0, "", "")
    assert as_json("release", lease)["end_reason"] == "released"
    assert "ended" in isthmus("release", lease).words


@pytest.mark.parametrize(
    "command",
    ["explain ls_nobody", "release ls_nobody", "logs ls_nobody", "cancel call_nobody", "drain nowhere",
     "resume nowhere", "token revoke key_nobody"],
)  # fmt: skip
def test_what_does_not_exist_has_exit_code_4(isthmus, command):
    code, words, complaint = isthmus(*command.split())
    assert (code, words) == (4, "")
    assert complaint.startswith("isthmus: no ")
    assert complaint.count("\n") == 1


def test_a_node_is_drained_and_resumed(as_json):
    (node,) = as_json("nodes")
    assert [row["node"] for row in as_json("drain", node["node"])] == [node["node"]]
    assert [row["node"] for row in as_json("resume", node["node"])] == [node["node"]]


def test_a_key_is_made_used_by_login_and_revoked(isthmus, as_json, elsewhere, site, tmp_path):
    said = isthmus("token", "create", "physics")
    assert (len(said.words.split()), said.words[:4]) == (1, "isk_")
    assert "shown once" in said.complaint
    created = as_json("token", "create", "physics", "--label", "laptop")
    assert created["secret"].startswith("isk_")
    assert created["key"] in isthmus("token", "list").words
    assert elsewhere("login", site.url, input=created["secret"]).code == 0
    assert (tmp_path / ".config" / "isthmus" / "login.json").stat().st_mode & 0o777 == 0o600
    assert json.loads(elsewhere("status", "--json").words)["tenant"] == "physics"
    assert as_json("token", "revoke", created["key"])["revoked"]
    assert elsewhere("status").code == 1
    assert "no key for http://other" in isthmus("login", "--forget", "http://other").complaint
    again = elsewhere("login", site.url, input=created["secret"])
    assert again.code == 1
    assert "revoked" in again.complaint
    assert as_json("login", "--forget")["site"] == ""
    assert elsewhere("status").code == 3


def test_other_rules_are_tried_and_replayed(as_json, tmp_path, lease):
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nname = "closed"\nthen = "deny"\nmessage = "closed today"\n')
    assert as_json("policy", "dry-run", str(policy))["outcome"] == "deny"
    replayed = as_json("policy", "replay", str(policy))
    assert len(replayed["changes"]) == replayed["judged"] >= 1


def test_two_policies_are_compared_and_the_difference_is_told(isthmus, as_json, tmp_path, lease):
    opened, closed = tmp_path / "open.toml", tmp_path / "closed.toml"
    opened.write_text("# everything that fits\n")
    closed.write_text('[[rule]]\nname = "closed"\nthen = "deny"\nmessage = "closed today"\n')
    assert as_json("policy", "diff", str(opened), str(opened))["differ"] == 0
    told = isthmus("policy", "diff", str(opened), str(closed)).words
    assert "grant -> deny" in told
    assert "is: rule 'closed': closed today" in told


def test_a_request_is_tried_for_another_tenant_at_another_time(as_json, tmp_path):
    night = tmp_path / "night.toml"
    night.write_text(
        '[[rule]]\nname = "by day"\nthen = "deny"\nwhen = \'tenant.name == "guest" && clock.hour == 12\'\n'
    )
    dry_run = ("policy", "dry-run", str(night), "--tenant", "guest")
    assert as_json(*dry_run, "--at", "2026-12-24T12:30:00")["outcome"] == "deny"
    assert as_json(*dry_run, "--at", "2026-12-24T22:00:00")["outcome"] == "grant"


def test_a_quota_changes_only_in_what_is_named_and_shares_are_listed(isthmus, as_json, lease):
    assert as_json("tenant", "quota", "physics", "--cores", "8", "--memory", "2GiB")["cores"] == 8
    changed = as_json("tenant", "quota", "physics", "--core-hours", "100", "--window-h", "48")
    assert (changed["cores"], changed["memory_bytes"], changed["core_hours"]) == (8, 2**31, 100)
    assert "100 within any 48 h" in isthmus("tenant", "quota", "physics").words
    assert as_json("tenant", "quota", "physics", "--cores", "0", "--core-hours", "0")["cores"] == 0
    (own,) = (row for row in as_json("tenant", "list") if row["held"]["leases"])
    assert own["standing"]["level"] > 0


def test_a_tenant_without_a_key_is_pointed_out_and_one_with_a_quota_is_listed(isthmus, as_json, site):
    said = isthmus("tenant", "quota", "phyiscs", "--cores", "1")
    assert (said.code, "nobody has a key of tenant 'phyiscs'" in said.complaint) == (0, True)
    assert "phyiscs" in [row["standing"]["tenant"] for row in as_json("tenant", "list")]
    with site.client() as client:
        for name in ("x" * 65, "a%0Ab"):
            assert client.put(f"/v1/tenants/{name}", json={}).status_code == 400


def test_an_id_never_leads_to_another_path(isthmus, site):
    assert isthmus("cancel", "../leases/ls_x").code == 4
    assert isthmus("release", "..").code == 4
    with site.client() as client:
        assert client.delete("/v1/leases/ls_x/executors/ex_..%2f").status_code == 404


def test_licences_are_listed_tried_and_limited_by_name(isthmus, as_json):
    assert as_json("licenses")[0] == {"name": "matlab", "total": 4, "held": 0, "others": 0, "free": 4}
    assert as_json("policy", "dry-run", "--license", "matlab=2")["outcome"] == "grant"
    assert as_json("policy", "dry-run", "--license", "ansys=1")["outcome"] == "deny"
    changed = as_json("tenant", "quota", "lab", "--license", "matlab=2", "--license", "ansys=1")
    assert changed["licenses"] == {"matlab": 2, "ansys": 1}
    assert as_json("tenant", "quota", "lab", "--license", "ansys=0")["licenses"] == {"matlab": 2}
    assert "matlab=2" in isthmus("tenant", "quota", "lab").words
    code, _, complaint = isthmus("policy", "dry-run", "--license", "matlab")
    assert code == 2
    assert "write for example matlab=2" in complaint


def test_bandwidth_that_nothing_holds_is_leased_and_says_accounted_only(isthmus, as_json, site):
    (node,) = as_json("nodes")
    assert node["amounts"] == {"bandwidth": 10**10}
    assert node["enforcement"]["amounts"] == {"bandwidth": "accounted-only"}
    assert "node.interface names none to hold it at" in node["enforcement"]["detail"]
    assert "10 Gbit/s of bandwidth: accounted-only" in isthmus("nodes").words
    with site.client() as client:
        asked = {"resources": {"bandwidth": "6Gbit/s", "memory": "256MiB"}, "wait_s": 20}
        (grant,) = client.post("/v1/leases", json=asked).json()["grants"]
        assert grant["enforcement"]["amounts"] == {"bandwidth": "accounted-only"}
        refused = as_json("policy", "dry-run", "--bandwidth", "6Gbit/s")
        assert refused["outcome"] == "wait"
        assert "6 Gbit/s of bandwidth" in refused["words"][0]
        client.delete(f"/v1/leases/{grant['lease']}")
    assert "of bandwidth x s" in isthmus("usage").words
    too_much = as_json("policy", "dry-run", "--bandwidth", "20Gbit/s")["words"][0]
    assert "no node has 20 Gbit/s of bandwidth (most: 10 Gbit/s on" in too_much
    assert as_json("tenant", "quota", "net", "--bandwidth", "1Gbit/s")["bandwidth"] == "1Gbit/s"
    assert "1 Gbit/s" in isthmus("tenant", "quota", "net").words
