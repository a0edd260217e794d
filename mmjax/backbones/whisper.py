"""The encoder of Whisper (Radford et al. 2022, https://arxiv.org/abs/2212.04356), from the waveform.

Numerically equal to Hugging Face's WhisperFeatureExtractor and WhisperModel.encoder, with one extension:
a clip runs at its own length and not padded to 30 s, and what a batch pads it with has no effect. A clip
that is itself padded with zeros to 30 s, all of it valid, gives the states of the original.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.backbones.convert import Table, conv1d, linear, norm, transpose, under
from mmjax.errors import UserError
from mmjax.layers import Array, Attention, Encoded, Linear, run_layer

SAMPLE_RATE = 16_000
WINDOW = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms
STRIDE = 2  # of the second convolution: mel frames for one encoder frame
SILENCE = -10.0  # log10 of the smallest power


def num_frames(samples: Any) -> Any:
  """Returns the encoder frames of a clip of `samples` at 16 kHz; an int or an integer array."""
  return (samples // HOP + 1) // STRIDE


@functools.cache
def mel_filters(mels: int) -> np.ndarray:
  """Returns triangular filters [201, mels] from 0 to 8000 Hz on Slaney's mel scale, each of unit area."""
  linear_end, step = 1000.0, math.log(6.4) / 27  # above 1000 Hz, which is mel 15, the scale is logarithmic
  top = 15 + math.log(SAMPLE_RATE / 2 / linear_end) / step
  marks = np.linspace(0, top, mels + 2)
  hertz = np.where(marks < 15, marks * 200 / 3, linear_end * np.exp((marks - 15) * step))  # [mels + 2]
  bins = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
  low, middle, high = hertz[:-2], hertz[1:-1], hertz[2:]
  triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle))
  return (np.maximum(triangles, 0) * 2 / (high - low)).astype(np.float32)


