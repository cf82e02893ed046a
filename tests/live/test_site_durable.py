"""Durable calls through deaths: of the site, of the executor, of the function itself."""

import concurrent.futures
import json
import os
import signal
import time

import msgspec
import pytest

from isthmus.core.api import CallResult, DurableCall
from isthmus.core.errors import ExecutorLostError, MemoryLimitError
from isthmus.core.model import Resources
from isthmus.fabric.codec import decode_error, decode_value, encode_call, encode_function, join
from tests.live.commands import commander
from tests.live.sites import running_site


def note_and_sleep(path, duration_s):
    import os
    import time

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"x")
    os.close(descriptor)
    time.sleep(duration_s)
    return os.getpid()


def die(code):
    import os

    os._exit(code)


def double(number):
    return 2 * number


def hog():
    return [bytearray(64 << 20) for _ in range(100)]


def durable(function, *args, **more):
    function.__module__ = "__main__"  # travels by value: executors cannot import this test module
    arguments = encode_call(args, {})
    call = DurableCall(
        function_name=function.__name__, function_kind="function", function_code=encode_function(function),
        arguments_meta=arguments.meta, arguments_data=bytes(join(arguments.data)), **more,
    )  # fmt: skip
    return msgspec.msgpack.encode(call)


def result_of(client, call):
    """The final one, however busy the machine is."""
    while True:
        answer = client.get(f"/v1/calls/{call}/result", params={"wait_s": 50})
        result = msgspec.msgpack.decode(answer.content, type=CallResult)
        if result.state not in ("queued", "running"):
            return result


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with running_site(tmp_path_factory.mktemp("durable") / "state") as running:
        yield running


def test_acknowledged_calls_survive_the_kill_of_the_site(tmp_path):
    with running_site(tmp_path / "state") as first, first.client() as client:
        notes = [tmp_path / f"{number}.note" for number in range(20)]
        calls = [
            client.post("/v1/calls", content=durable(note_and_sleep, str(note), 0.1)).json()["call"]
            for note in notes
        ]
        while not any(note.exists() for note in notes):
            time.sleep(0.01)
        first.stop(signal.SIGKILL)
        with running_site(first.state) as second, second.client() as again:
            results = [result_of(again, call) for call in calls]
            assert {result.state for result in results} == {"done"}
            assert all(decode_value(result.meta, memoryview(result.data)) > 1 for result in results)
            runs = [note.stat().st_size for note in notes]
            attempts = [again.get(f"/v1/calls/{call}").json()["attempts"] for call in calls]
            assert all(1 <= ran <= tried for ran, tried in zip(runs, attempts, strict=True))


def test_a_function_that_ends_its_process_is_told_with_its_exit_code(site):
    with site.client() as client:
        call = client.post("/v1/calls", content=durable(die, 7)).json()["call"]
        result = result_of(client, call)
        error = decode_error(result.meta, memoryview(result.data))
        assert (result.state, type(error)) == ("failed", ExecutorLostError)
        assert "7" in str(error)
        assert client.get(f"/v1/calls/{call}").json()["attempts"] == 1


def test_retries_are_spent_on_deaths_of_its_own_doing(site):
    with site.client() as client:
        call = client.post("/v1/calls", content=durable(die, 7, retries=1)).json()["call"]
        assert result_of(client, call).state == "failed"
        assert client.get(f"/v1/calls/{call}").json()["attempts"] == 2


def test_a_function_that_eats_its_memory_is_told_so(site):
    with site.client() as client:
        if client.get("/v1/nodes").json()[0]["enforcement"]["memory"] != "cgroup":
            pytest.skip("no cgroup here limits memory")
        call = client.post("/v1/calls", content=durable(hog, resources=Resources(memory="128MiB"))).json()[
            "call"
        ]
        result = result_of(client, call)
        assert type(decode_error(result.meta, memoryview(result.data))) in (MemoryLimitError, MemoryError), (
            result.detail
        )


def speak(words):
    import sys

    print(words, flush=True)
    print(words, file=sys.stderr, flush=True)


