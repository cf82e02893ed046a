"""What a user gives as an id stays one segment of a path, or nobody is asked about it."""

import pytest

from isthmus.core.errors import NotFoundError
from isthmus.core.ids import CallId, ExecutorId, LeaseId, new_id
from isthmus.sdk.control import Control


class Heard(Control):
    """Tells the path that httpx would ask for."""

    def _once(self, method: str, path: str, body: bytes, timeout_s: float, headers: dict[str, str]) -> bytes:
        client = self._enter()
        try:
            raise LookupError(client.build_request(method, path).url.raw_path.decode())
        finally:
            self._leave()


@pytest.mark.parametrize(
    "given", ["", ".", "..", "../leases", "a/b", "a?wait_s=9", "a#b", "a%2f..", "a\n", "\udc80", None]
)
def test_what_is_no_id_is_not_found_without_asking(given: str) -> None:
    control = Heard("http://127.0.0.1:9", "")
    with pytest.raises(NotFoundError, match="is no id"):
        control.call_result(CallId(given), 0.5)
    with pytest.raises(NotFoundError, match="is no id"):
        control.release(LeaseId(given))
    with pytest.raises(NotFoundError, match="is no id"):
        control.kill_executor(LeaseId("ls_1"), ExecutorId(given))


def test_an_id_is_one_segment_of_the_path_that_is_asked_for() -> None:
    control, call, lease = Heard("http://127.0.0.1:9", ""), CallId(new_id("call")), LeaseId(new_id("ls"))
    with pytest.raises(LookupError) as asked:
        control.call_result(call, 0.5)
    assert asked.value.args == (f"/v1/calls/{call}/result?wait_s=0.5",)
    with pytest.raises(LookupError) as asked:
        control.release(lease)
    assert asked.value.args == (f"/v1/leases/{lease}",)
    control.close()
