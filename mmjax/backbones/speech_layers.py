"""The parts of the speech encoders: convolutions over the waveform and over positions, transformer layers."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.layers import Array, Attention, Linear, torch_uniform

EPSILON = 1e-5  # of the norms whose value no configuration sets
LONG = 64  # frames


def layer_norm(name: str, epsilon: float) -> nn.LayerNorm:
  """Returns a LayerNorm in float32, with the variance computed as torch does."""
  return nn.LayerNorm(epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


def relative_buckets(frames: int, buckets: int, max_distance: int) -> Array:
  """Returns the bucket [F, F] of each key as seen from each query: half of them to each side of it.

  Half of a side's buckets are exact distances, the rest widen logarithmically up to `max_distance` (WavLM).
  """
  offset = jnp.arange(frames)[None, :] - jnp.arange(frames)[:, None]
  side, distance = buckets // 2, jnp.abs(offset)
  exact = side // 2
  far = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact) * (side - exact)
  far = jnp.minimum((exact + far).astype(jnp.int32), side - 1)
  return jnp.where(offset > 0, side, 0) + jnp.where(distance < exact, distance, far)


def span_mask(key: Array, lengths: Array, size: int, *, prob: float, span: int, min_masks: int) -> Array:
  """Returns SpecAugment's mask [B, size]: True in random spans of `span` positions within the first `lengths` [B].

  `prob` is the share that the spans would cover if none overlapped; their number is rounded at random, at
  least `min_masks` and at most what fits side by side. A row shorter than a span has none.
  """
  key_round, key_start = jax.random.split(key)
  count = jnp.floor(prob * lengths / span + jax.random.uniform(key_round, lengths.shape))
  count = jnp.minimum(jnp.maximum(count, min_masks), lengths // span)
  score = jax.random.uniform(key_start, (lengths.shape[0], size))
  score = jnp.where(jnp.arange(size) <= (lengths - span)[:, None], score, -1.0)
  rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
  started = jnp.cumsum(rank < count[:, None], axis=1)  # spans that start at or before each position
  ended = jnp.pad(started, ((0, 0), (span, 0)))[:, :size]
  return started > ended


def grouped_conv(x: Array, kernel: Array, groups: int) -> Array:
  """Returns the convolution [B, T, D] of `x` [B, T, D] with `kernel` [W, D / groups, D], as long as `x`."""
  width = kernel.shape[0]
  padding = [(width // 2, (width - 1) // 2)]

  def conv(x: Array, kernel: Array, groups: int) -> Array:
    return jax.lax.conv_general_dilated(
      x, kernel, (1,), padding, dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )

  if jax.default_backend() != "cpu" or x.shape[1] < LONG:
    return conv(x, kernel, groups)
  # XLA's grouped convolution on CPU takes 5 to 10 times as long, forward and backward, as one for each group;
  # those take some seconds more to compile, which short clips do not win back.
  parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
  return jnp.concatenate([conv(part, weights, 1) for part, weights in parts], axis=-1)


class GroupNorm(nn.Module):
  """Each channel of `x` [B, T, C] normalised over the frames where `mask` [B, T] is True (None: over all)."""

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    weights = jnp.ones((1, x.shape[1], 1)) if mask is None else mask[..., None].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
    x = x.astype(jnp.float32)
    mean = jnp.sum(x * weights, axis=1, keepdims=True) / count
    variance = jnp.sum(jnp.square(x - mean) * weights, axis=1, keepdims=True) / count
    return (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias


class FeatureExtractor(nn.Module):
  """Strided convolutions with GELU, [B, S] to [B, F, C].

  `valid` [B] counts the first convolution's frames that its GroupNorm takes into account (None: all). Later
  frames of a clip need no care: no convolution here pads, so a valid frame sees valid samples only.
  """

  widths: tuple[int, ...]
  kernels: tuple[int, ...]
  strides: tuple[int, ...]
  use_bias: bool
  norm: str
  compute_dtype: Any

  @nn.compact
  def __call__(self, wave: Array, valid: Array | None) -> Array:
    x = wave.astype(jnp.float32)[..., None]
    for i, (width, kernel, stride) in enumerate(zip(self.widths, self.kernels, self.strides, strict=True)):
      x = nn.Conv(
        width,
        (kernel,),
        stride,
        "VALID",
        use_bias=self.use_bias,
        # The wave's own convolution costs next to nothing, its rounding in bfloat16 would reach every layer.
        dtype=self.compute_dtype if i else jnp.float32,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
        bias_init=torch_uniform(kernel * x.shape[-1]),
        name=f"conv_{i}",
      )(x)
      if self.norm == "layer":
        x = layer_norm(f"norm_{i}", EPSILON)(x)
      elif i == 0:
        mask = None if valid is None else jnp.arange(x.shape[1]) < valid[:, None]
        x = GroupNorm(name="norm_0")(x, mask)
      x = jax.nn.gelu(x, approximate=False)
    return x


class PositionalConv(nn.Module):
  """A grouped convolution over frames, [B, F, D] to [B, F, D].

  With `weight_norm` its kernel is g v / |v|, with a norm and a `g` for each tap; else LayerNorm follows it.
  """

  width: int
  groups: int
  weight_norm: bool
  compute_dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    shape = (self.width, channels // self.groups, channels)
    if self.weight_norm:
      v = self.param("v", nn.initializers.normal(2 / math.sqrt(self.width * channels)), shape, jnp.float32)
      length = jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2)))
      g = self.param("g", lambda _: length)
      kernel = v * (g / length)[:, None, None]
    else:
      init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
      kernel = self.param("kernel", init, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    x = grouped_conv(x.astype(self.compute_dtype), kernel.astype(self.compute_dtype), self.groups)
    x = x + bias.astype(self.compute_dtype)
    if not self.weight_norm:
      x = nn.LayerNorm(EPSILON, jnp.float32, use_scale=False, use_bias=False, use_fast_variance=False)(x)
    return jax.nn.gelu(x, approximate=False)


class Layer(nn.Module):
  """One transformer layer, [B, F, D] to [B, F, D], normalised after each half or, with `norm_first`, before.

  `relative` [H, F, F] is WavLM's position bias, which a gate scales by head and query.
  """

  heads: int
  intermediate_size: int
  layer_norm_eps: float
  hidden_dropout: float
  attention_dropout: float
  activation_dropout: float
  init_std: float
  norm_first: bool
  compute_dtype: Any

  @nn.compact
  def __call__(self, x: Array, mask: Array, relative: Array | None, *, train: bool) -> Array:
    def drop(y: Array, rate: float) -> Array:
      return nn.Dropout(rate)(y, deterministic=not train)

    def dense(name: str, features: int) -> Linear:
      return Linear(features, init_std=self.init_std, compute_dtype=self.compute_dtype, name=name)

    def attend(y: Array) -> Array:
      attention = Attention(
        self.heads,
        self.attention_dropout,
        init_std=self.init_std,
        compute_dtype=self.compute_dtype,
        name="attention",
      )
      bias = None if relative is None else self.gate(y) * relative  # [B, H, F, F]
      return drop(attention(y, y, mask, bias=bias, train=train), self.hidden_dropout)

    def feed_forward(y: Array) -> Array:
      y = jax.nn.gelu(dense("ffn_in", self.intermediate_size)(y), approximate=False)
      return drop(dense("ffn_out", x.shape[-1])(drop(y, self.activation_dropout)), self.hidden_dropout)

    attention_norm = layer_norm("attention_norm", self.layer_norm_eps)
    ffn_norm = layer_norm("ffn_norm", self.layer_norm_eps)
    if self.norm_first:
      x = x + attend(attention_norm(x))
      return x + feed_forward(ffn_norm(x))
    x = attention_norm(x + attend(x))
    return ffn_norm(x + feed_forward(x))

  def gate(self, y: Array) -> Array:
    """Returns the factor [B, H, F, 1] of the position bias, from the attention's input [B, F, D]."""
    y = y.reshape(*y.shape[:-1], self.heads, y.shape[-1] // self.heads)  # [B, F, H, D / H]
    y = Linear(8, init_std=self.init_std, name="gate")(y)
    y = jax.nn.sigmoid(y.reshape(*y.shape[:-1], 2, 4).sum(axis=-1))  # [B, F, H, 2]
    scale = self.param("gate_scale", nn.initializers.ones, (self.heads,), jnp.float32)
    factor = y[..., 0] * (y[..., 1] * scale - 1) + 2
    return factor.transpose(0, 2, 1)[..., None]
