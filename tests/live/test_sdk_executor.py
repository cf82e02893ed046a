"""`isthmus.Executor` and joblib, where CPython's own tests do not reach: exits, drops, forks, interpreter
ends.
"""

import concurrent.futures
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import joblib
import pytest

import isthmus
from tests.live import sdk_functions as remote


@pytest.fixture(scope="module")
def site() -> Iterator[isthmus.Site]:
    with isthmus.connect() as opened:
        yield opened


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    """In an interpreter of its own, with an embedded site of its own."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=False
    )


def test_it_is_an_executor_and_its_futures_are_futures(site):
    with isthmus.Executor(2, site) as executor:
        assert isinstance(executor, concurrent.futures.Executor)
        future = executor.submit(remote.square, 3)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result() == 9


def test_a_dead_worker_breaks_the_pool_and_not_the_site(site):
    with isthmus.Executor(1, site) as executor:
        with pytest.raises(BrokenProcessPool):
            executor.submit(remote.die).result()
        with pytest.raises(BrokenProcessPool):
            executor.submit(remote.square, 1)
    assert site.call(remote.square, 2) == 4


def test_sys_exit_is_the_functions_exception(site):
    with isthmus.Executor(1, site) as executor:
        with pytest.raises(SystemExit):
            executor.submit(remote.leave).result()
        assert executor.submit(remote.square, 2).result() == 4


def test_dropping_it_lets_what_was_submitted_end(site, tmp_path):
    executor = isthmus.Executor(1, site)
    mark = tmp_path / "mark"
    future = executor.submit(remote.write_later, str(mark), 0.1)
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None
    future.result(timeout_s=20)
    assert mark.read_text() == "apple"


def test_what_was_submitted_ends_before_the_interpreter_does(tmp_path):
    mark = tmp_path / "mark"
    done = run_script(
        "import isthmus; from tests.live import sdk_functions as remote\n"
        f"isthmus.Executor(2).submit(remote.write_later, {str(mark)!r}, 0.5)"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert mark.read_text() == "apple"


def test_shutdown_without_waiting_does_not_hang_the_interpreter(tmp_path):
    mark = tmp_path / "mark"
    done = run_script(
        "import isthmus; from tests.live import sdk_functions as remote\n"
        f"pool = isthmus.Executor(2); pool.submit(remote.write_later, {str(mark)!r}, 0.5)\n"
        "pool.shutdown(wait=False)"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert mark.read_text() == "apple"


def test_an_interpreter_that_forgets_to_close_leaves_nothing_behind():
    done = run_script(
        "import isthmus; from tests.live import sdk_functions as remote\n"
        "site = isthmus.connect(); print(site.call(remote.process_id))"
    )
    assert done.stderr == ""
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


def test_joblib_runs_on_it_whichever_is_imported_first():
    for first, second in (("isthmus", "joblib"), ("joblib", "isthmus")):
        done = run_script(
            f"import {first}, {second}, joblib; from tests.live import sdk_functions as remote\n"
            "with joblib.parallel_config('isthmus', n_jobs=2):\n"
            "    print(joblib.Parallel()(joblib.delayed(remote.square)(n) for n in range(5)))"
        )
        assert (done.stdout.strip(), done.stderr) == ("[0, 1, 4, 9, 16]", "")


def test_joblib_batches_raises_and_streams(site):
    with joblib.parallel_config("isthmus", n_jobs=2, site=site):
        squares = joblib.Parallel()(joblib.delayed(remote.square)(number) for number in range(5000))
        assert squares == [number**2 for number in range(5000)]
        with pytest.raises(ValueError, match="multiple of three"):
            joblib.Parallel()(joblib.delayed(remote.refuse_thirds)(number) for number in range(1, 20))
        lazily = joblib.Parallel(return_as="generator")(joblib.delayed(abs)(number) for number in range(20))
        assert list(lazily) == list(range(20))


def test_joblib_nests(site):
    with joblib.parallel_config("isthmus", n_jobs=2, site=site):
        sums = joblib.Parallel()(joblib.delayed(remote.sum_in_parallel)(number) for number in range(4))
    assert sums == [0, 0, 1, 5]
