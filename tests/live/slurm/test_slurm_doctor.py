"""`isthmus doctor` as an operator types it, on a real cluster and where something is missing."""

import json
import subprocess
import sys

from tests.live.sites import clean_environment


def doctor(**environ):
    """(exit code, {subject: row})"""
    done = subprocess.run(
        [sys.executable, "-m", "isthmus", "doctor", "--json"],
        env=clean_environment({"ISTHMUS_CONFIG": "/dev/null", **environ}),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    rows = json.loads(done.stdout) if done.stdout else []
    return done.returncode, {row["subject"]: row for row in rows} or done.stderr


def test_on_a_working_cluster_it_says_what_works_and_what_each_lack_costs(cluster):
    code, rows = doctor(**cluster.environment, ISTHMUS_SLURM__PARTITION="batch")
    assert code == 0, rows
    verdicts = {subject: row["verdict"] for subject, row in rows.items()}
    assert verdicts == {
        "commands": "good", "controller": "good", "authentication": "good", "partitions": "poor",
        "clock": "good", "nodes": "poor", "cgroup": "poor", "fabric": "good",
    }  # fmt: skip
    assert "batch jobs cannot preempt elastic leases" in rows["partitions"]["words"]
    assert "6 of 6 nodes usable, 0 GPUs" in rows["nodes"]["words"]
    assert "only what its agent can enforce" in rows["cgroup"]["words"]


def test_a_partition_that_is_not_there_is_bad_and_so_is_its_exit_code(cluster):
    code, rows = doctor(**cluster.environment, ISTHMUS_SLURM__ELASTIC_PARTITION="scavange")
    assert code != 0
    assert (
        rows["partitions"]["words"] == "no partition scavange; there are batch, returning, scavenge, urgent"
    )


def test_without_slurms_commands_it_names_the_ways_out():
    code, rows = doctor(PATH="/nowhere")
    assert code != 0
    assert "install slurm-client, go to a login node, or set slurm.ssh.host" in rows["commands"]["words"]


def test_a_login_node_that_cannot_be_reached_is_said_in_words(login_node):
    login_node.stop()
    ssh = {"ISTHMUS_SLURM__SSH__HOST": "login", "ISTHMUS_SLURM__SSH__CONFIG": str(login_node.config)}
    code, rows = doctor(**ssh)
    assert code != 0
    assert "login cannot be reached by SSH" in rows["controller"]["words"]
    assert rows["nodes"]["verdict"] == "bad"


def test_slurmrestd_without_a_token_says_which_setting_to_set(cluster):
    code, said = doctor(ISTHMUS_SLURM__REST__URL=cluster.rest_url)
    assert code != 0
    assert "one of slurm.rest.token_file and slurm.rest.token_command" in said
