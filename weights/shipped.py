"""What is shipped beside a base model: networks, and held-out data to try them on."""

from pathlib import Path

from data.dataset import Dataset
from weights import drawings, tiny


def networks_beside(checkpoint: Path) -> dict[str, Path]:
    """The ControlNet and the students that were trained for this base model, by their names; none
    for any but the shipped ones. Those of one base also load on the other, and draw nonsense."""
    for base in (drawings.SD, tiny.SD, tiny.TURBO):
        if checkpoint.absolute() == base.absolute():
            students = sorted((base.parent / "students").glob("*.safetensors"))
            return {"ControlNet": base.with_name("controlnet.safetensors")} | {
                path.stem: path for path in students}
    return {}


def examples_beside(checkpoint: Path, size: int) -> Dataset | None:
    """Prompts and conditions that no network of this base model was trained on."""
    from data.circles import HELD_OUT, Circles
    from data.drawings import HeldOutDrawings

    if checkpoint.absolute() == drawings.SD.absolute():
        return HeldOutDrawings(drawings.DATA / "held_out", size)
    return Circles(size, 100, first=HELD_OUT) if checkpoint.absolute() in (
        tiny.SD.absolute(), tiny.TURBO.absolute()) else None
