"""Writes report.md and report.png of a run: `python -m mmjax.report --workdir=runs/x`.

Reads what training left in the workdir (results.json, metrics.jsonl, predictions_test.csv; for `--seeds` runs
the same in each seed_N) and, with `--baseline`, the scores of another system:
{"name": str, "test": {metric: value}, "constant"?: {metric: value}, "note"?: str}.
"""

import argparse
import contextlib
import csv
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import drift, metrics, pictures, robustness_report
from mmjax.errors import UserError
from mmjax.pictures import BLUE, GREY, INK, ORANGE
from mmjax.training import traces

Row = tuple[str, dict[str, str]]

HEADS = {"M": "M, all modalities", "T": "T, text only", "A": "A, audio only", "V": "V, vision only"}


def write(
  workdir: Path, *, checkpoint: str | None = None, baseline: Mapping | None = None, note: str | None = None
) -> str:
  """Returns the report as Markdown, after writing it to report.md beside report.png in `workdir`.

  A run whose objective left traces (generated labels) gets drift.png, too; of several seeds, the first one's. One
  that `mmjax.evaluate --robustness` (or `--drop`) scored gets that table, and robustness.png; of several seeds, if
  every one has it.

  `checkpoint` (default: the run's primary one) is the one whose heads are listed and marked; the other kept
  checkpoints get one row each. `note` stands on top of the report and under the picture. Raises UserError
  for a file that is missing or incomplete, before anything is written.
  """
  results = _json(workdir / "results.json", _train_command(workdir))
  seeds = results.get("seeds")
  runs = [workdir / f"seed_{seed}" for seed in seeds] if seeds else [workdir]
  details = [_json(run / "results.json", _train_command(workdir)) for run in runs] if seeds else [results]
  kept = (results.get("mean", {}) if seeds else results).get("checkpoints")
  if not isinstance(kept, dict) or not kept:
    raise UserError(f"{workdir / 'results.json'} names no checkpoints. To make it: {_train_command(workdir)}")
  checkpoint = checkpoint or details[0].get("primary", "best_loss")
  for where in (kept, *(detail.get("checkpoints", {}) for detail in details)):
    if not where.get(checkpoint, {}).get("test"):
      raise UserError(f"{workdir} has no test results of checkpoint {checkpoint!r}: expected one of {', '.join(kept)}.")
  rows, heads = _rows(results, kept, details[0], checkpoint, baseline)
  curves = [_curves(run) for run in runs]
  marks = [detail["checkpoints"][checkpoint] for detail in details]
  primary = details[0].get("primary", "best_loss")
  pred, true = _predictions(runs[0], heads[0], checkpoint, "" if checkpoint == primary else f"_{checkpoint}")
  scores = metrics.for_dataset(str(details[0].get("dataset", "")))(pred, true)

  subtitle = [f"{heads[0]} head", checkpoint, f"r = {scores['Corr']:.3f}", f"MAE = {scores['MAE']:.3f}"]
  if seeds:
    subtitle.insert(2, f"seed {seeds[0]}")
  epochs, labels = traces.read(runs[0])
  text = _markdown(
    workdir, results, details[0], checkpoint, rows, _comparison(rows, baseline), baseline, note, drifted=bool(epochs)
  )
  lossy_runs = _lossy(details, checkpoint, heads[0])
  try:
    if lossy_runs:
      options = (details[0].get("constant", {}).get("test", {}).get(heads[0], {}), HEADS)
      drawn = robustness_report.draw(workdir / "robustness.png", lossy_runs, heads[0], *options)
      text += "\n" + _robustness(lossy_runs, heads[0], checkpoint, drawn=drawn)
    if epochs:
      drift.draw(workdir / "drift.png", epochs, labels, HEADS)
    _draw(workdir / "report.png", pred, true, "   ".join(subtitle), curves, marks, checkpoint, note)
    (workdir / "report.md").write_text(text, encoding="utf-8")
  except OSError as error:
    raise UserError(f"Cannot write the report in {workdir}: {error.strerror or error}.") from error
  return text


def _train_command(workdir: Path) -> str:
  return f"python -m mmjax.train --gin_file=FILE.gin --workdir={workdir}"


def _json(path: Path, remedy: str) -> dict:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f"{path} is missing. To make it: {remedy}") from None
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}). To make it again: {remedy}") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} holds {type(content).__name__}: expected a JSON object. To make it: {remedy}")
  return content


