from collections.abc import Iterator

import pytest

from isthmus.core import errors
from isthmus.gateway.statuses import STATUSES, body_of, status_of


def _tree(root: type[errors.IsthmusError]) -> Iterator[type[errors.IsthmusError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _tree(kind)


CORE = sorted({kind for kind in _tree(errors.IsthmusError) if kind.__module__ == errors.__name__}, key=str)


@pytest.mark.parametrize("kind", CORE, ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_has_a_status_of_its_own(kind):
    assert 400 <= STATUSES[kind] <= 599


@pytest.mark.parametrize("kind", CORE, ids=lambda kind: kind.__name__)
def test_an_error_is_told_by_its_class_name_and_words(kind):
    body = body_of(kind("what happened"))
    assert (body.code, body.message, body.retryable) == (kind.__name__, "what happened", kind.retryable)


def test_a_subclass_from_elsewhere_gets_the_status_of_its_nearest_ancestor():
    class DiskFullError(errors.SiteUnavailableError):
        pass

    assert body_of(DiskFullError("full")).code == "SiteUnavailableError"
    assert status_of(DiskFullError("full")) == STATUSES[errors.SiteUnavailableError]
