"""MMML: Multi-Modality Multi-Loss Fusion Network (Wu, Gong, Koo, Hirschberg; NAACL 2024).

https://arxiv.org/abs/2308.00264, code https://github.com/zehuiwu/MMML

A text encoder and an audio encoder are fine-tuned together under one loss per head: M reads both
modalities, T the text alone, A the audio alone. M fuses either by concatenation (`cc`) or through a
cross-modality encoder (`cme`, versions v1 to v3). With `context`, each head also sees the previous
utterances of the same video. Ids such as MM7 name the places where the paper and its code differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.errors import UserError
from mmjax.layers import Array, Attention, Encoded, Linear, masked_mean, run_layer

# Hidden widths of the fused head by (fusion, context), between the fused features and the score.
FUSED_WIDTHS = {
  ("cc", False): (768, 768, 512),
  ("cc", True): (2048, 1024),
  ("cme", False): (768, 512),
  ("cme", True): (768,),
}


class Head(nn.Module):
  """Dropout, then Linear layers of `widths` with ReLU between, then one score: [B, D] -> float32 [B]."""

  widths: tuple[int, ...] = ()
  dropout: float = 0.3

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    x = nn.Dropout(self.dropout)(x.astype(jnp.float32), deterministic=not train)
    for i, width in enumerate(self.widths):
      x = nn.relu(Linear(width, name=f"dense_{i}")(x))
    return Linear(1, name="score")(x)[:, 0]


class AddNorm(nn.Module):
  """LayerNorm(residual + dropout(x)), both [B, T, D]."""

  dropout: float
  epsilon: float
  compute_dtype: Any

  @nn.compact
  def __call__(self, x: Array, residual: Array, *, train: bool) -> Array:
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    return nn.LayerNorm(self.epsilon, dtype=self.compute_dtype, name="norm")(x + residual)


class CMELayer(nn.Module):
  """One layer of the cross-modality encoder (figure 2; MM15).

  Cross-attention both ways from the layer's inputs, then self-attention per stream, then a ReLU
  feed-forward of 4 D; each followed by residual and LayerNorm. `text` [B, T, D], `audio` [B, F, E].
  """

  dropout: float = 0.3
  head_width: int = 64
  compute_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, text: Array, text_mask: Array, audio: Array, audio_mask: Array, *, train: bool
  ) -> tuple[Array, Array]:
    def add_norm(name: str, x: Array, residual: Array) -> Array:
      return AddNorm(self.dropout, 1e-12, self.compute_dtype, name=name)(x, residual, train=train)

    def attend(name: str, query: Array, context: Array, mask: Array) -> Array:
      heads = query.shape[-1] // self.head_width
      attention = Attention(heads, self.dropout, compute_dtype=self.compute_dtype, name=name)
      return add_norm(f"{name}_add", attention(query, context, mask, train=train), query)

    def feed_forward(name: str, x: Array) -> Array:
      width = x.shape[-1]
      hidden = nn.relu(Linear(4 * width, compute_dtype=self.compute_dtype, name=f"{name}_in")(x))
      return add_norm(f"{name}_add", Linear(width, compute_dtype=self.compute_dtype, name=f"{name}_out")(hidden), x)

    crossed_text = attend("text_cross", text, audio, audio_mask)
    crossed_audio = attend("audio_cross", audio, text, text_mask)
    text = attend("text_self", crossed_text, crossed_text, text_mask)
    audio = attend("audio_self", crossed_audio, crossed_audio, audio_mask)
    return feed_forward("text_ffn", text), feed_forward("audio_ffn", audio)


class MixLayer(nn.Module):
  """v3's mixing of [B, T, D]: a post-LN transformer layer with PyTorch's defaults (FFN 2048, ReLU)."""

  heads: int = 12
  dropout: float = 0.1
  compute_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
    width = x.shape[-1]
    attention = Attention(
      self.heads,
      self.dropout,
      # torch draws q, k and v as one Xavier-uniform [3D, D] matrix.
      qkv_init=nn.initializers.variance_scaling(0.5, "fan_avg", "uniform"),
      compute_dtype=self.compute_dtype,
      name="self",
    )
    add_norm = AddNorm(self.dropout, 1e-5, self.compute_dtype, name="self_add")
    x = add_norm(attention(x, x, mask, train=train), x, train=train)
    hidden = nn.relu(Linear(2048, compute_dtype=self.compute_dtype, name="ffn_in")(x))
    hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
    hidden = Linear(width, compute_dtype=self.compute_dtype, name="ffn_out")(hidden)
    return AddNorm(self.dropout, 1e-5, self.compute_dtype, name="ffn_add")(hidden, x, train=train)


class CME(nn.Module):
  """The cross-modality encoder: two encoded streams to one vector each, [B, D] text and [B, E] audio.

  v1: the two CLS states. v2: each CLS state mixed with its encoder's pooled feature by one Linear + ReLU.
  v3: encoder states and CME states side by side ([B, T, 2D]) through `mix_layers` transformer layers with
  a CLS of their own. Only what the version uses is built (MM16).
  """

  version: str = "v1"
  layers: int = 5
  mix_layers: int = 3
  dropout: float = 0.3
  head_width: int = 64
  compute_dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, text: Encoded, audio: Encoded, *, train: bool) -> tuple[Array, Array]:
    streams = {"text": text, "audio": audio}
    states = {name: self.prepend_cls(f"{name}_cls", s.hidden) for name, s in streams.items()}
    masks = {name: jnp.pad(s.mask, ((0, 0), (1, 0)), constant_values=True) for name, s in streams.items()}
    for i in range(self.layers):
      layer = CMELayer(self.dropout, self.head_width, self.compute_dtype, name=f"layer_{i}")
      streams_in = (states["text"], masks["text"], states["audio"], masks["audio"])
      states["text"], states["audio"] = run_layer(layer, *streams_in, remat=self.remat, train=train)
    vectors = {}
    for name, encoded in streams.items():
      cls = states[name][:, 0]
      self.sow("intermediates", f"{name}_cls", cls)
      if self.version == "v2":
        pooled = nn.Dropout(self.dropout)(jnp.concatenate([encoded.pooled, cls], axis=-1), deterministic=not train)
        cls = nn.relu(Linear(cls.shape[-1], compute_dtype=self.compute_dtype, name=f"{name}_mix")(pooled))
      elif self.version == "v3":
        mixed = jnp.concatenate([encoded.hidden, states[name][:, 1:]], axis=-1)  # [B, T, 2D]
        mixed = self.prepend_cls(f"{name}_mix_cls", mixed)
        for i in range(self.mix_layers):
          heads = mixed.shape[-1] // (2 * self.head_width)
          mix = MixLayer(heads, compute_dtype=self.compute_dtype, name=f"{name}_mix_{i}")
          mixed = run_layer(mix, mixed, masks[name], remat=self.remat, train=train)
        cls = mixed[:, 0]
      vectors[name] = cls
    return vectors["text"], vectors["audio"]

  def prepend_cls(self, name: str, x: Array) -> Array:
    """Puts a learned vector, drawn from N(0, 1), before `x` [B, T, D]."""
    cls = self.param(name, nn.initializers.normal(1.0), (x.shape[-1],), jnp.float32)
    cls = jnp.broadcast_to(cls, (x.shape[0], 1, x.shape[-1])).astype(self.compute_dtype)
    return jnp.concatenate([cls, x.astype(self.compute_dtype)], axis=1)


class MMML(nn.Module):
  """Scores of one utterance: {"M": [B], "T": [B], "A": [B]} for the heads named in `tasks`, float32.

  Attributes:
    text_encoder: gives `Encoded` with `pooled` (BERT or RoBERTa).
    audio_encoder: gives `Encoded` from the waveform; None where the batch holds extracted features.
    tasks: any subset of "MTA". An encoder that no head needs is neither built nor run.
    fusion: "cc" (concatenation) or "cme" (cross-modality encoder).
    fused_widths: hidden widths of the M head; None takes the paper's for this fusion.
    share_cme: whether context streams pass through the same CME layers and CLS vectors (MM7).
    empty_context: "masked" leaves an absent audio context out (its vector is zero); "silent" encodes it as a
      clip of zeros, one frame short of the whole box, as the authors' code happens to do (MM9, MM24).
    remat: computes the fusion's layers again in the backward pass (layers.run_layer); encoders have their own.
  """

  text_encoder: nn.Module | None = None
  audio_encoder: nn.Module | None = None
  tasks: str = "MTA"
  fusion: str = "cme"
  cme_version: str = "v1"
  cme_layers: int = 5
  mix_layers: int = 3
  context: bool = False
  share_cme: bool = True
  dropout: float = 0.3
  head_width: int = 64
  fused_widths: tuple[int, ...] | None = None
  empty_context: str = "masked"
  compute_dtype: Any = "float32"
  remat: bool = False

  def __post_init__(self) -> None:
    choices = {
      "fusion": ("cc", "cme"),
      "cme_version": ("v1", "v2", "v3"),
      "empty_context": ("masked", "silent"),
    }
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise UserError(f"MMML.{name}: found {getattr(self, name)!r}, expected one of {allowed}")
    if not self.tasks or set(self.tasks) - set("MTA") or len(set(self.tasks)) < len(self.tasks):
      raise UserError(f"MMML.tasks: found {self.tasks!r}, expected a subset of 'MTA' such as 'MTA' or 'T'")
    if self.text_encoder is None and "text" in self.streams:
      raise UserError(f"MMML.tasks={self.tasks!r} reads text: bind MMML.text_encoder")
    super().__post_init__()

  @property
  def streams(self) -> frozenset[str]:
    """The modalities that the heads in `tasks` read."""
    needs = {"M": {"text", "audio"}, "T": {"text"}, "A": {"audio"}}
    return frozenset[str]().union(*(needs[task] for task in self.tasks))

  @nn.compact
  def __call__(self, batch: Mapping[str, Any], *, train: bool) -> dict[str, Array]:
    names = ("", "_context") if self.context else ("",)
    texts, audios = [], []
    if "text" in self.streams:
      assert self.text_encoder is not None
      texts = [self.text_encoder(batch[f"text{name}"], train=train) for name in names]
      # What an encoder makes of padding alone depends on the box.
      there = [text.mask.any(axis=1, keepdims=True) for text in texts]
      texts = [t._replace(pooled=jnp.where(some, t.pooled, 0)) for t, some in zip(texts, there, strict=True)]
    if "audio" in self.streams:
      audios = [self.encode_audio(batch[f"audio{name}"], train=train) for name in names]

    outputs = {}
    if "T" in self.tasks:
      pooled = jnp.concatenate([text.pooled for text in texts], axis=-1)
      outputs["T"] = Head(dropout=self.dropout, name="T")(pooled, train=train)
    if "A" in self.tasks:
      pooled = jnp.concatenate([audio.pooled for audio in audios], axis=-1)
      self.sow("intermediates", "audio_pooled", pooled)
      outputs["A"] = Head(dropout=self.dropout, name="A")(pooled, train=train)
    if "M" in self.tasks:
      fused = self.fuse(texts, audios, train=train)
      self.sow("intermediates", "fused", fused)
      widths = self.fused_widths or FUSED_WIDTHS[self.fusion, self.context]
      outputs["M"] = Head(tuple(widths), self.dropout, name="M")(fused, train=train)
    return outputs

  def encode_audio(self, audio: Mapping[str, Array], *, train: bool) -> Encoded:
    """Returns the audio stream; `pooled` is the mean over valid frames (MM8), zeros where there is none."""
    mask = audio["mask"]
    if self.audio_encoder is None:
      if "features" not in audio:
        raise UserError(
          "the batch holds waveforms and MMML has no audio_encoder: bind MMML.audio_encoder to fine-tune "
          "one, or pipeline.Audio.encoder to train on its extracted features"
        )
      encoded = Encoded(audio["features"], mask)
    else:
      if self.empty_context == "silent":
        # One hop of 320 samples short of the box gives the authors' count, all frames but one (MM9).
        silent = jnp.arange(mask.shape[1]) < mask.shape[1] - 320
        mask = jnp.where(mask.any(axis=1, keepdims=True), mask, silent)
      encoded = self.audio_encoder({**audio, "mask": mask}, train=train)
    return encoded._replace(pooled=masked_mean(encoded.hidden, encoded.mask))

  def fuse(self, texts: list[Encoded], audios: list[Encoded], *, train: bool) -> Array:
    """Returns the M head's input [B, sum of widths]: text, text context, audio, audio context."""
    if self.fusion == "cc":
      vectors = [stream.pooled for stream in (*texts, *audios)]
    else:
      sizes = (self.cme_version, self.cme_layers, self.mix_layers, self.dropout, self.head_width)
      options: tuple[Any, ...] = (*sizes, self.compute_dtype, self.remat)
      shared = CME(*options, name="cme")
      modules = [shared, shared]
      if self.context and not self.share_cme:
        modules[1] = CME(*options, name="cme_context")
      pairs = [cme(text, audio, train=train) for cme, text, audio in zip(modules, texts, audios, strict=False)]
      present = [audio.mask.any(axis=1, keepdims=True) for audio in audios]
      vectors = [text for text, _ in pairs]
      vectors += [jnp.where(there, audio, 0) for there, (_, audio) in zip(present, pairs, strict=True)]
    return jnp.concatenate([vector.astype(jnp.float32) for vector in vectors], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiLoss:
  """One loss per head, summed with weight 1 (section 3.4).

  T and A are trained on labels of their own where the data have them (SIMS), else on M's (MM17).
  `loss`: "l1", as in the authors' code, or "l2", as appendix A.1 says (MM2).
  """

  loss: str = "l1"

  def __post_init__(self) -> None:
    if self.loss not in ("l1", "l2"):
      raise UserError(f"MultiLoss.loss: found {self.loss!r}, expected 'l1' or 'l2'")

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
    """Returns the loss terms {head: [B]} and the memory; every term selects the checkpoint (MM4)."""
    labels = batch["labels"]
    errors = {head: outputs[head] - labels.get(head, labels["M"]) for head in outputs}
    per_example = jnp.abs if self.loss == "l1" else jnp.square
    return jax.tree.map(per_example, errors), memory

  def predictions(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the scores {head: [B]}, in the labels' units."""
    return dict(outputs)
