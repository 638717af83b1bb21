"""train.py in processes of their own, which can be killed: forked from a server that has imported
everything and computed nothing.

Not from the test's own process: once that has run a backward pass it may have autograd's threads,
and then PyTorch refuses its forks one. """

import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

import train
from common.cli import run

_context = get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(os, "fork"):
    _context.set_forkserver_preload(["train"])


def nothing(*_: object, **__: object) -> None:
    """In the place of a part of train.py that a test does not need."""


def _train(arguments: list[str], changes: Mapping[str, object], environment: Mapping[str, str],
           said: str) -> None:
    signal.alarm(300)  # a child that hangs must not hang the tests
    os.environ |= environment
    sys.stdout = sys.stderr = open(said, "a", buffering=1)
    for name, value in changes.items():
        setattr(train, name, value)
    sys.exit(run(lambda: train.main(arguments)))


def start(arguments: list[str],
          changes: Mapping[str, object],
          environment: Mapping[str, str] | None = None,
          said: str = os.devnull) -> BaseProcess:
    """Start train.py with `changes` of the module's names; what it prints goes to the file
    `said`."""
    child = _context.Process(
        target=_train, args=(arguments, changes, environment or {}, said), daemon=True)
    child.start()
    return child


def code(child: BaseProcess) -> int:
    """Its exit code, or minus the signal that killed it, when it has ended."""
    child.join()
    return child.exitcode
