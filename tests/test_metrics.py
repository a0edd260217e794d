"""The metrics against the authors' values, hand-computed cases and scikit-learn."""

import warnings

import golden
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from mmjax import metrics

CASES = {
  "mosi_regression": (metrics.mosi_regression, "in_mosi_pred", "in_mosi_true"),
  "sims_regression": (metrics.sims_regression, "in_sims_pred", "in_sims_true"),
  "mosi_classification": (
    lambda pred, true: metrics.classification(pred, true, compat="msa"),
    "in_class_pred",
    "in_class_true",
  ),
}


@pytest.fixture(autouse=True)
def _no_warnings():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


@pytest.mark.parametrize("authors", ["mmml", "self_mm", "mmsa"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case, authors):
  function, pred, true = CASES[case]
  arrays = golden.arrays("metrics_msa")
  expected = golden.config("metrics_msa")[case]["unrounded"][authors]
  got = function(arrays[pred], arrays[true])
  assert list(got) == list(expected)
  for name, value in expected.items():
    assert got[name] == pytest.approx(value, abs=1e-6), name


def test_golden_non0_is_higher_when_fixed():
  arrays = golden.arrays("metrics_msa")
  pred, true = arrays["in_class_pred"], arrays["in_class_true"]
  fixed, msa = metrics.classification(pred, true), metrics.classification(pred, true, compat="msa")
  assert {name for name in fixed if fixed[name] != msa[name]} == {"Non0_acc_2", "Non0_F1_score"}
  kept = true != 1
  assert fixed["Non0_acc_2"] == np.mean((pred[kept, 2] > pred[kept, 0]) == (true[kept] == 2))
  # The released code can match negatives only.
  assert msa["Non0_acc_2"] == np.mean((pred[kept, 2] <= pred[kept, 0]) & (true[kept] == 0))


M3_NAMES = {
  "mae": "MAE",
  "corr": "Corr",
  "acc_7": "Mult_acc_7",
  "acc_5": "Mult_acc_5",
  "f1_pos": "Has0_F1_score",
  "bin_acc_pos": "Has0_acc_2",
  "f1_neg": "Neg0_F1_score",
  "bin_acc_neg": "Neg0_acc_2",
  "f1": "Non0_F1_score",
  "bin_acc": "Non0_acc_2",
}


@pytest.mark.parametrize("case", [0, 1])
def test_golden_m3(case):
  stored = golden.config("m3_mosei_metrics")["cases"][case]
  pred, true = np.float32(stored["preds"]), np.float32(stored["truths"])
  theirs = metrics.m3_regression(pred, true, f1_swapped=True)
  expected = stored["eval_mosei_senti"]
  assert {M3_NAMES[name] for name in expected} == set(theirs)
  for name, value in expected.items():
    assert theirs[M3_NAMES[name]] == pytest.approx(value, abs=1e-6), name

  # Their older function calls other variants by the same names, and can leave out the zeros before each.
  old = stored["eval_mosei_senti_old_exclude_zero_false"]
  assert (old["f1"], old["f1_neg"]) == pytest.approx((theirs["Has0_F1_score"], theirs["Neg0_F1_score"]))
  without = metrics.m3_regression(pred[true != 0], true[true != 0], f1_swapped=True)
  old = stored["eval_mosei_senti_old_exclude_zero_true"]
  assert (old["f1"], old["f1_neg"]) == pytest.approx((without["Has0_F1_score"], without["Neg0_F1_score"]))
  assert old["bin_acc_neg"] == pytest.approx(without["Neg0_acc_2"])

  # The order matters to F1 alone; the right one is scikit-learn's of (labels, predictions).
  right, everything = metrics.m3_regression(pred, true), np.ones(len(true), bool)
  assert all(right[name] == theirs[name] for name in right if "F1" not in name)
  for name, kept, limit in (
    ("Has0", everything, np.greater_equal),
    ("Neg0", everything, np.greater),
    ("Non0", true != 0, np.greater),
  ):
    labels, predictions = limit(true[kept], 0), limit(pred[kept], 0)
    assert right[f"{name}_F1_score"] == pytest.approx(f1_score(labels, predictions, average="weighted"))
    assert theirs[f"{name}_F1_score"] == pytest.approx(f1_score(predictions, labels, average="weighted"))
  assert right["Has0_F1_score"] != theirs["Has0_F1_score"]


def test_golden_emotions():
  stored = golden.config("m3_mosei_metrics")["eval_iemocap"]
  logits = np.float32(stored["logits_n_by_8"]).reshape(-1, 4, 2)
  names = ("neutral", "happy", "sad", "angry")
  got = metrics.emotions(logits[..., 1] - logits[..., 0], stored["labels_n_by_4"], names)
  assert {name.lower(): value for name, value in got.items()} == pytest.approx(stored["result"])
  for scores, present, message in (
    (np.zeros((0, 4)), np.zeros((0, 4)), "No examples"),
    (np.zeros((3, 4)), np.zeros((3, 1)), "expected .N, 4. for both"),
    (np.full((1, 4), np.nan), np.zeros((1, 4)), "4 of 4 predictions"),
  ):
    with pytest.raises(ValueError, match=message):
      metrics.emotions(scores, present, names)


def test_mosi_by_hand():
  #        zero: positive in Has0 | out of Non0 | 2.5 rounds to 2, 3.5 clips to 3 | -0.5 rounds to 0
  pred = [0.0, -0.1, 3.5, -0.5]
  true = [-0.4, 0.0, 2.5, -2.0]
  got = metrics.mosi_regression(pred, true)
  # Has0: pred + - + -, true - + + -. Non0 (without the second): pred - + -, true - + -.
  assert got["Has0_acc_2"] == 0.5
  assert got["Has0_F1_score"] == 0.5
  assert got["Non0_acc_2"] == 1.0
  assert got["Non0_F1_score"] == 1.0
  assert got["Mult_acc_7"] == 0.5  # 0/0, -0/0, 3/2, -0/-2
  assert got["Mult_acc_5"] == 0.75  # 2/2
  assert got["MAE"] == pytest.approx((0.4 + 0.1 + 1.0 + 1.5) / 4)
  assert got["Corr"] == pytest.approx(np.corrcoef(pred, true)[0, 1])


def test_a_prediction_of_zero_is_negative_in_non0():
  assert metrics.mosi_regression([0.0, 0.0], [1.0, -1.0])["Non0_acc_2"] == 0.5
  assert metrics.mosi_regression([0.0], [-1.0])["Non0_acc_2"] == 1.0
  assert metrics.mosi_regression([0.0], [-1.0])["Has0_acc_2"] == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sims_by_hand(dtype):
  true = np.array([-1.0, -0.7, -0.1, 0.0, 0.1, 0.7, 1.0, 1.0], dtype)
  pred = np.array([-9.0, -0.8, -0.2, -0.1, 0.2, 0.8, 0.9, 2.0], dtype)
  got = metrics.sims_regression(pred, true)
  # 5 classes, closed above. true 0 0 1 2 2 3 4 4; pred 0 0 1 1 3 4 4 4
  assert got["Mult_acc_5"] == 5 / 8
  # 3 classes. true 0 0 0 1 1 2 2 2; pred 0 0 0 0 2 2 2 2
  assert got["Mult_acc_3"] == 6 / 8
  assert got["Mult_acc_2"] == 1.0  # zero is negative
  assert got["F1_score"] == 1.0
  clipped = np.clip(pred, -1, 1)
  assert got["MAE"] == pytest.approx(np.mean(np.abs(clipped - true)), abs=1e-6)
  assert got["MAE"] < 0.1
  assert got["Corr"] == pytest.approx(np.corrcoef(clipped, true)[0, 1], abs=1e-6)


def test_classification_by_hand():
  pred = [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [2.0, 0.0, 2.0]]
  true = [0, 1, 2, 2]
  got = metrics.classification(pred, true)
  assert got["Acc_3"] == 0.75
  assert got["Has0_acc_2"] == 0.5  # the neutral label counts as negative, the tie as negative
  assert got["Non0_acc_2"] == pytest.approx(2 / 3)
  assert metrics.classification(pred, true, compat="msa")["Non0_acc_2"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_against_sklearn(seed):
  random = np.random.default_rng(seed)
  true = random.choice(np.arange(-15, 16) / 5, 200).astype(np.float32)
  pred = (true + random.normal(0, 1.2, 200)).astype(np.float32)
  got, kept = metrics.mosi_regression(pred, true), true != 0

  def check(names, y_true, y_pred, values):
    assert values[names[0]] == pytest.approx(accuracy_score(y_true, y_pred))
    if len(names) > 1:
      assert values[names[1]] == pytest.approx(f1_score(y_true, y_pred, average="weighted"))

  check(["Has0_acc_2", "Has0_F1_score"], true >= 0, pred >= 0, got)
  check(["Non0_acc_2", "Non0_F1_score"], true[kept] > 0, pred[kept] > 0, got)
  check(["Mult_acc_7"], np.round(np.clip(true, -3, 3)), np.round(np.clip(pred, -3, 3)), got)
  assert got["Corr"] == pytest.approx(np.corrcoef(pred, true)[0, 1])

  got = metrics.sims_regression(pred / 3, true / 3)
  check(["Mult_acc_2", "F1_score"], true > 0, pred > 0, got)

  scores, label = random.normal(size=(200, 3)), random.integers(0, 3, 200)
  got = metrics.classification(scores, label)
  check(["Acc_3", "F1_score_3"], label, scores.argmax(1), got)
  check(["Has0_acc_2", "Has0_F1_score"], label == 2, scores[:, 2] > scores[:, 0], got)


@pytest.mark.parametrize("function", [metrics.mosi_regression, metrics.sims_regression])
@pytest.mark.parametrize(
  ("pred", "true"),
  [
    ([0.1, 0.1, 0.1], [1.0, -1.0, 0.3]),
    ([0.1, 0.2, 0.3], [0.7, 0.7, 0.7]),
    ([0.1, -0.2], [0.0, 0.0]),
    ([0.4], [0.6]),
    ([1e30, -1e30], [1.0, -1.0]),
    (np.full(999, 0.1), np.linspace(-1, 1, 999)),
  ],
  ids=["constant", "constant-labels", "all-zero", "one", "huge", "constant-long"],
)
def test_edges_are_finite(function, pred, true):
  got = function(pred, true)
  assert all(np.isfinite(value) for value in got.values())
  if np.ptp(pred) == 0 or np.ptp(true) == 0:
    assert got["Corr"] == 0.0


def test_no_nonzero_label():
  got = metrics.mosi_regression([0.1, -0.2], [0.0, 0.0])
  assert got["Non0_acc_2"] == got["Non0_F1_score"] == 0.0
  assert got["Has0_acc_2"] == 0.5


@pytest.mark.parametrize(
  ("pred", "true", "message"),
  [
    ([], [], "No examples"),
    ([1.0, np.nan, np.inf], [1.0, 2.0, 3.0], "2 of 3 predictions"),
    ([1.0, 2.0], [np.nan, 2.0], "1 of 2 labels"),
    ([1.0, 2.0], [1.0], "2 predictions for 1 labels"),
  ],
)
@pytest.mark.parametrize("function", [metrics.mosi_regression, metrics.sims_regression])
def test_mistakes(function, pred, true, message):
  with pytest.raises(ValueError, match=message):
    function(pred, true)


def test_classification_mistakes():
  with pytest.raises(ValueError, match="No examples"):
    metrics.classification(np.zeros((0, 3)), [])
  with pytest.raises(ValueError, match="3 of 3 predictions"):
    metrics.classification(np.full((1, 3), np.nan), [0])
  with pytest.raises(ValueError, match="shape"):
    metrics.classification([[1.0, 2.0]], [0])
  with pytest.raises(ValueError, match="expected 0, 1 and 2"):
    metrics.classification([[1.0, 2.0, 3.0]], [-1])
  with pytest.raises(ValueError, match="compat"):
    metrics.classification([[1.0, 2.0, 3.0]], [1], compat="mmsa")


def test_lookup():
  assert metrics.for_dataset("MOSI", "regression") is metrics.mosi_regression
  assert metrics.for_dataset("sims", "regression") is metrics.sims_regression
  assert metrics.for_dataset("my_reviews", "regression") is metrics.mosi_regression
  assert metrics.for_dataset("mosei", "classification") is metrics.classification
  with pytest.raises(ValueError, match="regression, classification"):
    metrics.for_dataset("mosi", "ranking")


def test_selection_accuracy():
  mosi = metrics.mosi_regression([1.0, -1.0, 1.0], [2.0, 1.0, 1.0])
  assert metrics.selection_name(mosi) == "Has0_acc_2"
  assert metrics.selection_accuracy(mosi) == 0.6667
  sims = metrics.sims_regression([1.0, -1.0, 1.0], [0.2, 0.1, -0.1])
  assert metrics.selection_name(sims) == "Mult_acc_2"
  assert metrics.selection_accuracy(sims) == 0.3333


def test_constant_predictor():
  got = metrics.constant_predictor([-1.0, 0.2, 3.0], [0.4, -0.2, 1.0])
  assert got["MAE"] == pytest.approx((0.2 + 0.4 + 0.8) / 3, abs=1e-6)
  assert got["Corr"] == 0.0
  assert got["Has0_acc_2"] == pytest.approx(2 / 3)
  sims = metrics.constant_predictor([-1.0, 0.2, 0.3], [0.4, -0.2], metric=metrics.sims_regression)
  assert sims["Mult_acc_2"] == 0.5
  with pytest.raises(ValueError, match="No training labels"):
    metrics.constant_predictor([], [1.0])
