"""One frozen, typed settings object, read once. A misspelt key is refused with its path.

Order of precedence: environment (`ISTHMUS_<SECTION>__<FIELD>`), then the TOML file, then the defaults
(`settings_sources.py` reads them). Nothing else in isthmus reads settings from files or the environment.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from isthmus.core import settings_sources
from isthmus.core.errors import SettingsError
from isthmus.core.kinds import Licenses, amounts, check
from isthmus.core.units import parse_bytes

_LISTEN = re.compile(r"tcp://(\[[^\]]+\]|[^:/]+):\d{1,5}|unix:.+")
PoolName = Annotated[str, Meta(pattern="^[a-z][a-z0-9-]{0,30}$")]  # part of names of jobs and nodes


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the settings; unknown fields are errors."""


class PoolSettings(Section, frozen=True):
    """One warm pool of leases, named in `[leasing.pools.NAME]`."""

    minimum: Annotated[int, Meta(ge=0)] = 0
    """Forked executors kept ready when nobody calls. More: quick first calls, more memory. 0: none."""

    maximum: Annotated[int, Meta(ge=1)] = 1024
    """Leases of this pool at once, over all tenants."""

    idle_s: Annotated[float, Meta(gt=0)] = 300.0
    """A lease without a call for this long is ended. Longer holds idle cores; shorter makes calls cold."""


Price = Annotated[float, Meta(ge=0)]


class PriceSettings(Section, frozen=True):
    """What is held, not what is used, is paid for: others could have had it."""

    currency: Annotated[str, Meta(pattern="^[A-Za-z]{0,20}$")] = ""
    """A word for bills, like "EUR" or "credits". It is not converted."""

    core_h: Price = 0.0
    """Of a core for an hour."""

    memory_gib_h: Price = 0.0
    """Of a GiB of memory for an hour."""

    gpu_h: Price = 0.0
    """Of a GPU for an hour."""

    cache_gib_h: Price = 0.0
    """Of a GiB of cache on a node's disk for an hour."""

    bandwidth_gbit_h: Price = 0.0
    """Of a Gbit/s of a node's network for an hour."""

    licenses: dict[str, Price] = msgspec.field(default_factory=dict)
    """Of a licence for an hour, by name, like { matlab = 0.5 }."""

    classes: dict[Literal["reserved", "elastic", "harvested"], Price] = msgspec.field(default_factory=dict)
    """By what all of that is multiplied for a class of leases, like { harvested = 0.2 }. Else 1."""


class LeasingSettings(Section, frozen=True):
    lease_s: Annotated[float, Meta(gt=0)] = 30.0
    """Life of a lease without renewal. Longer wastes cores after a client's crash; shorter costs renewals."""

    grace_s: Annotated[float, Meta(ge=0)] = 2.0
    """Time that running calls get when a lease is taken back. Longer hurts the owner who waits for them."""

    idle_s: Annotated[float, Meta(gt=0)] = 1.0
    """An elastic lease without a call for so long goes when others wait. Longer keeps more of them warm."""

    tick_s: Annotated[float, Meta(gt=0)] = 0.5
    """Period of the reconcile loop. Shorter notices lost leases sooner and costs idle CPU."""

    agent_silence_s: Annotated[float, Meta(gt=0)] = 10.0
    """After this long without a heartbeat a node counts as silent and gets no new leases."""

    orphan_s: Annotated[float, Meta(ge=0)] = 600.0
    """How long leases with a connected client outlive their deadline while the site cannot be reached."""

    queue_max: Annotated[int, Meta(ge=0)] = 1000
    """Requests that may wait for capacity at once; the next one is refused. Longer queues hide overload."""

    queue_wait_s: Annotated[float, Meta(ge=0)] = 60.0
    """Longest time a request may wait for capacity, whatever it asks."""

    history_s: Annotated[float, Meta(gt=0)] = 7 * 86400.0
    """Ended leases, decisions and calls are kept this long. Longer makes the ledger grow."""

    licenses: Licenses = msgspec.field(default_factory=dict)
    """Licences that leases may hold, like { matlab = 4 }. On Slurm those that it counts itself (`Licenses=`
    in slurm.conf) are there without being named; naming one holds this site to fewer."""

    prices: PriceSettings = PriceSettings()

    pools: dict[str, PoolSettings] = msgspec.field(default_factory=lambda: {"default": PoolSettings()})
    """Pools by name; requests to a pool not named here are denied."""

    def __post_init__(self) -> None:
        check(self.licenses)


