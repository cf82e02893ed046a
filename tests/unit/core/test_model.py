"""The shared nouns refuse what makes no sense."""

import msgspec
import pytest

from isthmus.core.model import Environment, Resources


@pytest.mark.parametrize("line", ["--index-url=http://example.invalid", "-r requirements.txt", " -e ."])
def test_an_option_of_pip_is_no_requirement(line: str) -> None:
    with pytest.raises(ValueError, match="option of pip"):
        Environment(requirements=("numpy", line))
    sent = msgspec.json.encode({"requirements": [line]})
    with pytest.raises(msgspec.ValidationError, match="option of pip"):
        msgspec.json.decode(sent, type=Environment)


def test_an_environment_fits_into_every_message_that_carries_one() -> None:
    paths = tuple(f"/opt/modules/number/{number:030}/lib/python" for number in range(500))
    assert Environment(sys_path=paths).sys_path == paths
    with pytest.raises(ValueError, match="characters in all"):
        Environment(sys_path=paths * 3)
    with pytest.raises(ValueError, match="characters in all"):
        Environment(preload=("m",) * 30_000)


@pytest.mark.parametrize("wrong", [{"cores": 0}, {"gpus": -1}, {"memory": "1MiB"}, {"memory": "much"}])
def test_resources_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Resources(**wrong)  # type: ignore[arg-type]
