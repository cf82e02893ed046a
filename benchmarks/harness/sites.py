"""An embedded site for one claim, with the caller and the executor pinned to a core each.

Not here: what is measured.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import isthmus
from benchmarks.harness.subject import Cells, pin_pair
from isthmus.core.settings import ClientSettings, Settings

ONE_EXECUTOR = Settings(client=ClientSettings(pool_max=1))


@contextmanager
def site_for(cells: Cells) -> Iterator[isthmus.Site]:
    """An embedded site and one executor, never more."""
    with isthmus.connect(settings=ONE_EXECUTOR) as site:
        worker = site.call(os.getpid)
        cells.notes.append(pin_pair({worker}))
        cells.versions["isthmus"] = isthmus.__version__
        yield site
