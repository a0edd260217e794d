"""M3: MultiModal Masking Applied to Sentiment Analysis (Georgiou, Paraskevopoulos, Potamianos; INTERSPEECH 2021).

https://doi.org/10.21437/Interspeech.2021-1739, code https://github.com/efthymisgeo/multimodal-masking

Word-aligned sequences of text, audio and vision go through a recurrent encoder each, are fused by attention between
each pair, and are read by one more recurrent network. The masking layer (`mmjax.masking`) stands before the fusion.
Ids such as M8 name the places where the paper and its code differ.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.errors import UserError
from mmjax.layers import Array, Linear, masked_softmax
from mmjax.recurrent import BiLSTM

MODALITIES = ("text", "audio", "vision")
PAIRS = (("text", "audio"), ("vision", "audio"), ("text", "vision"))
# Order in which the last network reads the streams there are.
FUSED = (*MODALITIES, "text_audio", "text_vision", "vision_audio", "all")


class Attend(nn.Module):
  """Single-head attention without biases and output layer: `query` [B, Q, D] on `context` [B, K, D] gives [B, Q, D].

  `mask` [B, K] is True at real keys; None takes them all.
  """

  dropout: float
  compute_dtype: Any

  @nn.compact
  def __call__(self, query: Array, context: Array, mask: Array | None, *, train: bool) -> Array:
    width, xavier = query.shape[-1], nn.initializers.xavier_uniform()

    def project(name: str, x: Array) -> Array:
      return Linear(width, False, compute_dtype=self.compute_dtype, kernel_init=xavier, name=name)(x)

    scores = jnp.einsum("bqd,bkd->bqk", project("query", query) * width**-0.5, project("key", context))
    weights = masked_softmax(scores, None if mask is None else mask[:, None])
    weights = nn.Dropout(self.dropout)(weights, deterministic=not train)
    return jnp.einsum("bqk,bkd->bqd", weights.astype(self.compute_dtype), project("value", context))


class AttentiveRNN(nn.Module):
  """A BiLSTM, dropout, then attention of the sequence to itself: [B, T, I] to [B, T, H], 2H with merge="concat"."""

  hidden: int
  merge: str
  dropout: float
  compute_dtype: Any

  @nn.compact
  def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
    states, _ = BiLSTM(self.hidden, compute_dtype=self.compute_dtype, name="rnn")(x, mask)  # [B, T, 2H]
    states = nn.Dropout(self.dropout)(states, deterministic=not train)
    if self.merge == "sum":  # after dropout, which so falls on each direction by itself, as in the authors' code
      states = states[..., : self.hidden] + states[..., self.hidden :]
    self.sow("intermediates", "states", states)
    return Attend(self.dropout, self.compute_dtype, name="attention")(states, states, mask, train=train)


class Fusion(nn.Module):
  """The streams and what attention between them gives: {name: [B, T, D]}, three to seven; one to one, two to three.

  A pair attends both ways; each direction has weights of its own and the attending stream as residual, and the two
  are summed (`text_audio`, ...). `all` attends from vision and audio, fused, to the text. `masks` {name: [B, T]} say
  which keys are real; None for all.
  """

  dropout: float
  compute_dtype: Any

  @nn.compact
  def __call__(
    self, streams: Mapping[str, Array], masks: Mapping[str, Array] | None, *, train: bool
  ) -> dict[str, Array]:
    def attend(name: str, query: Array, other: str) -> Array:
      mask = None if masks is None else masks[other]
      return Attend(self.dropout, self.compute_dtype, name=name)(query, streams[other], mask, train=train)

    fused = dict(streams)
    for first, second in PAIRS:
      if not {first, second} <= set(streams):
        continue
      both = [
        attend(f"{one}_from_{other}", streams[one], other) + streams[one]
        for one, other in ((second, first), (first, second))
      ]
      self.sow("intermediates", f"{first}_{second}", jnp.stack(both))
      fused[f"{first}_{second}"] = both[0] + both[1]
    if len(streams) == 3:
      fused["all"] = attend("all", fused["vision_audio"], "text")
    return fused


class M3(nn.Module):
  """The score of one utterance, {"M": [B]} float32, from word-aligned features.

  A batch holds `features` [B, T, D] and `mask` [B, T] for text, audio and vision, of equal T.

  Attributes:
    modalities: those that are read; for the others nothing is built. One without another has no fusion.
    hidden: H of every LSTM, and D of the fusion.
    dropout: after each LSTM and on the weights of each attention.
    mask_before, mask_after: masking layers before the fusion (of the encoded streams) and after it (of all seven);
      None for none.
    pad_mask: leaves padded steps out of the fusion's attention and of the sum over time. False reads them, as the
      authors' code does even where it knows the lengths (M15).
    lengths: "true", or "padded", as the authors' code has it: every step of the box counts as real (M8).
  """

  modalities: tuple[str, ...] = MODALITIES
  hidden: int = 100
  dropout: float = 0.2
  mask_before: nn.Module | None = None
  mask_after: nn.Module | None = None
  pad_mask: bool = True
  lengths: str = "true"
  compute_dtype: Any = "float32"

  tasks: ClassVar[str] = "M"

  def __post_init__(self) -> None:
    found = tuple(self.modalities)
    if not found or set(found) - set(MODALITIES) or len(set(found)) < len(found):
      raise UserError(f"M3.modalities: found {found!r}, expected one or more of {MODALITIES}")
    if self.lengths not in ("true", "padded"):
      raise UserError(f"M3.lengths: found {self.lengths!r}, expected 'true' or 'padded'")
    super().__post_init__()

  @property
  def streams(self) -> frozenset[str]:
    """The modalities that are read."""
    return frozenset(self.modalities)

  @nn.compact
  def __call__(self, batch: Mapping[str, Any], *, train: bool) -> dict[str, Array]:
    masks = self.masks(batch)
    # Real is what is real in any modality: of a modality that is missing no step is.
    real = functools.reduce(jnp.logical_or, masks.values())
    streams = {}
    for name in masks:
      # Padding may hold anything; encoded it is 0, or with "padded" what the authors' zeros give.
      features = jnp.where(batch[name]["mask"][..., None], batch[name]["features"], 0)
      encoder = AttentiveRNN(self.hidden, "sum", self.dropout, self.compute_dtype, name=name)
      streams[name] = encoder(features, masks[name], train=train)
      self.sow("intermediates", f"{name}_encoded", streams[name])
    if self.mask_before is not None:
      streams = self.mask_before(streams, train=train)
    fusion = Fusion(self.dropout, self.compute_dtype, name="fusion")
    fused = fusion(streams, masks if self.pad_mask else None, train=train)
    if self.mask_after is not None:
      fused = self.mask_after(fused, train=train)
    joined = jnp.concatenate([fused[name] for name in FUSED if name in fused], axis=-1)  # [B, T, 7H]
    self.sow("intermediates", "fused", joined)
    reader = AttentiveRNN(self.hidden, "concat", self.dropout, self.compute_dtype, name="reader")
    steps = reader(joined, real, train=train).astype(jnp.float32)  # [B, T, 2H]
    self.sow("intermediates", "steps", steps)
    if self.pad_mask:
      steps = jnp.where(real[..., None], steps, 0)
    return {"M": Linear(1, name="score")(steps.sum(axis=1))[:, 0]}

  def masks(self, batch: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the mask of each modality that is read; UserError where they are not aligned."""
    names = [name for name in MODALITIES if name in self.modalities]
    for name in names:
      if "features" not in batch[name]:
        raise UserError(f"M3 reads features of {name}: found a batch with {', '.join(sorted(batch[name]))}")
    found = {name: batch[name]["features"].shape[1] for name in names}
    if len(set(found.values())) > 1:
      lengths = ", ".join(f"{name} {length}" for name, length in found.items())
      raise UserError(f"M3 reads aligned features: found {lengths} steps, expected equal lengths: use aligned data")
    masks = {name: jnp.asarray(batch[name]["mask"], bool) for name in names}
    return jax.tree.map(jnp.ones_like, masks) if self.lengths == "padded" else masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreLoss:
  """L1 of the score."""

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
    """Returns the loss term {"M": [B]} and the memory."""
    return {"M": jnp.abs(outputs["M"] - batch["labels"]["M"])}, memory

  def predictions(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the score {"M": [B]}, in the labels' units."""
    return dict(outputs)
