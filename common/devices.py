"""Where a program computes, and in which number format."""

import torch

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision


def device(name: str) -> torch.device:
    """The device that --device names. Raises ValueError for CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: expected a CUDA device, this machine (or this build "
                         "of PyTorch) has none")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def default_precision(where: torch.device) -> tuple[str, str]:
    """The --precision of training and sampling on a device, and its reason."""
    if where.type == "cpu":
        return "float32", ""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "this card has it"
    return "fp16", "this card has no bf16"


def to_device(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device. To a GPU from pinned memory: then nobody waits."""
    if where.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(where, non_blocking=True)


def tune(resolution: int, precision: str = "float32") -> None:
    """Settings of PyTorch that decide its speed; `resolution` in pixels.

    float32 is the exact mode. In the others a GPU may round the inputs of products that stay in
    float32 (the autoencoder's) to TF32, 10 bits for 23: several times faster, and still finer than
    bf16.
    """
    inexact = precision != "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = inexact
    torch.backends.cudnn.benchmark = True  # try algorithms: all batches have the same shape
    torch.set_flush_denormal(True)  # on some CPUs numbers near zero make a step eight times slower
    if resolution <= 64:
        # 8 x 8 latents are too little work to share: threads would mostly wait for each other.
        torch.set_num_threads(1)


def compile_blocks(network: torch.nn.Module, kinds: tuple[type, ...],
                   backend: str = "inductor") -> None:
    """Compile the modules of these kinds inside a network, one by one: equal blocks share their
    code, so that it takes a fraction of the time that the whole network would."""
    torch._dynamo.config.recompile_limit = 64  # sizes of one kind of block: Stable Diffusion has 14
    for module in network.modules():
        if isinstance(module, kinds):
            module.compile(backend=backend, dynamic=False)
