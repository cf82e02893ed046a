"""The REST interface of a real site: who may do what, and that every answer is what the OpenAPI document
says.
"""

import concurrent.futures
import json
import threading
import time

import msgspec
import pytest

from isthmus.core.api import CallResult, DurableCall
from isthmus.core.errors import CallCancelledError
from isthmus.core.model import Resources
from isthmus.fabric.codec import decode_error, decode_value, encode_call, encode_function, join
from tests.live.sites import running_site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with running_site(tmp_path_factory.mktemp("rest") / "state") as running:
        yield running


@pytest.fixture
def admin(site):
    with site.client() as client:
        yield client


@pytest.fixture
def as_user(site, admin):
    """Clients with fresh keys: as_user("ada"), as_user("ops", "operator")."""
    clients = []

    def client(tenant, role="user"):
        secret = admin.post("/v1/keys", json={"tenant": tenant, "role": role}).json()["secret"]
        clients.append(site.client(secret))
        return clients[-1]

    yield client
    for opened in clients:
        opened.close()


@pytest.fixture
def lease(admin):
    """An active lease of tenant `local`, gone at the end of the test."""
    granted = admin.post("/v1/leases", json={"wait_s": 20}).json()["grants"][0]
    yield granted
    admin.delete(f"/v1/leases/{granted['lease']}")


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"code", "message", "retryable"}
    return response.status_code, error["code"]


# who may do what -------------------------------------------------------------------------------------
@pytest.mark.parametrize("bearer", ["", "nonsense", "isk_" + "x" * 59, "lease:ls_x:y", "lease:", "x" * 5000])
def test_without_a_valid_key_nothing_is_told(site, bearer):
    with site.client(bearer) as client:
        response = client.get("/v1/status")
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/leases", json={}).status_code == 401
        assert client.get("/healthz").status_code == 200


def test_a_revoked_key_opens_nothing(site, admin):
    created = admin.post("/v1/keys", json={"tenant": "ada"}).json()
    with site.client(created["secret"]) as client:
        assert client.get("/v1/status").json()["tenant"] == "ada"
        assert admin.delete(f"/v1/keys/{created['key']}").json()["revoked"]
        assert error_of(client.get("/v1/status")) == (401, "AuthError")


def test_a_foreign_tenants_lease_does_not_exist(as_user, lease):
    ada = as_user("ada")
    path = f"/v1/leases/{lease['lease']}"
    attempts = [
        ada.get(path), ada.delete(path), ada.post(f"{path}/executors"), ada.delete(f"{path}/executors/ex_1"),
        ada.post("/v1/leases/renew", json={"leases": [lease["lease"]]}),
        ada.get(f"/v1/logs/{lease['lease']}"), ada.get(f"/v1/explain/{lease['lease']}"),
    ]  # fmt: skip
    assert [error_of(attempt) for attempt in attempts] == [(404, "NotFoundError")] * len(attempts)
    assert ada.get("/v1/leases").json() == []


def test_a_user_may_not_do_what_operators_and_administrators_do(as_user):
    ada, ops = as_user("ada"), as_user("ops", "operator")
    for client in (ada, ops):
        assert error_of(client.post("/v1/keys", json={"tenant": "ada"})) == (403, "PermissionDeniedError")
        assert error_of(client.put("/v1/tenants/ada", json={})) == (403, "PermissionDeniedError")
        assert error_of(client.get("/v1/audit")) == (403, "PermissionDeniedError")
    assert error_of(ada.post("/v1/nodes/n/drain")) == (403, "PermissionDeniedError")
    assert error_of(ada.get("/v1/tenants/physics")) == (403, "PermissionDeniedError")
    assert ada.get("/v1/tenants/ada").status_code == 200
    assert ops.get("/v1/tenants/physics").status_code == 200
    assert ops.get("/metrics").status_code == 200
    assert ada.get("/metrics").status_code == 403


def test_a_user_sees_and_revokes_only_keys_of_the_own_tenant(as_user, admin):
    ada, bob = as_user("ada-keys"), as_user("bob-keys")
    (own,) = ada.get("/v1/keys").json()
    assert own["secret"] == ""
    assert error_of(bob.delete(f"/v1/keys/{own['key']}")) == (404, "NotFoundError")
    assert ada.delete(f"/v1/keys/{own['key']}").json()["revoked"]
    assert ada.get("/v1/status").status_code == 401


