"""A tiny Self-MM and batches for it."""

import flax.linen as nn
import jax
import numpy as np
import tiny

from mmjax.layers import Encoded
from mmjax.papers.self_mm import SelfMM

WIDTHS = {"fusion_width": 6, "text_width": 5, "audio_width": 4, "vision_width": 3}


class Words(nn.Module):
  """A text encoder that compiles in no time."""

  @nn.compact
  def __call__(self, text: dict, *, train: bool) -> Encoded:
    return Encoded(nn.Embed(60, 8, name="word")(text["ids"]), text["mask"])


def stream(rows: int, steps: int, width: int, lengths, *, seed: int = 0) -> dict[str, np.ndarray]:
  mask = np.arange(steps) < np.resize(lengths, rows)[:, None]
  values = np.random.default_rng(seed).standard_normal((rows, steps, width)).astype(np.float32)
  return {"features": np.where(mask[..., None], values, 0), "mask": mask}


def batch_of(rows: int = 6, *, first: int = 0, seed: int = 0) -> dict:
  made = tiny.batch(rows, seed=seed)
  made["audio"] = stream(rows, 7, 3, (7, 1, 4), seed=seed)
  made["vision"] = stream(rows, 5, 4, (5, 0, 2), seed=seed + 50)
  made["index"] = np.arange(first, first + rows, dtype=np.int32)
  return made


def network_of(**overrides) -> SelfMM:
  options = {"text_encoder": Words(), "audio_hidden": 4, "vision_hidden": 5, **WIDTHS}
  return SelfMM(**{**options, **overrides})


def finite(tree) -> bool:
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