class NodeSettings(Section, frozen=True):
    cores: Annotated[int, Meta(ge=0)] = 0
    """Cores that isthmus may lease on the local machine. 0: all that this process may use."""

    memory: str = ""
    """Memory that it may lease, like "8GiB". Empty: 80 % of the machine's (or its cgroup's)."""

    bandwidth: str = ""
    """Bandwidth of each node that leases may hold, like "10Gbit/s". Empty: none, and requests for some are
    denied."""

    interface: str = ""
    """Where bandwidth is held to what was asked for, like "eth0". Needs root; tc's HTB becomes its root
    queue, with one lock for all of its traffic. Empty: bandwidth is accounted-only."""

    cache: str = ""
    """Of each node's own disk what leases may hold as cache, like "2TiB". Empty: none."""

    cache_path: str = ""
    """Directory on that disk. Each lease with cache gets one in it: a file system of its size where the agent
    may mount one (root); else its size is accounted-only."""

    isolation: Annotated[str, Meta(pattern="^(auto|cgroup-v2|cgroup-v1|systemd|none)$")] = "auto"
    """`auto` takes the strongest that works here and says which; another is used or refused at start."""

    meter_s: Annotated[float, Meta(gt=0)] = 1.0
    """Period of metering and heartbeats. Shorter: fresher bills, more idle CPU."""

    spin_s: Annotated[float, Meta(ge=0)] = 0.002
    """How long an executor spins for the next call before it sleeps. Longer: more hot calls and CPU."""

    log_bytes_max: Annotated[int, Meta(ge=4096)] = 16 * 2**20
    """Captured output per lease; older output is dropped beyond it."""

    fabric: Annotated[str, Meta(pattern="^(auto|ucx|sockets)$")] = "auto"
    """The data plane. `auto`: UCX where it loads, else the plain-Python twin."""

    patience_s: Annotated[float, Meta(ge=0)] = 2.0
    """How long a harvested lease may lie frozen before it is evicted. Longer: the owner's bursts cost no new
    start, but memory is held; shorter: its calls move on sooner."""

    listen: str = ""
    """Where executors listen. Empty: a Unix socket in the state directory. "tcp://0.0.0.0:0": any network."""

    def __post_init__(self) -> None:
        check({}, self.bandwidth, self.cache)
        if self.memory:
            parse_bytes(self.memory)
        if self.listen and not _LISTEN.fullmatch(self.listen):
            raise ValueError(f"listen = {self.listen!r}; write it like tcp://0.0.0.0:0, or unix:/PATH")
        if self.cache and not self.cache_path:
            raise ValueError("cache needs cache_path, a directory on the node's own disk")

    @property
    def amounts(self) -> dict[str, int]:
        """Of further kinds, what a node has for leases."""
        return amounts({}, self.bandwidth, self.cache)


class GatewaySettings(Section, frozen=True):
    host: str = "127.0.0.1"
    """Where REST listens. Anything but loopback belongs behind TLS."""

    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """0: any free port; clients on this machine find it in the state directory."""

    body_bytes_max: Annotated[int, Meta(ge=4096)] = 256 * 2**20
    """Largest request body, and largest result of a durable call: both pass through the site."""


class PolicySettings(Section, frozen=True):
    file: str = ""
    """TOML file of rules and tenants' terms, read at start; empty: everything that fits is allowed."""

    signals: str = ""
    """Where signals for rules come from: file or URL of a JSON object like {"carbon": 312}. Empty: none."""

    signals_s: Annotated[float, Meta(ge=1)] = 60.0
    """Period of reading them. Shorter: rules follow sooner; more load on the source."""

    signals_stale_s: Annotated[float, Meta(gt=0)] = 900.0
    """Signals that could not be read again for so long are forgotten: rules see none."""


class JobsSettings(Section, frozen=True):
    concurrency_max: Annotated[int, Meta(ge=1)] = 64
    """Durable calls that run at once."""

    attempts_max: Annotated[int, Meta(ge=1)] = 1000
    """Starts of one durable call, evictions included, before it fails for good."""

    tenant_bytes_max: Annotated[int, Meta(ge=2**20)] = 16 * 2**30
    """Bytes of disk for one tenant's durable calls and their results; beyond it further ones are refused."""


class ClientSettings(Section, frozen=True):
    site: str = ""
    """URL of the site. Empty: the one running for this user on this machine, else an embedded one."""

    api_key: str = ""
    """Its API key. Empty: the key file that `isthmus login` or the local site wrote."""

    spin_s: Annotated[float, Meta(ge=0)] = 0.001
    """How long a caller spins for an answer before it sleeps. Longer: lower latency, more CPU."""

    pool_max: Annotated[int, Meta(ge=1)] = 64
    """Leases one client holds at once for one kind of function."""

    capacity_wait_s: Annotated[float, Meta(ge=0)] = 600.0
    """How long calls without an executor wait while all cores are taken, before NoCapacityError. A call's own
    timeout_s ends its wait sooner."""


