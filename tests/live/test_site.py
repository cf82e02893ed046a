"""The real site as a process: how it starts, stops, dies and comes back."""

import json
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import isthmus
from isthmus.core.discovery import Endpoint, find_local, read_site
from tests.live import sdk_functions as remote
from tests.live.sites import clean_environment, gone, running_site, start


def test_a_site_is_found_by_its_state_directory_which_is_private(tmp_path):
    with running_site(tmp_path / "state") as site:
        assert stat.S_IMODE(site.state.stat().st_mode) == 0o700
        for name in ("key", "site.key", "join.key", "keys.sqlite3", "calls.sqlite3"):
            assert stat.S_IMODE((site.state / name).stat().st_mode) == 0o600, name
        found = find_local(site.state)
        assert found == Endpoint(site.url, site.key)
        with site.client() as client:
            status = client.get("/v1/status").json()
        assert (status["pid"], status["nodes"], status["role"]) == (site.process.pid, 1, "admin")
        assert status["cores"] >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_site_leaves_no_process_and_no_note_behind(tmp_path, number):
    with running_site(tmp_path / "state") as site:
        with site.client() as client:
            lease = client.post("/v1/leases", json={}).json()["grants"][0]
        processes = [*site.descendants(), lease["executors"][0]["pid"]]
        assert site.stop(number) == 0
        assert gone(processes)
        assert read_site(site.state) is None
        assert not (site.state / "site.json").exists()
        assert list((site.state / "leases").iterdir()) == []


def test_what_a_quick_program_called_is_counted_call_by_call(tmp_path):
    """Also the rows of a map, which travel many to a frame, and the last ones before its leases ended."""
    with running_site(tmp_path / "state") as site, site.client() as client:
        with isthmus.connect(site.url, api_key=site.key) as program:
            for _ in range(3):
                with pytest.raises(ValueError, match="3"):
                    program.call(remote.refuse_thirds, 3)
            assert len(list(program.map(remote.square, range(3000)))) == 3000
            list(program.map(remote.refuse_thirds, range(300), chunk=100, return_exceptions=True))
        give_up_s = time.monotonic() + 10.0
        while client.get("/v1/leases").json():
            assert time.monotonic() < give_up_s, "the leases did not end"
            time.sleep(0.02)
        counts = {row["name"].rpartition(".")[2]: row for row in client.get("/v1/functions").json()}
        usage = [row["usage"] for row in client.get("/v1/leases?ended=true").json()]
        bill = client.get("/v1/usage").json()
    assert (counts["square"]["calls"], counts["square"]["errors"]) == (3000, 0)
    assert (counts["refuse_thirds"]["calls"], counts["refuse_thirds"]["errors"]) == (303, 103)
    assert (sum(one["calls"] for one in usage), sum(one["errors"] for one in usage)) == (3303, 103)
    assert sum(row["calls"] for row in bill) == 3303


def test_a_second_site_on_the_same_state_is_refused_and_the_first_lives_on(tmp_path):
    with running_site(tmp_path / "state") as site:
        second, line = start(site.state)
        _, words = second.communicate(timeout=30)
        assert (second.returncode, line) == (1, b"")
        assert words.decode().count("\n") == 1
        assert f"another site (pid {site.process.pid} on " in words.decode()
        assert "isthmus down" in words.decode()
        with site.client() as client:
            assert client.get("/healthz").status_code == 200


def test_a_killed_site_comes_back_at_the_same_place_with_its_leases(tmp_path):
    with running_site(tmp_path / "state") as first:
        with first.client() as client:
            grant = client.post("/v1/leases", json={}).json()["grants"][0]
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        assert read_site(first.state) is None
        with running_site(first.state) as second:
            assert second.url == first.url
            with second.client() as client:
                lease = client.get(f"/v1/leases/{grant['lease']}").json()
                assert lease["state"] == "active"
                assert lease["executors"][0]["pid"] == grant["executors"][0]["pid"]
                renewal = client.post("/v1/leases/renew", json={"leases": [grant["lease"]]}).json()[
                    "renewals"
                ][0]
                assert renewal["ok"]
        assert gone([grant["executors"][0]["pid"]])


