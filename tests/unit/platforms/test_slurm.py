"""Slurm's commands as they are typed, and what is made of whatever they print."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import EndReason, LeaseClass, Resources
from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm import commands, parsing, reasons
from isthmus.platforms.slurm.parsing import SlurmOutputError
from isthmus.platforms.slurm.records import JobRequest, Program, allocation_of

AL = AllocationId("al_1")
SQUEUE = (
    "12|n2|RUNNING|None|2|100M|1795511987|matlab:2|isthmus:5173:al_1|.\n"
    "13||PENDING|Resources|4|1.50G|N/A|(null)|(null)|.\n"
    "14|n[1-3]|COMPLETING|None|12|0|1795511999|ansys@flex:3,vep|a | b|.\n"
)
SINFO = (
    "n1   |idle*  |0/4/0/4  |8192 |0   |(null)            |gpu:0              |(null)  |none |\n"
    "g1   |mixed- |3/13/0/16|64000|4096|gpu:a100:4(S:0-1) |gpu:a100:2(IDX:0-1)|ib,nvme |none |\n"
    "g1   |mixed- |3/13/0/16|64000|4096|gpu:a100:4(S:0-1) |gpu:a100:2(IDX:0-1)|ib,nvme |none |\n"
    "n2   |drained|0/0/4/4  |8192 |0   |(null)            |gpu:0              |(null)  |disk|full\nask me |\n"
)
LICENSES = (
    "LicenseName=matlab Total=4 Used=3 Free=1 Reserved=0 Remote=no\n"
    "LicenseName=vep@flex Total=9 Used=2 Free=7 Reserved=2 Remote=yes LastConsumed=0 LastDeficit=0\n"
)
SCONTROL = "JobId=12 JobName=x JobState=TIMEOUT Reason=TimeLimit Dependency=(null) PreemptTime=None\n"


def asked(lease_class=LeaseClass.ELASTIC):
    return JobRequest(
        site="5173", allocation=AL, node=NodeId("n1"), lease_class=lease_class,
        resources=Resources(cores=2, memory="100MiB", gpus=1),
        program=Program(words=("agent", "--x y"), environ={"KEY": "it's"}, log="/s/srun.log"),
    )  # fmt: skip


def test_a_lease_is_asked_for_like_this():
    settings = SlurmSettings(
        partition="batch", elastic_partition="scavenge", account="chem", qos="normal", gpu_type="a100"
    )
    command = commands.allocate(settings, asked(LeaseClass.ELASTIC))
    assert " ".join(command) == (
        "salloc --no-shell --job-name=isthmus-al_1 --comment=isthmus:5173:al_1 --nodelist=n1 --nodes=1 "
        "--ntasks=1 --cpus-per-task=2 --mem=100M --time=60 --partition=scavenge --qos=normal --account=chem "
        "--gres=gpu:a100:1"
    )
    assert "--partition=batch" in commands.allocate(settings, asked(LeaseClass.RESERVED))


def test_the_agent_is_started_like_this():
    assert " ".join(commands.start_step(12, Resources(cores=2), ("agent", "--x"))) == (
        "srun --jobid=12 --overlap --nodes=1 --ntasks=1 --cpus-per-task=2 --mem=0 --input=none --quiet "
        "--chdir=/ --job-name=isthmus-agent agent --x"
    )


def test_everything_is_looked_at_like_this():
    assert " ".join(commands.list_jobs("ada")) == (
        "squeue --noheader --all --states=all --user=ada --format=%A|%N|%T|%r|%C|%m|%e|%W|%k|."
    )
    assert commands.list_nodes(SlurmSettings(partition="b"))[-1] == "--partition=b"
    assert commands.cancel_named("ada", AL) == ("scancel", "--user=ada", "--name=isthmus-al_1")


def test_commands_run_without_the_users_own_options():
    environ = commands.environment(
        {"SQUEUE_FORMAT": "%i", "SLURM_CONF": "/c", "SLURM_JOB_ID": "1", "HOME": "/h"}
    )
    assert environ == {"SLURM_CONF": "/c", "HOME": "/h", "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C.UTF-8"}


def test_jobs_are_read_with_times_memory_and_comments():
    ours, waiting, foreign = parsing.jobs(SQUEUE)
    assert (ours.job, ours.node, ours.cores, ours.memory_bytes) == (12, "n2", 2, 100 * 2**20)
    assert ours.ends_s == 1795511987
    assert allocation_of(ours, "5173") == "al_1"
    assert allocation_of(ours, "other") is None
    assert (waiting.reason, waiting.memory_bytes, waiting.ends_s) == ("Resources", 3 * 2**29, float("inf"))
    assert foreign.comment == "a | b"
    assert (ours.licenses, waiting.licenses, foreign.licenses) == (
        {"matlab": 2},
        {},
        {"ansys@flex": 3, "vep": 1},
    )


def test_nodes_are_read_once_with_what_is_held():
    plain, rich, drained = parsing.nodes(SINFO)
    assert (plain.state, plain.cores, plain.gpus, plain.features) == ("idle", 4, 0, ())
    assert (rich.cores, rich.cores_held, rich.gpus, rich.gpus_held) == (16, 3, 4, 2)
    assert (rich.state, rich.features, rich.memory_held_bytes) == ("mixed", ("ib", "nvme"), 4096 * 2**20)
    assert (plain.reason, reasons.why_closed(drained)) == ("", "drained: disk|full ask me")


def test_words_of_people_may_have_several_lines_but_no_row_hides_in_them():
    first, second, third = SQUEUE.splitlines()
    before, _, after = parsing.jobs(f"{first}\n13||PENDING|None|4|1G|N/A|(null)|two\nlines|.\n{third}\n")
    assert (before.job, after.job) == (12, 14)
    with pytest.raises(SlurmOutputError, match="a row has no end"):
        parsing.jobs(f"{first.removesuffix('|.')}\n{second}\n")


def test_a_list_of_no_nodes_is_no_list():
    with pytest.raises(SlurmOutputError, match="shows us no node"):
        parsing.nodes("")


def test_a_state_that_nobody_knows_ends_nothing():
    assert reasons.allocation_state("RUN\ufffdNING") == "running"


def test_licences_are_read_with_what_is_free_and_reserved():
    matlab, vep = parsing.licenses(LICENSES)
    assert (matlab.name, matlab.total, matlab.free, matlab.reserved) == ("matlab", 4, 1, 0)
    assert (vep.name, vep.total, vep.free, vep.reserved) == ("vep@flex", 9, 7, 2)
    assert parsing.licenses("No licenses configured in Slurm.\n") == ()
    for text in (LICENSES[:-1], "LicenseName=matlab Total=4\n", "slurm_load_licenses error\n"):
        with pytest.raises(SlurmOutputError):
            parsing.licenses(text)


def test_licences_are_asked_for_by_name_and_number():
    request = msgspec.structs.replace(asked(), licenses={"vep": 1, "matlab": 2, "none": 0})
    assert commands.allocate(SlurmSettings(), request)[-1] == "--licenses=matlab:2,vep:1"


def test_one_job_is_read():
    assert parsing.shown_state(SCONTROL) == ("TIMEOUT", "TimeLimit")
    preempted = "JobState=COMPLETING Reason=None PreemptTime=2026-11-24T09:19:47"
    assert parsing.shown_state(preempted) == ("PREEMPTED", "None")
    assert parsing.granted("salloc: Pending job allocation 7\nsalloc: Granted job allocation 7\n") == 7


@pytest.mark.parametrize("read", [parsing.jobs, parsing.nodes], ids=["jobs", "nodes"])
@pytest.mark.parametrize("text", ["1|n1|RUN", "squeue: error: Socket timed out\n", "a|b|c|d|e|f|g|h|\nx\n"])
def test_half_a_list_is_no_list(read, text):
    with pytest.raises(SlurmOutputError):
        read(text)


@given(cut=st.integers(0, len(SQUEUE) - 1))
def test_jobs_cut_short_anywhere_are_refused_or_whole_lines(cut):
    try:
        found = parsing.jobs(SQUEUE[:cut])
    except SlurmOutputError:
        return
    assert found == parsing.jobs(SQUEUE)[: SQUEUE[:cut].count("\n")]


LINE = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from(["1", "n1", "0/4/0/4", "8G", ".", ""])), max_size=10
)


@given(
    text=st.one_of(
        st.text(), st.lists(LINE.map("|".join), max_size=4).map(lambda lines: "\n".join(lines) + "\n")
    )
)
def test_any_text_gives_values_or_the_typed_error(text):
    for read in (
        parsing.jobs, parsing.nodes, parsing.granted, parsing.shown_state, parsing.licenses,
        parsing.licenses_held,
    ):  # fmt: skip
        with contextlib.suppress(SlurmOutputError):
            read(text)


@given(state=st.text(max_size=20), reason=st.text(max_size=20))
def test_every_state_and_reason_has_words(state, reason):
    assert reasons.allocation_state(state) in ("pending", "running", "ended")
    assert reason in reasons.why_pending(reason)
    assert reasons.why_ended(7, state, reason).startswith("Slurm job 7: ")


def test_reasons_say_what_to_make_of_them():
    assert reasons.why_pending("Priority") == "jobs of higher priority come first (Priority)"
    assert "limit of its account" in reasons.why_pending("AssocGrpCpuLimit")
    assert reasons.end_reason("NODE_FAIL") is EndReason.NODE_LOST
    assert reasons.end_reason("PREEMPTED") is EndReason.EVICTED
