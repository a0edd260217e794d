"""Synergy: Can One Modality Model Synergize Training of Other Modality Models? (Lee, Yoon; ICLR 2025).

https://openreview.net/forum?id=5BXWhVbHAK, code https://github.com/johnjaejunlee95/synergistic-multimodal

A student of one modality is trained to classify and, at the same time, to give features like those of a frozen
teacher of another modality on inputs that need not belong together. The teacher's features are extracted once
and come with the batch (P15). Ids such as P10 name the places where the paper and its code differ.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmjax.errors import UserError
from mmjax.layers import Array, Encoded, Linear, masked_mean

EPSILON = 1e-5
POOLS = ("exact", "repo")


class Student(nn.Module):
  """Feature [B, D] and class scores [B, C] of an encoded stream, float32.

  kind "image":  D from the pooled vector; LayerNorm, LeakyReLU, C.
  kind "speech": D from the mean over frames; 128, GELU, C.
  kind "text":   D from the first token, LayerNorm; C.
  """

  kind: str
  feature_width: int
  classes: int
  ln: bool = False

  @nn.compact
  def __call__(self, encoded: Encoded) -> tuple[Array, Array]:
    if self.kind == "text":
      feature = Linear(self.feature_width, name="project")(encoded.hidden[:, 0].astype(jnp.float32))
      feature = layer_norm(feature)
      x = feature
    elif self.kind == "speech":
      hidden = normalize_clips(encoded) if self.ln else encoded.hidden
      pooled = masked_mean(hidden, encoded.mask)
      self.sow("intermediates", "pooled", pooled)
      feature = Linear(self.feature_width, name="project")(pooled)
      x = jax.nn.gelu(Linear(128, name="dense")(feature), approximate=False)
    else:
      feature = Linear(self.feature_width, name="project")(encoded.pooled.astype(jnp.float32))
      x = nn.leaky_relu(layer_norm(feature), 0.2)
    return feature, Linear(self.classes, name="score")(x)


def layer_norm(x: Array) -> Array:
  """Returns `x` [B, D] normalised with learned scale and bias; to be called in a module's `__call__`."""
  return nn.LayerNorm(EPSILON, use_fast_variance=False, name="norm")(x)


def normalize_clips(encoded: Encoded) -> Array:
  """Returns hidden states [B, F, D] of zero mean and unit variance over the real frames and channels of each clip.

  What the authors compute over all frames and throw away (P10).
  """
  real = encoded.mask[..., None]
  hidden = encoded.hidden.astype(jnp.float32)
  count = jnp.maximum(jnp.sum(real, axis=(1, 2), keepdims=True) * hidden.shape[-1], 1)
  mean = jnp.sum(jnp.where(real, hidden, 0), axis=(1, 2), keepdims=True) / count
  variance = jnp.sum(jnp.where(real, jnp.square(hidden - mean), 0), axis=(1, 2), keepdims=True) / count
  return jnp.where(real, (hidden - mean) * jax.lax.rsqrt(variance + EPSILON), 0)


def rounded_frames(samples: Array, frames: int) -> Array:
  """Returns the mask [B, F] of the authors' pooling: a clip has its share of `samples` [B, S] of all frames, rounded
  half to even, which may be a frame more than the convolutions see of it (P23)."""
  share = jnp.mean(samples.astype(jnp.float32), axis=1)
  return jnp.arange(frames) < jnp.round(share * frames)[:, None]