def test_no_key_revokes_one_that_may_do_more(as_user, admin):
    mine = as_user("local")
    above = [key for key in mine.get("/v1/keys").json() if key["role"] == "admin"]
    assert above
    assert error_of(mine.delete(f"/v1/keys/{above[0]['key']}")) == (403, "PermissionDeniedError")
    assert admin.get("/v1/status").status_code == 200


def test_a_lease_token_adds_executors_to_its_own_lease_and_does_nothing_else(site, admin, lease):
    with site.client(f"lease:{lease['lease']}:{lease['token']}") as inside:
        added = inside.post(f"/v1/leases/{lease['lease']}/executors")
        assert added.status_code == 201
        executor = added.json()["executor"]["executor"]
        assert inside.delete(f"/v1/leases/{lease['lease']}/executors/{executor}").json()["killed"]
        assert error_of(inside.post("/v1/leases/ls_0000000000000000/executors"))[0] == 403
        for attempt in (inside.post("/v1/leases", json={}), inside.get("/v1/leases"), inside.get("/v1/keys")):
            assert error_of(attempt) == (403, "PermissionDeniedError")
    admin.delete(f"/v1/leases/{lease['lease']}")
    with site.client(f"lease:{lease['lease']}:{lease['token']}") as late:
        assert error_of(late.post(f"/v1/leases/{lease['lease']}/executors"))[0] == 401


def test_a_quota_limits_what_a_tenant_holds(admin, as_user):
    admin.put("/v1/tenants/small", json={"leases": 1})
    small = as_user("small")
    first = small.post("/v1/leases", json={"wait_s": 20}).json()["grants"][0]
    assert error_of(small.post("/v1/leases", json={})) == (403, "DeniedError")
    assert small.delete(f"/v1/leases/{first['lease']}").json()["end_reason"] == "released"


def test_requests_at_once_do_not_pass_a_quota_together(admin, as_user):
    admin.put("/v1/tenants/hasty", json={"leases": 1})
    hasty = as_user("hasty")
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        replies = list(threads.map(lambda _: hasty.post("/v1/leases", json={}), range(12)))
    codes = [reply.status_code for reply in replies]
    assert codes.count(201) <= 1
    assert set(codes) <= {201, 403, 503}, codes
    for lease in hasty.get("/v1/leases").json():
        hasty.delete(f"/v1/leases/{lease['lease']}")


def test_whatever_changes_something_is_audited_without_secrets(admin, site):
    secret = admin.post("/v1/keys", json={"tenant": "audited"}).json()["secret"]
    with site.client(secret) as client:
        client.delete("/v1/leases/ls_nobody")
    newest = admin.get("/v1/audit").json()[0]
    assert (newest["tenant"], newest["action"]) == ("audited", "DELETE /v1/leases/ls_nobody")
    assert (newest["status"], newest["detail"]) == (404, "NotFoundError")
    everything = b"".join(
        path.read_bytes() for path in site.state.rglob("*") if path.is_file() and path.name != "key"
    )
    assert secret.encode() not in everything
    assert site.key.encode() not in everything


# requests that make no sense -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"nonsense": 1}', b'{"count": 0}', b'{"count": 99999}', b'{"wait_s": -1}',
     b'{"resources": {"cores": 99999999999999999999}}', b'{"resources": {"memory": "999999999TiB"}}',
     b'{"labels": {"a": "' + b"x" * 2000 + b'"}}', b'{"pool": "' + b"x" * 2000 + b'"}',
     json.dumps({"labels": {str(number): "" for number in range(65)}}).encode(),
     json.dumps({"environment": {"sys_path": ["/" + "x" * 100] * 1000}}).encode(),
     b"\xff\xfe", b'{"resources": {"cores": 0}}', b'{"resources": {"memory": "lots"}}', b'{"a":' * 5000],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_a_senseless_body_is_refused_in_words(admin, body):
    assert error_of(admin.post("/v1/leases", content=body)) == (400, "InvalidRequestError")


def test_a_pool_nobody_set_up_is_refused(admin):
    status, code = error_of(admin.post("/v1/leases", json={"pool": "nowhere"}))
    assert (status, code) == (403, "DeniedError")


