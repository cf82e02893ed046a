"""A real Slurm cluster for the session, and sites that draw leases from it."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import isthmus
from isthmus.platforms.slurm.tokens import expiry_s
from tests.live.sites import RunningSite, running_site
from tests.live.slurm.logins import MISSING, LoginNode
from tests.live.waiting import free_ports, wait_for

TOOLS = Path(__file__).parents[3] / "tools" / "slurm"
NODES = 6
LAST_LINES = 40
FAST = {
    "ISTHMUS_SLURM__TICK_S": "0.5",
    "ISTHMUS_SLURM__PENDING_S": "3",
    "ISTHMUS_LEASING__GRACE_S": "1",
    "ISTHMUS_NODE__METER_S": "0.3",
}


class Cluster:
    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}
        self.rest_url = f"unix:{directory}/rest/socket"

    def run(self, *command: str) -> str:
        """One command of Slurm; raises when it fails."""
        environ = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout + done.stderr

    def token(self, life_s: int = 3600) -> str:
        """A JSON web token of this user."""
        return self.run("scontrol", "token", f"lifespan={life_s}").strip().removeprefix("SLURM_JWT=")

    @staticmethod
    def is_expired(token: str) -> bool:
        return expiry_s(token) < time.time()

    def jobs(self, states: str = "R") -> list[int]:
        return [int(line) for line in self.run("squeue", "-h", "-t", states, "-o", "%A").split()]

    def our_jobs(self) -> list[int]:
        lines = self.run("squeue", "-h", "-t", "PD,R,CG,S", "-o", "%A %j").splitlines()
        return [int(line.split()[0]) for line in lines if "isthmus-" in line]

    def submit(self, script: str, *options: str) -> int:
        words = ("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script)
        return int(self.run(*words))

    def start(self) -> None:
        subprocess.run([TOOLS / "up.sh", self.directory, str(NODES), str(self.port)], check=True, timeout=110)

    def wait_until_saved(self, job: int) -> None:
        """slurmctld writes its jobs down a few seconds late; one killed before has forgotten the latest."""
        self.run("scontrol", "update", f"jobid={job}", "timelimit=+1")  # a change, so that it will write
        changed_s = time.time()
        wait_for(lambda: (self.directory / "state" / "job_state").stat().st_mtime > changed_s)

    @contextlib.contextmanager
    def without_slurmd(self, node: str) -> Iterator[None]:
        """Kills a node's slurmd; another is there after the block. What ran on the node runs on."""
        os.kill(int((self.directory / "run" / f"{node}.pid").read_text()), signal.SIGKILL)
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Kills slurmctld; another is there after the block. It does not know what ended a moment before."""
        open_jobs = set(self.jobs("PD,R,S"))
        os.kill(int((self.directory / "run" / "slurmctld.pid").read_text()), signal.SIGKILL)
        try:
            yield
        finally:
            self.start()
            revived = set(self.jobs("PD,R,S")) - open_jobs
            if revived:
                self.run("scancel", *map(str, revived))

    def last_words(self) -> str:
        """What slurmctld logged before it stopped answering; empty while it answers."""
        environ = {**os.environ, **self.environment}
        asked = subprocess.run(("scontrol", "ping"), env=environ, capture_output=True, text=True, timeout=30)
        if " is UP" in asked.stdout:
            return ""
        logged = (self.directory / "log" / "slurmctld").read_text("utf-8", "replace").splitlines()
        return "\n".join([asked.stdout, *logged[-LAST_LINES:]])

    def stop(self) -> None:
        subprocess.run([TOOLS / "down.sh", self.directory], check=True, timeout=60)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.getuid() != 0:
        pytest.skip("only root can start a Slurm cluster")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("Slurm is not installed, and this is no Debian to install it from")
    made = Cluster(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")), free_ports(NODES + 1))
    try:
        made.start()
    except subprocess.CalledProcessError:
        made.stop()
        if shutil.which("slurmctld") is None:
            pytest.skip("Slurm's packages cannot be installed here")
        raise
    yield made
    words = made.last_words()
    made.stop()
    assert not made.directory.exists()
    assert not words, f"slurmctld died, and no test that ended it started another one:\n{words}"


@pytest.fixture
def login_node(cluster: Cluster, tmp_path: Path) -> Iterator[LoginNode]:
    if shutil.which("sshd") is None:
        pytest.skip(MISSING)
    node = LoginNode(tmp_path / "login", cluster.environment["SLURM_CONF"])
    node.start()
    yield node
    node.stop()


@pytest.fixture
def open_site(
    cluster: Cluster, tmp_path: Path
) -> Iterator[Callable[..., AbstractContextManager[RunningSite]]]:
    """Starts sites on the cluster, with settings as keywords; afterwards nothing of them is in Slurm."""

    def opened(state: Path | None = None, **settings: str) -> AbstractContextManager[RunningSite]:
        environ = {**cluster.environment, **FAST, **settings}
        return running_site(state or tmp_path / "state", "--platform", "slurm", **environ)

    yield opened
    wait_for(lambda: not cluster.our_jobs())
    assert list((tmp_path / "state" / "agents").glob("*")) == []
    assert agents_of(tmp_path) == []


@pytest.fixture
def batch_job(cluster: Cluster) -> Iterator[Callable[..., int]]:
    """Submits batch jobs that are cancelled after the test."""
    jobs: list[int] = []

    def submit(script: str, *options: str) -> int:
        jobs.append(cluster.submit(script, *options))
        return jobs[-1]

    yield submit
    if jobs:
        cluster.run("scancel", *map(str, jobs))
    wait_for(lambda: not set(jobs) & set(cluster.jobs("PD,R,CG")))


@contextlib.contextmanager
def connected(site: RunningSite) -> Iterator[isthmus.Site]:
    with isthmus.connect(site.url, api_key=site.key) as opened:
        yield opened


def agents_of(directory: Path) -> list[int]:
    """Agents whose state is below a directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if b"isthmus.node.agent" in words and bytes(directory) in words:
                found.append(int(entry.name))
    return found
