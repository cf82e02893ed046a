"""What `import isthmus` offers, and what it costs."""

import subprocess
import sys

import isthmus
from isthmus.core import errors

IMPORT_MS_MAX = 60


def test_every_public_name_exists_and_is_listed():
    assert sorted(isthmus.__all__) == isthmus.__all__ == dir(isthmus)
    for name in isthmus.__all__:
        assert getattr(isthmus, name) is not None


def test_every_error_is_public():
    named = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert named <= set(isthmus.__all__)


def test_importing_costs_next_to_nothing():
    code = (
        "import sys, time; began = time.process_time(); import isthmus; took = time.process_time() - began;"
        "print(took * 1e3, 'numpy' in sys.modules, 'httpx' in sys.modules, 'joblib' in sys.modules)"
    )
    words = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert words[1:] == ["False"] * 3
    assert float(words[0]) < IMPORT_MS_MAX
