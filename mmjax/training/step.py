"""The one train step and the one evaluation step. Only this file calls a network's `init` and `apply`."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from mmjax.training import mesh as meshes

Batch = Mapping[str, Any]
Arrays = dict[str, jax.Array]


class Objective(Protocol):
  """What a paper defines beside its network; with `trace(memory) -> {name: [N]}`, `traces.py` keeps that each epoch."""

  def init(self, labels: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
    """Returns the memory carried across steps, from all training labels {name: [N]} and output shapes."""

  def __call__(
    self, outputs: Arrays, batch: Batch, memory: Any, *, epoch: jax.Array, train: bool
  ) -> tuple[Arrays, Any]:
    """Returns the loss terms {name: [B]} and the new memory."""

  def predictions(self, outputs: Arrays) -> Arrays:
    """Returns what is scored, {head: [B] or [B, C]}."""


class State(struct.PyTreeNode):
  """All that changes while training; no random state, since each step folds its number into the run's key."""

  params: Any
  model_state: Any  # other Linen collections, such as BatchNorm statistics
  opt_state: Any
  memory: Any  # the objective's, replicated
  gradient: Any  # sum over the examples since the last update; None without accumulation
  examples: Any  # how many those are; None without accumulation
  step: Any  # int32, micro-batches done
  epoch: Any  # int32, counted from 1


def abstract(network: nn.Module, batch: Any) -> Any:
  """Returns the shapes of the network's variables for a batch (of arrays or shapes)."""
  return jax.eval_shape(lambda b: initial(network, jax.random.key(0), b), batch)


def initial(network: nn.Module, key: jax.Array, batch: Any) -> dict[str, Any]:
  """Returns fresh variables: `params` and whatever other collections the network keeps."""
  params_key, dropout_key = jax.random.split(key)
  variables = network.init({"params": params_key, "dropout": dropout_key}, batch, train=False)
  return {name: value for name, value in variables.items() if name != "intermediates"}


def split(params: Any, frozen: Any) -> tuple[Any, Any]:
  """Returns (trained, frozen) parameters; each has None in the other's places."""
  trained = jax.tree.map(lambda p, f: None if f else p, params, frozen)
  return trained, jax.tree.map(lambda p, f: p if f else None, params, frozen)


def merge(trained: Any, frozen: Any) -> Any:
  """Undoes `split`."""
  return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None)


def without_gradient(state: State) -> State:
  """Returns `state` with nothing accumulated."""
  return state.replace(gradient=jax.tree.map(jnp.zeros_like, state.gradient), examples=jnp.zeros_like(state.examples))


def make_train_step(
  network: nn.Module,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  frozen: Any,
  accumulation: str = "mean",
) -> Callable[[State, Batch, jax.Array, jax.Array], tuple[State, Arrays]]:
  """Returns `train_step(state, batch, update, key)`.

  It gives the new state and the logs: per loss term the sum over valid rows, and their count. `update` (bool
  scalar) applies the gradient, averaged over all examples since the last update, or with `accumulation="sum"` the
  sum of each micro-batch's average; without accumulation it is always applied. `key` is the run's, the same at
  every step; as an argument it does not make a program of its own for each seed.
  """

  def train_step(state: State, batch: Batch, update: jax.Array, key: jax.Array) -> tuple[State, Arrays]:
    trained, fixed = split(state.params, frozen)
    rngs = {"dropout": jax.random.fold_in(key, state.step)}

    def total_loss(trained: Any) -> tuple[jax.Array, Any]:
      variables = {"params": merge(trained, fixed), **state.model_state}
      outputs, model_state = network.apply(variables, batch, train=True, rngs=rngs, mutable=list(state.model_state))
      terms, memory = objective(outputs, batch, state.memory, epoch=state.epoch, train=True)
      sums = {name: jnp.sum(jnp.where(batch["valid"], term, 0.0)) for name, term in terms.items()}
      return sum(sums.values(), start=jnp.float32(0)), (sums, model_state, memory)

    gradient, (sums, model_state, memory) = jax.grad(total_loss, has_aux=True)(trained)
    examples = jnp.sum(batch["valid"]).astype(jnp.float32)
    logs = {**sums, "examples": examples}
    state = state.replace(model_state=model_state, memory=memory, step=state.step + 1)

    def apply(state: State, gradient: Any, examples: jax.Array) -> State:
      mean = jax.tree.map(lambda g: g / jnp.maximum(examples, 1.0), gradient)
      updates, opt_state = optimizer.update(mean, state.opt_state, trained)
      return state.replace(params=merge(optax.apply_updates(trained, updates), fixed), opt_state=opt_state)

    if state.gradient is None:
      return apply(state, gradient, examples), logs

    total = state.examples + examples
    if accumulation == "sum":
      gradient = jax.tree.map(lambda g: g / jnp.maximum(examples, 1.0), gradient)
      total = jnp.ones_like(examples)  # a sum of means is divided by nothing
    gradient = jax.tree.map(jnp.add, state.gradient, gradient)

    def flush(state: State) -> State:
      return without_gradient(apply(state, gradient, total))

    def keep(state: State) -> State:
      return state.replace(gradient=gradient, examples=total)

    return jax.lax.cond(update, flush, keep, state), logs

  return train_step


