"""A frozen model whose weights are split over the processes of a run, for cards that cannot hold it whole."""

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(model: nn.Module, device_type: str, processes: int) -> None:
    """Split a model over all processes in place; each layer is gathered when it runs, and freed after it.

    All processes have to run the model equally often, with batches of any size. This is FSDP2 of PyTorch.

    Args:
        model: The model, in the memory of the CPU; the shards are on the device of each process.
        device_type: `cuda` or `cpu`.
        processes: Number of processes.
    """
    mesh = init_device_mesh(device_type, (processes,))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(module) for outer in lists for module in outer.modules() if module is not outer}
    for layers in lists:
        for layer in layers if id(layers) not in inner else ():
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parts = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    here, whole = (sum(part.numel() for part in some) / 1e6 for some in (parts, model.parameters()))
    rank_zero_info(f"a frozen model is split over {processes} processes: {here:.3g} of {whole:.3g} M parameters each")


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of a model are split over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
