"""What a run would be, without running it."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax.training import mesh as meshes
from mmjax.training import step
from mmjax.training.experiment import Experiment


def parameter_counts(params: Any, frozen: Any) -> str:
  """Returns a table of parameters by top-level module."""
  lines = [f"{'parameters':<20}{'trained':>14}{'frozen':>14}"]
  total = np.zeros(2, np.int64)
  for name in params:
    flags, leaves = jax.tree.leaves(frozen[name]), jax.tree.leaves(params[name])
    counts = [sum(leaf.size for leaf, f in zip(leaves, flags, strict=True) if f == want) for want in (0, 1)]
    total += counts
    lines.append(f"{name:<20}{counts[0]:>14,}{counts[1]:>14,}")
  return "\n".join([*lines, f"{'total':<20}{total[0]:>14,}{total[1]:>14,}"])


def shape_step(experiment: Experiment, batch: Any, labels: Mapping[str, Any] | None = None) -> tuple[step.State, Any]:
  """Returns the shapes of the state and of one train step's (state, logs) for a batch (of arrays or shapes).

  `labels` {name: [N]} are those of the training split, which decide the size of the objective's memory; None: of one
  example.
  """
  variables = dict(step.abstract(experiment.network, batch))
  params = variables.pop("params")
  frozen = experiment.optimizer.frozen_mask(params)
  optimizer = experiment.optimizer.build(params, total_steps=1)
  trained, _ = step.split(params, frozen)
  outputs = jax.eval_shape(
    lambda v, b: experiment.network.apply(v, b, train=False), {"params": params, **variables}, batch
  )
  labels = labels or {name: np.zeros(1, np.float32) for name in batch["labels"]}
  accumulating = experiment.optimizer.accumulate > 1
  state = step.State(
    params=params,
    model_state=variables,
    opt_state=jax.eval_shape(optimizer.init, trained),
    memory=jax.eval_shape(lambda: experiment.objective.init(labels, outputs)),
    gradient=trained if accumulating else None,
    examples=jax.ShapeDtypeStruct((), jnp.float32) if accumulating else None,
    step=jax.ShapeDtypeStruct((), jnp.int32),
    epoch=jax.ShapeDtypeStruct((), jnp.int32),
  )
  train_step = step.make_train_step(experiment.network, experiment.objective, optimizer, frozen=frozen)
  return state, jax.eval_shape(train_step, state, batch, jax.ShapeDtypeStruct((), jnp.bool_), jax.random.key(0))


def lower(experiment: Experiment, batch: Any, mesh: Mesh) -> Any:
  """Returns the train step lowered for `mesh` from shapes alone; its devices need not be here."""
  state, _ = shape_step(experiment, batch)
  frozen = experiment.optimizer.frozen_mask(state.params)
  train_step = step.make_train_step(
    experiment.network,
    experiment.objective,
    experiment.optimizer.build(state.params, total_steps=1),
    frozen=frozen,
    accumulation=experiment.optimizer.accumulation,
  )
  shardings, whole = meshes.shardings(state, mesh), meshes.replicated(mesh)

  def placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

  key = jax.eval_shape(lambda: jax.random.key(0))
  jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, whole))
  return jitted.lower(
    jax.tree.map(placed, state, shardings),
    placed(batch, meshes.rows(mesh)),
    placed(jax.ShapeDtypeStruct((), jnp.bool_), whole),
    placed(key, whole),
  )


def size(tree: Any) -> int:
  """Returns the bytes of the arrays (or shapes) in `tree`."""
  return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def overlay(cache_dir: Path, temporary: Path) -> Path:
  """Returns `temporary` with links to all that is prepared in `cache_dir`; what is missing will be made beside them."""
  for kind in ("records", "features"):
    (temporary / kind).mkdir()
    for entry in (cache_dir / kind).glob("*"):
      (temporary / kind / entry.name).symlink_to(entry.absolute())
  return temporary


def describe(experiment: Experiment, *, data_dir: Path, cache_dir: Path) -> None:
  """Prints what a run would read, build and need; writes nothing that stays."""
  with tempfile.TemporaryDirectory() as temporary:
    data = experiment.open_data(data_dir, overlay(cache_dir, Path(temporary)))
    print(data.describe())
    mesh = meshes.make(experiment.fsdp)
    batch = data.first_batch(row_multiple=mesh.size)
    print("\none batch")
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      print(f"  {name:<24}{leaf.dtype!s:<9}{list(leaf.shape)}")
    state, (_, logs) = shape_step(experiment, batch, data.splits["train"].labels)
    frozen = experiment.optimizer.frozen_mask(state.params)
    trained, _ = step.split(state.params, frozen)
    print("\n" + parameter_counts(state.params, frozen))
    losses = ", ".join(name for name in logs if name != "examples")
    plan = data.plan("train", seed=experiment.seed, epoch=1)
    print(f"\none train step traced; loss terms: {losses}; {len(plan)} steps an epoch on {dict(mesh.shape)}")
    print("memory, without activations")
    rows = {
      "parameters": size(state.params),
      "gradient": size(trained) * (2 if state.gradient is not None else 1),
      "optimiser state": size(state.opt_state),
      "objective's memory": size(state.memory),
      "largest batch": max(size(data.batch_shapes(box)) for box in data.boxes),
    }
    for name, count in {**rows, "total": sum(rows.values())}.items():
      print(f"  {name:<24}{count / 2**20:>10,.1f} MiB")
  print("\nnothing was trained or written")
