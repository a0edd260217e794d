"""Several seeds of one experiment: mean and standard deviation."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.training.evaluation import table, write_json


def combine(values: Sequence[Any], statistic: Callable[[Sequence[float]], float]) -> Any:
  """Returns `statistic` over equally nested dicts of numbers; what is no number in all of them is left out."""
  if all(isinstance(value, dict) for value in values):
    combined = {key: combine([v[key] for v in values], statistic) for key in values[0] if all(key in v for v in values)}
    return {key: value for key, value in combined.items() if value is not None}
  if all(isinstance(value, int | float) for value in values):
    return float(statistic(values))
  return None


def summarize(workdir: Path, seeds: Sequence[int]) -> dict[str, Any]:
  """Writes workdir/results.json from the seeds' own: every metric's mean and population standard deviation."""
  runs = [json.loads((workdir / f"seed_{seed}" / "results.json").read_text()) for seed in seeds]
  parts = [{"checkpoints": run["checkpoints"], "constant": run["constant"]} for run in runs]
  results = {
    "dataset": runs[0]["dataset"],
    "primary": runs[0]["primary"],
    "heads": runs[0]["heads"],
    "seeds": list(seeds),
    "mean": combine(parts, np.mean),
    "std": combine(parts, np.std),
  }
  write_json(workdir / "results.json", results)
  for name in ("mean", "std"):
    print(f"{name} over seeds {', '.join(map(str, seeds))}")
    print(table({**results, **results[name]}, "test"), flush=True)
  return results