def test_an_ephemeral_site_ends_with_its_parent_and_removes_its_state(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with running_site(tmp_path / "state", "--ephemeral", "--parent", str(parent.pid)) as site:
        with site.client() as client:
            lease = client.post("/v1/leases", json={}).json()["grants"][0]
        processes = [*site.descendants(), lease["executors"][0]["pid"]]
        parent.kill()
        parent.communicate()
        assert site.process.wait(30) == 0
        assert gone(processes)
        assert not site.state.exists()


def test_an_ephemeral_site_whose_parent_is_gone_already_does_not_stay(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", ""])
    parent.wait()
    process, _ = start(tmp_path / "state", "--ephemeral", "--parent", str(parent.pid))
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not (tmp_path / "state").exists()


def test_an_ephemeral_site_never_removes_what_was_there_before(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    process, _ = start(tmp_path, "--ephemeral")
    _, words = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"not empty" in words
    assert (tmp_path / "thesis.tex").exists()


def test_a_misspelt_setting_is_refused_with_its_path(tmp_path):
    process, line = start(tmp_path / "state", ISTHMUS_LEASING__LEESE_S="3")
    _, words = process.communicate(timeout=30)
    assert (process.returncode, line) == (1, b"")
    assert b"leese_s" in words
    assert b"$.leasing" in words


def test_a_bad_policy_is_refused_with_its_line(tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nname = "x"\nwhen = "request.coors > 1"\nthen = "deny"\n')
    process, _ = start(tmp_path / "state", ISTHMUS_POLICY__FILE=str(policy))
    _, words = process.communicate(timeout=30)
    assert process.returncode == 1
    assert words.startswith(f"isthmus: {policy}:3".encode())
    assert words.count(b"\n") == 1


def test_up_detached_returns_when_the_site_is_ready_and_down_ends_it(tmp_path):
    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "isthmus", *arguments, "--state", str(tmp_path / "state"), "--json"],
            capture_output=True, env=clean_environment(), timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout or b"null"), done.stderr.decode()

    code, site, words = command("up", "--detach")
    assert (code, words) == (0, "")
    assert command("status")[1]["pid"] == site["pid"]
    code, _, words = command("up", "--detach")
    assert code == 1
    assert "another site" in words
    assert command("down")[1] == {"stopped": True, "pid": site["pid"], "url": site["url"]}
    assert gone([site["pid"]])
    code, _, words = command("down")
    assert code == 3
    assert "no site is running" in words


def _down(state):
    command = [sys.executable, "-m", "isthmus", "down", "--state", str(state)]
    return subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(), timeout=60, check=False
    )


def test_down_ends_what_a_killed_site_left(tmp_path):
    with running_site(tmp_path / "state") as site:
        with site.client() as client:
            lease = client.post("/v1/leases", json={}).json()["grants"][0]
        left = [*site.descendants(), lease["executors"][0]["pid"]]
        site.stop(signal.SIGKILL)
        done = _down(site.state)
        assert (done.returncode, done.stderr) == (0, "")
        assert "the site had died; its agent" in done.stdout
        assert gone(left)
        assert _down(site.state).returncode == 3


def test_a_site_whose_state_directory_is_removed_ends_with_all_it_runs(tmp_path):
    with running_site(tmp_path / "state") as site:
        running = site.descendants()
        shutil.rmtree(site.state)
        site.process.wait(30)
        assert gone(running)


@pytest.mark.parametrize("name", ["keys.sqlite3", "calls.sqlite3", "ledger.sqlite3"])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, name):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / name).write_bytes(b"garbage" * 1000)
    process, _ = start(tmp_path / "state")
    _, words = process.communicate(timeout=30)
    assert (process.returncode, words.count(b"\n")) == (1, 1)
    assert str(tmp_path / "state" / name).encode() in words


def test_strangers_bytes_on_the_port_disturb_nobody(tmp_path):
    noise = random.Random(7)
    with running_site(tmp_path / "state") as site, site.client() as client:
        host, port = site.url.removeprefix("http://").split(":")
        for _ in range(50):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(noise.randbytes(noise.randrange(1, 4096)))
        assert client.get("/v1/status").status_code == 200


def test_strangers_on_the_agents_endpoint_are_closed_and_counted(tmp_path):
    noise = random.Random(8)
    with running_site(tmp_path / "state") as site, site.client() as client:
        address = site.url.replace("http", "ws") + "/agent"
        for message in (noise.randbytes(100), "text", b"", noise.randbytes(1 << 20), b"\x81\xa4type\xa4Done"):
            with connect(address) as stranger:
                stranger.recv()  # the challenge
                stranger.send(message)
                with pytest.raises(ConnectionClosed):
                    stranger.recv(timeout=10)
        counted = next(
            line
            for line in client.get("/metrics").text.splitlines()
            if line.startswith("isthmus_strangers_total{")
        )
        assert float(counted.split()[-1]) == 5.0
        assert client.get("/v1/nodes").json()[0]["agent"] == "connected"
