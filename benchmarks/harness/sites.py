"""An embedded site for one claim, with the caller and the executor pinned to a core each.

Not here: what is measured.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import isthmus
from benchmarks.harness.subject import Cells, pin_pair


@contextmanager
def site_for(cells: Cells, *warm_up: Callable[[], object]) -> Iterator[isthmus.Site]:
    """An embedded site that holds one warm lease. `warm_up` functions run there once, before anything is
    pinned.
    """
    with isthmus.connect() as site:
        worker = site.call(os.getpid)
        for function in warm_up:
            site.call(function)
        cells.notes.append(pin_pair({worker}))
        cells.versions["isthmus"] = isthmus.__version__
        yield site
