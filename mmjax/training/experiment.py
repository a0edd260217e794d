"""The experiment that a gin file describes: everything built, nothing read yet."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn

from mmjax.data.pipeline import Pipeline
from mmjax.training.optimizers import AdamW
from mmjax.training.step import Objective


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
  """

  network: nn.Module
  objective: Objective
  data: Pipeline
  optimizer: AdamW
  seed: int = 1
  epochs: int = 100
  patience: int = 8
  fsdp: int = 1
  log_every: int = 10
  save_minutes: float = 10.0

  @property
  def streams(self) -> frozenset[str] | None:
    """The modalities the network reads; None where it does not say, then all that the pipeline gives."""
    return getattr(self.network, "streams", None)

  @property
  def normalize_wave(self) -> bool:
    """Whether the audio encoder was trained on clips of zero mean and unit variance."""
    encoder: Any = getattr(self.network, "audio_encoder", None)
    if self.data.audio is not None and self.data.audio.encoder is not None:
      encoder = self.data.audio.encoder
    return getattr(encoder, "normalize_wave", False)

  def open_data(self, data_dir: Path, cache_dir: Path, boxes: Any = None) -> Any:
    """Returns the opened data with only the streams the network reads; `boxes` are those a workdir keeps."""
    return self.data.open(data_dir, cache_dir, streams=self.streams, normalize_wave=self.normalize_wave, boxes=boxes)

  def abstract_batch(self) -> dict[str, Any]:
    """Returns the shapes of a batch at the paper's full lengths; needs neither data nor tokenizer."""
    return self.data.abstract_batch(streams=self.streams)