def test_a_body_over_the_limit_is_refused_whether_announced_or_not(admin):
    assert admin.post("/v1/leases", content=b" " * (2 << 20)).status_code == 413
    endless = (b" " * 65536 for _ in range(1000))
    assert admin.post("/v1/leases", content=endless).status_code == 413
    assert admin.get("/healthz").status_code == 200


def test_an_unknown_path_or_method_is_told_as_such(admin):
    assert error_of(admin.get("/v1/nonsense")) == (404, "NotFoundError")
    assert error_of(admin.delete("/v1/leases/ls_x/executors/ex_..%2f")) == (404, "NotFoundError")
    assert error_of(admin.put("/v1/leases", json={})) == (405, "InvalidRequestError")


# leases ----------------------------------------------------------------------------------------------
def test_the_same_idempotency_key_gets_the_same_leases(admin, as_user):
    headers = {"idempotency-key": "once"}
    first = admin.post("/v1/leases", json={"wait_s": 20}, headers=headers).json()
    again = admin.post("/v1/leases", json={"wait_s": 20}, headers=headers).json()
    assert again == first
    admin.delete(f"/v1/leases/{first['grants'][0]['lease']}")
    ada = as_user("ada").post("/v1/leases", json={"wait_s": 20}, headers=headers).json()
    assert ada["request"] != first["request"]
    admin.delete(f"/v1/leases/{ada['grants'][0]['lease']}")


def test_a_lease_is_renewed_explained_and_ended(admin, lease):
    (renewal,) = admin.post("/v1/leases/renew", json={"leases": [lease["lease"]]}).json()["renewals"]
    assert renewal["ok"]
    assert renewal["deadline_s"] > lease["deadline_s"]
    assert any("granted" in line for line in admin.get(f"/v1/explain/{lease['lease']}").json()["words"])
    assert admin.get(f"/v1/logs/{lease['lease']}").json()["lease"] == lease["lease"]
    assert admin.delete(f"/v1/leases/{lease['lease']}").json()["state"] == "ended"
    (renewal,) = admin.post("/v1/leases/renew", json={"leases": [lease["lease"]]}).json()["renewals"]
    assert (renewal["ok"], renewal["reason"]) == (False, "released")
    assert lease["lease"] in [row["lease"] for row in admin.get("/v1/leases", params={"ended": 1}).json()]
    assert any(row["lease_class"] == "elastic" for row in admin.get("/v1/usage").json())


def test_a_requester_that_hangs_up_while_waiting_leaves_the_queue(site, admin):
    cores = admin.get("/v1/status").json()["cores"]
    full = admin.post("/v1/leases", json={"resources": {"cores": cores}, "wait_s": 20}).json()["grants"][0]
    with site.client() as impatient, pytest.raises(Exception, match="timed out"):
        impatient.post("/v1/leases", json={"wait_s": 30}, timeout=0.5)
    give_up_s = time.monotonic() + 10
    while admin.get("/v1/status").json()["requests_waiting"]:
        assert time.monotonic() < give_up_s
    admin.delete(f"/v1/leases/{full['lease']}")


def test_a_drained_node_gets_no_leases_until_it_is_resumed(admin):
    (node,) = admin.get("/v1/nodes").json()
    assert admin.post(f"/v1/nodes/{node['node']}/drain").status_code == 200
    assert error_of(admin.post("/v1/leases", json={})) == (503, "NoCapacityError")
    assert admin.post(f"/v1/nodes/{node['node']}/resume").status_code == 200
    granted = admin.post("/v1/leases", json={"wait_s": 20}).json()["grants"][0]
    admin.delete(f"/v1/leases/{granted['lease']}")
    assert error_of(admin.post("/v1/nodes/nowhere/drain")) == (404, "NotFoundError")


def test_a_policy_can_be_tried_before_it_is_used(admin):
    rule = '[[rule]]\nname = "closed"\nthen = "deny"\nmessage = "closed today"\n'
    assert admin.get("/v1/policy").json()["rules"] == []
    tried = admin.post("/v1/policy/dry-run", json={"policy": rule}).json()
    assert tried["outcome"] == "deny"
    assert any("closed today" in line for line in tried["words"])
    assert admin.post("/v1/policy/dry-run", json={}).json()["outcome"] == "grant"
    replayed = admin.post("/v1/policy/replay", json={"policy": rule}).json()
    assert replayed["judged"] >= len(replayed["changes"])
    assert error_of(admin.post("/v1/policy/dry-run", json={"policy": "[[rule"})) == (422, "PolicyError")


