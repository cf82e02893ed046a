"""Random kills of every kind of process under load, and a checker that no accepted call was lost.

    python -m tests.faults.soak --minutes 30 [--seed N] [--clients 3]

A site is started in a directory of its own; client processes run `submit`, `map` and durable calls against it
and keep a journal (`soak_client.py`); every second or so something is killed with SIGKILL: an executor, a
zygote, the agent, the site or a client. Dead sites and clients are started again. At the end the journals are
checked:

- every accepted call ended exactly once, with the right value or a typed error (but for a killed client's);
- every accepted durable call has its result, whoever was killed in between;
- nothing is left: no process, no cgroup, no directory for shared memory or for sockets.

Prints one JSON object; exit status 1 when anything is lost, wrong, repeated or left.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from isthmus.core import discovery
from isthmus.core.discovery import Endpoint
from isthmus.node.isolation import state_tag
from isthmus.node.socket_paths import short_directory
from tests.faults import census, soak_client

KILLS = ("executor", "executor", "executor", "zygote", "agent", "site", "client")
KILL_PAUSE_S = (0.3, 2.0)
START_S, FINISH_S, GONE_S = 60.0, 90.0, 30.0
ORPHAN_S = 20.0
STATES = ("state", f"state-{'long' * 20}")  # below the long one, sockets would have paths too long for them


class Soak:
    """One run: a site, its clients, a seeded killer, and at the end the account of what happened."""

    def __init__(self, folder: Path, seed: int, clients: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self._state = folder / self.random.choice(STATES)
        self._strangers = {process.pid for process in census.descendants()}
        self._clients: list[subprocess.Popen[bytes]] = []
        self._cgroups: set[Path] = set()
        self._count = clients
        self._journals = 0
        self._site = self._start_site()

    # the parts --------------------------------------------------------------------------------------------
    def _start_site(self) -> subprocess.Popen[bytes]:
        variables = {
            **os.environ,
            "ISTHMUS_NODE__CORES": "2",
            "ISTHMUS_LEASING__ORPHAN_S": str(ORPHAN_S),
            "ISTHMUS_LEASING__LEASE_S": "10",
        }
        command = [sys.executable, "-m", "isthmus", "up", "--state", str(self._state)]
        log = (self.folder / "site.out").open("ab")
        site = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        log.close()
        census.wait_until(lambda: self._announced(site), START_S, "the site is up")
        return site

    def _announced(self, site: subprocess.Popen[bytes]) -> bool:
        found = discovery.read_site(self._state)
        return found is not None and found.pid == site.pid

    def _endpoint(self) -> Endpoint:
        found = discovery.find_local(self._state)
        assert found is not None
        return found

    def _start_client(self) -> subprocess.Popen[bytes]:
        endpoint = self._endpoint()
        journal = self.folder / f"journal-{self._journals}.jsonl"
        self._journals += 1
        command = [
            sys.executable, "-m", "tests.faults.soak_client", endpoint.url, str(journal),
            str(self.random.getrandbits(32)),
        ]  # fmt: skip
        log = (self.folder / "clients.out").open("ab")
        client = subprocess.Popen(
            command, env={**os.environ, "ISTHMUS_CLIENT__API_KEY": endpoint.key}, stdout=log, stderr=log
        )
        log.close()
        return client

    # the run ----------------------------------------------------------------------------------------------
    def run(self, duration_s: float) -> dict[str, Any]:
        until_s = time.monotonic() + duration_s
        self._clients = [self._start_client() for _ in range(self._count)]
        while time.monotonic() < until_s:
            time.sleep(self.random.uniform(*KILL_PAUSE_S))
            self._cgroups |= census.cgroups([process.pid for process in census.descendants()])
            self._kill_one(self.random.choice(KILLS))
            self._restart()
        return self._account(duration_s)

    def _kill_one(self, kind: str) -> None:
        victims = self._victims(kind)
        if victims:
            victim = self.random.choice(victims)
            census.kill(victim)
            if victim == self._site.pid:
                self._site.wait()  # a dying site has no address to give to new clients
            self.kills[kind] += 1

    def _victims(self, kind: str) -> list[int]:
        if kind == "client":
            return [client.pid for client in self._clients]
        if kind == "site":
            return [self._site.pid]
        if kind == "agent":
            return census.find("agent")
        zygotes, executors = census.zygotes()
        return executors if kind == "executor" else zygotes

    def _restart(self) -> None:
        if self._site.poll() is not None:
            self._site = self._start_site()
        for place, client in enumerate(self._clients):
            if client.poll() is not None:
                self._clients[place] = self._start_client()

    # the account ------------------------------------------------------------------------------------------
    def _account(self, duration_s: float) -> dict[str, Any]:
        for client in self._clients:
            census.kill(client.pid, signal.SIGTERM)
        hung = sum(not _ended(client) for client in self._clients)
        report = soak_client.check(sorted(self.folder.glob("journal-*.jsonl")), self._endpoint())
        census.kill(self._site.pid, signal.SIGTERM)
        site_hung = not _ended(self._site)
        report |= {
            "duration_s": duration_s,
            "kills": dict(self.kills),
            "clients_hung": hung,
            "site_hung": site_hung,
        }
        report["left"] = self._left()
        report["ok"] = not (hung or site_hung or report["left"] or report["failures"])
        return report

    def _left(self) -> list[str]:
        try:
            census.wait_until(lambda: not self._leftovers(), GONE_S, "nothing left")
        except AssertionError:
            return self._leftovers()
        return []

    def _leftovers(self) -> list[str]:
        census.reap_orphans(set())
        alive = [f"process {process.pid}: {process.command}" for process in self._own()]
        cgroups = [f"cgroup {path}" for path in self._cgroups if path.exists()]
        return alive + cgroups + [f"directory {path}" for path in self._directories() if path.exists()]

    def _directories(self) -> list[Path]:
        """Outside the state directory, those that its agents make; other sites' names differ."""
        shared = Path("/dev/shm") / f"isthmus-{os.getuid()}-{state_tag(self._state)}"
        return [shared, short_directory(self._state)]

    def _own(self) -> list[census.Process]:
        return [process for process in census.descendants() if process.pid not in self._strangers]

    def stop(self) -> None:
        for process in self._own():
            census.kill(process.pid)
        for child in (*self._clients, self._site):
            child.wait()
        census.reap_orphans(set())


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=FINISH_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return False
    return True


def soak(duration_s: float, seed: int, clients: int) -> dict[str, Any]:
    """One run in a temporary directory, which is kept when something went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="isthmus-soak-"))
    census.adopt_orphans()
    run = Soak(folder, seed, clients)
    try:
        report = {"seed": seed, **run.run(duration_s)}
    finally:
        run.stop()
    if report["ok"]:
        shutil.rmtree(folder)
    else:
        report["folder"] = str(folder)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--clients", type=int, default=3)
    options = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    report = soak(options.minutes * 60, seed, options.clients)
    print(json.dumps(report, indent=2))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
