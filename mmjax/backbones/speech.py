"""Speech encoders from the waveform: wav2vec 2.0 (Baevski et al. 2020, https://arxiv.org/abs/2006.11477),
HuBERT (Hsu et al. 2021, https://arxiv.org/abs/2106.07447), data2vec-audio (Baevski et al. 2022,
https://arxiv.org/abs/2202.03555) and WavLM (Chen et al. 2021, https://arxiv.org/abs/2110.13900).

One network with switches: strided convolutions, a projection, convolutions that tell positions, transformer
layers. With `padding="hf"` numerically equal to Hugging Face's models in evaluation mode.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.backbones.convert import Table, conv1d, linear, norm, under
from mmjax.backbones.speech_layers import (
  FeatureExtractor,
  Layer,
  PositionalConv,
  layer_norm,
  relative_buckets,
  span_mask,
)
from mmjax.errors import UserError
from mmjax.layers import Array, Encoded, Linear, run_layer, torch_uniform

KINDS = ("data2vec-audio", "hubert", "wav2vec2", "wavlm")
# Fields that bear the name they have in a config.json, without those that turn LayerDrop and SpecAugment on.
REGULARIZATION = ("layerdrop", "mask_time_prob", "mask_feature_prob")
SAME = (
  *("conv_bias", "layer_norm_eps", "feat_proj_dropout", "hidden_dropout", "attention_dropout", "activation_dropout"),
  *("mask_time_length", "mask_time_min_masks", "mask_feature_length", "mask_feature_min_masks"),
)


class Speech(nn.Module):
  """Hidden states [B, F, D], 50 a second, and their mask; 0 where the mask is False.

  `audio` holds `wave` and `mask` [B, S] at 16 kHz. A clip shorter than 400 samples has no valid frame, and
  an array shorter than that gives one frame. The parameters of the convolutions lie below
  `feature_extractor`. `pretrained` names where `pretrained.restore` finds the weights.

  Attributes:
    conv_norm: "group", after the first convolution only, or "layer", after each.
    norm_first: transformer layers of the "stable" kind.
    pos_kernel, pos_layers, pos_groups: width, number and groups of the positional convolutions.
    weight_norm: False gives data2vec's positional convolutions, with LayerNorm.
    buckets, max_distance: of WavLM's relative positions; 0 has none.
    padding: "exact" keeps what a batch pads a clip with out of its frames; "hf" lets it in as Hugging Face
      does (MM22).
    layerdrop, mask_time_*, mask_feature_*: LayerDrop and SpecAugment in training (MM28).
  """

  normalize_wave: ClassVar[bool] = True

  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  conv_dim: tuple[int, ...] = (512,) * 7
  conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
  conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
  conv_bias: bool = False
  conv_norm: str = "group"
  norm_first: bool = False
  pos_kernel: int = 128
  pos_layers: int = 1
  pos_groups: int = 16
  weight_norm: bool = True
  buckets: int = 0
  max_distance: int = 800
  layer_norm_eps: float = 1e-5
  feat_proj_dropout: float = 0.0
  hidden_dropout: float = 0.1
  attention_dropout: float = 0.1
  activation_dropout: float = 0.1
  layerdrop: float = 0.0
  mask_time_prob: float = 0.0
  mask_time_length: int = 10
  mask_time_min_masks: int = 2
  mask_feature_prob: float = 0.0
  mask_feature_length: int = 10
  mask_feature_min_masks: int = 0
  init_std: float = 0.02
  padding: str = "exact"
  compute_dtype: Any = jnp.float32
  remat: bool = False  # see layers.run_layer
  pretrained: str | None = None

  def __post_init__(self) -> None:
    for name, allowed in {"padding": ("exact", "hf"), "conv_norm": ("group", "layer")}.items():
      if getattr(self, name) not in allowed:
        raise UserError(f"Speech.{name}: found {getattr(self, name)!r}, expected one of {allowed}")
    super().__post_init__()

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
    window = 1
    for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
      window = (window - 1) * stride + kernel
    wave = jnp.pad(wave, ((0, 0), (0, max(window - wave.shape[1], 0))))
    exact = self.padding == "exact"

    x = FeatureExtractor(
      tuple(self.conv_dim),
      tuple(self.conv_kernel),
      tuple(self.conv_stride),
      self.conv_bias,
      self.conv_norm,
      self.compute_dtype,
      name="feature_extractor",
    )(wave, self.num_frames(samples, 1) if exact else None)
    self.sow("intermediates", "conv_features", x)
    frames = self.num_frames(samples)
    mask = jnp.arange(x.shape[1]) < frames[:, None]

    x = layer_norm("projection_norm", self.layer_norm_eps)(x)
    uniform = torch_uniform(x.shape[-1])
    x = Linear(self.hidden_size, kernel_init=uniform, name="projection")(x)
    self.sow("intermediates", "projected", x)
    x = nn.Dropout(self.feat_proj_dropout)(x, deterministic=not train)
    x = jnp.where(mask[..., None], self.spec_augment(x, frames, train=train), 0)

    positions = x
    for i in range(self.pos_layers):
      conv = PositionalConv(self.pos_kernel, self.pos_groups, self.weight_norm, self.compute_dtype, name=f"pos_{i}")
      positions = conv(positions)
      if exact:
        # The next convolution would carry what the bias left in padded frames into valid ones.
        positions = jnp.where(mask[..., None], positions, 0)
    x = x + positions
    norm = layer_norm("norm", self.layer_norm_eps)
    if not self.norm_first:
      x = norm(x)
    x = nn.Dropout(self.hidden_dropout)(x, deterministic=not train)

    relative = self.relative_bias(x.shape[1]) if self.buckets else None
    self.sow("intermediates", "hidden_states", x)
    for i in range(self.num_layers):
      layer = Layer(
        self.num_heads,
        self.intermediate_size,
        self.layer_norm_eps,
        self.hidden_dropout,
        self.attention_dropout,
        self.activation_dropout,
        self.init_std,
        self.norm_first,
        self.compute_dtype,
        name=f"layer_{i}",
      )
      y = run_layer(layer, x, mask, relative, remat=self.remat, train=train)
      if train and self.layerdrop:
        y = jnp.where(jax.random.bernoulli(self.make_rng("dropout"), self.layerdrop), x, y)
      x = y
      self.sow("intermediates", "hidden_states", x)
    if self.norm_first:
      x = norm(x)
    return Encoded(jnp.where(mask[..., None], x, 0).astype(self.compute_dtype), mask)

  def spec_augment(self, x: Array, frames: Array, *, train: bool) -> Array:
    """Returns `x` [B, F, D] with random spans of valid frames replaced by a learned vector, of channels by 0."""
    if self.mask_time_prob:
      embedding = self.param("masked_spec_embed", nn.initializers.uniform(1.0), (x.shape[-1],), jnp.float32)
      if train:
        options = {"span": self.mask_time_length, "min_masks": self.mask_time_min_masks}
        key = self.make_rng("dropout")
        masked = span_mask(key, frames, x.shape[1], prob=self.mask_time_prob, **options)
        x = jnp.where(masked[..., None], embedding.astype(x.dtype), x)
    if self.mask_feature_prob and train:
      options = {"span": self.mask_feature_length, "min_masks": self.mask_feature_min_masks}
      widths = jnp.full(x.shape[0], x.shape[-1])
      masked = span_mask(self.make_rng("dropout"), widths, x.shape[-1], prob=self.mask_feature_prob, **options)
      x = jnp.where(masked[:, None, :], 0, x)
    return x

  def relative_bias(self, frames: int) -> Array:
    """Returns WavLM's bias [H, F, F], which all layers share."""
    init = nn.initializers.normal(self.init_std)
    table = self.param("relative", init, (self.buckets, self.num_heads), jnp.float32)
    near = relative_buckets(frames, self.buckets, self.max_distance)
    return jnp.take(table, near, axis=0).transpose(2, 0, 1)


