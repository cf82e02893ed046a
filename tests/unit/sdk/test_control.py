"""What a user gives as an id stays one segment of a path."""

import pytest

from isthmus.core.ids import CallId, LeaseId
from isthmus.sdk.control import Control


class Heard(Control):
    def _once(self, method: str, path: str, body: bytes, timeout_s: float, headers: dict[str, str]) -> bytes:
        raise LookupError(path)


@pytest.mark.parametrize("given", ["../leases", "a/b", "a?wait_s=9", "a#b", "a%2f.."])
def test_an_id_reaches_no_other_path(given: str) -> None:
    control = Heard("http://127.0.0.1:9", "")
    with pytest.raises(LookupError) as asked:
        control.call_result(CallId(given), 0.5)
    path = str(asked.value.args[0])
    assert (path.count("/"), path.count("?"), path.count("#")) == (4, 1, 0)
    with pytest.raises(LookupError) as asked:
        control.release(LeaseId(given))
    assert str(asked.value.args[0]).count("/") == 3