class SshSettings(Section, frozen=True):
    """Slurm's commands on a login node; needs `isthmus[ssh]`."""

    host: str = ""
    """The login node, as in `ssh HOST`: user, port, keys, ProxyJump and known hosts are those of your OpenSSH
    configuration. Empty: Slurm's commands run on the site's machine."""

    config: str = ""
    """An OpenSSH configuration to read in place of ~/.ssh/config."""

    tunnel: Annotated[str, Meta(pattern=r"^([^:]+:\d+)?$")] = ""
    """Where the login node shall listen for agents and forward them to the site: "HOST:PORT", HOST as compute
    nodes reach it. Its sshd must allow `GatewayPorts clientspecified`. Empty: nodes reach the site."""

    setup: str = ""
    """Shell line to run there before Slurm's commands, like "module load slurm". Empty: they are on PATH."""

    connect_s: Annotated[float, Meta(gt=0)] = 15.0
    """How long the connection may take to come about. Shorter: a slow login node looks like none."""

    keepalive_s: Annotated[float, Meta(gt=0)] = 10.0
    """Period of questions whether the other side is there; three without an answer end the connection."""


class RestSettings(Section, frozen=True):
    """slurmrestd in place of Slurm's commands."""

    url: str = ""
    """Of slurmrestd: "http://HOST:PORT", or "unix:/PATH" of its socket. Empty: Slurm's commands are used."""

    user: str = ""
    """Whose jobs they are; the token must be this user's. Empty: the user who runs the site."""

    token_file: str = ""
    """File with the JSON web token; read again when the token has expired."""

    token_command: str = ""
    """Command that prints a token, like "scontrol token lifespan=3600"; run again when that has expired."""

    version: str = ""
    """Version of the interface, like "v0.0.38". Empty: the newest that both sides know."""


CONTRACTS = ("requeue", "suspend", "drain")  # of a pool of allocations with batch jobs


class SlurmPoolSettings(Section, frozen=True):
    """One pool of allocations that stand ready with their agents, named in `[slurm.pools.NAME]`."""

    cores: Annotated[int, Meta(ge=1)]
    """Cores of each allocation, which is one job on one node. More: fewer jobs; fewer: they fit sooner."""

    memory: str
    """Memory of each, like "16GiB"."""

    partition: str = ""
    """Where they stand; best one whose jobs Slurm may preempt. Empty: `elastic_partition`."""

    qos: str = ""
    """Their QoS. Empty: `elastic_qos`."""

    minimum: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Allocations that stand ready when nobody calls. More: more first calls are quick; more is held."""

    maximum: Annotated[int, Meta(ge=1, le=1000)] = 4
    """Allocations at most; beyond it those about to reach their time limit, until they are replaced."""

    idle_s: Annotated[float, Meta(gt=0)] = 300.0
    """One beyond the minimum without a lease for so long is given back."""

    time_limit_s: Annotated[int, Meta(ge=60)] = 4 * 3600
    """Longest life of an allocation, rounded up to minutes. Longer: fewer replacements; it starts later."""

    renew_s: Annotated[float, Meta(ge=0)] = 300.0
    """So long before its time limit another takes an allocation's place. Longer: it may wait in the queue."""

    contract: str = "requeue"
    """When batch jobs want the nodes: `requeue`: Slurm preempts the jobs, which come back by themselves;
    `suspend`: it suspends them, and calls go on when it resumes them; `drain`: isthmus hands them back, idle
    ones first, as soon as a batch job waits for resources."""

    def __post_init__(self) -> None:
        parse_bytes(self.memory)
        if self.minimum > self.maximum:
            raise ValueError(f"minimum={self.minimum} is more than maximum={self.maximum}")
        if self.renew_s > self.time_limit_s / 2:
            raise ValueError(
                f"renew_s={self.renew_s:g} is more than half of time_limit_s={self.time_limit_s}"
            )
        if self.contract == "shrink":
            raise ValueError(
                "contract 'shrink': each allocation is one job on one node, so a pool gives back whole jobs; "
                "use 'drain'"
            )
        if self.contract not in CONTRACTS:
            raise ValueError(f"contract {self.contract!r}: use one of {', '.join(map(repr, CONTRACTS))}")


