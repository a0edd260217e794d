"""wav2vec 1.0 (Schneider et al. 2019, https://arxiv.org/abs/1904.05862): the large model's feature extractor
and aggregator, under the names of fairseq's checkpoint `wav2vec_large.pt`.

With `padding="repo"` numerically equal to fairseq's, padding included.
"""

import ast
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.backbones.convert import Table, conv1d, norm
from mmjax.errors import UserError
from mmjax.layers import Array, Encoded, torch_uniform

EPSILON = 1e-5


class Wav2Vec1(nn.Module):
  """Aggregated features [B, F, D], 100 a second, and their mask; 0 where the mask is False.

  `audio` holds `wave` and `mask` [B, S] at 16 kHz, not normalised. A clip shorter than 465 samples has no
  valid frame, and an array shorter than that gives one frame. The extractor's features, before aggregation,
  are sown as `conv_features`. `pretrained` names where `pretrained.restore` finds the weights.

  Attributes:
    width: channels of every layer.
    aggregator_kernels: each layer sees this many frames up to the present one.
    log_compression: the extractor ends with log(|x| + 1).
    residual_scale: each aggregator layer gives (x + its input) * sqrt(residual_scale).
    padding: "exact" keeps what a batch pads a clip with out of its frames; "repo" normalises over it and
      counts frames as the authors of SSE-FT do (F5, F19).
  """

  normalize_wave: ClassVar[bool] = False

  width: int = 512
  conv_kernel: tuple[int, ...] = (10, 8, 4, 4, 4, 1, 1)
  conv_stride: tuple[int, ...] = (5, 4, 2, 2, 2, 1, 1)
  aggregator_kernels: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
  log_compression: bool = True
  residual_scale: float = 0.5
  padding: str = "exact"
  compute_dtype: Any = jnp.float32
  pretrained: str | None = None

  def __post_init__(self) -> None:
    if self.padding not in ("exact", "repo"):
      raise UserError(f"Wav2Vec1.padding: found {self.padding!r}, expected 'exact' or 'repo'")
    super().__post_init__()

  @property
  def hidden_size(self) -> int:
    """Width of a frame."""
    return self.width

  @property
  def hop(self) -> int:
    """Samples from one frame to the next."""
    return math.prod(self.conv_stride)

  def num_frames(self, samples: Any, convolutions: int | None = None) -> Any:
    """Returns the frames of a clip of `samples`, an int or an integer array, after all or the first convolutions."""
    for kernel, stride in list(zip(self.conv_kernel, self.conv_stride, strict=True))[:convolutions]:
      samples = (samples - kernel) // stride + 1
      samples = samples * (samples > 0)
    return samples

  @nn.compact
  def __call__(self, audio: Mapping[str, Any], *, train: bool) -> Encoded:
    wave, samples = jnp.asarray(audio["wave"]), jnp.sum(jnp.asarray(audio["mask"], bool), axis=1)
    padded = wave.shape[1] - samples
    window = 1
    for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
      window = (window - 1) * stride + kernel
    wave = jnp.pad(wave, ((0, 0), (0, max(window - wave.shape[1], 0))))
    exact = self.padding == "exact"

    x = wave.astype(jnp.float32)[..., None]
    for i, (kernel, stride) in enumerate(zip(self.conv_kernel, self.conv_stride, strict=True)):
      x = self.conv(f"extractor_{i}", x, kernel, stride, use_bias=False)
      mask = jnp.arange(x.shape[1]) < self.num_frames(samples, i + 1)[:, None]
      x = nn.relu(GroupNorm(name=f"extractor_norm_{i}")(x, mask if exact else None))
    if self.log_compression:
      x = jnp.log(jnp.abs(x) + 1)
    self.sow("intermediates", "conv_features", x)

    for i, kernel in enumerate(self.aggregator_kernels):
      # Only the past is seen, and before the start its first frame again.
      past = jnp.pad(x, ((0, 0), (kernel - 1, 0), (0, 0)), mode="edge")
      y = self.conv(f"aggregator_{i}", past, kernel, 1, use_bias=True)
      y = nn.relu(GroupNorm(name=f"aggregator_norm_{i}")(y, mask if exact else None))
      x = (x + y) * math.sqrt(self.residual_scale)
    if not exact:
      # As many frames as the padding alone would make, not the clip's own count (F5).
      mask = jnp.arange(x.shape[1]) < (x.shape[1] - self.num_frames(padded))[:, None]
    return Encoded(jnp.where(mask[..., None], x, 0).astype(self.compute_dtype), mask)

  def conv(self, name: str, x: Array, kernel: int, stride: int, *, use_bias: bool) -> Array:
    """Returns the convolution [B, F, D] of `x` [B, T, C], without padding."""
    uniform = torch_uniform(kernel * x.shape[-1])
    options: dict[str, Any] = {"kernel_init": uniform, "bias_init": uniform, "dtype": self.compute_dtype}
    return nn.Conv(self.width, (kernel,), stride, "VALID", use_bias=use_bias, name=name, **options)(x)


