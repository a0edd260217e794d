"""What the image encoders share: convolution, batch normalisation with torch's statistics, the rows that load them.

Images are `[B, H, W, C]`. Running statistics lie in the collection `batch_stats`, `mean` and `var` of each norm.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.backbones.convert import Table
from mmjax.layers import Array, Initializer

SMALL = 16  # positions


class Conv(nn.Module):
  """A convolution of `x` [B, H, W, C] with a square kernel, `padding` zeros on each side: [B, H', W', features]."""

  features: int
  kernel: int
  stride: int
  padding: int
  kernel_init: Initializer
  bias_init: Initializer | None = None  # None has no bias
  compute_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.kernel, self.kernel, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    y = convolve(x.astype(self.compute_dtype), kernel.astype(self.compute_dtype), self.stride, self.padding)
    if self.bias_init is not None:
      y = y + self.param("bias", self.bias_init, (self.features,), jnp.float32).astype(self.compute_dtype)
    return y


def convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
  """Returns the convolution [B, H', W', O] of `x` [B, H, W, C] with `kernel` [K, K, C, O]."""
  size, sides = kernel.shape[0], x.shape[1:3]
  rows, columns = ((side + 2 * padding - size) // stride + 1 for side in sides)
  if jax.default_backend() != "cpu" or rows * columns > SMALL:
    pads = ((padding, padding), (padding, padding))
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
  # One matrix product: with few positions XLA's convolution on CPU takes 5 to 50 times as long, forward and
  # backward. What of the kernel only ever meets padding is left out.
  top, bottom = met(sides[0], rows, size, stride, padding)
  left, right = met(sides[1], columns, size, stride, padding)
  padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  patches = [
    padded[:, i : i + stride * rows - stride + 1 : stride, j : j + stride * columns - stride + 1 : stride]
    for i in range(top, bottom)
    for j in range(left, right)
  ]
  kernel = kernel[top:bottom, left:right].reshape(-1, kernel.shape[-1])
  return jnp.concatenate(patches, axis=-1) @ kernel


def met(side: int, out: int, size: int, stride: int, padding: int) -> tuple[int, int]:
  """Returns the part of a kernel's `size` that meets real positions of a `side`, from its first to behind its last."""
  real = [tap for tap in range(size) if any(0 <= i * stride + tap - padding < side for i in range(out))]
  return real[0], real[-1] + 1


class BatchNorm(nn.Module):
  """Each channel of `x` [B, ..., C] normalised, in float32, as torch's BatchNorm does.

  In training by the mean and the biased variance of this batch, which also move the running ones: by
  `momentum` (torch's, the weight of the new value, which Flax calls 1 - momentum), and with the unbiased
  variance. In evaluation by the running ones. Rows where `valid` [B] is False count in neither; a batch
  without a valid row leaves the running statistics as they are.
  """

  momentum: float = 0.1
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Array, valid: Array | None = None, *, train: bool) -> Array:
    width = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, width, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, width, jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, width, jnp.float32)
    x = x.astype(jnp.float32)
    if not train:
      mean, variance = running_mean.value, running_var.value
    else:
      axes = tuple(range(x.ndim - 1))
      rows = jnp.ones(x.shape[0], bool) if valid is None else valid
      real = rows.reshape(-1, *(1 for _ in x.shape[1:]))
      count = jnp.sum(rows).astype(jnp.float32) * (x[0, ..., 0].size)
      mean = jnp.sum(jnp.where(real, x, 0), axes) / jnp.maximum(count, 1.0)
      variance = jnp.sum(jnp.where(real, jnp.square(x - mean), 0), axes) / jnp.maximum(count, 1.0)
      if not self.is_initializing():
        unbiased = variance * count / jnp.maximum(count - 1, 1.0)
        rate = jnp.where(count > 0, self.momentum, 0.0)
        running_mean.value += rate * (mean - running_mean.value)
        running_var.value += rate * (unbiased - running_var.value)
    return (x - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias


def conv2d(x: np.ndarray) -> np.ndarray:
  """Conv2d: torch's [out, in, height, width] -> [height, width, in, out]."""
  return x.transpose(2, 3, 1, 0)


def batch_norm(source: str, target: str) -> Table:
  """Returns the rows of a BatchNorm, its running statistics included."""
  return [
    (source + r"\.weight", target + "/scale", None),
    (source + r"\.bias", target + "/bias", None),
    (source + r"\.running_mean", target + "/mean", None),
    (source + r"\.running_var", target + "/var", None),
    (source + r"\.num_batches_tracked", None, None),
  ]
