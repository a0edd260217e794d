"""What a split's loss averages over, in which order its examples come, and which metrics score it."""

import types
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmjax import metrics
from mmjax.data import plan as plans
from mmjax.errors import UserError
from mmjax.papers.m3 import ScoreLoss
from mmjax.training import evaluation, step
from mmjax.training import mesh as meshes
from mmjax.training.experiment import Experiment
from mmjax.training.optimizers import AdamW

LABELS = np.array([0.0, 1, 2, 3, -3, -1, 0.5, -2], np.float32)
BOXES = [{"text": 2}, {"text": 4}]
LENGTHS = {"text": np.array([1, 1, 4, 2, 2, 1, 2, 1])}


class Zero(nn.Module):
  """Predicts 0 for whatever it reads."""

  @nn.compact
  def __call__(self, batch: Any, *, train: bool) -> dict[str, jax.Array]:
    return {"M": nn.Dense(1, kernel_init=nn.initializers.zeros)(batch["x"])[:, 0]}


class Data:
  """Eight validation examples, one of which only the box of evaluation holds; batches of up to 3."""

  name, eval_batch_size, eval_boxes = "mosi", 3, BOXES

  def __init__(self):
    self.splits = {"valid": types.SimpleNamespace(ids=list("abcdefgh"), labels={"M": LABELS}, lengths=LENGTHS)}
    self.splits["train"] = self.splits["valid"]
    self.read: list[list[int]] = []

  def plan(self, split: str, *, seed: int | None, epoch: int) -> plans.Batches:
    boxes = BOXES if seed is None else BOXES[:1]
    return plans.plan(LENGTHS, boxes, self.eval_batch_size, seed=seed, epoch=epoch)

  def batches(self, split: str, batches: plans.Batches, *, row_multiple: int) -> Any:
    self.read = [rows.tolist() for _, rows in batches]
    for _, rows in batches:
      index = np.resize(rows, max(3, row_multiple))
      valid = np.arange(len(index)) < len(rows)
      yield {"x": index[:, None].astype(np.float32), "labels": {"M": LABELS[index]}, "index": index, "valid": valid}


def experiment_of(data: Data, **options: Any) -> Experiment:
  return Experiment(network=Zero(), objective=ScoreLoss(), data=data, optimizer=AdamW(learning_rate=1.0), **options)


def evaluator_of(**options: Any) -> tuple[evaluation.Evaluator, Data]:
  data = Data()
  return evaluation.Evaluator(experiment_of(data, **options), data, meshes.make(devices=jax.devices()[:1])), data


def score(evaluator: evaluation.Evaluator, epoch: int, **options: Any) -> evaluation.Scores:
  batch = {"x": np.zeros((3, 1), np.float32)}
  variables = step.initial(evaluator.experiment.network, jax.random.key(0), batch)
  return evaluator.score(variables, {}, np.int32(epoch), "valid", **options)


def test_the_loss_is_the_mean_over_examples_in_a_fixed_order():
  evaluator, data = evaluator_of()
  losses = [(score(evaluator, epoch).loss, data.read) for epoch in (1, 2)]
  assert losses[0] == losses[1]
  assert losses[0][0] == pytest.approx(float(np.mean(np.abs(LABELS))))


def test_shuffled_batches_weigh_alike():
  """SM3: each epoch has an order of its own, and a short batch weighs as much as the others."""
  evaluator, data = evaluator_of(valid_loss="batches", eval_shuffle=True, seed=3)
  found = {}
  for epoch in (1, 2, 3):
    scores = score(evaluator, epoch)
    assert sorted(row for rows in data.read for row in rows) == list(range(8))
    assert sorted(len(rows) for rows in data.read) == [2, 3, 3]
    assert scores.loss == pytest.approx(np.mean([np.abs(LABELS[rows]).mean() for rows in data.read]))
    assert scores.metrics == {"M": metrics.mosi_regression(np.zeros(8), LABELS)}
    found[epoch] = (scores.loss, data.read)
  assert len({loss for loss, _ in found.values()}) > 1
  assert (score(evaluator, 9, order=2).loss, data.read) == found[2]


def test_shuffling_alone_leaves_the_loss():
  evaluator, data = evaluator_of(eval_shuffle=True)
  reads = []
  for epoch in (1, 2):
    assert score(evaluator, epoch).loss == pytest.approx(float(np.mean(np.abs(LABELS))))
    reads.append(data.read)
  assert reads[0] != reads[1]


def test_metrics_by_name():
  values = score(evaluator_of(metric="m3_swapped")[0], 1).metrics["M"]
  assert values == metrics.m3_regression(np.zeros(8), LABELS, f1_swapped=True)
  assert values["Has0_F1_score"] != metrics.m3_regression(np.zeros(8), LABELS)["Has0_F1_score"]
  assert experiment_of(Data()).measure("sims") is metrics.sims_regression


@pytest.mark.parametrize(
  ("option", "message"),
  [({"valid_loss": "batch"}, "valid_loss: found 'batch'.*'batches'"), ({"metric": "m4"}, "metric: found 'm4'.*'m3'")],
)
def test_mistakes(option, message):
  with pytest.raises(UserError, match=message):
    experiment_of(Data(), **option)
