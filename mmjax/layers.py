"""Layers that more than one network uses.

Arrays are `[batch, time, features]`; masks are boolean, True where real.
`compute_dtype` is the type of activations and matrix products; parameters,
softmax and normalisation statistics are float32 whatever it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Initializer = Callable[..., Array]


class Encoded(NamedTuple):
  """What an encoder returns for one stream."""

  hidden: Array  # [B, T, D] last hidden states
  mask: Array  # [B, T] bool, True at real positions
  pooled: Any = None  # [B, D] one vector per example, where there is one


def torch_uniform(fan_in: int) -> Initializer:
  """Returns torch's default for Linear, LSTM and conv: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nn.Module):
  """Dense layer `[..., I] -> [..., features]` initialised as torch does.

  `init_std` (a checkpoint's `initializer_range`) draws the kernel from N(0, std)
  and zeroes the bias instead, as the Hugging Face encoders do; `kernel_init` likewise, by any initializer.
  """

  features: int
  use_bias: bool = True
  init_std: float | None = None
  compute_dtype: Any = jnp.float32
  kernel_init: Initializer | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    fan_in = x.shape[-1]
    kernel_init, bias_init = torch_uniform(fan_in), torch_uniform(fan_in)
    if self.kernel_init is not None:
      kernel_init, bias_init = self.kernel_init, nn.initializers.zeros
    elif self.init_std is not None:
      kernel_init, bias_init = nn.initializers.normal(self.init_std), nn.initializers.zeros
    kernel = self.param("kernel", kernel_init, (fan_in, self.features), jnp.float32)
    y = x.astype(self.compute_dtype) @ kernel.astype(self.compute_dtype)
    if self.use_bias:
      bias = self.param("bias", bias_init, (self.features,), jnp.float32)
      y = y + bias.astype(self.compute_dtype)
    return y


def masked_softmax(scores: Array, mask: Array | None) -> Array:
  """Softmax over the last axis in float32; a row without any real key comes out uniform, not NaN.

  The masked score is the smallest finite float32, not -inf (MM14).
  """
  scores = scores.astype(jnp.float32)
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(scores, axis=-1)


class Attention(nn.Module):
  """Multi-head attention of `query` [B, Q, D] on `context` [B, K, C], giving [B, Q, D].

  `mask` [B, K] says which keys are real, `bias` [B, H, Q, K] is added to the scores.
  Parameters: `query`, `key`, `value`, `out`, each a Linear.
  """

  heads: int
  dropout: float = 0.0
  key_bias: bool = True
  init_std: float | None = None
  compute_dtype: Any = jnp.float32
  qkv_init: Initializer | None = None

  @nn.compact
  def __call__(
    self, query: Array, context: Array, mask: Array | None, *, bias: Array | None = None, train: bool
  ) -> Array:
    width = query.shape[-1]
    if width % self.heads:
      raise ValueError(f"attention width {width} is not a multiple of heads={self.heads}")

    def project(name: str, x: Array, use_bias: bool = True) -> Array:
      x = Linear(width, use_bias, self.init_std, self.compute_dtype, self.qkv_init, name=name)(x)
      return x.reshape(*x.shape[:-1], self.heads, width // self.heads)  # [B, T, H, D/H]

    q = project("query", query) * (width // self.heads) ** -0.5
    k = project("key", context, self.key_bias)
    v = project("value", context)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    if bias is not None:
      scores = scores + bias
    weights = masked_softmax(scores, None if mask is None else mask[:, None, None, :])
    weights = nn.Dropout(self.dropout)(weights, deterministic=not train)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(self.compute_dtype), v)
    mixed = mixed.reshape(*query.shape[:-1], width)  # [B, Q, D]
    return Linear(width, True, self.init_std, self.compute_dtype, name="out")(mixed)


def masked_mean(x: Array, mask: Array) -> Array:
  """Mean of `x` [B, T, D] over real positions of `mask` [B, T], in float32; zeros where there is none."""
  weights = mask.astype(jnp.float32)[..., None]
  total = jnp.sum(x.astype(jnp.float32) * weights, axis=1)
  return total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)


def run_layer(layer: nn.Module, *arrays: Any, remat: bool, train: bool) -> Any:
  """Returns `layer(*arrays, train=train)`.

  With `remat` the backward pass computes the layer's activations again instead of keeping them: about a third
  more work for a fraction of the memory.
  """

  def run(layer: Any, *arrays: Any) -> Any:
    return layer(*arrays, train=train)

  return (nn.remat(run) if remat and train else run)(layer, *arrays)
