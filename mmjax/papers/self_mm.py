"""Self-MM: Learning Modality-Specific Representations with Self-Supervised Multi-Task Learning (Yu et al., AAAI 2021).

https://arxiv.org/abs/2102.04830, code https://github.com/thuiar/Self-MM and https://github.com/thuiar/MMSA

A fused regression head is trained beside one head per modality. The modalities have no labels of their own: from the
second epoch on, each training example's are generated from where its features lie between the centres of positive and
negative examples, relative to where the fused feature lies. Ids such as SM6 name where paper and code differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import UserError
from mmjax.layers import Array, Linear
from mmjax.recurrent import LSTM

MODALITIES = {"T": "text", "A": "audio", "V": "vision"}


class Tower(nn.Module):
  """The state of an LSTM at the true end, dropout, then Linear: [B, T, I] to float32 [B, features]."""

  hidden: int
  features: int
  dropout: float = 0.0

  @nn.compact
  def __call__(self, stream: Mapping[str, Array], *, train: bool) -> Array:
    _, last = LSTM(self.hidden, name="lstm")(stream["features"], stream["mask"])
    last = nn.Dropout(self.dropout)(last, deterministic=not train)
    return Linear(self.features, name="out")(last)


class Head(nn.Module):
  """Dropout, Linear + ReLU (the feature), Linear + ReLU, score: [B, D] to ([B], [B, width]), float32."""

  width: int
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    feature = nn.relu(Linear(self.width, name="feature")(x))
    hidden = nn.relu(Linear(self.width, name="dense")(feature))
    return Linear(1, name="score")(hidden)[:, 0], feature


class SelfMM(nn.Module):
  """Scores {"M", "T", "A", "V": [B]} and the features behind them {"M_feature", ...: [B, width]}, float32.

  A text without any token is a vector of zeros, as audio and vision without any step are to their towers.

  Attributes:
    text_encoder: gives `Encoded`; the text is its hidden state at the first token (SM16). None where no text is read.
    modalities: those that are read; the others have neither tower nor head, and no part in M.
    modality_mask: a masking layer in front of the fusion, of the vectors by modality; the heads of T, A and V are
      not masked. None, as in the paper, for none.
    audio_hidden, vision_hidden: widths of the LSTMs.
    audio_features, vision_features: widths of what the LSTMs' towers give.
    state_dropout: on the LSTMs' last states; the authors' settings have 0.
    fusion_width, text_width, audio_width, vision_width: of each head's feature (the "post" layers).
    fusion_dropout, text_dropout, audio_dropout, vision_dropout: before each head's first layer.
  """

  text_encoder: nn.Module | None = None
  modalities: tuple[str, ...] = tuple(MODALITIES.values())
  modality_mask: nn.Module | None = None
  audio_hidden: int = 32
  vision_hidden: int = 64
  audio_features: int = 16
  vision_features: int = 32
  state_dropout: float = 0.0
  fusion_width: int = 128
  text_width: int = 64
  audio_width: int = 16
  vision_width: int = 32
  fusion_dropout: float = 0.1
  text_dropout: float = 0.0
  audio_dropout: float = 0.1
  vision_dropout: float = 0.1

  def __post_init__(self) -> None:
    found, known = tuple(self.modalities), tuple(MODALITIES.values())
    if not found or set(found) - set(known) or len(set(found)) < len(found):
      raise UserError(f"SelfMM.modalities: found {found!r}, expected one or more of {known}")
    if self.text_encoder is None and "text" in found:
      raise UserError("SelfMM.modalities: found text without an encoder: bind SelfMM.text_encoder")
    super().__post_init__()

  @property
  def streams(self) -> frozenset[str]:
    """The modalities that are read."""
    return frozenset(self.modalities)

  @property
  def tasks(self) -> str:
    """The heads: M and one for each modality."""
    return "M" + "".join(head for head, name in MODALITIES.items() if name in self.modalities)

  @nn.compact
  def __call__(self, batch: Mapping[str, Any], *, train: bool) -> dict[str, Array]:
    audio = Tower(self.audio_hidden, self.audio_features, self.state_dropout, name="audio")
    vision = Tower(self.vision_hidden, self.vision_features, self.state_dropout, name="vision")
    encode = {
      "T": lambda text: self.encode_text(text, train=train),
      "A": lambda stream: audio(stream, train=train),
      "V": lambda stream: vision(stream, train=train),
    }
    vectors = {head: encode[head](batch[MODALITIES[head]]) for head in self.tasks[1:]}
    for name, vector in vectors.items():
      self.sow("intermediates", f"{MODALITIES[name]}_vector", vector)
    heads = {
      "M": Head(self.fusion_width, self.fusion_dropout, name="M"),
      "T": Head(self.text_width, self.text_dropout, name="T"),
      "A": Head(self.audio_width, self.audio_dropout, name="A"),
      "V": Head(self.vision_width, self.vision_dropout, name="V"),
    }
    parts = {MODALITIES[name]: vector for name, vector in vectors.items()}
    if self.modality_mask is not None:
      parts = self.modality_mask(parts, train=train)
    vectors["M"] = jnp.concatenate([parts[MODALITIES[name]] for name in self.tasks[1:]], axis=-1)
    outputs = {}
    for name in self.tasks:
      outputs[name], outputs[f"{name}_feature"] = heads[name](vectors[name], train=train)
    return outputs

  def encode_text(self, text: Mapping[str, Array], *, train: bool) -> Array:
    """Returns the state at the first token, float32 [B, D]; zeros where there is no token."""
    if "ids" not in text:
      raise UserError("Self-MM fine-tunes a text encoder on token ids: found a batch with extracted text features")
    assert self.text_encoder is not None
    first = self.text_encoder(text, train=train).hidden[:, 0].astype(jnp.float32)
    # Of padding alone an encoder makes something that depends on its length.
    return jnp.where(jnp.any(text["mask"], axis=1, keepdims=True), first, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelGeneration:
  """L1 on each head, with labels of T, A and V that it generates while training (sections 3.3 to 3.5).

  Attributes:
    label_bound: H, the largest absolute value of a label: 3 for MOSI and MOSEI, 1 for SIMS and SIMSv2 (SM12).
    zero_in_positive: whether an example labelled 0 counts for the positive centre, as in the authors' code; their
      MMSA leaves it out of both (SM4).
    distance: of a feature to a centre: "norm", as in the code, or "sq_over_sqrt_d", the paper's |F - C|^2 / sqrt(d)
      (SM5).
    alpha_eps: in both denominators (SM8).
    human_labels: trains T, A and V on labels of their own, where the data have them, generating none (SM17).
  """

  label_bound: float = 3.0
  zero_in_positive: bool = False
  distance: str = "norm"
  alpha_eps: float = 1e-8
  human_labels: bool = False

  def __post_init__(self) -> None:
    if self.distance not in ("norm", "sq_over_sqrt_d"):
      raise UserError(f"LabelGeneration.distance: found {self.distance!r}, expected 'norm' or 'sq_over_sqrt_d'")

  def init(self, labels: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the memory: of each head a label and a feature per training example, and two centres.

    {"labels": {head: [N]}, "features": {head: [N, D]}, "positive" and "negative": {head: [D]}}. Labels start as M's;
    features and centres as zeros, so that the first epoch's centres count rows not yet seen (SM6).
    """
    heads = [head for head in MODALITIES if f"{head}_feature" in outputs]
    missing = [head for head in heads if head not in labels]
    if self.human_labels and missing:
      raise UserError(
        f"LabelGeneration.human_labels: found no labels of {', '.join(missing)}, expected them beside M's, as SIMS has"
      )
    own = labels if self.human_labels else dict.fromkeys(heads, labels["M"])
    starts = {"M": labels["M"], **{head: own[head] for head in heads}}
    widths = {head: outputs[f"{head}_feature"].shape[-1] for head in starts}
    return {
      "labels": {head: jnp.array(values, jnp.float32) for head, values in starts.items()},
      "features": {head: jnp.zeros((len(labels["M"]), width)) for head, width in widths.items()},
      "positive": {head: jnp.zeros(width) for head, width in widths.items()},
      "negative": {head: jnp.zeros(width) for head, width in widths.items()},
    }

  def __call__(
    self, outputs: Mapping[str, Array], batch: Mapping[str, Any], memory: dict[str, Any], *, epoch: Array, train: bool
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    """Returns the loss terms {head: [B]} and the memory after this batch (the order is SM6).

    Losses are against the labels so far: those of T, A and V are 0 in the first two epochs (SM7, SM7b). In
    evaluation only M has a term, which selects the checkpoint (SM14), and the memory stays as it is.
    """
    fused = batch["labels"]["M"]
    losses = {"M": jnp.abs(outputs["M"] - fused)}
    if not train:
      return losses, memory
    # Padding rows read row 0 and, beyond the end, write nothing; a negative index would wrap.
    size = memory["labels"]["M"].shape[0]
    read, write = (jnp.where(batch["valid"], batch["index"], instead) for instead in (0, size))
    labels = {head: memory["labels"][head][read] for head in MODALITIES if head in outputs}
    for head, label in labels.items():
      losses[head] = jnp.tanh(jnp.abs(label - fused)) * jnp.abs(outputs[head] - label)
    features = {head: jax.lax.stop_gradient(outputs[f"{head}_feature"]) for head in memory["features"]}
    memory = dict(memory)
    if not self.human_labels:
      generated = self.generate(features, labels, fused, memory, epoch=epoch)
      memory["labels"] = memory["labels"] | {
        head: memory["labels"][head].at[write].set(label, mode="drop") for head, label in generated.items()
      }
    memory["features"] = {
      head: memory["features"][head].at[write].set(feature, mode="drop") for head, feature in features.items()
    }
    return losses, {**memory, **self.centres(memory)}

  def generate(
    self,
    features: Mapping[str, Array],
    labels: Mapping[str, Array],
    fused: Array,
    memory: Mapping[str, Any],
    *,
    epoch: Array,
  ) -> dict[str, Array]:
    """Returns the next labels {head: [B]} of T, A and V; in the first epoch they are `labels` again."""
    n = jnp.asarray(epoch, jnp.float32)
    offset = {
      head: self.offset(features[head], memory["positive"][head], memory["negative"][head]) for head in features
    }
    following = {}
    for head, label in labels.items():
      alpha = offset[head] / (offset["M"] + self.alpha_eps)
      new = 0.5 * alpha * fused + 0.5 * (fused + offset[head] - offset["M"])
      new = jnp.clip(new, -self.label_bound, self.label_bound)
      momentum = (n - 1) / (n + 1) * label + 2 / (n + 1) * new
      following[head] = jnp.where(n > 1, momentum, label)
    return following

  def offset(self, feature: Array, positive: Array, negative: Array) -> Array:
    """Returns [B], above 0 where a feature [B, D] is nearer to the positive centre [D] than to the negative one."""
    d_p, d_n = (jnp.sum(jnp.square(feature - centre), axis=-1) for centre in (positive, negative))
    if self.distance == "norm":
      d_p, d_n = jnp.sqrt(d_p), jnp.sqrt(d_n)
    else:
      d_p, d_n = d_p / feature.shape[-1] ** 0.5, d_n / feature.shape[-1] ** 0.5
    return (d_n - d_p) / (d_p + self.alpha_eps)

  def centres(self, memory: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """Returns the mean feature {"positive", "negative": {head: [D]}} of the examples with such a label."""
    centres: dict[str, dict[str, Array]] = {"positive": {}, "negative": {}}
    for head, feature in memory["features"].items():
      label = memory["labels"][head]
      members = {"positive": label >= 0 if self.zero_in_positive else label > 0, "negative": label < 0}
      for side, member in members.items():
        total = jnp.sum(jnp.where(member[:, None], feature, 0.0), axis=0)
        count = jnp.sum(member)
        # A class without members keeps its centre, where the mean of none would be NaN (SM9).
        centres[side][head] = jnp.where(count > 0, total / jnp.maximum(count, 1), memory[side][head])
    return centres

  def predictions(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the scores {head: [B]}, in the labels' units."""
    return {head: outputs[head] for head in ("M", *MODALITIES) if head in outputs}

  def trace(self, memory: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the labels so far {head: [N]}, by which the report shows how they drift."""
    return {head: np.asarray(label) for head, label in memory["labels"].items()}
