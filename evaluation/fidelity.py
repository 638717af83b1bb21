"""Control fidelity: do the pictures that are sampled under a control network obey it?"""

from collections.abc import Mapping

from torch.utils.data import default_collate

from controlnet import ControlNetwork
from controlnet.sampling import sample_pictures
from data.dataset import Dataset
from evaluation.report import FIDELITIES, TITLES
from weights import StableDiffusion


def is_measurable(dataset: Dataset) -> bool:
    """Whether the data set can tell how well a picture obeys one of its samples."""
    return bool(dataset.fidelity(dataset[0]["target"][None] / 2 + 0.5, [0], [0]))


def control_fidelity(sd: StableDiffusion, net: ControlNetwork | None, dataset: Dataset, *,
                     name: str = "", prompts: bool = True) -> dict[str, float]:
    """How well pictures obey a data set's samples, on average; {} if it cannot be measured.
    `prompts` False: every prompt is empty and names no colours, so the picture's own are taken."""
    if not is_measurable(dataset):
        return {}
    samples = default_collate([dataset[i] for i in range(len(dataset))])
    texts = samples["prompt"] if prompts else [""] * len(dataset)
    pictures = sample_pictures(sd, net, samples["condition"], texts, seed=0, name=name)
    same = range(len(dataset))
    return dataset.fidelity(pictures, same, same if prompts else None)


def print_fidelity(sd: StableDiffusion, networks: Mapping[str, ControlNetwork | None],
                   dataset: Dataset) -> None:
    """Print a line for each network (None: the base without control) once it is measured."""
    if not is_measurable(dataset):
        print("control fidelity cannot be measured on these pictures: look at the samples")
        return
    print(f"\ncontrol fidelity on {len(dataset)} held-out samples, {sd.sampling.steps} DDIM "
          f"steps, guidance {sd.sampling.guidance:g}")
    width = max(28, *(len(name) + 2 for name in networks))
    for i, (name, net) in enumerate(networks.items()):
        result = control_fidelity(sd, net, dataset, name=name)
        titles = [TITLES.get(measure, measure) for measure in result]
        columns = [max(10, len(title) + 2) for title in titles]
        if i == 0:
            head = [f"{title:>{column}}" for title, column in zip(titles, columns, strict=True)]
            print(f"{'':{width}}{'parameters':>12}{''.join(head)}")
        parameters = f"{sum(p.numel() for p in net.parameters()):,}" if net else "-"
        values = [f"{value:>{column}.{FIDELITIES.get(measure, 3)}f}"
                  for (measure, value), column in zip(result.items(), columns, strict=True)]
        print(f"{name:{width}}{parameters:>12}{''.join(values)}", flush=True)
