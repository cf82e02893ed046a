"""The tree drawn in the module's docstring is the tree of classes."""

import inspect
import pickle
import re

import pytest

from isthmus.core import errors

CLASSES = [
    each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, errors.IsthmusError)
]


def drawn() -> dict[str, tuple[str, bool]]:
    """Class name -> (name of its parent, whether it is drawn as retryable)."""
    found: dict[str, tuple[str, bool]] = {}
    above: dict[int, str] = {0: "IsthmusError"}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│ ]*)[├└]── (\w+)", line)
        if match:
            depth = len(match[1]) // 4
            found[match[2]] = above[depth], "(retryable)" in line
            above[depth + 1] = match[2]
    return found


def test_every_class_is_drawn_under_its_parent() -> None:
    real = {each.__name__: each.__bases__[0].__name__ for each in CLASSES if each is not errors.IsthmusError}
    assert {name: parent for name, (parent, _) in drawn().items()} == real


def test_the_drawing_says_which_are_retryable() -> None:
    own = {each.__name__: each.retryable for each in CLASSES if each is not errors.IsthmusError}
    assert {name: retryable for name, (_, retryable) in drawn().items()} == own


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_keep_their_words_when_pickled(kind: type[errors.IsthmusError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(again) is kind
    assert str(again) == "what happened"
    assert kind.__doc__


def test_timeouts_and_cancellations_are_also_the_standard_ones() -> None:
    import concurrent.futures

    assert issubclass(errors.CallTimeoutError, TimeoutError)
    assert issubclass(errors.CallCancelledError, concurrent.futures.CancelledError)
