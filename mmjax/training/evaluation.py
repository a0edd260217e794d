"""Scores a split: predictions, exact losses and metrics, the same code while training and afterwards."""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmjax import metrics
from mmjax.data import plan as plans
from mmjax.progress import track
from mmjax.training import checkpoints, step
from mmjax.training import mesh as meshes
from mmjax.training.experiment import Experiment

# The checkpoint whose rows are reported first (MM4).
PRIMARY = "best_loss"


@dataclasses.dataclass(frozen=True)
class Scores:
  """What one split gave."""

  loss: float  # sum of the terms, each averaged as `Experiment.valid_loss` says
  terms: dict[str, float]
  predictions: dict[str, np.ndarray]  # {head: [N]}
  metrics: dict[str, dict[str, float]]  # {head: {name: value}}

  def summary(self) -> dict[str, Any]:
    """Returns what results.json keeps of it."""
    return {"loss": self.loss, **self.metrics}


def head_labels(labels: Mapping[str, np.ndarray], head: str) -> np.ndarray:
  """Returns the labels a head is scored against: its own where the data have them, else M's (MM17)."""
  return labels.get(head, labels["M"])


def primary(heads: Any) -> str:
  """Returns the head whose accuracy selects a checkpoint: M where there is one (MMML's `tasks[0]`)."""
  return next(head for head in ("M", *sorted(heads, reverse=True)) if head in heads)


class Evaluator:
  """Scores variables on the splits of `data`, with one compiled step a box."""

  def __init__(self, experiment: Experiment, data: Any, mesh: Mesh):
    self.experiment, self.data, self.mesh = experiment, data, mesh
    self.eval_step = jax.jit(
      step.make_eval_step(experiment.network, experiment.objective),
      out_shardings=meshes.replicated(mesh),
    )

  def plan(self, split: str, epoch: Any) -> plans.Batches:
    """Returns the batches of `split`, in a fixed order or, where the experiment shuffles, in the epoch's (SM3)."""
    data = self.data
    if not self.experiment.eval_shuffle:
      fixed: plans.Batches = data.plan(split, seed=None, epoch=0)
      return fixed
    # With the boxes of evaluation: those of training may be too small for other splits.
    lengths, boxes, size = data.splits[split].lengths, data.eval_boxes, data.eval_batch_size
    return plans.plan(lengths, boxes, size, seed=self.experiment.seed, epoch=int(epoch))

  def score(self, variables: Any, memory: Any, epoch: Any, split: str, *, order: int | None = None) -> Scores:
    """Returns the scores of `split` (train, valid or test) in evaluation mode.

    `order` is the epoch whose order of examples holds, if that changes; None: `epoch`.
    """
    data = self.data
    plan = self.plan(split, epoch if order is None else order)
    size = len(data.splits[split].ids)
    predictions: dict[str, np.ndarray] = {}
    losses: dict[str, np.ndarray] = {}
    params = variables["params"]
    model_state = {name: value for name, value in variables.items() if name != "params"}
    batches = data.batches(split, plan, row_multiple=self.mesh.size)
    for (_, indices), batch in track(
      zip(plan, batches, strict=True), f"evaluating {split}", total=len(plan), unit="batches"
    ):
      batch = meshes.put_batch(batch, self.mesh)
      outputs, terms = self.eval_step(params, model_state, memory, epoch, batch)
      for store, values in ((predictions, outputs), (losses, terms)):
        for name, value in jax.device_get(values).items():
          rows = value[: len(indices)]
          store.setdefault(name, np.zeros((size, *rows.shape[1:]), np.float32))[indices] = rows
    groups = [rows for _, rows in plan] if self.experiment.valid_loss == "batches" else [slice(None)]  # SM3
    means = {
      name: float(np.mean([np.mean(value[rows], dtype=np.float64) for rows in groups]))
      for name, value in losses.items()
    }
    measure = self.experiment.measure(data.name)
    labels = data.splits[split].labels
    table = {head: measure(predictions[head], head_labels(labels, head)) for head in predictions}
    return Scores(sum(means.values()), means, predictions, table)

  def keep(
    self,
    workdir: Path,
    saved: checkpoints.Checkpoints,
    name: str,
    splits: Sequence[str],
    like: Any,
    memory: Any,
    epoch: Any,
  ) -> dict[str, Any]:
    """Scores checkpoint `name`; writes its part of results.json and its predictions; returns results.json.

    `predictions_<split>.csv` is the primary checkpoint's; another's carry its name.
    """
    path = workdir / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    data = self.data
    results |= {
      "dataset": data.name,
      "seed": self.experiment.seed,
      **({"metric": self.experiment.metric} if self.experiment.metric else {}),
      "primary": PRIMARY,
      "counts": {split: len(data.splits[split].ids) for split in data.splits},
    }
    info = saved.info(name)
    entry = results.setdefault("checkpoints", {}).setdefault(name, {})
    if entry.get("step") != info["step"]:
      entry.clear()
    entry |= {"step": info["step"], "epoch": info["epoch"]}
    variables = saved.restore(name, "variables", like)
    measure = self.experiment.measure(data.name)
    for split in splits:
      scores = self.score(variables, memory, epoch, split, order=info["epoch"])
      entry[split] = scores.summary()
      results["heads"] = sorted(scores.metrics, key="MTAV".find)
      results.setdefault("constant", {})[split] = constant(data, split, results["heads"], measure)
      suffix = "" if name == PRIMARY else f"_{name}"
      write_predictions(workdir / f"predictions_{split}{suffix}.csv", data.splits[split], scores.predictions)
    write_json(path, results)
    return results


