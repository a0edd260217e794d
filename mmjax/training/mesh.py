"""One mesh for every run, from a single CPU to a pod."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.errors import UserError

# Below this many elements a parameter is kept whole on every device: gathering it costs more than it saves.
SMALLEST_SHARDED = 2**10


def make(fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh of axes `data` and `fsdp` over all devices (or those given); each batch is split over both.

  `fsdp` devices share one copy of parameters and optimiser state. Axes are Auto: Linen's RNN does not trace
  with explicit ones.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if fsdp < 1 or count % fsdp:
    raise UserError(f"Experiment.fsdp={fsdp} does not divide the {count} devices found: bind a divisor of {count}")
  shape, axes = (count // fsdp, fsdp), ("data", "fsdp")
  return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns a sharding for each array of `tree`, by its shape alone.

  The largest dimension that the `fsdp` axis divides is split over it, so that a parameter and its moments are
  split alike; scalars, small arrays and everything on a mesh without fsdp are replicated.
  """
  parts = mesh.shape["fsdp"]

  def leaf(x: Any) -> NamedSharding:
    dims = [d for d, size in enumerate(x.shape) if size % parts == 0]
    if parts == 1 or not dims or np.prod(x.shape) < SMALLEST_SHARDED:
      return replicated(mesh)
    largest = max(dims, key=lambda d: x.shape[d])
    return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))

  return jax.tree.map(leaf, tree)


def rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Returns the batch on the devices; with several processes each passes its own rows."""
  sharding = rows(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
