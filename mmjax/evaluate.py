"""`python -m mmjax.evaluate`: scores a checkpoint of a workdir on a split."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmjax import config
from mmjax.errors import UserError


def run(argv: Sequence[str]) -> int:
  """Evaluates as the flags say; returns the exit status."""
  parser = config.parser("evaluate", "Score a checkpoint of a workdir; writes the numbers training wrote.")
  parser.add_argument("--workdir", type=Path, required=True, help="folder of a run that train made")
  parser.add_argument("--checkpoint", default="best_loss", help="best_loss (default), best_accuracy, latest or a step")
  parser.add_argument("--split", default="test", choices=("train", "valid", "test"))
  flags = config.parse(parser, argv)
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
  results = evaluation.evaluate(
    loaded.experiment,
    workdir=flags.workdir,
    checkpoint=flags.checkpoint,
    split=flags.split,
    data_dir=data_dir,
    cache_dir=cache_dir,
  )
  print(evaluation.table(results, flags.split))
  print(f"written to {flags.workdir / 'results.json'}")
  return 0


if __name__ == "__main__":
  config.main(run)