def evaluate(
  experiment: Experiment, *, workdir: Path, checkpoint: str, split: str, data_dir: Path, cache_dir: Path
) -> dict[str, Any]:
  """Scores one checkpoint of `workdir` on one split; returns results.json, which it updates."""
  saved = checkpoints.Checkpoints(workdir, read_only=True)
  name = saved.find(checkpoint)
  boxes_file = workdir / "boxes.json"
  boxes = json.loads(boxes_file.read_text()) if boxes_file.exists() else None
  data = experiment.open_data(data_dir, cache_dir, boxes)
  mesh = meshes.make(experiment.fsdp)
  batch = data.first_batch(row_multiple=mesh.size)
  shapes = step.abstract(experiment.network, batch)
  like = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    meshes.shardings(shapes, mesh),
  )
  outputs = jax.eval_shape(lambda v, b: experiment.network.apply(v, b, train=False), shapes, batch)
  memory = experiment.objective.init(data.splits["train"].labels, outputs)
  epoch = np.int32(saved.info(name)["epoch"])
  return Evaluator(experiment, data, mesh).keep(workdir, saved, name, (split,), like, memory, epoch)


def constant(data: Any, split: str, heads: Any, measure: metrics.Metric) -> dict[str, dict[str, float]]:
  """Returns the metrics of the constant predictor: each head says the median of its training labels."""
  train, labels = data.splits["train"].labels, data.splits[split].labels
  table = {}
  for head in heads:
    true = head_labels(labels, head)
    table[head] = measure(np.full(len(true), np.median(head_labels(train, head)), np.float32), true)
  return table


def write_predictions(path: Path, split: Any, predictions: Mapping[str, np.ndarray]) -> None:
  """Writes a CSV: id, the labels, one column per head, rows in the split's order."""
  heads = sorted(predictions, key="MTAV".find)
  columns = {"id": split.ids}
  columns |= {f"label_{name}": split.labels[name] for name in sorted(split.labels, key="MTAV".find)}
  columns |= {head: predictions[head] for head in heads}
  partial = path.with_suffix(".partial")
  with partial.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
      writer.writerow([row[0], *(f"{value:.6g}" for value in row[1:])])
  partial.replace(path)


def write_json(path: Path, value: Any) -> None:
  """Writes `value` to `path` whole or not at all."""
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  partial.replace(path)


def table(results: Mapping[str, Any], split: str) -> str:
  """Returns a text table of results.json: a row per checkpoint and head and for the constant predictor."""
  found = {name: entry[split] for name, entry in results["checkpoints"].items() if split in entry}
  found["constant"] = results["constant"][split]
  rows = [(f"{name} {head}", scores[head]) for name, scores in found.items() for head in results["heads"]]
  title = f"{split} ({results['dataset']})"
  names = list(rows[0][1]) if rows else []
  width = max([len(title), *(len(row) for row, _ in rows)])
  lines = [title.ljust(width) + "".join(f"{name:>{max(len(name), 8) + 2}}" for name in names)]
  for row, values in rows:
    cells = "".join(f"{values.get(name, float('nan')):>{max(len(name), 8) + 2}.4f}" for name in names)
    lines.append(row.ljust(width) + cells)
  return "\n".join(lines)