@functools.cache
def _fourier() -> np.ndarray:
  """Returns [400, 1, 402]: cosines and sines of 201 frequencies under a periodic Hann window."""
  time = np.arange(WINDOW)[:, None]
  window = 0.5 - 0.5 * np.cos(2 * np.pi * time / WINDOW)
  angle = 2 * np.pi * (time * np.arange(WINDOW // 2 + 1) % WINDOW) / WINDOW
  return (window * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)[:, None, :]


def log_mel(wave: Array, mask: Array, mels: int = 80) -> tuple[Array, Array]:
  """Returns the log-mel spectrogram [B, max(S // 160, 1), mels] in float32, 0 beyond the mask [B, F] it gives.

  `wave` [B, S] at 16 kHz, `mask` [B, S] (prefixes). Each clip is mirrored before its start and followed by
  zeros; its values are floored at 8 below its own maximum, in powers of ten. Only a clip that fills all
  30 s differs from Hugging Face, in its last frame: the original mirrors at second 30, too.
  """
  samples = jnp.sum(mask, axis=1)
  frames = max(wave.shape[1] // HOP, 1)
  wave = jnp.where(mask, wave, 0).astype(jnp.float32)
  half = WINDOW // 2
  wave = jnp.pad(wave, ((0, 0), (0, WINDOW)))
  wave = jnp.concatenate([wave[:, half:0:-1], wave], axis=1)[:, : (frames - 1) * HOP + WINDOW]
  # The transform as a convolution: quicker on CPU than an FFT of frames.
  spectrum = jax.lax.conv_general_dilated(
    wave[..., None],
    jnp.asarray(_fourier()),
    window_strides=(HOP,),
    padding="VALID",
    dimension_numbers=("NWC", "WIO", "NWC"),
    precision="highest",
  )  # [B, F, 402]
  real, imaginary = jnp.split(spectrum, 2, axis=-1)
  power = jnp.matmul(real**2 + imaginary**2, mel_filters(mels), precision="highest")  # [B, F, mels]
  valid = jnp.arange(frames) < (samples // HOP)[:, None]
  log = jnp.log10(jnp.maximum(power, 10.0**SILENCE))
  maximum = jnp.max(jnp.where(valid[..., None], log, SILENCE), axis=(1, 2), keepdims=True)
  mel = (jnp.maximum(log, maximum - 8.0) + 4.0) / 4.0
  return jnp.where(valid[..., None], mel, 0), valid


def sinusoids(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
  """Returns Whisper's fixed positions [T, D], sines then cosines, in the form of an initializer."""
  length, width = shape
  rates = np.exp(-math.log(10_000) / max(width // 2 - 1, 1) * np.arange(width // 2))
  angles = np.arange(length)[:, None] * rates
  return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)


class Layer(nn.Module):
  """One transformer layer, [B, F, D] to [B, F, D] float32: each half is normalised first, added to its input."""

  heads: int
  intermediate_size: int
  dropout: float
  attention_dropout: float
  activation_dropout: float
  init_std: float
  compute_dtype: Any

  @nn.compact
  def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
    def drop(y: Array, rate: float) -> Array:
      return nn.Dropout(rate)(y, deterministic=not train)

    def dense(name: str, features: int) -> Linear:
      return Linear(features, init_std=self.init_std, compute_dtype=self.compute_dtype, name=name)

    attention = Attention(
      self.heads,
      self.attention_dropout,
      key_bias=False,
      init_std=self.init_std,
      compute_dtype=self.compute_dtype,
      name="attention",
    )
    y = _norm("attention_norm", self.compute_dtype)(x)
    x = x + drop(attention(y, y, mask, train=train), self.dropout)
    y = _norm("ffn_norm", self.compute_dtype)(x)
    y = drop(jax.nn.gelu(dense("ffn_in", self.intermediate_size)(y), approximate=False), self.activation_dropout)
    return x + drop(dense("ffn_out", x.shape[-1])(y), self.dropout)


class Whisper(nn.Module):
  """Hidden states [B, F, D], 50 a second, and their mask; 0 where the mask is False.

  `audio` holds `wave` and `mask` [B, S], or the log-mel spectrogram `mel` [B, M, mels] and its `mask`
  [B, M]. The clip decides its states, padding does not. A clip shorter than 10 ms has no valid frame, and
  an array shorter than that gives one frame. `pretrained` names where `pretrained.restore` finds the
  weights. Raises ValueError for a clip longer than the positions (30 s).
  """

  normalize_wave: ClassVar[bool] = False

  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  mels: int = 80
  max_positions: int = 1500
  dropout: float = 0.0
  attention_dropout: float = 0.0
  activation_dropout: float = 0.0
  init_std: float = 0.02
  compute_dtype: Any = jnp.float32
  remat: bool = False  # see layers.run_layer
  pretrained: str | None = None

  def num_frames(self, samples: Any) -> Any:
    """Returns the encoder frames of a clip of `samples` at 16 kHz; an int or an integer array."""
    return num_frames(samples)

  @nn.compact
  def __call__(self, audio: Mapping[str, Any], *, train: bool) -> Encoded:
    mask = jnp.asarray(audio["mask"], bool)
    mel_limit = STRIDE * self.max_positions
    if "mel" in audio:
      self._check(mask.shape[1], mel_limit, "mel frames")
      mel = jnp.where(mask[..., None], jnp.asarray(audio["mel"]), 0)
      if mel.shape[-1] != self.mels:
        raise ValueError(
          f"{self._label}: found {mel.shape[-1]} mel bands in an array [B, frames, bands], expected {self.mels}. "
          "Transpose it, or make it with the encoder's number of bands."
        )
    else:
      self._check(mask.shape[1], mel_limit * HOP, "samples")
      mel, mask = log_mel(jnp.asarray(audio["wave"]), mask, self.mels)

    def conv(name: str, stride: int) -> nn.Conv:
      init = nn.initializers.normal(self.init_std)
      return nn.Conv(self.hidden_size, (3,), stride, 1, dtype=self.compute_dtype, kernel_init=init, name=name)

    x = jax.nn.gelu(conv("conv1", 1)(mel.astype(self.compute_dtype)), approximate=False)
    # conv1 makes something even of zeros; conv2 must see none of it.
    x = jnp.where(mask[..., None], x, 0)
    x = jax.nn.gelu(conv("conv2", STRIDE)(x), approximate=False)  # [B, F, D]
    mask = mask[:, ::STRIDE]
    positions = self.param("positions", sinusoids, (self.max_positions, self.hidden_size), jnp.float32)
    x = x + positions[: x.shape[1]]
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    for i in range(self.num_layers):
      self.sow("intermediates", "hidden_states", x.astype(self.compute_dtype))
      layer = Layer(
        self.num_heads,
        self.intermediate_size,
        self.dropout,
        self.attention_dropout,
        self.activation_dropout,
        self.init_std,
        self.compute_dtype,
        name=f"layer_{i}",
      )
      x = run_layer(layer, x, mask, remat=self.remat, train=train)
    x = jnp.where(mask[..., None], _norm("norm", self.compute_dtype)(x), 0)
    self.sow("intermediates", "hidden_states", x)
    return Encoded(x, mask)

  @property
  def _label(self) -> str:
    return self.pretrained or "Whisper"

  def _check(self, found: int, limit: int, unit: str) -> None:
    if found > limit:
      seconds = self.max_positions * STRIDE * HOP / SAMPLE_RATE
      raise ValueError(
        f"{self._label}: found {found} {unit}, expected at most {limit} ({seconds:g} s). Lower pipeline.Audio.seconds."
      )


def _norm(name: str, compute_dtype: Any) -> nn.LayerNorm:
  return nn.LayerNorm(1e-5, dtype=compute_dtype, use_fast_variance=False, name=name)


def from_config(config: Mapping[str, Any], **overrides: Any) -> Whisper:
  """Returns the encoder that a Hugging Face config.json describes; `overrides` replace fields of `Whisper`.

  Raises `UserError` for another activation than GELU, KeyError for a size that is missing. LayerDrop stays
  off whatever the configuration says (MM28).
  """
  activation = config.get("activation_function", "gelu")
  if activation != "gelu":
    raise UserError(f"found activation_function {activation!r}, expected 'gelu'. Choose another speech encoder.")
  fields = {
    "hidden_size": config["d_model"],
    "num_layers": config["encoder_layers"],
    "num_heads": config["encoder_attention_heads"],
    "intermediate_size": config["encoder_ffn_dim"],
    "mels": config.get("num_mel_bins", 80),
    "max_positions": config.get("max_source_positions", 1500),
    "dropout": config.get("dropout", 0.0),
    "attention_dropout": config.get("attention_dropout", 0.0),
    "activation_dropout": config.get("activation_dropout", 0.0),
    "init_std": config.get("init_std", 0.02),
  }
  return Whisper(**{**fields, **overrides})


_LAYER: Table = [
  (r"self_attn\.k_proj\.weight", "attention/key/kernel", transpose),
  *linear(r"self_attn\.q_proj", "attention/query"),
  *linear(r"self_attn\.v_proj", "attention/value"),
  *linear(r"self_attn\.out_proj", "attention/out"),
  *norm(r"self_attn_layer_norm", "attention_norm"),
  *linear(r"fc1", "ffn_in"),
  *linear(r"fc2", "ffn_out"),
  *norm(r"final_layer_norm", "ffn_norm"),
]
_ENCODER: Table = [
  (r"conv([12])\.weight", r"conv\1/kernel", conv1d),
  (r"conv([12])\.bias", r"conv\1/bias", None),
  (r"embed_positions\.weight", "positions", None),
  *under(r"layers\.(\d+)\.", r"layer_\1", _LAYER),
  *norm(r"layer_norm", "norm"),
]
TABLE: Table = [
  *((r"(?:(?:model\.)?encoder\.)?" + pattern, path, transform) for pattern, path, transform in _ENCODER),
  (r"(?:model\.)?decoder\..*", None, None),
  (r"proj_out\..*", None, None),
]
