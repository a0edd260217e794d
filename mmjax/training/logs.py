"""Metrics of a run: TensorBoard events and metrics.jsonl, through clu's writers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def without_later_steps(path: Path, step: int) -> None:
  """Drops the lines of `path` that a killed run wrote after the checkpoint it resumes from."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except (ValueError, KeyError):  # a line cut short by the kill
      continue
  partial = path.with_suffix(".partial")
  partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
  partial.replace(path)


class Writer:
  """Writes the same scalars to TensorBoard and to `workdir/metrics.jsonl`, one JSON object a line."""

  def __init__(self, workdir: Path, *, after_step: int):
    from clu import metric_writers

    path = workdir / "metrics.jsonl"
    without_later_steps(path, after_step)
    self.lines = path.open("a", encoding="utf-8")
    self.tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir / "tensorboard")))

  def write(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
    """Writes `scalars` {name: value} of a step."""
    self.lines.write(json.dumps({"step": step, "epoch": epoch, **scalars}) + "\n")
    self.lines.flush()
    self.tensorboard.write_scalars(step, dict(scalars))

  def step(self, step: int, epoch: int, terms: Mapping[str, float]) -> None:
    """Writes the loss of one step and its terms, means over the batch."""
    scalars = {f"train/loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
    self.write(step, epoch, {"train/loss": sum(terms.values()), **scalars})

  def epoch(self, step: int, epoch: int, train_loss: float, scores: Any) -> None:
    """Writes the mean training loss of an epoch and the scores on valid."""
    scalars = {"train/loss_epoch": train_loss, "valid/loss": scores.loss}
    scalars |= {f"valid/loss_{name}": value for name, value in scores.terms.items()}
    for head, values in scores.metrics.items():
      scalars |= {f"valid/{head}/{name}": value for name, value in values.items()}
    self.write(step, epoch, scalars)
    self.tensorboard.flush()

  def close(self) -> None:
    """Flushes and closes both."""
    self.lines.close()
    self.tensorboard.flush()
    self.tensorboard.close()
