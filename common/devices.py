"""Where a program computes, and in which number format."""

import torch

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision


def device(name: str) -> torch.device:
    """The device that --device names. Raises ValueError for CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: expected a CUDA device, this machine (or this build "
                         "of PyTorch) has none")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def tune_cpu(resolution: int) -> None:
    """Two settings of PyTorch that decide its speed on small pictures; `resolution` in pixels."""
    torch.set_flush_denormal(True)  # on some CPUs numbers near zero make a step eight times slower
    if resolution <= 64:
        # 8 x 8 latents are too little work to share: threads would mostly wait for each other.
        torch.set_num_threads(1)
