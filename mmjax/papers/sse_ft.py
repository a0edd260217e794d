"""SSE-FT: Multimodal Emotion Recognition with Transformer-Based Self Supervised Feature Fusion
(Siriwardhana, Kaluarachchi, Billinghurst, Nanayakkara; IEEE Access 2020).

https://ieeexplore.ieee.org/document/9206016, code
https://github.com/shamanez/Self-Supervised-Embedding-Fusion-Transformer

Features of three frozen self-supervised encoders (RoBERTa, wav2vec 1.0, FAb-Net), extracted once (F9), are
fused by cross-modal attention. Ids such as F4 name the places where the paper and its code differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmjax.errors import UserError
from mmjax.layers import Array, Attention, Linear, masked_mean

MODALITIES = ("text", "audio", "vision")
# Order in which the head reads the modalities (F20).
HEAD_ORDER = ("text", "vision", "audio")
INIT_STD = 0.02  # BERT's


def layer_norm(name: str) -> nn.LayerNorm:
  """Returns a LayerNorm in float32: between layers, the rounding of bfloat16 would add up."""
  return nn.LayerNorm(1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)


class Layer(nn.Module):
  """One post-LN transformer layer: `query` [B, Q, D] attends to `context` [B, K, C], giving [B, Q, D].

  Query, residual and feed-forward have the query's width, whatever the context's; equal widths work, too (F19).
  """

  heads: int
  ffn_size: int
  dropout: float
  qkv_init: Any
  compute_dtype: Any

  @nn.compact
  def __call__(self, query: Array, context: Array, mask: Array, *, train: bool) -> Array:
    def add_norm(name: str, x: Array, residual: Array) -> Array:
      x = nn.Dropout(self.dropout)(x, deterministic=not train)
      return layer_norm(name)(x + residual)

    def dense(name: str, features: int, x: Array) -> Array:
      return Linear(features, init_std=INIT_STD, compute_dtype=self.compute_dtype, name=name)(x)

    attention = Attention(
      self.heads,
      self.dropout,
      init_std=INIT_STD,
      qkv_init=self.qkv_init,
      compute_dtype=self.compute_dtype,
      name="attention",
    )
    x = add_norm("attention_norm", attention(query, context, mask, train=train), query)
    hidden = jax.nn.gelu(dense("ffn_in", self.ffn_size, x), approximate=False)
    return add_norm("ffn_norm", dense("ffn_out", query.shape[-1], hidden), x)


class Stack(nn.Module):
  """Layers that attend to the same `context` throughout, or each to its own input where there is none.

  `query` [B, Q, D], `context` [B, K, C] and its `mask` [B, K] give [B, Q, D].
  """

  layers: int
  heads: int
  ffn_size: int
  dropout: float
  compute_dtype: Any

  @nn.compact
  def __call__(self, query: Array, context: Array | None, mask: Array, *, train: bool) -> Array:
    # The authors draw the packed matrix of self-attention as BERT does, the separate ones as fairseq does.
    init = nn.initializers.normal(INIT_STD) if context is None else nn.initializers.xavier_uniform()
    for i in range(self.layers):
      layer = Layer(self.heads, self.ffn_size, self.dropout, init, self.compute_dtype, name=f"layer_{i}")
      query = layer(query, query if context is None else context, mask, train=train)
    return query


class SSEFT(nn.Module):
  """Scores of one utterance from feature streams: {"M": [B]} or {"class": [B, C]} or [B, C, 2], float32.

  A batch holds `features` [B, T, D] and `mask` [B, T] for every modality in use. Since a cross-modal stack never
  mixes its queries, only the one that is kept runs through it.

  Attributes:
    modalities: one, two or three of text, audio, vision; the others are neither read nor built (F3).
    task: "regression" gives {"M": [B]}; "softmax" one score a class; "binary" two scores a class, absent and
      present (F8).
    classes: number of classes, without regard in regression.
    max_audio, max_vision: positions, one more than the most frames.
    start_init: "zeros", as the authors' start tokens begin, or "normal" (F10).
    text_vector: what stands for the text: "first", its first token, or "mean" over its tokens.
    modality_mask: a masking layer in front of the fusion, of the streams' states; their lengths differ, so that it
      needs `coin` other than "step" and `sequential=False`. None, as in the paper, for none.
    head_dropout: of the head alone; 0 in the authors' command, which sets none.
  """

  modalities: tuple[str, ...] = MODALITIES
  task: str = "regression"
  classes: int = 1
  layers: int = 2
  cross_layers: int = 2
  heads: int = 4
  ffn_size: int = 1024
  max_audio: int = 936
  max_vision: int = 301
  dropout: float = 0.1
  head_dropout: float = 0.0
  start_init: str = "zeros"
  text_vector: str = "first"
  modality_mask: nn.Module | None = None
  compute_dtype: Any = "float32"

  def __post_init__(self) -> None:
    choices = {
      "task": ("regression", "softmax", "binary"),
      "start_init": ("zeros", "normal"),
      "text_vector": ("first", "mean"),
    }
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise UserError(f"SSEFT.{name}: found {getattr(self, name)!r}, expected one of {allowed}")
    found = tuple(self.modalities)
    if not found or set(found) - set(MODALITIES) or len(set(found)) < len(found):
      raise UserError(f"SSEFT.modalities: found {found!r}, expected one or more of {MODALITIES}")
    if self.classes < (1 if self.task == "binary" else 2) and self.task != "regression":
      raise UserError(f"SSEFT.classes: found {self.classes}, expected the number of classes for task={self.task!r}")
    super().__post_init__()

  @property
  def streams(self) -> frozenset[str]:
    """The modalities that are read."""
    return frozenset(self.modalities)

  @nn.compact
  def __call__(self, batch: Mapping[str, Any], *, train: bool) -> dict[str, Array]:
    states, masks, vectors = {}, {}, {}
    for name in MODALITIES:
      if name in self.streams:
        states[name], masks[name] = self.encode(name, batch[name], train=train)
    if self.modality_mask is not None:
      states = self.modality_mask(states, train=train)
    for name, x in states.items():
      mean = name == "text" and self.text_vector == "mean"
      vectors[name] = masked_mean(x, masks[name])[:, None] if mean else x[:, :1]  # [B, 1, D], stands for the stream
      self.sow("intermediates", f"{name}_vector", vectors[name][:, 0])

    def attend(name: str, other: str) -> Array:
      stack = Stack(
        self.cross_layers, self.heads, self.ffn_size, self.dropout, self.compute_dtype, name=f"{name}_from_{other}"
      )
      vector = stack(vectors[name], states[other], masks[other], train=train)[:, 0]
      self.sow("intermediates", f"{name}_from_{other}_vector", vector)
      return vector

    parts = []
    # Two modalities: the query that comes first here is the first of the pair in the authors' code, too.
    for name in HEAD_ORDER if len(states) > 2 else MODALITIES:
      if name in states:
        part = vectors[name][:, 0]
        for i, other in enumerate(other for other in states if other != name):
          crossed = attend(name, other)
          part = crossed if i == 0 else part * crossed  # T = ta * tv and so on (F4)
        parts.append(part)
    return self.head(jnp.concatenate(parts, axis=-1), train=train)

  def encode(self, name: str, stream: Mapping[str, Any], *, train: bool) -> tuple[Array, Array]:
    """Returns a stream's states [B, T, D] and their mask [B, T].

    Text is taken as it comes (F20); audio and vision get a start token, positions, a norm and self-attention.
    """
    x, mask = jnp.asarray(stream["features"], jnp.float32), jnp.asarray(stream["mask"], bool)
    if name == "text":
      x = jnp.where(mask[..., None], x, 0)
      return x, mask
    rows = self.max_audio if name == "audio" else self.max_vision
    if x.shape[1] >= rows:
      raise ValueError(f"SSEFT: found {x.shape[1]} {name} frames, expected at most SSEFT.max_{name} - 1 = {rows - 1}")
    normal = nn.initializers.normal(INIT_STD)
    start_init = nn.initializers.zeros if self.start_init == "zeros" else normal
    start = self.param(f"{name}_start", start_init, (x.shape[-1],), jnp.float32)
    positions = self.param(f"{name}_positions", normal, (rows, x.shape[-1]), jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(start, (x.shape[0], 1, x.shape[-1])), x], axis=1)
    mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
    x = x + positions[: x.shape[1]]
    x = layer_norm(f"{name}_norm")(x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    x = jnp.where(mask[..., None], x, 0)
    self.sow("intermediates", f"{name}_embedded", x)
    stack = Stack(self.layers, self.heads, self.ffn_size, self.dropout, self.compute_dtype, name=f"{name}_self")
    x = stack(x, None, mask, train=train)
    self.sow("intermediates", f"{name}_encoded", x)
    return x, mask

  def head(self, x: Array, *, train: bool) -> dict[str, Array]:
    """Returns the outputs from the joined vectors [B, D], whose width follows the modalities (F3)."""
    x = nn.Dropout(self.head_dropout)(x, deterministic=not train)
    x = jnp.tanh(Linear(x.shape[-1], name="dense")(x))
    x = nn.Dropout(self.head_dropout)(x, deterministic=not train)
    if self.task == "regression":
      return {"M": Linear(1, name="score")(x)[:, 0]}
    scores = Linear(self.classes * (2 if self.task == "binary" else 1), name="score")(x)
    return {"class": scores.reshape(-1, self.classes, 2) if self.task == "binary" else scores}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmotionLoss:
  """The loss that fits the network's outputs: L1 of a score, cross-entropy of classes, or, for two scores a
  class, the cross-entropies of all classes summed, each class being present or absent (F8)."""

  def init(self, labels: Mapping[str, Array], outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Returns no memory: nothing is carried from step to step."""
    return {}

  def __call__(
    self,
    outputs: Mapping[str, Array],
    batch: Mapping[str, Any],
    memory: dict[str, Array],
    *,
    epoch: Array,
    train: bool,
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the loss term {head: [B]} and the memory; in nats, not divided by ln 2 as the authors log it (F7)."""
    labels = batch["labels"]
    if "M" in outputs:
      return {"M": jnp.abs(outputs["M"] - labels["M"])}, memory
    scores, target = outputs["class"], labels["class"]
    if scores.ndim == 3:
      present = (target[:, None] == jnp.arange(scores.shape[1])).astype(jnp.int32)  # [B, C]
      loss = optax.softmax_cross_entropy_with_integer_labels(scores, present).sum(axis=-1)
    else:
      loss = optax.softmax_cross_entropy_with_integer_labels(scores, target)
    return {"class": loss}, memory

  def predictions(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Returns scores {"M": [B]} or {"class": [B, C]}; with two a class their difference, above 0 if present."""
    if "class" in outputs and outputs["class"].ndim == 3:
      return {"class": outputs["class"][..., 1] - outputs["class"][..., 0]}
    return dict(outputs)
