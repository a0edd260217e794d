"""Optimisers that gin builds; each is a plain description until `build` sees the parameters."""

import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from mmjax.errors import UserError


def matches(patterns: tuple[str, ...], params: Any) -> Any:
  """Returns a tree like `params`, True where a pattern matches the whole slash-separated path."""
  paths = traverse_util.flatten_dict(params, sep="/")
  marked = {path: any(re.fullmatch(pattern, path) for pattern in patterns) for path in paths}
  return traverse_util.unflatten_dict(marked, sep="/")


class PlateauState(NamedTuple):
  """The factor on every rate, float32 []: data, so that another value is no other program."""

  plateau_scale: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau:
  """PyTorch's ReduceLROnPlateau on the exact validation loss of each epoch (mode "min", relative threshold).

  Attributes:
    factor: on the rates at each reduction.
    patience: epochs without a lower loss that are still borne; one more reduces the rates.
    cooldown: epochs after a reduction that do not count as such.
    min_rate: below which no reduction takes a rate; one that starts below it stays as it is.
    threshold: share of the lowest loss by which a new one must be lower.
  """

  factor: float = 0.5
  patience: int = 2
  cooldown: int = 2
  min_rate: float = 2.5e-5
  threshold: float = 1e-4

  def __post_init__(self) -> None:
    if not 0 < self.factor < 1:
      raise UserError(f"Plateau.factor: found {self.factor!r}, expected a number between 0 and 1")
    for name in ("patience", "cooldown", "min_rate", "threshold"):
      if getattr(self, name) < 0:
        raise UserError(f"Plateau.{name}: found {getattr(self, name)!r}, expected 0 or more")

  def after(self, counters: Mapping[str, float], loss: float) -> dict[str, float]:
    """Returns the counters after an epoch of this validation loss; `counters` is empty before the first.

    {"best": lowest loss, "bad": epochs without a lower one, "wait": epochs of cooldown left, "scale": of the rates}.
    """
    best, bad = counters.get("best", math.inf), counters.get("bad", 0.0)
    wait, scale = counters.get("wait", 0.0), self.scale(counters)
    if loss < best * (1 - self.threshold):
      best, bad = loss, 0.0
    else:
      bad += 1
    if wait > 0:
      wait, bad = wait - 1, 0.0
    if bad > self.patience:
      scale, wait, bad = scale * self.factor, float(self.cooldown), 0.0
    return {"best": float(best), "bad": bad, "wait": wait, "scale": scale}

  @staticmethod
  def scale(counters: Mapping[str, float]) -> float:
    """Returns the factor on the rates that the counters say, before `min_rate`."""
    return counters.get("scale", 1.0)

  def transformation(self, rates: Any) -> optax.GradientTransformation:
    """Returns what scales an update by the factor in its state; `rates` has each parameter's rate before that."""
    floors = jax.tree.map(lambda rate: min(self.min_rate / rate, 1.0) if rate > 0 else 1.0, rates)

    def init(params: Any) -> PlateauState:
      return PlateauState(jnp.ones((), jnp.float32))

    def update(updates: Any, state: PlateauState, params: Any = None) -> tuple[Any, PlateauState]:
      scaled = jax.tree.map(lambda u, floor: u * jnp.maximum(state.plateau_scale, floor), updates, floors)
      return scaled, state

    return optax.GradientTransformation(init, update)


