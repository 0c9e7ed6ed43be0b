"""What FSDP2 needs to know of these models beyond what Accelerate tells it."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel


def shard_tables(
    model: PreTrainedModel,
    mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Make units for FSDP2 of the embeddings and the output layer, one of all that share a weight.

    Accelerate knows one input embedding; of these models' three tables any two may be one, and a weight in two units
    is refused. Everything else is best left to one unit, the model itself: decoding uses parts of the decoder one by
    one. The tables stay gathered after a forward pass, so that no process that generates waits for one that generates
    fewer tokens.

    Args:
        mesh, mp_policy, offload_policy: as for `torch.distributed.fsdp.fully_shard`.
    """
    units: dict[int, list[nn.Module]] = {}
    parts = model.get_encoder().get_input_embeddings(), model.get_decoder().get_input_embeddings()
    for module in (*parts, model.get_output_embeddings()):
        units.setdefault(id(module.weight), []).append(module)
    for unit in units.values():
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=False,
            mp_policy=mp_policy or MixedPrecisionPolicy(),
            offload_policy=offload_policy or OffloadPolicy(),
        )


def shard_tables_for(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Before Accelerate shards a model by FSDP2: the tables, with its settings."""
    if not accelerator.is_fsdp2 or isinstance(model, FSDPModule):
        return
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    shard_tables(model, mesh, plugin.mixed_precision_policy, plugin.cpu_offload)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """While this lasts, a model that FSDP2 has sharded is of its own class again, whose code it is saved with."""
    sharded = type(model)
    if issubclass(sharded, FSDPModule):  # a class that `fully_shard` has made of FSDPModule and the model's
        model.__class__ = sharded.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = sharded
