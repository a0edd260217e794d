"""The table and the picture of scores with missing modalities and lost steps (`mmjax.robustness`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import pictures

NONE = "none"
# What a table and the picture show of a head's metrics, the first that there is of each.
SHOWN = (("MAE",), ("Corr",), ("Has0_acc_2", "Mult_acc_2", "Acc_3"))
LABELS = {"MAE": "MAE", "Corr": "Corr", "Has0_acc_2": "Acc-2", "Mult_acc_2": "Acc-2", "Acc_3": "Acc-3"}


def shown(metrics: Mapping[str, Any]) -> list[str]:
  """Returns the names of the metrics that are shown; all where none of the usual ones is there."""
  found = [next((name for name in names if name in metrics), None) for names in SHOWN]
  return [name for name in found if name] or list(metrics)


def rows(runs: Sequence[Mapping[str, Any]], head: str) -> list[tuple[str, dict[str, tuple[float, float]]]]:
  """Returns (what is lacking, {metric: (mean, standard deviation)}) over `runs`, in the order they have.

  `runs` are what `robustness.evaluate` returned, one a seed; what one of them lacks is left out.
  """
  found = []
  for kind, title in (("missing", "without {}"), ("lost", "{}% of the steps lost")):
    for name in runs[0].get(kind, {}):
      if not all(head in run.get(kind, {}).get(name, {}) for run in runs) or (kind, name) == ("lost", "0"):
        continue
      scores = [run[kind][name][head] for run in runs]
      values = {metric: [score[metric] for score in scores] for metric in scores[0]}
      label = "nothing missing" if name == NONE else title.format(name.replace("+", " and "))
      found.append((label, {metric: (float(np.mean(v)), float(np.std(v))) for metric, v in values.items()}))
  return found


def table(runs: Sequence[Mapping[str, Any]], head: str) -> str:
  """Returns the rows as a Markdown table; with several runs each cell is mean +- standard deviation."""
  found = rows(runs, head)
  columns = list(found[0][1]) if found else []
  lines = [["lacking", *columns], ["---", *["---:"] * len(columns)]]
  for label, values in found:
    cells = [f"{mean:.4f}" + (f" +- {std:.4f}" if len(runs) > 1 else "") for mean, std in values.values()]
    lines.append([label, *cells])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(
  path: Path, runs: Sequence[Mapping[str, Any]], head: str, constant: Mapping[str, float], names: Mapping[str, str]
) -> bool:
  """Draws the metrics over the share of lost steps to `path`; returns False, drawing nothing, where none is kept.

  Dotted lines are single missing modalities, the grey one the `constant` predictor; a band is the standard
  deviation over `runs`. `names` are what heads are called.
  """
  rates = [rate for rate in runs[0].get("lost", {}) if all(head in run.get("lost", {}).get(rate, {}) for run in runs)]
  if not rates:
    return False
  metrics = shown(runs[0]["lost"][rates[0]][head])[:3]
  x = np.array([int(rate) for rate in rates])
  with pictures.figure(path, len(metrics), figsize=(4 * len(metrics), 4)) as (_, axes):
    for panel, metric in zip(axes, metrics, strict=True):
      values = np.array([[run["lost"][rate][head][metric] for rate in rates] for run in runs])
      mean, std = values.mean(axis=0), values.std(axis=0)
      if len(runs) > 1:
        panel.fill_between(x, mean - std, mean + std, color=pictures.BLUE, alpha=0.2, linewidth=0)
      panel.plot(x, mean, color=pictures.BLUE, linewidth=1.9, marker="o", markersize=4, label="steps lost")
      for style, missing in zip((":", "--", "-."), ("text", "audio", "vision"), strict=True):
        scores = [run.get("missing", {}).get(missing, {}).get(head) for run in runs]
        if all(scores):
          level = float(np.mean([score[metric] for score in scores]))
          panel.axhline(level, color=pictures.ORANGE, linewidth=1.2, linestyle=style, label=f"without {missing}")
      if metric in constant:
        panel.axhline(constant[metric], color=pictures.GREY, linewidth=1, label="constant")
      pictures.title(panel, LABELS.get(metric, metric), names.get(head, head))
      panel.set(xlabel="steps lost in every stream (%)", xlim=(-2, x[-1] + 2))
    axes[0].legend(frameon=False, fontsize=9)
  return True
