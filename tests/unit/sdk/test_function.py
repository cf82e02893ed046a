"""What a function asks for is checked where it is written, not at its first call."""

import functools
from typing import Any

import pytest

import isthmus
from isthmus.sdk.function import FunctionSpec, Retry, spec_of


@pytest.mark.parametrize("limit_s", [float("nan"), float("inf"), 1e300, -1, 0, "3"])
def test_a_time_limit_that_is_none_is_refused_in_the_decorator(limit_s: Any) -> None:
    with pytest.raises(ValueError, match=r"timeout_s=.*: expected seconds, more than 0"):
        isthmus.function(timeout_s=limit_s)


def test_an_ordinary_time_limit_is_kept_as_it_is() -> None:
    assert spec_of(isthmus.function(timeout_s=3)(lambda: 1)).timeout_s == 3


@pytest.mark.parametrize(
    "options", [{"max": -1}, {"max": 1.5}, {"backoff_s": float("nan")}, {"backoff_s": -1}, {"on": ("x",)}]
)
def test_retries_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Retry(**options)


def test_an_option_that_belongs_to_the_resources_is_named_with_its_place() -> None:
    with pytest.raises(TypeError, match=r"Resources\(cores=2\)"):
        isthmus.function(cores=2)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="no option 'timeout'; there are resources, policy"):
        isthmus.function(timeout=2)  # type: ignore[call-overload]


@pytest.mark.parametrize("options", [{"retries": 3}, {"resources": {"cores": 1}}, {"policy": None}])
def test_an_option_of_the_wrong_type_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        FunctionSpec(**options)


def test_what_nothing_can_be_attached_to_is_refused_with_the_way_out() -> None:
    for target in (pow, dict, "text".upper):
        with pytest.raises(TypeError, match="decorate a function that calls it"):
            isthmus.function(timeout_s=1.0)(target)
    assert spec_of(isthmus.function(timeout_s=1.0)(functools.partial(pow, 2))).timeout_s == 1.0


def test_packages_in_one_text_are_refused_with_the_tuple_to_write() -> None:
    with pytest.raises(ValueError, match=r"requirements=\('numpy',\)"):
        isthmus.Environment(requirements="numpy")  # type: ignore[arg-type]