def from_config(config: Mapping[str, Any], *, regularization: str = "dropout", **overrides: Any) -> Speech:
  """Returns the encoder that a Hugging Face config.json describes; `overrides` replace fields of `Speech`.

  `regularization="dropout"` takes the dropout rates and leaves LayerDrop and SpecAugment off; "config" turns
  these on, too, at the rates of the configuration, as Hugging Face's models train (MM28).
  Raises `UserError` for a variant that `Speech` does not compute, KeyError for a size that is missing.
  """
  if regularization not in ("dropout", "config"):
    raise UserError(f"regularization: found {regularization!r}, expected 'dropout' or 'config'")
  kind = config["model_type"]
  if kind not in KINDS:
    raise UserError(f"found model_type {kind!r}, expected one of {', '.join(KINDS)}.")
  supported = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "add_adapter": False,
    "conv_pos_batch_norm": False,
    "feat_proj_layer_norm": True,
  }
  for option, expected in supported.items():
    if config.get(option, expected) != expected:
      raise UserError(f"found {option} {config[option]!r}, expected {expected!r}. Choose another speech encoder.")
  fields = {
    "hidden_size": config["hidden_size"],
    "num_layers": config["num_hidden_layers"],
    "num_heads": config["num_attention_heads"],
    "intermediate_size": config["intermediate_size"],
    "pos_groups": config.get("num_conv_pos_embedding_groups", 16),
    "init_std": config.get("initializer_range", 0.02),
  }
  if kind == "data2vec-audio":
    fields["conv_norm"] = "layer"
    fields["weight_norm"] = False
    fields["pos_layers"] = config.get("num_conv_pos_embeddings", 5)
    fields["pos_kernel"] = config.get("conv_pos_kernel_size", 19)
  else:
    fields["conv_norm"] = config.get("feat_extract_norm", "group")
    fields["norm_first"] = config.get("do_stable_layer_norm", False)
    fields["pos_kernel"] = config.get("num_conv_pos_embeddings", 128)
  if kind == "wavlm":
    fields["buckets"] = config.get("num_buckets", 320)
    fields["max_distance"] = config.get("max_bucket_distance", 800)
  for name in ("conv_dim", "conv_kernel", "conv_stride"):
    if name in config:
      fields[name] = tuple(config[name])
  names = [*SAME]
  if regularization == "config":
    names += REGULARIZATION if config.get("apply_spec_augment", True) else ["layerdrop"]
  fields |= {name: config[name] for name in names if name in config}
  return Speech(**{**fields, **overrides})