def test_what_a_function_writes_can_be_read_by_its_tenant_only(site, monkeypatch, capsys, tmp_path):
    command = commander(monkeypatch, capsys, home=tmp_path)
    with site.client() as client:
        call = client.post("/v1/calls", content=durable(speak, "hello from the lease")).json()["call"]
        assert result_of(client, call).state == "done"
        lease = client.get(f"/v1/calls/{call}").json()["lease"]
        chunks = command("logs", lease, "--json", ISTHMUS_STATE=str(site.state)).words.splitlines()
        assert "hello from the lease" in json.loads(chunks[0])["text"]
        followed = command("logs", "-f", lease, ISTHMUS_STATE=str(site.state))  # until the idle lease ends
        assert followed.code == 0
        assert followed.words.count("hello from the lease") == 2
        secret = client.post("/v1/keys", json={"tenant": "stranger"}).json()["secret"]
    with site.client(secret) as stranger:
        assert stranger.get(f"/v1/logs/{lease}").status_code == 404


def speak_and_die(words):
    import os

    print(words)
    os._exit(5)


def log_of(client, lease):
    """What the lease wrote, once it has ended."""
    give_up_s = time.monotonic() + 20
    while client.get(f"/v1/leases/{lease}").json()["state"] != "ended":
        assert time.monotonic() < give_up_s, f"{lease} did not end in time"
        time.sleep(0.02)
    chunk = client.get(f"/v1/logs/{lease}").json()
    assert chunk["ended"]
    return chunk["text"]


def test_what_a_released_lease_wrote_outlives_it_and_the_site(tmp_path):
    with running_site(tmp_path / "state") as first, first.client() as client:
        call = client.post("/v1/calls", content=durable(speak, "before the end")).json()["call"]
        assert result_of(client, call).state == "done"
        lease = client.get(f"/v1/calls/{call}").json()["lease"]
        assert client.delete(f"/v1/leases/{lease}").status_code == 200
        assert log_of(client, lease).count("before the end") == 2
        secret = client.post("/v1/keys", json={"tenant": "stranger"}).json()["secret"]
        with first.client(secret) as stranger:
            assert stranger.get(f"/v1/logs/{lease}").status_code == 404
        assert first.stop() == 0
        with running_site(first.state) as second, second.client() as again:
            assert log_of(again, lease).count("before the end") == 2


def test_what_a_function_wrote_before_it_ended_its_process_can_be_read(site, monkeypatch, capsys, tmp_path):
    command = commander(monkeypatch, capsys, home=tmp_path)
    with site.client() as client:
        call = client.post("/v1/calls", content=durable(speak_and_die, "last words")).json()["call"]
        assert result_of(client, call).state == "failed"
        lease = client.get(f"/v1/calls/{call}").json()["lease"]
        assert "last words" in log_of(client, lease)
    said = command("logs", lease, ISTHMUS_STATE=str(site.state))
    assert said.code == 0
    assert "last words" in said.words


def test_two_hundred_clients_at_once_are_all_answered(site):
    def submit(number):
        with site.client() as client:
            call = client.post("/v1/calls", content=durable(double, number)).json()["call"]
            return result_of(client, call)

    with concurrent.futures.ThreadPoolExecutor(200) as threads:
        results = list(threads.map(submit, range(200)))
    assert [decode_value(result.meta, memoryview(result.data)) for result in results] == [
        2 * number for number in range(200)
    ]


def test_an_executor_killed_from_outside_loses_no_call(site, tmp_path):
    note = tmp_path / "note"
    with site.client() as client:
        call = client.post("/v1/calls", content=durable(note_and_sleep, str(note), 0.5, retries=1)).json()[
            "call"
        ]
        while not note.exists():
            time.sleep(0.01)
        while client.get(f"/v1/calls/{call}").json()["lease"] is None:
            time.sleep(0.01)
        lease = client.get(f"/v1/leases/{client.get(f'/v1/calls/{call}').json()['lease']}").json()
        os.kill(lease["executors"][0]["pid"], signal.SIGKILL)
        assert result_of(client, call).state == "done"
        assert note.stat().st_size == 2
