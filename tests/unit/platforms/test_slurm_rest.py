"""slurmrestd's interfaces, old and new, as they are spoken; and the token that it wants."""

import asyncio
import base64
import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.errors import SettingsError, SiteUnavailableError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import LeaseClass, Resources
from isthmus.core.settings import RestSettings, SlurmSettings, SshSettings
from isthmus.platforms.slurm import open_client, rest_shapes
from isthmus.platforms.slurm.parsing import SlurmOutputError
from isthmus.platforms.slurm.records import Job, JobRequest, License, NodeUse, Program
from isthmus.platforms.slurm.tokens import Tokens, expiry_s

REQUEST = JobRequest(
    site="5173", allocation=AllocationId("al_1"), node=NodeId("n1"), lease_class=LeaseClass.ELASTIC,
    resources=Resources(cores=2, memory="100MiB", gpus=1, licenses={"matlab": 2}), licenses={"matlab": 2},
    program=Program(words=("agent", "--x y"), environ={"KEY": "it's"}, log="/s/srun.log"),
)  # fmt: skip
SETTINGS = SlurmSettings(partition="batch", elastic_partition="scavenge", account="chem", gpu_type="a100")

OLD_JOB = {
    "job_id": 12, "nodes": "n2", "job_state": "RUNNING", "state_reason": "None", "cpus": 2,
    "user_name": "ada", "memory_per_node": 100, "tres_alloc_str": "cpu=2,mem=100M,node=1",
    "end_time": 1795511987,
    "comment": "isthmus:5173:al_1", "preempt_time": 0, "licenses": "matlab:2",
}  # fmt: skip
NEW_JOB = OLD_JOB | {
    "job_state": ["RUNNING"],
    "cpus": {"set": True, "infinite": False, "number": 2},
    "memory_per_node": {"set": True, "infinite": False, "number": 100},
    "end_time": {"set": True, "infinite": False, "number": 1795511987},
    "preempt_time": {"set": True, "infinite": False, "number": 0},
}
JOB = Job(
    job=12, node=NodeId("n2"), state="RUNNING", reason="None", cores=2, memory_bytes=100 << 20,
    ends_s=1795511987, comment="isthmus:5173:al_1", licenses={"matlab": 2},
)  # fmt: skip
OLD_NODE = {
    "name": "g1", "state": "mixed", "state_flags": [], "cpus": 16, "alloc_cpus": 3, "real_memory": 64000,
    "alloc_memory": 4096, "gres": "gpu:a100:4(S:0-1)", "gres_used": "gpu:a100:2(IDX:0-1)",
    "features": "ib,nvme", "partitions": ["batch"],
}  # fmt: skip
NEW_NODE = OLD_NODE | {"state": ["MIXED"], "features": ["ib", "nvme"]}
NODE = NodeUse(
    node=NodeId("g1"), state="mixed", cores=16, cores_held=3, memory_bytes=64000 << 20,
    memory_held_bytes=4096 << 20, gpus=4, gpus_held=2, features=("ib", "nvme"),
)  # fmt: skip


def token(**claims):
    parts = ({"alg": "HS256", "typ": "JWT"}, claims)
    return ".".join(
        [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
        + ["sig"]
    )


def test_a_lease_is_asked_for_in_the_words_of_each_interface():
    old = rest_shapes.submission(SETTINGS, REQUEST, 38)
    assert old["script"].endswith("exec agent '--x y'\n")
    assert old["job"] == {
        "name": "isthmus-al_1", "comment": "isthmus:5173:al_1", "tasks": 1, "cpus_per_task": 2,
        "current_working_directory": "/", "standard_output": "/s/srun.log", "partition": "scavenge",
        "account": "chem", "nodelist": "n1", "nodes": 1, "memory_per_node": 100, "time_limit": 60,
        "open_mode": "append", "no_requeue": True, "gres": "gpu:a100:1",
        "licenses": "matlab:2",
        "environment": {"PATH": "/usr/local/bin:/usr/bin:/bin", "KEY": "it's"},
    }  # fmt: skip
    new = rest_shapes.submission(SETTINGS, REQUEST, 41)["job"]
    assert new["script"] == old["script"]
    assert new["required_nodes"] == ["n1"]
    assert new["tres_per_node"] == "gres/gpu:a100:1"
    assert new["memory_per_node"] == {"set": True, "infinite": False, "number": 100}
    assert new["environment"] == ["PATH=/usr/local/bin:/usr/bin:/bin", "KEY=it's"]
    assert (new["requeue"], new["licenses"]) == (False, "matlab:2")
    assert "nodelist" not in new
    assert "script" in rest_shapes.submission(SETTINGS, REQUEST, 40)


@pytest.mark.parametrize("row", [OLD_JOB, NEW_JOB], ids=["v0.0.38", "v0.0.40"])
def test_jobs_are_read_from_old_and_new(row):
    assert rest_shapes.jobs({"jobs": [row, row | {"user_name": "bob"}]}, "ada") == (JOB,)
    ending = row | {"job_state": ["CANCELLED", "COMPLETING"], "preempt_time": 5}
    assert rest_shapes.job_state({"jobs": [ending]}) == ("PREEMPTED", "None")
    assert rest_shapes.job_state({"jobs": [row]}) == ("RUNNING", "None")


def test_licences_are_read_with_what_is_free():
    row = {"LicenseName": "matlab", "Total": 4, "Used": 3, "Free": 1, "Reserved": 0, "Remote": False}
    assert rest_shapes.licenses({"licenses": [row]}) == (License(name="matlab", total=4, free=1),)
    with pytest.raises(SlurmOutputError):
        rest_shapes.licenses({"licenses": [row | {"Free": "few"}]})


@pytest.mark.parametrize("row", [OLD_NODE, NEW_NODE], ids=["v0.0.38", "v0.0.40"])
def test_nodes_are_read_from_old_and_new(row):
    assert rest_shapes.nodes({"nodes": [row]}, ["batch", ""]) == (NODE,)
    assert rest_shapes.nodes({"nodes": [row]}, ["other"]) == ()
    assert rest_shapes.nodes({"nodes": [row | {"state_flags": ["DRAIN"]}]}, ())[0].state == "drain"


def test_errors_are_found_whatever_the_status_was():
    known = {"errors": [{"error": "Invalid job id", "error_number": 2017, "description": "JobId=9"}]}
    assert rest_shapes.errors(known) == ([2017], "Invalid job id: JobId=9")
    assert rest_shapes.errors({"errors": [{"error": "no such node", "errno": 2018}]})[0] == [2018]
    assert rest_shapes.errors({"errors": []}) == ([], "")
    assert rest_shapes.is_refusal([2018])
    assert not rest_shapes.is_refusal([-1, 1801])


def test_the_newest_interface_that_both_know_is_spoken():
    document = {
        "paths": {f"/slurm/v0.0.{n}/jobs": {} for n in (37, 39, 40, 99)} | {"/slurmdb/v0.0.40/jobs": {}}
    }
    assert rest_shapes.version(document, "") == 40
    assert rest_shapes.version(document, "v0.0.39") == 39
    with pytest.raises(SlurmOutputError, match=r"does not speak v0.0.41, only v0.0.37, v0.0.39"):
        rest_shapes.version(document, "v0.0.41")
    with pytest.raises(SlurmOutputError, match=r"speaks v0.0.99; isthmus knows v0.0.38 to v0.0.46"):
        rest_shapes.version({"paths": ["/slurm/v0.0.99/jobs/"]}, "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*OLD_JOB, *OLD_NODE, "jobs", "nodes", "errors", "set", "number"]), inner
        )
    ),
    max_leaves=20,
)


