"""Optimisers that gin builds; each is a plain description until `build` sees the parameters."""

import dataclasses
import operator
import re
from typing import Any

import jax
import optax
from flax import traverse_util

from mmjax.errors import UserError


def matches(patterns: tuple[str, ...], params: Any) -> Any:
  """Returns a tree like `params`, True where a pattern matches the whole slash-separated path."""
  paths = traverse_util.flatten_dict(params, sep="/")
  marked = {path: any(re.fullmatch(pattern, path) for pattern in patterns) for path in paths}
  return traverse_util.unflatten_dict(marked, sep="/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
  """AdamW with PyTorch's defaults: decoupled weight decay .01 on every parameter, biases too (MM20).

  Attributes:
    frozen: regular expressions over whole parameter paths, "audio_encoder/feature_extractor/.*". Frozen
      parameters get no gradient, no moments and no decay; their backward pass is not computed.
    no_decay: regular expressions of parameters without weight decay.
    warmup_steps: optimiser steps over which the rate rises linearly from 0.
    decay: "constant", "linear" or "cosine" to 0 at the last step of the last epoch.
    clip_norm: largest global norm of the gradient; None does not clip.
    accumulate: micro-batches per optimiser step; their gradients are averaged over examples.
    reset_each_epoch: forget moments and bias correction at each epoch, as the authors' MMML does (MM1).
  """

  learning_rate: float
  weight_decay: float = 0.01
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  frozen: tuple[str, ...] = ()
  no_decay: tuple[str, ...] = ()
  warmup_steps: int = 0
  decay: str = "constant"
  clip_norm: float | None = None
  accumulate: int = 1
  reset_each_epoch: bool = False

  def __post_init__(self) -> None:
    if self.decay not in ("constant", "linear", "cosine"):
      raise UserError(f"AdamW.decay: found {self.decay!r}, expected 'constant', 'linear' or 'cosine'")
    if self.accumulate < 1:
      raise UserError(f"AdamW.accumulate: found {self.accumulate}, expected at least 1")

  def schedule(self, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the optimiser step."""
    rate = self.learning_rate
    after = max(total_steps - self.warmup_steps, 1)
    main = {
      "constant": optax.constant_schedule(rate),
      "linear": optax.linear_schedule(rate, 0.0, after),
      "cosine": optax.cosine_decay_schedule(rate, after),
    }[self.decay]
    if not self.warmup_steps:
      return main
    warmup = optax.linear_schedule(0.0, rate, self.warmup_steps)
    return optax.join_schedules([warmup, main], [self.warmup_steps])

  def frozen_mask(self, params: Any) -> Any:
    """Returns a tree like `params`, True where a parameter is not trained."""
    return matches(self.frozen, params)

  def build(self, params: Any, *, total_steps: int) -> optax.GradientTransformation:
    """Returns the optax transformation for `params` (arrays or shapes) and `total_steps` optimiser steps."""
    exempt = matches(self.no_decay, params)
    steps = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
    steps.append(
      optax.adamw(
        self.schedule(total_steps),
        self.b1,
        self.b2,
        self.eps,
        weight_decay=self.weight_decay,
        mask=jax.tree.map(operator.not_, exempt),
      )
    )
    return optax.chain(*steps)