# durable calls ---------------------------------------------------------------------------------------
def double(number):
    return 2 * number


def wait_for_ever():
    threading.Event().wait()


def durable(function, *args, **more):
    arguments = encode_call(args, {})
    return msgspec.msgpack.encode(
        DurableCall(
            function_name=function.__name__, function_kind="function",
            function_code=encode_function(_portable(function)), arguments_meta=arguments.meta,
            arguments_data=bytes(join(arguments.data)), **more,
        )
    )  # fmt: skip


def _portable(function):
    """The function by value: executors cannot import this test module."""
    function.__module__ = "__main__"
    return function


def result_of(client, call):
    answer = client.get(f"/v1/calls/{call}/result", params={"wait_s": 40})
    assert answer.headers["content-type"] == "application/msgpack"
    return msgspec.msgpack.decode(answer.content, type=CallResult)


def test_a_durable_call_runs_on_an_executor_and_keeps_its_result(admin, as_user):
    # a shape of its own: the executor of an earlier test may be on its way out, which costs an attempt
    submitted = admin.post("/v1/calls", content=durable(double, 21, resources=Resources(memory=300 << 20)))
    assert submitted.status_code == 201
    call = submitted.json()["call"]
    result = result_of(admin, call)
    assert result.state == "done"
    assert decode_value(result.meta, memoryview(result.data)) == 42
    row = admin.get(f"/v1/calls/{call}").json()
    assert (row["attempts"], row["detail"]) == (1, "")
    assert error_of(as_user("ada").get(f"/v1/calls/{call}/result")) == (404, "NotFoundError")


def test_durable_calls_with_one_idempotency_key_are_one_call(admin):
    bodies = [durable(double, 1, idempotency_key="just-once")] * 8
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda body: admin.post("/v1/calls", content=body).json()["call"], bodies))
    assert len(set(answers)) == 1
    assert result_of(admin, answers[0]).state == "done"


def test_a_running_durable_call_can_be_cancelled(admin):
    call = admin.post("/v1/calls", content=durable(wait_for_ever)).json()["call"]
    while admin.get(f"/v1/calls/{call}").json()["state"] == "queued":
        time.sleep(0.05)
    assert admin.delete(f"/v1/calls/{call}").json()["state"] == "cancelled"
    result = result_of(admin, call)
    assert isinstance(decode_error(result.meta, memoryview(result.data)), CallCancelledError)
    assert call in [row["call"] for row in admin.get("/v1/calls").json()]


def test_a_durable_call_that_is_too_slow_fails_with_its_timeout(admin):
    call = admin.post("/v1/calls", content=durable(wait_for_ever, timeout_s=0.3)).json()["call"]
    result = result_of(admin, call)
    assert result.state == "failed"
    assert "timeout_s=0.3" in result.detail


def test_a_hundred_durable_calls_take_a_few_leases(admin):
    before = len(admin.get("/v1/leases", params={"ended": 1}).json())
    calls = [admin.post("/v1/calls", content=durable(double, number)).json()["call"] for number in range(100)]
    results = [result_of(admin, call) for call in calls]
    values = [decode_value(result.meta, memoryview(result.data)) for result in results]
    assert values == [2 * number for number in range(100)]
    assert len(admin.get("/v1/leases", params={"ended": 1}).json()) - before <= 8


# the document ----------------------------------------------------------------------------------------
def test_the_openapi_document_describes_every_operation(admin):
    document = admin.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    operations = [(method, path) for path, methods in document["paths"].items() for method in methods]
    assert ("post", "/v1/leases") in operations
    assert ("get", "/v1/calls/{call}/result") in operations
    identifiers = [
        entry["operationId"] for methods in document["paths"].values() for entry in methods.values()
    ]
    assert len(set(identifiers)) == len(identifiers) == len(operations) >= 30
    assert json.dumps(document).count('"#/components/schemas/') > 20
