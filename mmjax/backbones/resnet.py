"""ResNet-18 and ResNet-34 (He et al. 2015, https://arxiv.org/abs/1512.03385), with state-dict names of
torchvision and of Hugging Face.

Numerically equal to torchvision's models without `fc` and to Hugging Face's ResNetModel, in evaluation mode.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from mmjax.backbones.convert import Table
from mmjax.backbones.vision_layers import BatchNorm, Conv, batch_norm, conv2d
from mmjax.errors import UserError
from mmjax.layers import Array, Encoded

STAGES = 4


class ResNet(nn.Module):
  """Hidden states [B, H/32 * W/32, D] of an image in row order, and as `pooled` their mean [B, D].

  `vision` holds `image` [B, H, W, C]; the first convolution has as many channels as the image, 1 or 3. Rows
  where `valid` [B] is False stay out of the batch statistics of training. Published weights expect RGB values
  in 0..1, resized to `image_size` and normalised by `image_mean` and `image_std` (P21). `pretrained` names
  where `pretrained.restore` finds the weights, and in the same way the statistics in `batch_stats`.

  Attributes:
    depths: blocks of each stage: 2, 2, 2, 2 in ResNet-18, 3, 4, 6, 3 in ResNet-34.
    widths: channels of each stage.
  """

  image_size: ClassVar[int] = 224
  image_mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
  image_std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)

  depths: tuple[int, ...] = (2, 2, 2, 2)
  widths: tuple[int, ...] = (64, 128, 256, 512)
  stem_width: int = 64
  compute_dtype: Any = jnp.float32
  pretrained: str | None = None

  def __post_init__(self) -> None:
    for name in ("depths", "widths"):
      if len(getattr(self, name)) != STAGES:
        raise UserError(f"ResNet.{name}: found {getattr(self, name)!r}, expected {STAGES} numbers")
    super().__post_init__()

  @property
  def hidden_size(self) -> int:
    """Width of the pooled vector."""
    return self.widths[-1]

  @nn.compact
  def __call__(self, vision: Mapping[str, Any], *, train: bool, valid: Array | None = None) -> Encoded:
    x = jnp.asarray(vision["image"])
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
      raise ValueError(f"ResNet: found images of shape {x.shape}, expected [batch, height, width, 1 or 3]")
    options = {"compute_dtype": self.compute_dtype, "valid": valid, "train": train}
    x = nn.relu(conv_norm("stem", x, self.stem_width, 7, 2, **options))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    self.sow("intermediates", "hidden_states", x)
    for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
      for i in range(depth):
        stride = 2 if stage > 0 and i == 0 else 1
        x = Block(width, stride, self.compute_dtype, name=f"block_{stage}_{i}")(x, valid, train=train)
      self.sow("intermediates", "hidden_states", x)
    pooled = jnp.mean(x, axis=(1, 2))
    hidden = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, H/32 * W/32, D]
    return Encoded(hidden.astype(self.compute_dtype), jnp.ones(hidden.shape[:2], bool), pooled)


class Block(nn.Module):
  """Two 3x3 convolutions around which the input passes, [B, H, W, C] to float32 [B, H/stride, W/stride, width]."""

  width: int
  stride: int
  compute_dtype: Any

  @nn.compact
  def __call__(self, x: Array, valid: Array | None, *, train: bool) -> Array:
    options = {"compute_dtype": self.compute_dtype, "valid": valid, "train": train}
    y = nn.relu(conv_norm("1", x, self.width, 3, self.stride, **options))
    y = conv_norm("2", y, self.width, 3, 1, **options)
    if self.stride > 1 or x.shape[-1] != self.width:
      x = conv_norm("shortcut", x, self.width, 1, self.stride, **options)
    return nn.relu(x + y)


def conv_norm(
  name: str, x: Array, width: int, kernel: int, stride: int, *, compute_dtype: Any, valid: Array | None, train: bool
) -> Array:
  """Returns `x` [B, H, W, C] convolved and normalised, float32; to be called in a module's `__call__`."""
  init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
  x = Conv(width, kernel, stride, kernel // 2, init, compute_dtype=compute_dtype, name=f"conv_{name}")(x)
  return BatchNorm(name=f"norm_{name}")(x, valid, train=train)


def from_config(config: Mapping[str, Any], **overrides: Any) -> ResNet:
  """Returns the encoder that a Hugging Face config.json describes; `overrides` replace fields of `ResNet`.

  Raises `UserError` for a variant that `ResNet` does not compute, such as ResNet-50, KeyError for a size that
  is missing.
  """
  supported = {"model_type": "resnet", "layer_type": "basic", "hidden_act": "relu", "downsample_in_first_stage": False}
  default = {"layer_type": "bottleneck"}  # what Hugging Face takes where a configuration does not say
  for option, expected in supported.items():
    found = config.get(option, default.get(option, expected))
    if found != expected:
      raise UserError(f"found {option} {found!r}, expected {expected!r}. Choose ResNet-18 or ResNet-34.")
  fields = {
    "depths": tuple(config["depths"]),
    "widths": tuple(config["hidden_sizes"]),
    "stem_width": config["embedding_size"],
  }
  return ResNet(**{**fields, **overrides})


def _unit(conv: str, norm: str, target: str, name: str) -> Table:
  return [(conv + r"\.weight", f"{target}conv_{name}/kernel", conv2d), *batch_norm(norm, f"{target}norm_{name}")]


def _torchvision() -> Table:
  rows = [*_unit("conv1", "bn1", "", "stem")]
  for stage in range(STAGES):
    source, target = rf"layer{stage + 1}\.(\d+)\.", rf"block_{stage}_\1/"
    for i in "12":
      rows += _unit(f"{source}conv{i}", f"{source}bn{i}", target, i)
    rows += _unit(rf"{source}downsample\.0", rf"{source}downsample\.1", target, "shortcut")
  return [*rows, (r"fc\..*", None, None)]


def _hugging_face() -> Table:
  def unit(source: str, target: str, name: str) -> Table:
    return _unit(rf"{source}\.convolution", rf"{source}\.normalization", target, name)

  rows = [*unit(r"embedder\.embedder", "", "stem")]
  source, target = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"block_\1_\2/"
  for i in "12":
    rows += unit(rf"{source}layer\.{int(i) - 1}", target, i)
  rows += unit(rf"{source}shortcut", target, "shortcut")
  return [*rows, (r"classifier\..*", None, None)]


TORCHVISION: Table = _torchvision()
HUGGING_FACE: Table = _hugging_face()
TABLE: Table = [*TORCHVISION, *((rf"(?:resnet\.)?{pattern}", path, fn) for pattern, path, fn in HUGGING_FACE)]