def with_plateau_scale(opt_state: Any, scale: Any) -> Any:
  """Returns the state of an optimiser that was built with `Plateau`, with this factor on its rates."""
  return optax.tree_utils.tree_set(opt_state, plateau_scale=scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """What both optimisers have: moments, what is frozen, the schedule, clipping, accumulation, the plateau.

  Attributes:
    frozen: regular expressions over whole parameter paths, "audio_encoder/feature_extractor/.*". Frozen
      parameters get no gradient, no moments and no decay; their backward pass is not computed.
    warmup_steps: optimiser steps over which the rate rises linearly from 0.
    decay: "constant", "linear" or "cosine" to 0 at the last step of the last epoch.
    clip_norm: largest global norm of the gradient; None does not clip.
    accumulate: micro-batches per optimiser step; an epoch's last step takes what is left.
    accumulation: "mean" over all examples of a step's micro-batches, or the "sum" of each one's mean, as the
      authors' Self-MM has it (SM2).
    drop_leftovers: make no step of the micro-batches left at an epoch's end, as the authors' Self-MM does (SM1).
    reset_each_epoch: forget moments and bias correction at each epoch, as the authors' MMML does (MM1).
    plateau: lowers the rates when the validation loss stops falling; it multiplies the schedule. None: never.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  frozen: tuple[str, ...] = ()
  warmup_steps: int = 0
  decay: str = "constant"
  clip_norm: float | None = None
  accumulate: int = 1
  accumulation: str = "mean"
  drop_leftovers: bool = False
  reset_each_epoch: bool = False
  plateau: Plateau | None = None

  def __post_init__(self) -> None:
    name = type(self).__name__
    if self.decay not in ("constant", "linear", "cosine"):
      raise UserError(f"{name}.decay: found {self.decay!r}, expected 'constant', 'linear' or 'cosine'")
    if self.accumulate < 1:
      raise UserError(f"{name}.accumulate: found {self.accumulate}, expected at least 1")
    if self.accumulation not in ("mean", "sum"):
      raise UserError(f"{name}.accumulation: found {self.accumulation!r}, expected 'mean' or 'sum'")

  def updates(self, micro_batches: int) -> int:
    """Returns the optimiser steps of an epoch of so many micro-batches; UserError where there would be none."""
    whole, left = divmod(micro_batches, self.accumulate)
    if self.drop_leftovers and not whole:
      raise UserError(
        f"{type(self).__name__}.drop_leftovers: found {micro_batches} batches in an epoch, fewer than "
        f"accumulate={self.accumulate}, so no step would ever be made: lower accumulate or the batch size"
      )
    return whole + (left > 0 and not self.drop_leftovers)

  def is_update(self, micro_batch: int, micro_batches: int) -> bool:
    """Returns whether the optimiser steps after this one, counted from 1, of an epoch's micro-batches."""
    last = micro_batch == micro_batches and not self.drop_leftovers
    return last or micro_batch % self.accumulate == 0

  def schedule(self, total_steps: int, peak: float = 1.0) -> optax.Schedule:
    """Returns the learning rate as a function of the optimiser step; `peak` is its largest."""
    after = max(total_steps - self.warmup_steps, 1)
    main = {
      "constant": optax.constant_schedule(peak),
      "linear": optax.linear_schedule(peak, 0.0, after),
      "cosine": optax.cosine_decay_schedule(peak, after),
    }[self.decay]
    if not self.warmup_steps:
      return main
    warmup = optax.linear_schedule(0.0, peak, self.warmup_steps)
    return optax.join_schedules([warmup, main], [self.warmup_steps])

  def frozen_mask(self, params: Any) -> Any:
    """Returns a tree like `params`, True where a parameter is not trained."""
    return matches(self.frozen, params)

  def build(self, params: Any, *, total_steps: int) -> optax.GradientTransformation:
    """Returns the optax transformation for `params` (arrays or shapes) and `total_steps` optimiser steps."""
    clip = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
    plateau = [self.plateau.transformation(self.rates(params))] if self.plateau else []
    return optax.chain(*clip, self.rule(params, total_steps), *plateau)

  def rates(self, params: Any) -> Any:
    """Returns a tree like `params` with each parameter's learning rate, None where frozen."""
    raise NotImplementedError

  def rule(self, params: Any, total_steps: int) -> optax.GradientTransformation:
    """Returns what makes the update of the clipped gradient."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
  """AdamW with PyTorch's defaults: decoupled weight decay .01 on every parameter, biases too (MM20).

  Attributes:
    learning_rate: of every parameter.
    weight_decay: times the rate.
    no_decay: regular expressions of parameters without weight decay.
  """

  learning_rate: float
  weight_decay: float = 0.01
  no_decay: tuple[str, ...] = ()

  def rates(self, params: Any) -> Any:
    """Returns the one rate in each place."""
    return jax.tree.map(lambda frozen: None if frozen else self.learning_rate, self.frozen_mask(params))

  def rule(self, params: Any, total_steps: int) -> optax.GradientTransformation:
    """Returns optax's AdamW."""
    exempt = matches(self.no_decay, params)
    return optax.adamw(
      self.schedule(total_steps, self.learning_rate),
      self.b1,
      self.b2,
      self.eps,
      weight_decay=self.weight_decay,
      mask=jax.tree.map(operator.not_, exempt),
    )


@dataclasses.dataclass(frozen=True)
class Group:
  """The parameters whose whole path `pattern` matches, with their learning rate and weight decay."""

  pattern: str
  learning_rate: float
  weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
  """PyTorch's Adam with parameter groups: weight decay is coupled, that is, added to the gradient before the moments.

  Attributes:
    groups: each trained parameter is of the first group whose pattern matches; UserError lists those of none.
  """

  groups: tuple[Group, ...]

  def group_of(self, params: Any) -> Any:
    """Returns a tree like `params` with each parameter's group, None where frozen."""
    frozen = traverse_util.flatten_dict(self.frozen_mask(params), sep="/")
    found = {
      path: None if frozen[path] else next((g for g in self.groups if re.fullmatch(g.pattern, path)), None)
      for path in frozen
    }
    alone = [path for path, group in found.items() if group is None and not frozen[path]]
    if alone:
      patterns = ", ".join(repr(group.pattern) for group in self.groups) or "none"
      raise UserError(
        "Adam.groups: found trained parameters that no pattern matches:\n  "
        + "\n  ".join(alone)
        + f"\nexpected one of {patterns} to match, or Adam.frozen"
      )
    return traverse_util.unflatten_dict(found, sep="/")

  def rates(self, params: Any) -> Any:
    """Returns each group's rate in its parameters' places."""
    return by_group(lambda group: group.learning_rate, self.group_of(params))

  def rule(self, params: Any, total_steps: int) -> optax.GradientTransformation:
    """Returns weight decay, moments, then each group's rate."""
    groups = self.group_of(params)
    schedule = self.schedule(total_steps)

    def decayed(updates: Any, params: Any) -> Any:
      return by_group(lambda group, u, p: u + group.weight_decay * p, groups, updates, params)

    def scaled(updates: Any, params: Any) -> Any:
      return by_group(lambda group, u: -group.learning_rate * u, groups, updates)

    return optax.chain(
      optax.stateless(decayed),
      optax.scale_by_adam(self.b1, self.b2, self.eps),
      optax.stateless(scaled),
      optax.scale_by_schedule(schedule),
    )


def by_group(function: Any, groups: Any, *trees: Any) -> Any:
  """Returns `function(group, *leaves)` for each parameter of a group; None, as in the trees, for a frozen one."""

  def apply(group: Group | None, *leaves: Any) -> Any:
    return None if group is None else function(group, *leaves)

  return jax.tree.map(apply, groups, *trees, is_leaf=lambda x: x is None or isinstance(x, Group))
