"""What a pool of allocations needs, decided from what it has; and what is typed for it."""

import shlex

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core import tokens
from isthmus.core.ids import NodeId
from isthmus.core.model import Resources
from isthmus.core.settings import NodeSettings, SlurmPoolSettings, SlurmSettings
from isthmus.node.launching import key_holder
from isthmus.platforms.slurm import commands, parsing, rest_shapes
from isthmus.platforms.slurm.parsing import SlurmOutputError
from isthmus.platforms.slurm.pool_agents import PoolAgents, job_of, node_name
from isthmus.platforms.slurm.pooling import Claim, Member, Plan, allocations_for, claim, plan
from isthmus.platforms.slurm.records import allocation_of, new_job, pool_of

POOL = SlurmPoolSettings(
    cores=4, memory="8GiB", minimum=2, maximum=4, idle_s=60, time_limit_s=3600, renew_s=300
)
AGENTS = PoolAgents(
    site="5173", url="ws://h:1/agent", directory="/s/my agents", log="/s/srun.log", python="/py",
    join_key=b"secret", node_settings=NodeSettings(),
)  # fmt: skip


def idle(job, idle_s=0.0, left_s=3000.0, **more):
    return Member(job=job, is_running=True, is_ready=True, leases=0, idle_s=idle_s, left_s=left_s, **more)


def busy(job, left_s=3000.0, **more):
    return idle(job, left_s=left_s, **more)._replace(leases=1)


def waiting(job, idle_s=0.0):
    return Member(job=job, is_running=False, is_ready=False, leases=0, idle_s=idle_s)


def decide(*members, pool=POOL, more=0, claimed=None):
    return plan(pool, members, more, claimed)


def test_a_pool_is_filled_up_to_its_minimum_and_then_left_alone():
    assert decide() == Plan(submit=2)
    assert decide(waiting(1)) == Plan(submit=1)
    assert decide(waiting(1), idle(2, idle_s=1e6)) == Plan()


def test_it_grows_for_requests_without_room_up_to_its_maximum():
    assert decide(busy(1), busy(2), more=1) == Plan(submit=1)
    assert decide(busy(1), busy(2), waiting(3), more=1) == Plan(), "one is on its way"
    assert decide(busy(1), busy(2), busy(3), more=9) == Plan(submit=1)


def test_what_nobody_needs_goes_after_a_while_those_first_that_wait_in_the_queue():
    assert decide(busy(1), idle(2), idle(3, idle_s=59)) == Plan()
    assert decide(busy(1), idle(2), idle(3, idle_s=61)) == Plan(leave=frozenset({3}))
    assert decide(busy(1), idle(2, idle_s=99), waiting(3, idle_s=61)) == Plan(cancel=frozenset({3}))


def test_who_is_to_go_is_cancelled_once_nobody_can_get_a_lease_there():
    leaving = idle(3, is_leaving=True)
    assert decide(idle(1), idle(2), leaving) == Plan()
    assert decide(idle(1), idle(2), leaving._replace(is_left=True)) == Plan(cancel=frozenset({3}))
    assert decide(idle(1), idle(2), leaving._replace(is_left=True, leases=1)) == Plan()


def test_another_takes_its_place_before_its_time_limit_and_only_then_it_goes():
    old = busy(1, left_s=299)
    assert decide(old, idle(2)) == Plan(submit=1)
    assert decide(old, idle(2), waiting(3)) == Plan()
    assert decide(old, idle(2), idle(3)._replace(is_ready=False)) == Plan()
    assert decide(old, idle(2), idle(3)) == Plan(leave=frozenset({1}))


def test_no_lease_begins_in_the_last_half_of_that_time_even_without_another():
    assert decide(busy(1, left_s=149), idle(2), waiting(3)) == Plan(leave=frozenset({1}))


def test_an_idle_pool_without_a_minimum_is_not_renewed():
    small = msgspec.structs.replace(POOL, minimum=0)
    assert decide(idle(1, left_s=299), pool=small) == Plan(leave=frozenset({1}))


def test_what_batch_jobs_claim_goes_before_the_minimum_idle_ones_first():
    assert decide(busy(1), idle(2), claimed=1) == Plan(leave=frozenset({2}))
    assert decide(busy(1), idle(2), waiting(3), claimed=2) == Plan(
        leave=frozenset({1, 2}), cancel=frozenset({3})
    )
    assert decide(busy(1), idle(2, is_leaving=True), claimed=1) == Plan(), "one is on its way out"
    assert decide(claimed=0, more=3) == Plan(), "nothing new while batch waits"


def test_batch_jobs_claim_what_the_next_of_them_need():
    queue = (
        "7|batch|2|6|Resources|.\n8|batch|9|90|Priority|.\n9|other|9|90|Resources|.\n"
        "11|batch|9|90|Dependency|.\n"
    )
    waits = parsing.queue(queue)
    batch = frozenset({"batch"})
    assert claim(POOL, batch, waits) == Claim(jobs=(7,), allocations=2), "six cores on two nodes"
    assert claim(POOL, batch, waits[1:]) == Claim(jobs=(8,), allocations=0), "it waits behind our own"
    assert claim(POOL, batch, waits[3:]) is None
    assert claim(POOL, frozenset(), waits[2:3]) == Claim(jobs=(9,), allocations=23)
    with pytest.raises(SlurmOutputError):
        parsing.queue(queue[:-3])


