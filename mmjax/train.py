"""`python -m mmjax.train`: trains the experiment of a gin file, resuming what the workdir holds."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from mmjax import config
from mmjax.errors import UserError


def run(argv: Sequence[str]) -> int:
  """Trains as the flags say; returns the exit status."""
  parser = config.parser("train", "Train the experiment of a gin file; resume what the workdir holds.")
  parser.add_argument("--gin_file", type=Path, required=True, help="such as gin/mmml_mosi.gin")
  parser.add_argument("--workdir", type=Path, help="folder of the run (default: runs/<name of the gin file>)")
  parser.add_argument("--seeds", help="such as 1,11,111: one run each in workdir/seed_N, then mean and std")
  parser.add_argument("--dry_run", action="store_true", help="build everything, describe the run, write nothing")
  flags = config.parse(parser, argv)
  workdir = flags.workdir or Path("runs") / flags.gin_file.stem
  seeds = parse_seeds(flags.seeds) if flags.seeds else None
  loaded = config.load(flags.gin_file, flags.gin)
  data_dir, cache_dir = flags.data_dir or Path("data"), flags.cache_dir or config.default_cache_dir()
  if flags.dry_run:
    from mmjax.training.dry_run import describe

    describe(loaded.experiment, data_dir=data_dir, cache_dir=cache_dir)
    return 0

  from mmjax.training import fit
  from mmjax.training import seeds as several
  from mmjax.training.compilation import free_memory_after_compiling, use_cache
  from mmjax.training.signals import Interrupted

  use_cache(cache_dir)
  free_memory_after_compiling()
  runs = [(workdir, loaded)]
  if seeds:
    runs = [
      (
        workdir / f"seed_{seed}",
        config.load(flags.gin_file, [*flags.gin, f"{config.EXPERIMENT}.seed={seed}"]),
      )
      for seed in seeds
    ]
  for folder, this in runs:
    config.check_workdir(folder, this.text)
  for folder, this in runs:
    folders = {"data_dir": str(data_dir.absolute()), "cache_dir": str(cache_dir.absolute())}
    records = {"config.gin": this.text, "run.json": json.dumps(folders) + "\n"}
    try:
      fit.fit(this.experiment, workdir=folder, data_dir=data_dir, cache_dir=cache_dir, records=records)
    except Interrupted as interrupted:
      print(f"{interrupted}; to resume, run the same command:\n  python -m mmjax.train {shlex.join(argv)}")
      return 143
    print(f"everything is in {folder}; evaluate again with: python -m mmjax.evaluate --workdir={folder}")
  if seeds:
    several.summarize(workdir, seeds)
  return 0


def parse_seeds(text: str) -> list[int]:
  """Returns the distinct seeds of a text such as "1,11,111"."""
  try:
    seeds = [int(part) for part in text.split(",")]
  except ValueError:
    seeds = []
  if not seeds or len(set(seeds)) < len(seeds):
    raise UserError(f"--seeds={text}: expected distinct whole numbers such as --seeds=1,11,111")
  return seeds


if __name__ == "__main__":
  config.main(run)
