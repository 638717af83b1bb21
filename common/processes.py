"""One function for many inputs, by several processes that end with the one that started them."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import RLock, Thread
from typing import Any

import torch
from tqdm import tqdm


def in_processes(function: Callable, inputs: Sequence, count: int, preload: Sequence[str] = (),
                 begin: Callable[[], None] | None = None) -> Iterator[Any]:
    """`map`, by `count` processes, each with one thread of PyTorch. They are not forked from this
    one, which may have threads of its own; `preload`: modules that need not be imported in each;
    `begin`: called in each of them first. Raises OSError if one of them is killed."""
    if count == 1 or len(inputs) < 2:
        torch.set_num_threads(1)  # as in the others: not even rounding depends on their number
        yield from map(function, inputs)
        return
    context = get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(list(preload))
    try:
        with ProcessPoolExecutor(min(count, len(inputs)), context, _start, (begin,)) as pool:
            tasks = deque(pool.submit(function, each) for each in inputs)
            try:
                while tasks:  # not pool.map: interrupted, it breaks the pool's own books
                    yield tasks.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # what has not begun never will
    except BrokenProcessPool:
        raise OSError("a process was killed, perhaps for lack of memory: run the same command "
                      "again, with fewer --processes if need be") from None


def _start(begin: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    tqdm.set_lock(RLock())  # its own would be left behind by a process that is killed
    if begin:
        begin()