def _baseline(path: Path) -> dict:
  content = _json(path, 'write {"name": "...", "test": {"MAE": 0.9, "Corr": 0.6}} there')
  if not isinstance(content.get("name"), str) or not isinstance(content.get("test"), dict):
    raise UserError(f'{path} has keys {", ".join(content) or "none"}: expected "name" and "test".')
  return content


def _predictions(run: Path, head: str, checkpoint: str, suffix: str) -> tuple[np.ndarray, np.ndarray]:
  path = run / f"predictions_test{suffix}.csv"
  remedy = f"python -m mmjax.evaluate --workdir={run} --checkpoint={checkpoint} --split=test"
  try:
    with path.open(newline="", encoding="utf-8") as file:
      table = list(csv.DictReader(file))
    label = next((name for name in (f"label_{head}", "label_M") if table and name in table[0]), f"label_{head}")
    pred, true = (np.array([float(row[name]) for row in table]) for name in (head, label))
  except FileNotFoundError:
    raise UserError(f"{path} is missing. To make it: {remedy}") from None
  except KeyError as error:
    raise UserError(f"{path} has no column {error}. To make it again: {remedy}") from None
  except (OSError, TypeError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}). To make it again: {remedy}") from error
  if not len(pred) or not np.isfinite([pred, true]).all():
    raise UserError(f"{path} has {'non-finite values' if len(pred) else 'no rows'}. To make it again: {remedy}")
  return pred, true


def _curves(run: Path) -> dict[str, tuple[list[float], list[float]]]:
  """Returns (epochs, losses) of "steps", "train" and "valid"; a step is a fraction of an epoch."""
  path, remedy = run / "metrics.jsonl", _train_command(run)
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except FileNotFoundError:
    raise UserError(f"{path} is missing. To make it: {remedy}") from None
  records = []
  for line in lines:
    # A killed run leaves half a line, which the resumed one may have lengthened.
    with contextlib.suppress(ValueError):
      records.append(json.loads(line))
  # Steps after the last save are logged again by a resumed run: the later line holds.
  steps = {r["step"]: r["train/loss"] for r in records if np.isfinite(r.get("train/loss", np.nan))}
  epochs = {r["epoch"]: r for r in records if np.isfinite(r.get("valid/loss", np.nan))}
  if not epochs:
    raise UserError(f"{path} has no finished epoch. To go on training: {remedy}")
  per_epoch = max(r["step"] / r["epoch"] for r in epochs.values())
  curves = {"steps": sorted((step / per_epoch, loss) for step, loss in steps.items())}
  for name, key in (("train", "train/loss_epoch"), ("valid", "valid/loss")):
    curves[name] = sorted((n, r[key]) for n, r in epochs.items() if np.isfinite(r.get(key, np.nan)))
  return {name: ([x for x, _ in points], [y for _, y in points]) for name, points in curves.items()}


def _rows(
  results: Mapping, kept: Mapping, detail: Mapping, checkpoint: str, baseline: Mapping | None
) -> tuple[list[Row], list[str]]:
  test, std = kept[checkpoint]["test"], results.get("std", {}).get("checkpoints", {})
  heads = [head for head in detail.get("heads", test) if isinstance(test.get(head), dict)]
  if not heads:
    raise UserError(f"results.json has no test metrics of a head in checkpoint {checkpoint!r}: train again.")

  def row(name: str, head: str) -> Row:
    spread = std.get(name, {}).get("test", {}).get(head, {})
    return f"{HEADS.get(head, head)} ({name})", _cells(kept[name]["test"][head], spread)

  rows = [row(checkpoint, head) for head in heads]
  rows += [row(name, heads[0]) for name in kept if name != checkpoint and heads[0] in kept[name].get("test", {})]
  constants = detail.get("constant", {}).get("test", {})
  constants = {head: _cells(constants[head]) for head in heads if head in constants}
  if not constants and baseline and baseline.get("constant"):
    constants = {heads[0]: _cells(baseline["constant"])}
  for head, cells in constants.items():
    if cells not in [shown for name, shown in rows if name.startswith("constant")]:
      suffix = "" if head == heads[0] else f", labels of {head}"
      rows.append((f"constant (training median{suffix})", cells))
  if baseline:
    rows.append((baseline["name"], _cells(baseline["test"])))
  published = detail.get("published")
  if isinstance(published, dict) and published:
    scores = published.get("test", published)
    rows.append((str(published.get("name", "published")), _cells(scores.get(heads[0], scores))))
  return rows, heads


