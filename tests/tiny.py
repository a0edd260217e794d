"""Tiny encoders and batches that several tests build MMML from."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.backbones.bert import Bert
from mmjax.layers import Encoded, Linear
from mmjax.papers.mmml import MMML

WIDTH = 32


class TinySpeech(nn.Module):
  """A speech encoder of one frame for 320 samples, exact under padding."""

  normalize_wave: ClassVar[bool] = True
  features: int = WIDTH
  pretrained: str | None = None

  @property
  def hidden_size(self) -> int:
    return self.features

  @nn.compact
  def __call__(self, audio: dict[str, Any], *, train: bool) -> Encoded:
    wave, mask = audio["wave"], audio["mask"]
    frames = wave.shape[1] // 320
    windows = (wave * mask)[:, : frames * 320].reshape(wave.shape[0], frames, 320)
    valid = jnp.arange(frames) < (mask.sum(axis=1) // 320)[:, None]
    hidden = nn.tanh(Linear(self.features, name="feature_extractor")(windows))
    hidden = Linear(self.features, name="projection")(nn.Dropout(0.1)(hidden, deterministic=not train))
    return Encoded(hidden * valid[..., None], valid)


def bert(vocab_size: int = 512, **overrides: Any) -> Bert:
  options = {
    "vocab_size": vocab_size,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "max_positions": 128,
  }
  return Bert(**{**options, **overrides})


def mmml(**overrides: Any) -> MMML:
  options = {
    "text_encoder": bert(),
    "audio_encoder": TinySpeech(),
    "cme_layers": 1,
    "mix_layers": 1,
    "head_width": 16,
    "fused_widths": (16,),
  }
  return MMML(**{**options, **overrides})


def batch(
  rows: int = 8, *, tokens: int = 12, samples: int = 3200, context: bool = False, vocab_size: int = 60, seed: int = 0
) -> dict[str, Any]:
  """A full batch with ragged lengths; row 0 fills the box."""
  rng = np.random.default_rng(seed)

  def text() -> dict[str, np.ndarray]:
    lengths = rng.integers(3, tokens + 1, rows)
    lengths[0] = tokens
    mask = np.arange(tokens) < lengths[:, None]
    return {"ids": np.where(mask, rng.integers(5, vocab_size, (rows, tokens)), 0).astype(np.int32), "mask": mask}

  def audio() -> dict[str, np.ndarray]:
    lengths = rng.integers(960, samples + 1, rows)
    lengths[0] = samples
    mask = np.arange(samples) < lengths[:, None]
    wave = np.where(mask, rng.standard_normal((rows, samples)), 0).astype(np.float32)
    return {"wave": wave, "mask": mask}

  made: dict[str, Any] = {"text": text(), "audio": audio()}
  if context:
    made |= {"text_context": text(), "audio_context": audio()}
    made["audio_context"]["mask"][1] = False
    made["audio_context"]["wave"][1] = 0
  made["labels"] = {"M": rng.uniform(-3, 3, rows).astype(np.float32)}
  made["index"] = np.arange(rows, dtype=np.int32)
  made["valid"] = np.ones(rows, bool)
  return made


def init(network: nn.Module, batch: Any, seed: int = 0) -> Any:
  variables = jax.jit(lambda key: network.init(key, batch, train=False))(jax.random.key(seed))
  return variables["params"]


def shapes(network: nn.Module, batch: Any) -> Any:
  return jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False))["params"]