class Synergy(nn.Module):
  """Scores and feature of one example: {"class": [B, C], "feature": [B, D]}, float32.

  Exactly one encoder is bound; its name says which stream is read, its kind how: `vision_encoder` reads
  `batch["vision"]`, an `audio_encoder` that is a ResNet reads spectrograms, `batch["audio"]["image"]`.

  Attributes:
    feature_width: width D of the teacher's features.
    classes: number of classes.
    ln: normalises the frames of a clip before they are pooled (P10).
    pool: "exact" means the frames that the encoder's mask marks, "repo" rounds their number (P23); either way
      what an encoder gives as zero at padded frames counts as zero.
  """

  text_encoder: nn.Module | None = None
  audio_encoder: nn.Module | None = None
  vision_encoder: nn.Module | None = None
  feature_width: int = 768
  classes: int = 10
  ln: bool = False
  pool: str = "exact"

  def __post_init__(self) -> None:
    if self.pool not in POOLS:
      raise UserError(f"Synergy.pool: found {self.pool!r}, expected one of {POOLS}")
    if len(self.bound) != 1:
      found = ", ".join(f"{name}_encoder" for name in self.bound) or "none"
      raise UserError(
        f"Synergy: found {found} bound, expected exactly one of text_encoder, audio_encoder, vision_encoder"
      )
    super().__post_init__()

  @property
  def bound(self) -> dict[str, nn.Module]:
    """The encoders that are bound, by modality."""
    encoders = {"text": self.text_encoder, "audio": self.audio_encoder, "vision": self.vision_encoder}
    return {name: encoder for name, encoder in encoders.items() if encoder is not None}

  @property
  def streams(self) -> frozenset[str]:
    """The modality of the student."""
    return frozenset(self.bound)

  @property
  def kind(self) -> str:
    """How the encoded stream is read: "text", "speech" or "image"."""
    ((name, encoder),) = self.bound.items()
    if name == "text":
      return "text"
    return "image" if hasattr(type(encoder), "image_size") else "speech"

  @nn.compact
  def __call__(self, batch: Mapping[str, Any], *, train: bool) -> dict[str, Array]:
    ((name, encoder),) = self.bound.items()
    stream = batch[name]
    if self.kind == "image":
      encoded = encoder(stream, train=train, valid=batch.get("valid"))
    else:
      encoded = encoder(stream, train=train)
    if self.kind == "speech" and self.pool == "repo":
      encoded = encoded._replace(mask=rounded_frames(stream["mask"], encoded.hidden.shape[1]))
    student = Student(self.kind, self.feature_width, self.classes, self.ln, name="student")
    feature, scores = student(encoded)
    return {"class": scores, "feature": feature}


class Teacher(nn.Module):
  """The feature [B, D] of a frozen encoder, float32: the mean over what it gives for one example.

  Attributes:
    encoder: any encoder of the project; it runs in evaluation mode.
    pool: "exact" means over real tokens or frames, "repo" over padded ones, too, as the encoder gives them (P13).
  """

  encoder: nn.Module
  pool: str = "exact"

  def __post_init__(self) -> None:
    if self.pool not in POOLS:
      raise UserError(f"Teacher.pool: found {self.pool!r}, expected one of {POOLS}")
    super().__post_init__()

  def __call__(self, stream: Mapping[str, Any]) -> Array:
    encoded = self.encoder(stream, train=False)
    mask = jnp.ones_like(encoded.mask) if self.pool == "repo" else encoded.mask
    return jax.lax.stop_gradient(masked_mean(encoded.hidden, mask))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynergyLoss:
  """(1 - lam) * cross-entropy + lam * mean squared distance to the teacher's feature.

  `lam` 0 is the baseline without a teacher. Evaluation gives the cross-entropy alone, since the teacher's
  input is drawn at random (P12): it selects the checkpoint, and no split but train needs a teacher.
  """

  lam: float = 0.3

  def __post_init__(self) -> None:
    if not 0 <= self.lam <= 1:
      raise UserError(f"SynergyLoss.lam: found {self.lam}, expected a number from 0 to 1 such as 0.3")
    if self.lam == 1:
      # The default of the authors' command line (P5).
      warnings.warn(
        "SynergyLoss.lam = 1 leaves out the classification loss: nothing is learned of the labels", stacklevel=2
      )

  @property
  def streams(self) -> frozenset[str]:
    """What the loss reads of a training batch beside the labels."""
    return frozenset({"teacher"} if self.lam else ())

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
    """Returns the loss terms, {"class": [B], "teacher": [B]} in training and {"class": [B]} else, and the memory.

    Raises `UserError` where the teacher's features have another width than the student's.
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs["class"], batch["labels"]["class"])
    if not train or not self.lam:
      return {"class": loss}, memory
    teacher, feature = batch["teacher"]["features"], outputs["feature"]
    if teacher.shape[-1] != feature.shape[-1]:
      raise UserError(
        f"the teacher's features have {teacher.shape[-1]} values, the student's {feature.shape[-1]}. "
        f"Set Synergy.feature_width = {teacher.shape[-1]}"
      )
    distance = jnp.mean(jnp.square(feature - teacher), axis=-1)
    return {"class": (1 - self.lam) * loss, "teacher": self.lam * distance}, memory

  def predictions(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the class scores {"class": [B, C]}."""
    return {"class": outputs["class"]}