def _cells(values: Mapping[str, Any], spread: Mapping[str, Any] | None = None) -> dict[str, str]:
  spread = spread or {}
  return {
    name: f"{value:.4f}" + (f" +- {spread[name]:.4f}" if name in spread else "")
    for name, value in values.items()
    if isinstance(value, int | float)
  }


def _table(rows: Sequence[Row]) -> str:
  columns = list(dict.fromkeys(name for _, cells in rows for name in cells))
  lines = [["test", *columns], *([label, *(cells.get(c, "-") for c in columns)] for label, cells in rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
  rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
  text = [
    f"| {line[0].ljust(widths[0])} | " + " | ".join(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))
    for line in lines
  ]
  return "\n".join([text[0] + " |", rule, *(line + " |" for line in text[1:])])


def _comparison(rows: Sequence[Row], baseline: Mapping | None) -> str | None:
  if not baseline or not {"MAE", "Corr"} <= set(rows[0][1]) & set(_cells(baseline["test"])):
    return None
  mae, corr = (float(rows[0][1][name].split()[0]) for name in ("MAE", "Corr"))
  ratio, gain = mae / baseline["test"]["MAE"], corr - baseline["test"]["Corr"]
  return f"{rows[0][0]} against {baseline['name']}: MAE x {ratio:.2f}, Corr {gain:+.3f}."


def _markdown(
  workdir: Path,
  results: Mapping,
  detail: Mapping,
  checkpoint: str,
  rows: Sequence[Row],
  comparison: str | None,
  baseline: Mapping | None,
  note: str | None,
  *,
  drifted: bool,
) -> str:
  facts = [f"Dataset {detail.get('dataset', 'unknown')}"]
  facts += [f"{count} {split}" for split, count in detail.get("counts", {}).items()]
  if results.get("seeds"):
    facts.append(f"mean +- standard deviation over seeds {', '.join(map(str, results['seeds']))}")
  else:
    chosen = detail["checkpoints"][checkpoint]
    facts.append(f"checkpoint {checkpoint} of epoch {chosen.get('epoch')}, step {chosen.get('step')}")
    if "seconds" in detail:
      facts.append(f"trained in {detail['seconds']:.0f} s")
  reading = "MAE: lower is better; everything else: higher is better. Definitions: mmjax/metrics.py."
  remarks = [comparison, baseline.get("note") if baseline else None, reading]
  parts: list[str | None] = [
    f"# {workdir.resolve().name}",
    f"> **Note: {note}**" if note else None,
    ", ".join(facts) + ".",
  ]
  parts += [_table(rows), *remarks, "![predicted against true, and losses](report.png)"]
  if drifted:
    parts.append("![how the generated labels drift over the epochs](drift.png)")
  return "\n\n".join(part for part in parts if part) + "\n"


def _lossy(details: Sequence[Mapping], checkpoint: str, head: str) -> list[Mapping]:
  """Returns each run's scores with something missing, if every run has them of this very checkpoint."""
  found = []
  for detail in details:
    scores = detail.get("robustness", {}).get(checkpoint, {})
    if scores.get("step") == detail["checkpoints"][checkpoint].get("step") and "test" in scores:
      found.append(scores["test"])
  return found if len(found) == len(details) and robustness_report.rows(found, head) else []


def _robustness(runs: Sequence[Mapping], head: str, checkpoint: str, *, drawn: bool) -> str:
  parts = [
    "## Missing modalities and lost steps",
    f"Test scores of {HEADS.get(head, head)} ({checkpoint}). Definitions: mmjax/robustness.py.",
    robustness_report.table(runs, head),
    "![scores over the share of lost steps](robustness.png)" if drawn else "",
  ]
  return "\n\n".join(part for part in parts if part) + "\n"


def _draw(
  path: Path,
  pred: np.ndarray,
  true: np.ndarray,
  subtitle: str,
  curves: Sequence[Mapping],
  marks: Sequence[Mapping],
  checkpoint: str,
  note: str | None,
) -> None:
  widths = {"width_ratios": [1, 1.25]}
  with pictures.figure(path, 2, figsize=(11, 5), gridspec_kw=widths) as (figure, (left, right)):
    _draw_predictions(left, pred, true, subtitle)
    _draw_losses(right, curves, marks, checkpoint)
    engine = figure.get_layout_engine()
    footer = textwrap.fill(note, 150) if note else ""
    below = 0.04 * (footer.count("\n") + 1) + 0.01 if footer else 0
    engine.set(wspace=0.06, w_pad=0.12, h_pad=0.1, rect=(0, below, 1, 1 - below))
    figure.text(0.012, 0.018, footer, fontsize=9, color=GREY, style="italic", va="bottom")


def _draw_predictions(axes: Any, pred: np.ndarray, true: np.ndarray, subtitle: str) -> None:
  limit = 1.06 * max(np.abs(pred).max(), np.abs(true).max(), 0.1)
  if len(pred) <= 1500:
    axes.scatter(true, pred, s=16, color=BLUE, alpha=0.35, linewidths=0)
  else:
    # Labels are multiples of 0.2 or coarser in +-3: narrower cells would leave empty columns between them.
    axes.hexbin(
      true, pred, gridsize=26, extent=(-limit, limit, -limit, limit), cmap="Blues", bins="log", vmin=0.4,
      mincnt=1, linewidths=0.2,
    )  # fmt: skip
  ends = [-limit, limit]
  axes.plot(ends, ends, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label="predicted = true", zorder=3)
  axes.legend(frameon=False, fontsize=9.5, loc="lower right")
  axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="true", ylabel="predicted")
  pictures.title(axes, f"Predicted against true, {len(pred):,} test examples", subtitle)


