"""LSTM and GRU over true lengths, with PyTorch's equations, initial values and gate order.

`x` is [B, T, I] and `mask` [B, T] is True where real. At a padded step the state stays as it is, so the state after
the loop is that of the true last step, and a reversed loop starts at the true end. A row without any real step gives
zeros. The input projection is one product outside the loop; only the recurrent product is inside.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.backbones.convert import Table, transpose
from mmjax.errors import UserError
from mmjax.layers import Array, torch_uniform

GATES = {"lstm": 4, "gru": 3}


def lstm_step(state: tuple[Array, Array], x: Array, *, recurrent: Callable[[Array], Array]) -> tuple[Array, Array]:
  """Returns the next (h, c), [B, H] each; `x` [B, 4H] holds the projected gates i, f, g, o."""
  h, c = state
  i, f, g, o = jnp.split(x + recurrent(h), 4, axis=-1)
  c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
  return nn.sigmoid(o) * jnp.tanh(c), c


def gru_step(state: tuple[Array], x: Array, *, recurrent: Callable[[Array], Array]) -> tuple[Array]:
  """Returns the next (h,), [B, H]; `x` [B, 3H] holds the projected gates r, z, n."""
  (h,) = state
  r, z, n = jnp.split(x, 3, axis=-1)
  r_h, z_h, n_h = jnp.split(recurrent(h), 3, axis=-1)
  r, z = nn.sigmoid(r + r_h), nn.sigmoid(z + z_h)
  n = jnp.tanh(n + r * n_h)
  return (n + z * (h - n),)


class LSTM(nn.Module):
  """One direction of one layer: `(x, mask)` to (outputs [B, T, H], last [B, H]); outputs are 0 at padding.

  Attributes:
    features: H.
    reverse: run from the true end to the start; `outputs` keep their places in time, `last` is the first step's.
    cell: "lstm" or "gru".

  Parameters: `input_kernel` [I, 4H], `recurrent_kernel` [H, 4H], `input_bias` and `recurrent_bias` [4H] (3H in a GRU).
  The two biases of an LSTM act as their sum, but under Adam that sum moves twice as fast as one bias would: torch
  has both. Products are in `compute_dtype`, the state is float32.
  """

  features: int
  reverse: bool = False
  cell: str = "lstm"
  compute_dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if self.cell not in GATES:
      raise UserError(f"LSTM.cell: found {self.cell!r}, expected 'lstm' or 'gru'")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> tuple[Array, Array]:
    width, gates = self.features, GATES[self.cell] * self.features
    # torch draws every array of the layer from +-1/sqrt(H), whatever its fan-in.
    uniform = torch_uniform(width)
    kernel = self.param("input_kernel", uniform, (x.shape[-1], gates), jnp.float32)
    hidden_kernel = self.param("recurrent_kernel", uniform, (width, gates), jnp.float32).astype(self.compute_dtype)
    bias = self.param("input_bias", uniform, (gates,), jnp.float32)
    hidden_bias = self.param("recurrent_bias", uniform, (gates,), jnp.float32)
    # Time first, so that each step of the loop reads one contiguous block.
    steps = jnp.swapaxes(x, 0, 1).astype(self.compute_dtype) @ kernel.astype(self.compute_dtype)
    steps = steps.astype(jnp.float32) + bias  # [T, B, gates]

    def recurrent(h: Array) -> Array:
      return (h.astype(self.compute_dtype) @ hidden_kernel).astype(jnp.float32) + hidden_bias

    zeros = jnp.zeros((x.shape[0], width), jnp.float32)
    start: tuple[Array, ...] = (zeros, zeros) if self.cell == "lstm" else (zeros,)
    advance: Any = lstm_step if self.cell == "lstm" else gru_step

    # Without the checkpoint, stacking each step's gates takes more than half of the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state: tuple[Array, ...], inputs: tuple[Array, Array]) -> tuple[tuple[Array, ...], Array]:
      step, real = inputs[0], inputs[1][:, None]
      moved = advance(state, step, recurrent=recurrent)
      state = tuple(jnp.where(real, new, old) for new, old in zip(moved, state, strict=True))
      return state, jnp.where(real, state[0], 0)

    state, outputs = jax.lax.scan(body, start, (steps, mask.T), reverse=self.reverse)
    return jnp.swapaxes(outputs, 0, 1), state[0]


class BiLSTM(nn.Module):
  """Both directions, `forward` and `backward`: `(x, mask)` to (outputs, last), merged by "sum" or "concat".

  "concat" gives 2H features, as torch's bidirectional layer does; `last` merges each direction's own last state.
  """

  features: int
  merge: str = "concat"
  cell: str = "lstm"
  compute_dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    if self.merge not in ("sum", "concat"):
      raise UserError(f"BiLSTM.merge: found {self.merge!r}, expected 'sum' or 'concat'")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> tuple[Array, Array]:
    there = LSTM(self.features, False, self.cell, self.compute_dtype, name="forward")(x, mask)
    back = LSTM(self.features, True, self.cell, self.compute_dtype, name="backward")(x, mask)
    if self.merge == "sum":
      return there[0] + back[0], there[1] + back[1]
    outputs, last = (jnp.concatenate(pair, axis=-1) for pair in zip(there, back, strict=True))
    return outputs, last


def torch_rows(source: str, target: str, *, layer: int = 0, bidirectional: bool = False) -> Table:
  """Returns the rows of one layer of torch's LSTM or GRU at `source` (a regular expression) for a module at `target`.

  torch's gate order (i, f, g, o; r, z, n) is kept.
  """
  sides = (("", "/forward"), ("_reverse", "/backward")) if bidirectional else (("", ""),)
  rows: list = []
  for theirs, ours in sides:
    for short, name in (("ih", "input"), ("hh", "recurrent")):
      rows.append((f"{source}weight_{short}_l{layer}{theirs}", f"{target}{ours}/{name}_kernel", transpose))
      rows.append((f"{source}bias_{short}_l{layer}{theirs}", f"{target}{ours}/{name}_bias", None))
  return rows
