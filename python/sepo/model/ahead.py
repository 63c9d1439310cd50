"""Make the next of several results while the caller works on this one."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(jobs: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Yield what each job returns, in order; a thread makes at most one before it is asked for.

    A job's error is raised where its result is asked for. Close the generator, or exhaust it, and
    the thread is gone; a job that runs is waited for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="sepo-next-batch") as pool:
        following = None
        for job in jobs:
            this, following = following, pool.submit(job)
            if this is not None:
                yield this.result()
        if following is not None:
            yield following.result()
