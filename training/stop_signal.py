"""How a run is asked to stop."""

import signal


class StopSignal:
    """SIGTERM (from a scheduler) and Ctrl-C: the step in progress is finished and saved. A second
    Ctrl-C stops at once. `received` is the signal, if one came."""

    def __enter__(self) -> "StopSignal":
        self.received: signal.Signals | None = None
        self.handlers = {number: signal.signal(number, self._receive)
                         for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, number: int, frame: object) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
