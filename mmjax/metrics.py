"""Metrics of MOSI, MOSEI and SIMS under the names and definitions of their published tables (SM15, SM15b).

Everything is numpy on whole splits: Corr, F1 and the class accuracies are not means over batches. Values are
fractions (0.8591, not 85.91) and are not rounded. Class membership is decided in float32: a label read as the
float64 0.1 and one that passed through float32 fall into the same class.

Every metric is finite. Where a definition has nothing to count, the value is 0.0: Corr when predictions or
labels are constant (or there is one example), and the Non0 metrics when every label is zero.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Values = dict[str, float]
Metric = Callable[[Any, Any], Values]

SIMS_BOUNDS = {"Mult_acc_2": (0.0,), "Mult_acc_3": (-0.1, 0.1), "Mult_acc_5": (-0.7, -0.1, 0.1, 0.7)}


def mosi_regression(pred: Any, true: Any, *, f1_swapped: bool = False) -> Values:
  """Returns the MOSI/MOSEI metrics of predicted scores `pred` [N] for labels `true` [N] in -3..3.

  - Has0_acc_2, Has0_F1_score: two classes, value >= 0 against value < 0, for prediction and label; every
    example counts, and a zero is positive.
  - Non0_acc_2, Non0_F1_score: examples whose label is not exactly 0; value > 0 against value <= 0, so a
    prediction of 0 is negative.
  - Mult_acc_7, Mult_acc_5: share of examples whose prediction and label are equal after clipping both to
    [-3, 3] (5 classes: [-2, 2]) and rounding half to even (0.5 -> 0, 1.5 -> 2, 2.5 -> 2), in this order.
  - MAE, Corr: mean absolute error and Pearson correlation of the values as they are, not clipped.

  F1 is the weighted one: the F1 of each class, averaged with the class's share of the labels. `f1_swapped`
  averages with its share of the predictions, as the code of M3 and MulT does, which hands the two over in the
  other order (M11). Raises ValueError for empty or non-finite input and for unequal lengths. Source: SM15.
  """
  pred, true = _scores(pred, true)
  kept = true != 0
  has0 = _two_classes(pred >= 0, true >= 0, "Has0", f1_swapped=f1_swapped)
  non0 = _two_classes(pred[kept] > 0, true[kept] > 0, "Non0", f1_swapped=f1_swapped)
  rounded = {
    f"Mult_acc_{2 * limit + 1}": _accuracy(*(np.round(np.clip(x, -limit, limit)) for x in (pred, true)))
    for limit in (2, 3)
  }
  return {**has0, **non0, **rounded, **_distance(pred, true)}


def m3_regression(pred: Any, true: Any, *, f1_swapped: bool = False) -> Values:
  """Returns `mosi_regression` and M3's third pair of two-class metrics, for scores and labels in -3..3.

  - Neg0_acc_2, Neg0_F1_score: value > 0 against value <= 0; every example counts, and a zero is negative.

  Of M3's names, `f1_pos` is Has0, `f1_neg` Neg0 and `f1` Non0, with `f1_swapped=True` (M11).
  """
  values = mosi_regression(pred, true, f1_swapped=f1_swapped)
  pred, true = _scores(pred, true)
  return {**values, **_two_classes(pred > 0, true > 0, "Neg0", f1_swapped=f1_swapped)}


def emotions(scores: Any, present: Any, names: Sequence[str]) -> Values:
  """Returns {name_acc, name_F1} of each emotion by itself, present or absent, as IEMOCAP is scored.

  `scores` [N, C] are above 0 where an emotion is taken to be present, `present` [N, C] is 0 or 1, `names` are the C
  emotions. F1 is weighted. Raises ValueError as `mosi_regression` and for other shapes.
  """
  scores, present = np.asarray(scores, np.float32), np.asarray(present)
  if scores.ndim != 2 or not scores.shape == present.shape == (len(scores), len(names)):
    raise ValueError(f"Emotion scores {scores.shape}, labels {present.shape}: expected (N, {len(names)}) for both.")
  if not len(scores):
    raise ValueError("No examples: metrics need at least one.")
  _check_finite(scores, "predictions")
  values: Values = {}
  for name, pred, true in zip(names, (scores > 0).T, (present > 0).T, strict=True):
    values |= {f"{name}_acc": _accuracy(pred, true), f"{name}_F1": _weighted_f1(pred, true)}
  return values


def sims_regression(pred: Any, true: Any) -> Values:
  """Returns the CH-SIMS metrics of predicted scores `pred` [N] for labels `true` [N] in -1..1.

  Predictions and labels are clipped to [-1, 1] first, before MAE and Corr too. Classes are intervals open
  below and closed above:

  - Mult_acc_2, F1_score: [-1, 0], (0, 1]; that is non-positive against positive, so a zero is negative.
  - Mult_acc_3: [-1, -0.1], (-0.1, 0.1], (0.1, 1].
  - Mult_acc_5: [-1, -0.7], (-0.7, -0.1], (-0.1, 0.1], (0.1, 0.7], (0.7, 1].
  - MAE, Corr: of the clipped values.

  F1 is weighted, as in `mosi_regression`. Raises ValueError likewise. Source: SM15.
  """
  pred, true = (np.clip(x, -1, 1) for x in _scores(pred, true))
  classes = {
    name: [np.searchsorted(np.asarray(bounds, np.float32), x, side="left") for x in (pred, true)]
    for name, bounds in SIMS_BOUNDS.items()
  }
  accuracies = {name: _accuracy(*both) for name, both in classes.items()}
  return {**accuracies, "F1_score": _weighted_f1(*classes["Mult_acc_2"]), **_distance(pred, true)}


def classification(pred: Any, true: Any, *, compat: str | None = None) -> Values:
  """Returns the three-class metrics of class scores `pred` [N, 3] for labels `true` [N].

  Classes are 0 negative, 1 neutral, 2 positive. The scores may be logits or probabilities.

  - Acc_3, F1_score_3: the highest of the three scores against the label.
  - Has0_acc_2, Has0_F1_score: every example; positive when the positive score exceeds the negative one, label
    positive when it is 2: unlike in the regression metrics, a neutral label is negative here.
  - Non0_acc_2, Non0_F1_score: the same on examples whose label is not neutral.

  `compat="msa"` gives the value of the released code, which compares predictions 0 and 1 with labels 0 and 2
  in Non0, so that no positive ever matches. F1 is weighted. Raises ValueError as `mosi_regression` and for
  labels that are not 0, 1 or 2. Source: SM15b.
  """
  if compat not in (None, "msa"):
    raise ValueError(f'compat={compat!r}: expected None (the fixed definition) or "msa".')
  pred, true = np.asarray(pred, np.float32), np.asarray(true).reshape(-1)
  if pred.shape != (len(true), 3):
    raise ValueError(f"Class scores have shape {pred.shape}: expected ({len(true)}, 3) for {len(true)} labels.")
  _check_finite(pred, "predictions")
  if not len(true):
    raise ValueError("No examples: metrics need at least one.")
  if not np.isin(true, (0, 1, 2)).all():
    raise ValueError(f"Class labels {sorted(set(true.tolist()))}: expected 0, 1 and 2.")
  best, positive, kept = pred.argmax(1), (pred[:, 2] > pred[:, 0]).astype(int), true != 1
  non0_true = true[kept] if compat == "msa" else true[kept] == 2  # SM15b
  return {
    **_two_classes(positive, true == 2, "Has0"),
    **_two_classes(positive[kept], non0_true, "Non0"),
    "Acc_3": _accuracy(best, true),
    "F1_score_3": _weighted_f1(best, true),
  }


METRICS: dict[str, dict[str, Metric]] = {
  "mosi": {"regression": mosi_regression, "classification": classification},
  "mosei": {"regression": mosi_regression, "classification": classification},
  "sims": {"regression": sims_regression, "classification": classification},
  "simsv2": {"regression": sims_regression, "classification": classification},
}
# By name, in place of those of the data set (`Experiment.metric`).
NAMED: dict[str, Metric] = {
  "m3": m3_regression,
  "m3_swapped": functools.partial(m3_regression, f1_swapped=True),  # M11
}
SELECTION = ("Has0_acc_2", "Mult_acc_2")


def for_dataset(name: str, kind: str = "regression") -> Metric:
  """Returns the function `(pred, true) -> {metric: value}` of a dataset; upper and lower case are the same.

  `kind` is "regression" or "classification". A name outside `METRICS` is a dataset of your own, with labels
  in -3..3: it is measured as MOSI is. Raises ValueError for another kind.
  """
  kinds = METRICS.get(name.lower(), METRICS["mosi"])
  if kind not in kinds:
    raise ValueError(f"Metrics of kind {kind!r}: expected one of {', '.join(kinds)}.")
  return kinds[kind]


def selection_name(metrics: Mapping[str, float]) -> str:
  """Returns the accuracy that selects checkpoints: Has0_acc_2 (MOSI, MOSEI, own), Mult_acc_2 (SIMS). MM4."""
  return next(name for name in SELECTION if name in metrics)


def selection_accuracy(metrics: Mapping[str, float]) -> float:
  """Returns the validation accuracy that selects checkpoints, rounded to 4 decimals.

  Rounding makes ties, and a tie goes to the later epoch: compare with `>=`. Source: MM4.
  """
  return round(float(metrics[selection_name(metrics)]), 4)


def constant_predictor(train_labels: Any, true: Any, *, metric: Metric = mosi_regression) -> Values:
  """Returns the metrics of predicting the median of `train_labels` for every label in `true`.

  The median is the constant with the lowest MAE on the training labels: what a model must beat.
  """
  train_labels, true = np.asarray(train_labels, np.float32).reshape(-1), np.asarray(true)
  if not train_labels.size:
    raise ValueError("No training labels: the constant predictor needs at least one.")
  _check_finite(train_labels, "training labels")
  return metric(np.full(true.size, np.median(train_labels)), true)


def _scores(pred: Any, true: Any) -> tuple[np.ndarray, np.ndarray]:
  pred, true = (np.asarray(x, np.float32).reshape(-1) for x in (pred, true))
  if len(pred) != len(true):
    raise ValueError(f"{len(pred)} predictions for {len(true)} labels: expected one for each.")
  if not len(true):
    raise ValueError("No examples: metrics need at least one.")
  _check_finite(pred, "predictions")
  _check_finite(true, "labels")
  return pred, true


def _check_finite(values: np.ndarray, what: str) -> None:
  bad = int(np.sum(~np.isfinite(values)))
  if bad:
    raise ValueError(f"{bad} of {values.size} {what} are not finite (NaN or infinite).")


def _accuracy(pred: np.ndarray, true: np.ndarray) -> float:
  return float(np.mean(pred == true)) if len(true) else 0.0


def _weighted_f1(pred: np.ndarray, true: np.ndarray) -> float:
  total = 0.0
  for label in np.unique(true):
    hits = np.sum((pred == label) & (true == label))
    support = np.sum(true == label)
    total += support * 2 * hits / (np.sum(pred == label) + support)
  return float(total / len(true)) if len(true) else 0.0


def _two_classes(pred: np.ndarray, true: np.ndarray, prefix: str, *, f1_swapped: bool = False) -> Values:
  f1 = _weighted_f1(true, pred) if f1_swapped else _weighted_f1(pred, true)
  return {f"{prefix}_acc_2": _accuracy(pred, true), f"{prefix}_F1_score": f1}


def _distance(pred: np.ndarray, true: np.ndarray) -> Values:
  x, y = pred.astype(np.float64), true.astype(np.float64)
  mae = float(np.mean(np.abs(x - y)))
  # Equality, not a small variance: the mean of equal numbers may differ from them by rounding.
  if np.ptp(x) == 0 or np.ptp(y) == 0:
    return {"MAE": mae, "Corr": 0.0}
  x, y = ((v - v.mean()) / np.abs(v - v.mean()).max() for v in (x, y))
  return {"MAE": mae, "Corr": float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))}