@given(answer=st.one_of(JSON, st.fixed_dictionaries({"jobs": st.lists(JSON), "nodes": st.lists(JSON)})))
def test_any_json_gives_values_or_the_typed_error(answer):
    reads = (
        lambda: rest_shapes.jobs(answer, "ada"), lambda: rest_shapes.nodes(answer, ()),
        lambda: rest_shapes.job_state(answer), lambda: rest_shapes.errors(answer),
        lambda: rest_shapes.partitions(answer), lambda: rest_shapes.pings(answer),
        lambda: rest_shapes.version(answer, ""), lambda: rest_shapes.submitted(answer),
    )  # fmt: skip
    for read in reads:
        with contextlib.suppress(SlurmOutputError):
            read()


def test_a_token_is_kept_until_it_is_about_to_expire(tmp_path):
    file = tmp_path / "token"
    tokens = Tokens(RestSettings(token_file=str(file)), 5)
    first, second = token(exp=time.time() + 3600, sun="ada"), token(exp=time.time() + 7200, sun="ada")

    async def story():
        file.write_text(f"SLURM_JWT={first}\n")
        assert await tokens.current() == first
        file.write_text(second)
        assert await tokens.current() == first
        tokens.discard()
        assert await tokens.current() == second

    asyncio.run(story())


def test_an_expired_token_says_when_and_what_to_do(tmp_path):
    file = tmp_path / "token"
    file.write_text(token(exp=1_700_000_000))
    with pytest.raises(
        SiteUnavailableError, match=r"expired at 2023-11-14 22:13:20 UTC, \d+ s ago; write a new"
    ):
        asyncio.run(Tokens(RestSettings(token_file=str(file)), 5).current())


def test_a_command_gives_tokens_and_its_failure_has_words(tmp_path):
    good = token(exp=time.time() + 60)
    printing = Tokens(RestSettings(token_command=f"echo SLURM_JWT={good}"), 5)
    assert asyncio.run(printing.current()) == good
    for command, words in (("false", "false failed"), ("echo nothing", "gives no JSON web token")):
        with pytest.raises(SiteUnavailableError, match=words):
            asyncio.run(Tokens(RestSettings(token_command=command), 5).current())


@given(payload=st.text(alphabet="abcXYZ019_-", min_size=1))
def test_any_token_has_an_end_or_is_none(payload):
    with contextlib.suppress(SiteUnavailableError):
        assert isinstance(expiry_s(f"a.{payload}.c"), float)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(SettingsError, match=r"one of slurm.rest.token_file and slurm.rest.token_command"):
        open_client(SlurmSettings(rest=RestSettings(url="http://h:1")))
    both = SlurmSettings(rest=RestSettings(url="http://h:1"), ssh=SshSettings(host="login"))
    with pytest.raises(SettingsError, match="are both set"):
        open_client(both)


def test_without_asyncssh_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "isthmus.platforms.slurm.ssh", raising=False)
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(SettingsError, match=r"pip install 'isthmus\[ssh\]'"):
        open_client(SlurmSettings(ssh=SshSettings(host="login")))