class GroupNorm(nn.Module):
  """Frames and channels of `x` [B, T, C] normalised together, in float32: over frames where `mask` [B, T] is
  True, and 0 elsewhere; None takes all frames. Scale and bias are each channel's own."""

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    real = jnp.ones((1, 1, 1), bool) if mask is None else mask[..., None]
    real = jnp.broadcast_to(real, (real.shape[0], x.shape[1], 1))
    x = x.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(real, axis=(1, 2), keepdims=True) * x.shape[-1], 1)
    mean = jnp.sum(jnp.where(real, x, 0), axis=(1, 2), keepdims=True) / count
    variance = jnp.sum(jnp.where(real, jnp.square(x - mean), 0), axis=(1, 2), keepdims=True) / count
    return jnp.where(real, (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias, 0)


def from_config(config: Mapping[str, Any], **overrides: Any) -> Wav2Vec1:
  """Returns the encoder that a fairseq checkpoint's arguments describe; `overrides` replace fields of `Wav2Vec1`.

  What is not given is as in the published large model. Raises `UserError` for a variant that `Wav2Vec1` does
  not compute.
  """
  supported = {
    "encoder": "cnn",
    "aggregator": "cnn",
    "skip_connections_feat": False,
    "skip_connections_agg": True,
    "no_conv_bias": False,
    "agg_zero_pad": False,
    "non_affine_group_norm": False,
    "project_features": "none",
  }
  for option, expected in supported.items():
    if config.get(option, expected) != expected:
      raise UserError(f"found {option} {config[option]!r}, expected {expected!r}, as in wav2vec_large.")
  fields: dict[str, Any] = {name: config[name] for name in ("log_compression", "residual_scale") if name in config}
  widths = set()
  if "conv_feature_layers" in config:
    width, fields["conv_kernel"], fields["conv_stride"] = layers(config["conv_feature_layers"])
    widths |= set(width)
  if "conv_aggregator_layers" in config:
    width, fields["aggregator_kernels"], strides = layers(config["conv_aggregator_layers"])
    widths |= set(width)
    if set(strides) != {1}:
      raise UserError(f"found conv_aggregator_layers with strides {strides}, expected 1 throughout.")
  if len(widths) > 1:
    raise UserError(f"found layers of {sorted(widths)} channels, expected one number throughout.")
  if widths:
    fields["width"] = widths.pop()
  return Wav2Vec1(**{**fields, **overrides})


def layers(description: Any) -> tuple[tuple[int, ...], ...]:
  """Returns widths, kernels and strides of fairseq's "[(width, kernel, stride), ...]", a list or its text."""
  try:
    rows = ast.literal_eval(description) if isinstance(description, str) else description
    widths, kernels, strides = (tuple(map(int, column)) for column in zip(*rows, strict=True))
  except (ValueError, SyntaxError, TypeError):
    raise UserError(f"found layers {description!r}, expected [(width, kernel, stride), ...]") from None
  return widths, kernels, strides


TABLE: Table = [
  (r"feature_extractor\.conv_layers\.(\d+)\.0\.weight", r"extractor_\1/kernel", conv1d),
  *norm(r"feature_extractor\.conv_layers\.(\d+)\.2", r"extractor_norm_\1"),
  (r"feature_aggregator\.conv_layers\.(\d+)\.1\.weight", r"aggregator_\1/kernel", conv1d),
  (r"feature_aggregator\.conv_layers\.(\d+)\.1\.bias", r"aggregator_\1/bias", None),
  *norm(r"feature_aggregator\.conv_layers\.(\d+)\.3", r"aggregator_norm_\1"),
  # What only pretraining needs.
  (r"wav2vec_predictions\..*", None, None),
]
