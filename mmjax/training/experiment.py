"""The experiment that a gin file describes: everything built, nothing read yet."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn

from mmjax import metrics
from mmjax.errors import UserError
from mmjax.training.optimizers import Optimizer
from mmjax.training.step import Objective


class Source(Protocol):
  """An input pipeline: `pipeline.Pipeline`, `feature_pipeline.Features` or one of your own."""

  @property
  def dataset(self) -> str:
    """The data set's name."""

  @property
  def batch_size(self) -> int:
    """Examples of a training batch."""

  def abstract_batch(self, *, streams: Collection[str] | None = None) -> dict[str, Any]:
    """Returns the shapes of a batch at full lengths; `streams` are the modalities that are read, None all."""

  def open(
    self,
    data_dir: Path,
    cache_dir: Path,
    *,
    streams: Collection[str] | None = None,
    normalize_wave: bool = False,
    boxes: Sequence[Mapping[str, int]] | None = None,
  ) -> Any:
    """Returns `batches.Data`; `boxes` are those of an earlier start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What `train`, `evaluate` and every other verb work on.

  Attributes:
    network: a paper's network, `network(batch, train=...) -> {name: array}`.
    objective: a paper's objective.
    data: the input pipeline.
    optimizer: the optimiser's description.
    seed: of initial weights, dropout and the order of batches; a run is a function of (configuration, seed).
    epochs: the most epochs to train.
    patience: epochs without a lower validation loss after which training stops.
    fsdp: devices that share one copy of parameters and optimiser state.
    log_every: micro-batches between two lines of metrics.jsonl.
    save_minutes: minutes between two saves of `latest` within an epoch.
    valid_loss: the loss of a split, by which checkpoints are chosen: the mean over its "examples", or over its
      "batches" of their means, as in the authors' Self-MM, where a short last batch weighs as much as the others (SM3).
    eval_shuffle: scores splits in another order after each epoch, as the authors' Self-MM does (SM3). Only the loss
      over "batches" depends on it.
    metric: a name of `metrics.NAMED` in place of the data set's own metrics.
  """

  network: nn.Module
  objective: Objective
  data: Source
  optimizer: Optimizer
  seed: int = 1
  epochs: int = 100
  patience: int = 8
  fsdp: int = 1
  log_every: int = 10
  save_minutes: float = 10.0
  valid_loss: str = "examples"
  eval_shuffle: bool = False
  metric: str | None = None

  def __post_init__(self) -> None:
    for name, allowed in {"valid_loss": ("examples", "batches"), "metric": (None, *metrics.NAMED)}.items():
      if getattr(self, name) not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise UserError(f"Experiment.{name}: found {getattr(self, name)!r}, expected one of {expected}")

  @property
  def streams(self) -> frozenset[str] | None:
    """The modalities the network reads; None where it does not say, then all that the pipeline gives."""
    return getattr(self.network, "streams", None)

  @property
  def normalize_wave(self) -> bool:
    """Whether the audio encoder was trained on clips of zero mean and unit variance."""
    encoder: Any = getattr(getattr(self.data, "audio", None), "encoder", None)
    if encoder is None:
      encoder = getattr(self.network, "audio_encoder", None)
    return getattr(encoder, "normalize_wave", False)

  def open_data(self, data_dir: Path, cache_dir: Path, boxes: Any = None) -> Any:
    """Returns the opened data with only the streams the network reads; `boxes` are those a workdir keeps."""
    return self.data.open(data_dir, cache_dir, streams=self.streams, normalize_wave=self.normalize_wave, boxes=boxes)

  def measure(self, dataset: str) -> metrics.Metric:
    """Returns the function of (predictions, labels) that scores a head on `dataset`."""
    return metrics.NAMED[self.metric] if self.metric else metrics.for_dataset(dataset)

  def abstract_batch(self) -> dict[str, Any]:
    """Returns the shapes of a batch at the paper's full lengths; needs neither data nor tokenizer."""
    return self.data.abstract_batch(streams=self.streams)
