"""`python -m mmjax.evaluate`: scores a checkpoint of a workdir on a split, whole or with something missing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax import config, robustness, robustness_report
from mmjax.errors import UserError


def run(argv: Sequence[str]) -> int:
  """Evaluates as the flags say; returns the exit status."""
  parser = config.parser("evaluate", "Score a checkpoint of a workdir; writes the numbers training wrote.")
  parser.add_argument("--workdir", type=Path, required=True, help="folder of a run that train made")
  parser.add_argument("--checkpoint", default="best_loss", help="best_loss (default), best_accuracy, latest or a step")
  parser.add_argument("--split", default="test", choices=("train", "valid", "test"))
  lacking = parser.add_mutually_exclusive_group()
  lacking.add_argument("--drop", help="score without these modalities, as in --drop=audio,vision")
  lacking.add_argument(
    "--robustness",
    action="store_true",
    help="score without every subset of the modalities, and with 10 to 90%% of all steps lost",
  )
  flags = config.parse(parser, argv)
  drop = robustness.parse(flags.drop) if flags.drop is not None else None
  gin_file = flags.workdir / "config.gin"
  if not gin_file.is_file():
    raise UserError(
      f"--workdir={flags.workdir} holds no run: {gin_file} is missing\n"
      "expected: a folder that `python -m mmjax.train --gin_file=... --workdir=...` made"
    )
  loaded = config.load(gin_file, flags.gin)
  run_file = flags.workdir / "run.json"
  folders = json.loads(run_file.read_text()) if run_file.exists() else {}
  data_dir = flags.data_dir or Path(folders.get("data_dir", "data"))
  cache_dir = flags.cache_dir or Path(folders.get("cache_dir", config.default_cache_dir()))

  from mmjax.training import evaluation
  from mmjax.training.compilation import use_cache

  use_cache(cache_dir)
  where: dict[str, Any] = {
    "workdir": flags.workdir,
    "checkpoint": flags.checkpoint,
    "split": flags.split,
    "data_dir": data_dir,
    "cache_dir": cache_dir,
  }
  if drop is None and not flags.robustness:
    print(evaluation.table(evaluation.evaluate(loaded.experiment, **where), flags.split))
  else:
    part = robustness.evaluate(loaded.experiment, **where, drop=drop)
    if drop is not None:
      part = {"missing": {"+".join(drop): part["missing"]["+".join(drop)]}}
    scores = next(iter(part["missing"].values()))
    for head in sorted(set(scores) - {"loss"}, key="MTAV".find):
      print(f"{head}, {flags.split}\n\n{robustness_report.table([part], head)}\n")
  print(f"written to {flags.workdir / 'results.json'}")
  return 0


if __name__ == "__main__":
  config.main(run)
