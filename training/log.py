"""RUN/log.jsonl, one JSON object per step, and TensorBoard's event files."""

import json
import time
from pathlib import Path

from common.files import named


class Log:
    """Appends to RUN/log.jsonl, with the seconds since the run began (of a resumed run without the
    pause). `tensorboard`: event files too."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        last = json.loads(lines[-1]) if lines else {"step": 0, "seconds": 0.0}
        self.last_step = last["step"]
        self.begun = time.time() - last["seconds"]
        self.file = open(path, "a")
        self.events = None
        if tensorboard:
            self.events = event_writer()(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, entry: dict) -> None:
        seconds = round(time.time() - self.begun, 3)
        with named(self.file.name):
            self.file.write(json.dumps(entry | {"seconds": seconds}) + "\n")
            self.file.flush()
        if self.events:
            for name, value in entry.items():
                for i, number in enumerate(value if isinstance(value, list) else [value]):
                    if number is not None and name != "step":
                        tag = f"{name}/{i}" if isinstance(value, list) else name
                        self.events.add_scalar(tag, number, entry["step"])
            self.events.flush()

    def close(self) -> None:
        self.file.close()
        if self.events:
            self.events.close()


def event_writer() -> type:
    """TensorBoard's writer of event files. Raises ValueError if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not installed: "
                         "pip install tensorboard") from None
    return SummaryWriter
