"""The report of a made-up run: its table, its picture, and one message for each missing or broken file."""

import csv
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from mmjax import metrics, report
from mmjax.training import traces

NOTE = "The speech is synthetic."


def make_run(folder, *, seed=0, count=60, heads="MTA"):
  """Writes a workdir as training leaves it; best_loss is of epoch 2, best_accuracy of epoch 3."""
  folder.mkdir(parents=True, exist_ok=True)
  random = np.random.default_rng(seed)
  true = np.clip(np.round(random.normal(0, 1.5, count) * 5) / 5, -3, 3)
  pred = {head: 0.8 * true + random.normal(0, 0.6 + 0.4 * i, count) for i, head in enumerate(heads)}
  test = {"loss": 2.0, **{head: metrics.mosi_regression(pred[head], true) for head in heads}}
  later = {"loss": 2.2, **{head: metrics.mosi_regression(0.5 * pred[head], true) for head in heads}}
  constant = {head: metrics.constant_predictor([-0.4, 0.2, 0.4], true) for head in heads}
  results = {
    "primary": "best_loss",
    "dataset": "mosi",
    "heads": list(heads),
    "checkpoints": {
      "best_loss": {"step": 20, "epoch": 2, "test": test, "valid": test},
      "best_accuracy": {"step": 30, "epoch": 3, "test": later, "valid": later},
    },
    "constant": {"valid": constant, "test": constant},
    "counts": {"train": 100, "valid": 20, "test": count},
    "seconds": 61.4,
  }
  (folder / "results.json").write_text(json.dumps(results))
  lines = []
  for step in range(1, 31):
    epoch = (step + 9) // 10
    lines.append({"step": step, "epoch": epoch, "train/loss": 3 / step})
    if step % 10 == 0:
      lines.append({"step": step, "epoch": epoch, "train/loss_epoch": 3 / epoch, "valid/loss": 2 + epoch % 2})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  for suffix, scale in (("", 1.0), ("_best_accuracy", 0.5)):
    with (folder / f"predictions_test{suffix}.csv").open("w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(["id", "label_M", *heads])
      writer.writerows([i, true[i], *(scale * pred[head][i] for head in heads)] for i in range(count))
  return results


def rows(text):
  lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
  head = [cell.strip() for cell in lines[0]][1:]
  return {line[0].strip(): dict(zip(head, (cell.strip() for cell in line[1:]), strict=True)) for line in lines[2:]}


def test_report(tmp_path, capsys):
  results = make_run(tmp_path)
  baseline = tmp_path / "ridge.json"
  baseline.write_text(json.dumps({"name": "ridge", "test": {"MAE": 1.0, "Corr": 0.5}, "note": "Validated."}))
  assert report.main([f"--workdir={tmp_path}", f"--baseline={baseline}", f"--note={NOTE}"]) == 0
  text = (tmp_path / "report.md").read_text()
  assert text in capsys.readouterr().out
  assert f"**Note: {NOTE}**" in text
  assert "Validated." in text
  assert "100 train, 20 valid, 60 test" in text
  table = rows(text)
  assert list(table) == [
    "M, all modalities (best_loss)",
    "T, text only (best_loss)",
    "A, audio only (best_loss)",
    "M, all modalities (best_accuracy)",
    "constant (training median)",
    "ridge",
  ]
  mine = results["checkpoints"]["best_loss"]["test"]["M"]
  assert table["M, all modalities (best_loss)"] == {name: f"{value:.4f}" for name, value in mine.items()}
  assert table["constant (training median)"]["Corr"] == "0.0000"
  assert table["ridge"]["MAE"] == "1.0000"
  assert table["ridge"]["Mult_acc_7"] == "-"
  assert f"MAE x {mine['MAE']:.2f}, Corr {mine['Corr'] - 0.5:+.3f}" in text
  assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.fixture
def drawn(monkeypatch):
  """Arguments of the picture instead of the picture."""
  calls = []
  monkeypatch.setattr(report, "_draw", lambda *args: calls.append(args))
  return calls


def test_another_checkpoint(tmp_path, drawn):
  results = make_run(tmp_path)
  text = report.write(tmp_path, checkpoint="best_accuracy")
  _, pred, true, subtitle, _, marks, checkpoint, _ = drawn[0]
  mae = results["checkpoints"]["best_accuracy"]["test"]["M"]["MAE"]
  assert np.mean(np.abs(pred - true)) == pytest.approx(mae, abs=1e-6)
  assert f"best_accuracy   r = {np.corrcoef(pred, true)[0, 1]:.3f}   MAE = {mae:.3f}" in subtitle
  assert (checkpoint, marks[0]["epoch"]) == ("best_accuracy", 3)
  assert next(iter(rows(text))) == "M, all modalities (best_accuracy)"
  (tmp_path / "predictions_test_best_accuracy.csv").unlink()
  with pytest.raises(report.UserError, match="--checkpoint=best_accuracy --split=test"):
    report.write(tmp_path, checkpoint="best_accuracy")


def test_curves_of_a_resumed_run(tmp_path):
  make_run(tmp_path)
  path = tmp_path / "metrics.jsonl"
  again = [{"step": 30, "epoch": 3, "train/loss": 7.0}, {"step": 30, "epoch": 3, "valid/loss": 5.0}]
  path.write_text(path.read_text() + '{"step": 3' + "\n" + "\n".join(map(json.dumps, again)) + '\n{"ste')
  curves = report._curves(tmp_path)
  assert curves["valid"] == ([1, 2, 3], [3, 2, 5.0])
  assert len(curves["steps"][0]) == 30
  assert (curves["steps"][0][-1], curves["steps"][1][-1]) == (3.0, 7.0)


def test_seeds(tmp_path, drawn):
  from mmjax.training import seeds

  runs = [make_run(tmp_path / f"seed_{seed}", seed=seed)["checkpoints"] for seed in (1, 11)]

  seeds.summarize(tmp_path, [1, 11])
  text = report.write(tmp_path)
  maes = [run["best_loss"]["test"]["M"]["MAE"] for run in runs]
  assert rows(text)["M, all modalities (best_loss)"]["MAE"] == f"{np.mean(maes):.4f} +- {np.std(maes):.4f}"
  assert "over seeds 1, 11" in text
  assert "seed 1" in drawn[0][3]
  assert len(drawn[0][4]) == 2
  (tmp_path / "seed_11" / "metrics.jsonl").unlink()
  with pytest.raises(report.UserError, match="seed_11"):
    report.write(tmp_path)


def test_text_only_run(tmp_path, drawn):
  make_run(tmp_path, heads="T")
  assert next(iter(rows(report.write(tmp_path)))) == "T, text only (best_loss)"
  assert drawn[0][3].startswith("T head")


def _drop_column(folder):
  path = folder / "predictions_test.csv"
  path.write_text(path.read_text().replace(",M,", ",X,", 1))


def _no_epoch(folder):
  (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "train/loss": 2.0}\n')


MISTAKES = {
  "no results": (lambda d: (d / "results.json").unlink(), ["results.json is missing", "mmjax.train"]),
  "half results": (lambda d: (d / "results.json").write_text('{"pri'), ["results.json cannot be read"]),
  "empty results": (lambda d: (d / "results.json").write_text("{}"), ["names no checkpoints"]),
  "no metrics": (lambda d: (d / "metrics.jsonl").unlink(), ["metrics.jsonl is missing", "mmjax.train"]),
  "no epoch": (_no_epoch, ["no finished epoch"]),
  "no predictions": (
    lambda d: (d / "predictions_test.csv").unlink(),
    ["predictions_test.csv is missing", "mmjax.evaluate", "--checkpoint=best_loss"],
  ),
  "no column": (_drop_column, ["predictions_test.csv has no column 'M'"]),
  "no rows": (lambda d: (d / "predictions_test.csv").write_text("id,label_M,M\n"), ["has no rows"]),
  "text in a column": (
    lambda d: (d / "predictions_test.csv").write_text("id,label_M,M\na,x,1\n"),
    ["cannot be read", "'x'"],
  ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(tmp_path, capsys, case):
  make_run(tmp_path)
  spoil, expected = MISTAKES[case]
  spoil(tmp_path)
  assert report.main([f"--workdir={tmp_path}"]) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1
  assert all(part in message for part in expected), message
  assert not (tmp_path / "report.md").exists()
  assert not (tmp_path / "report.png").exists()


def test_wrong_arguments(tmp_path, capsys):
  make_run(tmp_path)
  bad = tmp_path / "bad.json"
  bad.write_text('{"MAE": 1.0}')
  for argument, expected in [
    ("--checkpoint=best", "expected one of best_loss, best_accuracy"),
    (f"--baseline={tmp_path / 'none.json'}", "none.json is missing"),
    (f"--baseline={bad}", 'expected "name" and "test"'),
    (f"--workdir={tmp_path / 'nowhere'}", "nowhere/results.json is missing"),
  ]:
    assert report.main([f"--workdir={tmp_path}", argument]) == 2
    assert expected in capsys.readouterr().err


def test_help_is_quick_and_imports_no_jax():
  code = (
    "import runpy, sys\nsys.argv = ['report', '--help']\n"
    "try:\n  runpy.run_module('mmjax.report', run_name='__main__')\n"
    "finally:\n  print(sorted({'jax', 'matplotlib', 'tensorflow'} & set(sys.modules)))"
  )
  start = time.monotonic()
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
  assert done.returncode == 0, done.stderr
  assert "--workdir" in done.stdout
  assert done.stdout.splitlines()[-1] == "[]"
  assert time.monotonic() - start < 2


def test_labels_that_drift_get_a_picture(tmp_path):
  class Objective:
    def trace(self, memory):
      return memory

  make_run(tmp_path)
  assert "drift.png" not in report.write(tmp_path)
  start = np.linspace(-3, 3, 50)
  for epoch in (1, 2, 10):
    traces.write(tmp_path, epoch, Objective(), {"M": start, "A": start / epoch})
  traces.write(tmp_path, 11, object(), {})  # an objective without a trace leaves none
  epochs, labels = traces.read(tmp_path)
  assert epochs == [1, 2, 10]
  np.testing.assert_allclose(labels["A"][2], start / 10, rtol=1e-6)
  assert "](drift.png)" in report.write(tmp_path)
  assert (tmp_path / "drift.png").stat().st_size > 10_000
  (tmp_path / "trace" / "epoch_0002.npz").write_bytes(b"PK\x03\x04")
  assert report.main([f"--workdir={tmp_path}"]) == 2
