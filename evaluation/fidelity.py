"""Control fidelity: do the pictures that are sampled under a control network obey it?"""

from collections.abc import Mapping

from torch.utils.data import default_collate

from controlnet import ControlNetwork
from controlnet.sampling import sample_pictures
from data.dataset import Dataset
from weights import StableDiffusion


def is_measurable(dataset: Dataset) -> bool:
    """Whether the data set can tell how well a picture obeys one of its samples."""
    return bool(dataset.fidelity(dataset[0]["target"][None] / 2 + 0.5))


def control_fidelity(sd: StableDiffusion, net: ControlNetwork | None, dataset: Dataset, *,
                     steps: int = 20, name: str = "", prompts: bool = True) -> dict[str, float]:
    """How well pictures obey a data set's samples, on average; {} if it cannot be measured.
    `prompts` False: every prompt is empty and names no colours, so the picture's own are taken."""
    if not is_measurable(dataset):
        return {}
    samples = default_collate([dataset[i] for i in range(len(dataset))])
    texts = samples["prompt"] if prompts else [""] * len(dataset)
    pictures = sample_pictures(sd, net, samples["condition"], texts, steps=steps, seed=0, name=name)
    return dataset.fidelity(pictures, own_colors=not prompts)


def print_fidelity(sd: StableDiffusion, networks: Mapping[str, ControlNetwork | None],
                   dataset: Dataset, *, steps: int = 20) -> None:
    """Print a line for each network (None: the base without control) once it is measured."""
    if not is_measurable(dataset):
        print("control fidelity is measured on generated circles only: look at the samples")
        return
    print(f"\ncontrol fidelity on {len(dataset)} held-out circles, {steps} DDIM steps, "
          f"guidance {sd.guidance:g}")
    width = max(28, *(len(name) + 2 for name in networks))
    print(f"{'':{width}}{'parameters':>12}{'overlap':>10}{'colour error':>14}")
    for name, net in networks.items():
        result = control_fidelity(sd, net, dataset, steps=steps, name=name)
        parameters = f"{sum(p.numel() for p in net.parameters()):,}" if net else "-"
        print(f"{name:{width}}{parameters:>12}{result['overlap']:>10.3f}"
              f"{result['color_error']:>14.1f}", flush=True)