def make_eval_step(network: nn.Module, objective: Objective) -> Callable[..., tuple[Arrays, Arrays]]:
  """Returns `eval_step(params, model_state, memory, epoch, batch)`, giving predictions and loss terms."""

  def eval_step(params: Any, model_state: Any, memory: Any, epoch: jax.Array, batch: Batch) -> tuple[Arrays, Arrays]:
    outputs: Any = network.apply({"params": params, **model_state}, batch, train=False)
    terms, _ = objective(outputs, batch, memory, epoch=epoch, train=False)
    return objective.predictions(outputs), terms

  return eval_step


def create_state(
  network: nn.Module,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  frozen: Any,
  accumulate: int,
  labels: Mapping[str, Any],
  batch: Any,
  key: jax.Array,
  mesh: Mesh,
  restore: Callable[[Any], Any] = lambda params: params,
) -> tuple[State, Any]:
  """Returns the state before step 1, created sharded, and its shardings.

  `restore` replaces what is published of a collection (parameters, statistics of BatchNorm), before the optimiser's
  state is made from the parameters.
  """

  def variables_of(key: jax.Array) -> dict[str, Any]:
    # A batch of constants keeps the batch's own values out of the compiled program.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    return initial(network, key, zeros)

  variables_shape = jax.eval_shape(variables_of, key)
  variables = jax.jit(variables_of, out_shardings=meshes.shardings(variables_shape, mesh))(key)
  variables = {collection: restore(tree) for collection, tree in variables.items()}
  variables = jax.device_put(variables, meshes.shardings(variables, mesh))
  params = variables.pop("params")
  outputs = jax.eval_shape(lambda v, b: network.apply(v, b, train=False), {"params": params, **variables}, batch)

  def rest(params: Any, model_state: Any) -> State:
    trained, _ = split(params, frozen)
    accumulating = accumulate > 1
    return State(
      params=params,
      model_state=model_state,
      opt_state=optimizer.init(trained),
      memory=objective.init(labels, outputs),
      gradient=jax.tree.map(jnp.zeros_like, trained) if accumulating else None,
      examples=jnp.zeros((), jnp.float32) if accumulating else None,
      step=jnp.zeros((), jnp.int32),
      epoch=jnp.ones((), jnp.int32),
    )

  shape = jax.eval_shape(rest, params, variables)
  shardings = meshes.shardings(shape, mesh)
  replicated = meshes.replicated(mesh)
  shardings = shardings.replace(memory=jax.tree.map(lambda _: replicated, shape.memory))
  return jax.jit(rest, out_shardings=shardings, donate_argnums=(0, 1))(params, variables), shardings
