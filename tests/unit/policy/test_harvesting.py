"""What of batch jobs may be harvested, by policy."""

from hypothesis import given
from hypothesis import strategies as st

from isthmus.policy import ALLOW_ALL, load_policies
from isthmus.policy.harvesting import NOTHING, Job, Moment, consent
from isthmus.policy.snapshot import Holding

GIB = 2**30
NIGHT = Moment(clock_s=2 * 3600.0, signals={"carbon": 120.0})
NOON = Moment(clock_s=12 * 3600.0, signals={})
JOB = Job(id="17", name="cfd", user="ann", account="phys", partition="batch", cores=16, memory_bytes=64 * GIB)
SLACK = Holding(cores=10, memory_bytes=32 * GIB)
POLICY = load_policies(
    """
[[rule]]
name = "half of what is idle"
then = "harvest"
share = 0.5
when = 'job.partition == "batch"'

[[rule]]
name = "few of one user"
then = "harvest"
per = "user"
cores = 4
memory = "20GiB"
when = 'job.partition == "batch" && clock.hour >= 8 && clock.hour < 20'

[[rule]]
name = "leave them alone"
then = "protect"
when = 'job.user == "carol" || job.name.startsWith("prod-")'
message = "production"
"""
)


def test_without_rules_all_that_a_job_lends_and_does_not_use_is_harvested() -> None:
    assert consent(ALLOW_ALL, JOB, SLACK, {}, NOON) == (SLACK, "its owner lends what it does not use")


def test_all_matching_rules_limit_what_is_taken() -> None:
    night = consent(POLICY, JOB, SLACK, {}, NIGHT)
    assert night.amount == Holding(cores=5, memory_bytes=16 * GIB)
    assert night.reason == "rule 'half of what is idle' limits it"
    assert consent(POLICY, JOB, SLACK, {}, NOON).amount == Holding(cores=4, memory_bytes=16 * GIB)


def test_a_limit_per_user_counts_all_jobs_of_the_user() -> None:
    harvested = {("user", "ann"): Holding(cores=2)}
    assert consent(POLICY, JOB, SLACK, harvested, NOON).amount.cores == 2


def test_a_protected_job_is_left_alone_although_it_lends() -> None:
    for job in (Job(id="1", user="carol"), Job(id="2", name="prod-x", partition="batch")):
        refused = consent(POLICY, job, SLACK, {}, NIGHT)
        assert refused.amount == NOTHING
        assert refused.reason == "rule 'leave them alone' protects it: production"


def test_a_protection_that_cannot_be_evaluated_protects() -> None:
    green = load_policies("[[rule]]\nname = 'g'\nthen = 'protect'\nwhen = 'signal.carbon > 300.0'\n")
    assert consent(green, JOB, SLACK, {}, NIGHT).amount == SLACK
    assert consent(green, JOB, SLACK, {}, NOON).amount == NOTHING  # no signal now


@given(st.integers(0, 64), st.integers(0, 64))
def test_never_more_than_the_slack_is_taken(cores: int, others: int) -> None:
    job = Job(id="17", user="ann", partition="batch")
    harvested = {("user", "ann"): Holding(cores=others)}
    amount = consent(POLICY, job, Holding(cores=cores), harvested, NOON).amount
    assert 0 <= amount.cores <= cores
    assert amount.cores + others <= max(4, others)
