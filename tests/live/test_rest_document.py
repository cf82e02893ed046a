"""Every operation is driven with generated requests; every answer must be what the OpenAPI document says."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from tests.live.sites import running_site

# Random bodies of these would install random packages, or are msgpack; `test_rest.py` has them by hand.
LEFT_OUT = {"post_leases", "post_calls", "get_calls_call_result"}
# What happens without a key is in `test_rest.py`; a policy can be refused for more than its type.
NOT_CHECKED = [ignored_auth, positive_data_acceptance]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with running_site(tmp_path_factory.mktemp("document") / "state") as running:
        yield running


def test_generated_requests_get_documented_answers(site):
    schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
    headers = {"authorization": f"Bearer {site.key}"}
    operations = [found.ok() for found in schema.get_all_operations()]
    driven = [one for one in operations if one.definition.raw["operationId"] not in LEFT_OUT]
    assert len(driven) >= 25
    for operation in driven:
        _drive(operation, headers)
    with site.client() as client:
        assert client.get("/v1/status").json()["pid"] == site.process.pid


def _drive(operation, headers):
    @hypothesis.given(operation.as_strategy())
    @hypothesis.settings(
        max_examples=10,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        case.call_and_validate(headers=headers, excluded_checks=NOT_CHECKED)

    ask()