members = st.lists(
    st.builds(
        Member,
        job=st.integers(1, 10**6), is_running=st.booleans(), is_ready=st.booleans(),
        leases=st.integers(0, 2), idle_s=st.floats(0, 1e4), left_s=st.floats(-10, 1e4),
        is_leaving=st.booleans(), is_left=st.booleans(),
    ),
    max_size=8, unique_by=lambda one: one.job,
)  # fmt: skip


@given(members=members, more=st.integers(0, 20), claimed=st.none() | st.integers(0, 3))
def test_a_plan_never_cancels_a_lease_nor_goes_beyond_the_maximum(members, more, claimed):
    made = plan(POOL, members, more, claimed)
    by_job = {one.job: one for one in members}
    assert not any(by_job[job].leases for job in made.cancel if by_job[job].is_running)
    assert not any(by_job[job].is_leaving for job in made.leave)
    staying = [one for one in members if not one.is_leaving and one.left_s > POOL.renew_s]
    assert not made.submit or len(staying) + made.submit <= POOL.maximum


def test_requests_count_as_the_allocations_that_they_would_fill():
    two = Resources(cores=2, memory="1GiB")
    assert allocations_for(POOL, [two] * 3) == 2
    assert allocations_for(POOL, [Resources(cores=1, memory="8GiB")] * 3) == 3, "memory fills them too"
    assert allocations_for(POOL, [Resources(cores=5), Resources(gpus=1)]) == 0, "too large for any"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"contract": "shrink"}, "one job on one node.*use 'drain'"),
        ({"contract": "keep"}, "use one of 'requeue', 'suspend', 'drain'"),
        ({"minimum": 9}, "minimum=9 is more than maximum=4"),
        ({"renew_s": 1e6}, "more than half of time_limit_s"),
        ({"memory": "much"}, "much"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_at_load_with_words(given, words):
    told = {"pools": {"burst": {"cores": 4, "memory": "8GiB"} | given}}
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert(told, SlurmSettings)


def test_a_pools_job_is_submitted_like_this():
    settings = SlurmSettings(partition="batch", elastic_partition="scavenge", account="chem")
    command = commands.submit(settings, AGENTS.request("burst", POOL))
    assert " ".join(command[:-1]) == (
        "sbatch --parsable --job-name=isthmus-pool-burst --comment=isthmus-pool:5173:burst --nodes=1 "
        "--ntasks=1 --cpus-per-task=4 --mem=8192M --time=60 --requeue --chdir=/ --output=/dev/null "
        "--partition=scavenge --account=chem"
    )
    assert command[-1].startswith("--wrap=trap 'gone=1' TERM; gone=; mkdir -p '/s/my agents' /s\n")
    assert (
        "exec /py -m isthmus.node.agent --site ws://h:1/agent "
        '--node "$SLURMD_NODENAME.burst.$SLURM_JOB_ID" --name "$SLURMD_NODENAME.burst.$SLURM_JOB_ID" '
        "--state '/s/my agents'/pool-\"$SLURM_JOB_ID\" >>/s/srun.log 2>&1)"
    ) in command[-1]
    drained = msgspec.structs.replace(POOL, contract="drain", partition="calm", qos="low")
    assert {"--no-requeue", "--partition=calm", "--qos=low"} <= {
        *commands.submit(settings, AGENTS.request("burst", drained))
    }


def test_no_secret_of_a_pools_agent_is_on_a_command_line():
    request = AGENTS.request("burst", POOL)
    key = tokens.agent_key(b"secret", key_holder(NodeId("n7.burst.42"))).hex()
    assert request.environ["ISTHMUS_AGENT_KEY"] == key
    assert key not in shlex.join(commands.submit(SlurmSettings(), request))


@pytest.mark.parametrize("interface", [38, 39, 41])
def test_slurmrestd_is_sent_the_same(interface):
    request = AGENTS.request("burst", POOL)
    sent = rest_shapes.pool_submission(SlurmSettings(partition="batch"), request, interface)
    job, script = sent["job"], sent.get("script") or sent["job"]["script"]
    assert script.endswith(f"\n{request.script}\n")
    assert (job["comment"], job["partition"], job["requeue"]) == ("isthmus-pool:5173:burst", "batch", True)
    plain = [value["number"] if interface > 38 else value for value in (job["memory_per_node"],)]
    assert plain == [8192]


def test_what_sbatch_says_is_read():
    assert parsing.submitted("42\n") == parsing.submitted("sbatch: a word of the site\n42;strait\n") == 42
    with pytest.raises(SlurmOutputError):
        parsing.submitted("Submitted batch job forty-two\n")


def test_jobs_of_pools_are_told_from_those_of_leases_and_of_other_sites():
    job = msgspec.structs.replace(new_job(12), comment=AGENTS.request("burst", POOL).comment)
    assert (pool_of(job, "5173"), pool_of(job, "other"), allocation_of(job, "5173")) == ("burst", None, None)
    assert pool_of(msgspec.structs.replace(job, comment="isthmus:5173:al_1"), "5173") is None


def test_a_node_of_a_pool_is_known_by_its_name():
    assert job_of(node_name(NodeId("n2.example.org"), "burst", 12)) == 12
    assert job_of(NodeId("n2.example.org")) is None
    assert job_of(NodeId("n7.job42")) is None