def _draw_losses(axes: Any, curves: Sequence[Mapping], marks: Sequence[Mapping], checkpoint: str) -> None:
  for number, (curve, mark) in enumerate(zip(curves, marks, strict=True)):
    first = number == 0
    if first and len(curves) == 1:
      axes.plot(*curve["steps"], color=BLUE, linewidth=0.7, alpha=0.25, label="training, per step")
    for name, color, label in (("train", BLUE, "training, per epoch"), ("valid", ORANGE, "validation")):
      alpha = 1 if first else 0.4
      axes.plot(*curve[name], color=color, linewidth=1.9, marker="o", markersize=3.5, alpha=alpha)
      if first:
        axes.plot([], [], color=color, linewidth=1.9, marker="o", markersize=3.5, label=label)
    epochs, losses = curve["valid"]
    if mark.get("epoch") in epochs:
      at = epochs.index(mark["epoch"])
      axes.scatter(
        epochs[at], losses[at], s=95, facecolor="white", edgecolor=ORANGE, linewidth=2.2, zorder=5,
        label=f"checkpoint {checkpoint}" if first else None,
      )  # fmt: skip
  levels = [y for curve in curves for name in ("train", "valid") for y in curve[name][1]]
  steps = curves[0]["steps"][1] if len(curves) == 1 else []
  levels += list(np.percentile(steps, [1, 99])) if steps else []
  low, high = min(levels), max(levels)
  margin = 0.06 * (high - low) or 0.1
  last = max(x for curve in curves for x in curve["valid"][0])
  axes.set(xlim=(0, last * 1.03), ylim=(low - margin, high + margin), xlabel="epoch", ylabel="loss")
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.legend(frameon=False, fontsize=9.5, loc="best")
  ended = f"{len(curves)} seeds" if len(curves) > 1 else f"{checkpoint} is of epoch {marks[0].get('epoch')}"
  pictures.title(axes, "Loss", ended)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit status: 0, or 2 after one message about a mistake."""
  parser = argparse.ArgumentParser(
    prog="python -m mmjax.report", description="Writes report.md and report.png of a trained workdir."
  )
  parser.add_argument("--workdir", type=Path, required=True, help="folder that mmjax.train wrote")
  parser.add_argument("--baseline", type=Path, help='JSON of another system: {"name": ..., "test": {...}}')
  parser.add_argument("--checkpoint", help="checkpoint to list and mark (default: the run's primary one)")
  parser.add_argument("--note", help="sentence printed on top of the report")
  args = parser.parse_args(argv)
  try:
    baseline = _baseline(args.baseline) if args.baseline else None
    text = write(args.workdir, checkpoint=args.checkpoint, baseline=baseline, note=args.note)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(text)
  print(f"Written: {args.workdir / 'report.md'}, {args.workdir / 'report.png'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
