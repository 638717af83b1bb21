"""train.py in processes of their own, which can be killed: forked from a server that has imported
everything and computed nothing.

Not from the test's own process: once that has run a backward pass it may have autograd's threads,
and then PyTorch refuses its forks one.
"""

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
    # and the compiler, which every optimizer imports
    _context.set_forkserver_preload(["train", "torch._dynamo"])


def _train(arguments: list[str], environment: Mapping[str, str], output: str,
           probe_samples: int) -> None:
    signal.alarm(300)  # a child that hangs must not hang the tests
    train.PROBE_SAMPLES = probe_samples
    os.environ |= environment
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    sys.exit(run(lambda: train.main(arguments)))


def start(arguments: list[str], environment: Mapping[str, str] | None = None,
          output: str = os.devnull) -> BaseProcess:
    """Start train.py; what it prints goes to the file `output`."""
    args = (arguments, environment or {}, output, train.PROBE_SAMPLES)
    child = _context.Process(target=_train, args=args, daemon=True)
    child.start()
    return child


def exit_code(child: BaseProcess) -> int:
    """The exit code when it has ended, or minus the signal that killed it."""
    child.join()
    return child.exitcode