_LAYER: Table = [
  *linear(r"attention\.q_proj", "attention/query"),
  *linear(r"attention\.k_proj", "attention/key"),
  *linear(r"attention\.v_proj", "attention/value"),
  *linear(r"attention\.out_proj", "attention/out"),
  *linear(r"attention\.gru_rel_pos_linear", "gate"),
  (r"attention\.gru_rel_pos_const", "gate_scale", lambda x: x.reshape(-1)),
  *norm(r"layer_norm", "attention_norm"),
  *linear(r"feed_forward\.intermediate_dense", "ffn_in"),
  *linear(r"feed_forward\.output_dense", "ffn_out"),
  *norm(r"final_layer_norm", "ffn_norm"),
]
_MODEL: Table = [
  (r"masked_spec_embed", "masked_spec_embed", None),
  (r"feature_extractor\.conv_layers\.(\d+)\.conv\.weight", r"feature_extractor/conv_\1/kernel", conv1d),
  (r"feature_extractor\.conv_layers\.(\d+)\.conv\.bias", r"feature_extractor/conv_\1/bias", None),
  *norm(r"feature_extractor\.conv_layers\.(\d+)\.layer_norm", r"feature_extractor/norm_\1"),
  *norm(r"feature_projection\.layer_norm", "projection_norm"),
  *linear(r"feature_projection\.projection", "projection"),
  # torch renamed the two parts of a weight-normed kernel.
  (
    r"encoder\.pos_conv_embed\.conv\.(?:weight_g|parametrizations\.weight\.original0)",
    "pos_0/g",
    lambda x: x.reshape(-1),
  ),
  (r"encoder\.pos_conv_embed\.conv\.(?:weight_v|parametrizations\.weight\.original1)", "pos_0/v", conv1d),
  (r"encoder\.pos_conv_embed\.conv\.bias", "pos_0/bias", None),
  (r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.weight", r"pos_\1/kernel", conv1d),
  (r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.bias", r"pos_\1/bias", None),
  *norm(r"encoder\.layer_norm", "norm"),
  (r"encoder\.layers\.0\.attention\.rel_attn_embed\.weight", "relative", None),
  *under(r"encoder\.layers\.(\d+)\.", r"layer_\1", _LAYER),
]
TABLE: Table = [
  *((r"(?:(?:data2vec_audio|wav2vec2|hubert|wavlm)\.)?" + p, path, transform) for p, path, transform in _MODEL),
  # Heads and quantizers of pretraining, recognition and classification.
  (r"(?:lm_head|quantizer|project_q|project_hid|projector|classifier|final_proj|tdnn|objective)\..*", None, None),
  (r"label_embs_concat|layer_weights|feature_extractor\.conv_layers\..*num_batches_tracked", None, None),
]
