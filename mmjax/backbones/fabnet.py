"""FAb-Net's encoder of faces (Wiles, Koepke, Zisserman 2018, https://arxiv.org/abs/1808.06882), under the names
of the authors' checkpoints, such as `affectnet_4views.pth`.

Numerically equal to the authors' encoder in evaluation mode.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from mmjax.backbones.convert import Table
from mmjax.backbones.vision_layers import BatchNorm, Conv, batch_norm, conv2d
from mmjax.errors import UserError
from mmjax.layers import Array, Encoded, torch_uniform

LAYERS = 8


class FabNet(nn.Module):
  """Hidden states [B, H/256 * W/256, D] of face crops in row order, and as `pooled` their mean [B, D].

  `vision` holds `image` [B, H, W, 3], RGB in 0..1. The authors' crops have 256 x 256 pixels and give one
  position. Rows where `valid` [B] is False stay out of the batch statistics of training. `pretrained` names
  where `pretrained.restore` finds the weights, and in the same way the statistics in `batch_stats`.

  Attributes:
    hidden_size: width of the last layer.
    filters: channels of the first layer; they double up to eight times as many.
  """

  image_size: ClassVar[int] = 256
  image_mean: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.0)
  image_std: ClassVar[tuple[float, ...]] = (1.0, 1.0, 1.0)

  hidden_size: int = 256
  filters: int = 32
  compute_dtype: Any = jnp.float32
  pretrained: str | None = None

  @nn.compact
  def __call__(self, vision: Mapping[str, Any], *, train: bool, valid: Array | None = None) -> Encoded:
    x = jnp.asarray(vision["image"])
    if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 2**LAYERS:
      raise ValueError(f"FabNet: found images of shape {x.shape}, expected [batch, >= 256, >= 256, 3]")
    for i in range(LAYERS):
      width = self.hidden_size if i == LAYERS - 1 else self.filters * 2 ** min(i, 3)
      uniform = torch_uniform(16 * x.shape[-1])
      x = Conv(width, 4, 2, 1, uniform, uniform, self.compute_dtype, name=f"conv_{i}")(x)
      self.sow("intermediates", "states", x)
      if 0 < i < LAYERS - 1:
        x = BatchNorm(name=f"norm_{i}")(x, valid, train=train)
        self.sow("intermediates", "states", x)
      if i < LAYERS - 1:
        x = nn.leaky_relu(x, 0.2)
    hidden = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, H/256 * W/256, D]
    return Encoded(hidden, jnp.ones(hidden.shape[:2], bool), jnp.mean(hidden.astype(jnp.float32), axis=1))


def from_config(config: Mapping[str, Any], **overrides: Any) -> FabNet:
  """Returns the encoder that `config` describes by `inner_nc` and `num_additional_ids`, the authors' names;
  `overrides` replace fields of `FabNet`. Raises `UserError` for another number of input channels than 3."""
  if config.get("input_nc", 3) != 3:
    raise UserError(f"found input_nc {config['input_nc']!r}, expected 3.")
  names = {"inner_nc": "hidden_size", "num_additional_ids": "filters"}
  fields = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
  return FabNet(**{**fields, **overrides})


def _table() -> Table:
  rows: list = []
  place = 0  # in the authors' sequence of convolution, norm and activation
  for i in range(LAYERS):
    source = rf"encoder\.{place}"
    rows += [(rf"{source}\.weight", f"conv_{i}/kernel", conv2d), (rf"{source}\.bias", f"conv_{i}/bias", None)]
    if 0 < i < LAYERS - 1:
      place += 1
      rows += batch_norm(rf"encoder\.{place}", f"norm_{i}")
    place += 2
  return rows


TABLE: Table = [
  *_table(),
  # The decoder and the masks of pretraining.
  (r"(?!encoder\.).*", None, None),
]
