"""MultiModal Masking (Georgiou, Paraskevopoulos, Potamianos; INTERSPEECH 2021), a layer for any fusion.

https://doi.org/10.21437/Interspeech.2021-1739, code https://github.com/efthymisgeo/multimodal-masking

While training, one modality at a time is hidden, so that the fusion cannot lean on a dominant one. Ids such as M1
name the places where the paper and its code differ.
"""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from mmjax.errors import UserError
from mmjax.layers import Array


class ModalityMask(nn.Module):
  """Hides one modality at a time: {name: [B, T, D] or [B, D]} to the same, D of any width.

  In evaluation it changes nothing, except with `rescale="repo"`. It draws from the rng "dropout" and has no
  parameters.

  Attributes:
    kind: "hard" sets one modality to zero wherever the coin hits. "soft" picks one modality and hides each of its
      features with probability p, with no coin before. "dropout" is plain dropout on every stream, the paper's
      baseline. "none" leaves all as it is.
    p: the probability of hiding.
    p_mod: {name: weight} of being the one that is hidden, over exactly the streams given; None for equal weights.
    coin: how often a hard mask's coin is tossed: for each "step" of each sample, as the paper says, once a "sample",
      or once a "batch", as the authors' code does, which then hides something at every step of every sample (M1).
      A soft mask picks its modality once for the whole "batch", as the authors' does, or for each sample.
    sequential: picks the modality anew at every step, else once a sample (M2) or, for a soft mask's "batch", once.
      The authors' sequential soft mask fails; this one does what it is for (M3).
    rescale: "train" divides a stream by its own probability of being kept, as inverted dropout does. "repo" divides
      every stream by 1 - p / number of streams, in evaluation too (M4, M16). None: as it is.
    noop_multidropout: makes "dropout" do nothing, as the authors' baseline does (M5).

  Draws at steps need streams of equal length; without them (`coin` not "step", `sequential=False`) any lengths go.
  """

  kind: str = "hard"
  p: float = 0.2
  p_mod: Mapping[str, float] | None = None
  coin: str = "step"
  sequential: bool = True
  rescale: str | None = None
  noop_multidropout: bool = False

  def __post_init__(self) -> None:
    choices = {
      "kind": ("hard", "soft", "dropout", "none"),
      "coin": ("step", "sample", "batch"),
      "rescale": (None, "train", "repo"),
    }
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise UserError(f"ModalityMask.{name}: found {getattr(self, name)!r}, expected one of {allowed}")
    if not 0 <= self.p <= 1:
      raise UserError(f"ModalityMask.p: found {self.p!r}, expected a probability from 0 to 1")
    weights = list((self.p_mod or {}).values())
    if weights and not (all(w >= 0 and math.isfinite(w) for w in weights) and sum(weights) > 0):
      raise UserError(f"ModalityMask.p_mod: found {dict(self.p_mod or {})}, expected weights of 0 or more, not all 0")
    if self.kind == "dropout" and self.rescale is not None:
      raise UserError(
        f"ModalityMask.rescale: found {self.rescale!r} with kind='dropout', which scales by itself: expected None"
      )
    if self.p_mod is not None:
      self.p_mod = FrozenDict(self.p_mod)  # a module must be hashable
    super().__post_init__()

  @nn.compact
  def __call__(self, streams: Mapping[str, Array], *, train: bool) -> dict[str, Array]:
    if self.kind == "none" or self.p == 0:
      return dict(streams)
    if self.kind == "dropout":
      dropout = nn.Dropout(0.0 if self.noop_multidropout else self.p)
      return {name: dropout(x, deterministic=not train) for name, x in streams.items()}
    # jit hands dicts over sorted, so that only this order is the same with and without it.
    names = sorted(streams)
    shares = self.shares(names)
    if train:
      hidden = self.draw({name: streams[name] for name in names}, shares)
      streams = {name: jnp.where(hidden[name], 0, x) for name, x in streams.items()}
    kept = {name: 1.0 for name in names}
    if self.rescale == "repo":
      kept = {name: 1 - self.p / len(names) for name in names}
    elif self.rescale == "train" and train:
      kept = {name: 1 - self.p * share for name, share in zip(names, shares, strict=True)}
    # A stream that is never kept is zero already.
    return {name: x * (1 / kept[name] if kept[name] else 1.0) for name, x in streams.items()}

  def shares(self, names: Sequence[str]) -> list[float]:
    """Returns the probability of each name to be the one that is picked."""
    if self.p_mod is None:
      return [1 / len(names)] * len(names)
    if set(self.p_mod) != set(names):
      raise UserError(f"ModalityMask.p_mod: found {', '.join(sorted(self.p_mod))}, expected {', '.join(names)}")
    total = sum(self.p_mod.values())
    return [self.p_mod[name] / total for name in names]

  def draw(self, streams: Mapping[str, Array], shares: Sequence[float]) -> dict[str, Array]:
    """Returns {name: True where hidden}, each of a shape that broadcasts with its stream."""
    rows, steps = next(iter(streams.values())).shape[0], 1
    if self.sequential or (self.kind == "hard" and self.coin == "step"):
      steps = self.common_length(streams)
    pick_rows = 1 if self.kind == "soft" and self.coin == "batch" else rows
    pick_key, coin_key = jax.random.split(self.make_rng("dropout"))
    picked = jax.random.categorical(
      pick_key, jnp.log(jnp.array(shares)), shape=(pick_rows, steps if self.sequential else 1)
    )
    hidden = {}
    if self.kind == "hard":
      coins = {"step": (rows, steps), "sample": (rows, 1), "batch": (1, 1)}[self.coin]
      hit = jax.random.bernoulli(coin_key, self.p, coins)
    for i, (name, x) in enumerate(streams.items()):
      mine = picked == i  # [B or 1, T or 1]
      if self.kind == "hard":
        mine = mine & hit
      hidden[name] = mine[..., None] if x.ndim == 3 else mine
      if self.kind == "soft":
        hidden[name] &= jax.random.bernoulli(jax.random.fold_in(coin_key, i), self.p, x.shape)
    return hidden

  def common_length(self, streams: Mapping[str, Array]) -> int:
    """Returns T of streams [B, T, D], 1 of streams [B, D]; UserError where they differ."""
    found = {name: x.shape[1] if x.ndim == 3 else 1 for name, x in streams.items()}
    if len(set(found.values())) > 1:
      lengths = ", ".join(f"{name} {length}" for name, length in found.items())
      raise UserError(
        f"ModalityMask with coin={self.coin!r} and sequential={self.sequential} draws at each step: found {lengths} "
        "steps, expected equal lengths (aligned streams); for others bind ModalityMask.coin = 'sample' and "
        "ModalityMask.sequential = False"
      )
    return next(iter(found.values()))
