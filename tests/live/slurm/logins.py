"""A login node: an sshd of the tests' own on this machine, with its own keys; its connections can be cut."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.live.processes import running_below
from tests.live.waiting import free_ports, wait_for

MISSING = "no sshd here: apt-get install openssh-server"


class LoginNode:
    """`config` is an OpenSSH configuration in which it is `login`, and `inner` behind it as a jump host."""

    def __init__(self, directory: Path, slurm_conf: str) -> None:
        self._process: subprocess.Popen[bytes]
        self.directory = directory
        self.port = free_ports(1)
        self.config = directory / "config"
        self.known_hosts = directory / "known_hosts"
        directory.mkdir()
        for name in ("host", "user"):
            command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name))
            subprocess.run(command, check=True)
        shutil.copy(directory / "user.pub", directory / "authorized_keys")
        self._write(slurm_conf)
        self.trust((directory / "host.pub").read_text())

    def _write(self, slurm_conf: str) -> None:
        here = self.directory
        (here / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {here}/host\nPidFile {here}/pid\n"
            f"AuthorizedKeysFile {here}/authorized_keys\nStrictModes no\nPermitRootLogin prohibit-password\n"
            f"PasswordAuthentication no\nUsePAM no\nSetEnv SLURM_CONF={slurm_conf}\n"
        )
        common = f"    HostName 127.0.0.1\n    Port {self.port}\n    IdentityFile {here}/user\n"
        known = f"    UserKnownHostsFile {self.known_hosts}\n    IdentitiesOnly yes\n"
        self.config.write_text(
            f"Host login\n{common}{known}\nHost inner\n{common}{known}    ProxyJump login\n"
        )

    def trust(self, public_key: str) -> None:
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public_key}")

    def start(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
        command = (shutil.which("sshd"), "-D", "-e", "-f", self.directory / "sshd_config")
        with (self.directory / "log").open("wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=output)
        wait_for(lambda: "listening on" in self.log())

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def stop(self) -> None:
        """It and all connections that it has."""
        if self._process.poll() is None:
            self.cut()
            self._process.terminate()
            self._process.wait(10)

    def cut(self) -> None:
        """End all connections, as a broken network would: what runs in them does not hear of it."""
        for pid in running_below(self._process.pid, b"sshd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def has_child(self, name: bytes) -> bool:
        return self.count_children(name) > 0

    def count_children(self, name: bytes) -> int:
        return len(running_below(self._process.pid, name))
