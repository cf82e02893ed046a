"""A joblib backend: `with joblib.parallel_config("isthmus"): Parallel()(...)` runs on leased executors.

`parallel_config("isthmus", site=site)` uses a Site that is open already. Parallelism inside a task uses
threads of its executor, as joblib does in its own worker processes.
"""

import os
from collections.abc import Callable
from typing import Any

from joblib.parallel import (  # type: ignore[import-untyped]
    AutoBatchingMixin,
    ParallelBackendBase,
    register_parallel_backend,
)

from isthmus.core.model import Resources
from isthmus.sdk.executor import Executor
from isthmus.sdk.futures import Future
from isthmus.sdk.site import Site


class IsthmusBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    supports_retrieve_callback = True
    uses_threads = False
    supports_sharedmem = False
    default_n_jobs = -1

    def __init__(self, site: Site | None = None, resources: Resources | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._site = site
        self._resources = resources
        self._executor: Executor | None = None
        self._workers = 1
        self.parallel: Any = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """-1: as many as this machine has cores; the site may grant fewer, never more."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        cores = len(os.sched_getaffinity(0))
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(cores + 1 + n_jobs, 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        self._workers = self.effective_n_jobs(n_jobs)
        self._executor = Executor(self._workers, self._site, resources=self._resources)
        self.parallel = parallel
        return self._workers

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Future[Any]], None] | None = None
    ) -> Future[Any]:
        assert self._executor is not None
        future = self._executor.submit(func)
        if callback is not None:
            future.add_done_callback(callback)  # type: ignore[arg-type]
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        return out.result()

    def terminate(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """A task failed or the user left: stop what runs."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.abort()
        if ensure_ready:
            self.configure(self._workers, self.parallel)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to executors inside joblib's batches; the open Site does not."""
        return IsthmusBackend, (None, self._resources)


def register() -> None:
    register_parallel_backend("isthmus", IsthmusBackend)


register()