class SlurmSettings(Section, frozen=True):
    partition: str = ""
    """Where leases are drawn from. Empty: Slurm's default partition, and `isthmus nodes` shows all nodes."""

    elastic_partition: str = ""
    """A preemptible partition for elastic leases: batch jobs get those cores back. Empty: `partition`."""

    qos: str = ""
    """QoS of all leases. Empty: the account's default."""

    elastic_qos: str = ""
    """QoS of elastic leases, where preemption goes by QoS. Empty: `qos`."""

    account: str = ""
    """Account that pays. Empty: the user's default."""

    constraint: str = ""
    """Features that nodes must have, in Slurm's syntax."""

    reservation: str = ""
    """Reservation to draw from."""

    gpu_type: str = ""
    """Type of GPU to ask for, like "a100". Empty: any."""

    time_limit_s: Annotated[int, Meta(ge=60)] = 3600
    """Longest life of a lease, rounded up to minutes. Longer: fewer restarts; shorter: it starts sooner."""

    pending_s: Annotated[float, Meta(gt=0)] = 10.0
    """How long a job may wait in the queue before its lease is refused. Longer: users wait silently."""

    agent_start_s: Annotated[float, Meta(gt=0)] = 30.0
    """How long the agent may take to start and dial in. Slow shared file systems need more."""

    tick_s: Annotated[float, Meta(ge=0.1)] = 2.0
    """Period of the one squeue and one sinfo. Shorter: losses are seen sooner; more load on slurmctld."""

    command_timeout_s: Annotated[float, Meta(gt=0)] = 10.0
    """A command of Slurm that takes longer counts as no answer. Shorter: a slow slurmctld looks like none."""

    close_s: Annotated[float, Meta(ge=0)] = 10.0
    """Leases are drained this long before their time limit. Longer: less use; shorter: calls are cut off."""

    lend_directives: bool = True
    """Look into the scripts of your own batch jobs for `#ISTHMUS lend`. Costs slurmctld one request for each
    job that begins."""

    python: str = ""
    """Interpreter with isthmus, as compute nodes see it. Empty: the one that runs the site."""

    agent_dir: str = ""
    """Where agents keep their state, as compute nodes see it. Empty: in the site's state directory."""

    site_url: str = ""
    """Where agents dial the site, "http://HOST:PORT". Empty: through `ssh.tunnel`, else where it listens."""

    pools: dict[PoolName, SlurmPoolSettings] = msgspec.field(default_factory=dict)
    """Allocations that stand ready with their agents, by the name of their pool: leases there are quick."""

    ssh: SshSettings = SshSettings()
    rest: RestSettings = RestSettings()


class Settings(Section, frozen=True):
    platform: Annotated[str, Meta(pattern="^(local|slurm)$")] = "local"
    """Where leases are drawn from: this machine, or a Slurm cluster (`isthmus up --platform`)."""

    state_dir: str = ""
    """Where a site keeps its ledger, keys and logs; ISTHMUS_STATE sets it too. Empty:
    $XDG_STATE_HOME/isthmus."""

    cache_dir: str = ""
    """Virtual environments built for functions. Empty: $XDG_CACHE_HOME/isthmus."""

    leasing: LeasingSettings = LeasingSettings()
    node: NodeSettings = NodeSettings()
    gateway: GatewaySettings = GatewaySettings()
    policy: PolicySettings = PolicySettings()
    jobs: JobsSettings = JobsSettings()
    client: ClientSettings = ClientSettings()
    slurm: SlurmSettings = SlurmSettings()

    @property
    def state_path(self) -> Path:
        return _xdg(self.state_dir, "XDG_STATE_HOME", ".local/state")

    @property
    def cache_path(self) -> Path:
        return _xdg(self.cache_dir, "XDG_CACHE_HOME", ".cache")


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """`$ISTHMUS_CONFIG`, else `$XDG_CONFIG_HOME/isthmus/isthmus.toml`."""
    named = environ.get("ISTHMUS_CONFIG")
    if named:
        return Path(named)
    base = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config"
    return Path(base) / "isthmus" / "isthmus.toml"


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process. A file may be missing unless it was named. Raises SettingsError."""
    named = path is not None or "ISTHMUS_CONFIG" in environ
    path = path or config_path(environ)
    tree: dict[str, Any] = {}
    try:
        tree = settings_sources.read_file(path)
    except FileNotFoundError as error:
        if named:
            raise SettingsError(f"no settings file at {path}") from error
    settings_sources.overlay(tree, environ, Settings.__struct_fields__)
    try:
        settings = msgspec.convert(tree, Settings, strict=False)
        _refuse_endless(msgspec.to_builtins(settings), "$")
        return settings
    except msgspec.ValidationError as error:
        raise SettingsError(f"{path} or {settings_sources.PREFIX}* variables: {error}") from error


def _refuse_endless(value: object, path: str) -> None:
    """No setting may be infinite or no number at all: deadlines are counted in integers."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_endless(item, f"{path}.{name}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise msgspec.ValidationError(f"`{value}` is no finite number - at `{path}`")


def _xdg(explicit: str, variable: str, fallback: str) -> Path:
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / fallback) / "isthmus"
