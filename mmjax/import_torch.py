"""`python -m mmjax.import_torch`: an authors' PyTorch checkpoint becomes a workdir that evaluate accepts."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax import config
from mmjax.errors import UserError


def run(argv: Sequence[str]) -> int:
  """Imports as the flags say; returns the exit status."""
  parser = config.parser(
    "import_torch", "Make a workdir from a state dict of the authors' code; nothing in the file is executed."
  )
  parser.add_argument("--gin_file", type=Path, required=True, help="the experiment it belongs to: gin/mmml_mosi.gin")
  parser.add_argument("--torch_checkpoint", type=Path, required=True, help="a .pth, .pt or .bin file of torch.save")
  parser.add_argument("--workdir", type=Path, required=True, help="folder to make")
  flags = config.parse(parser, argv)
  if not flags.torch_checkpoint.is_file():
    raise UserError(f"--torch_checkpoint={flags.torch_checkpoint}: found no such file, expected one of torch.save")
  if flags.workdir.exists() and any(flags.workdir.iterdir() if flags.workdir.is_dir() else [flags.workdir]):
    raise UserError(f"--workdir={flags.workdir}: found something there, expected a new or empty folder")
  loaded = config.load(flags.gin_file, flags.gin)
  variables = read(loaded.experiment, flags.torch_checkpoint)

  from mmjax.training import checkpoints, fit

  folders = {name: str(path.absolute()) for name in ("data_dir", "cache_dir") if (path := getattr(flags, name))}
  imported = {**folders, "imported_from": str(flags.torch_checkpoint.absolute())}
  fit.write_records(flags.workdir, {"config.gin": loaded.text, "run.json": json.dumps(imported) + "\n"})
  saved = checkpoints.Checkpoints(flags.workdir)
  saved.save("best_loss", 0, variables, {"step": 0, "epoch": 0})
  print(f"imported {flags.torch_checkpoint}; score it with: python -m mmjax.evaluate --workdir={flags.workdir}")
  return 0


def read(experiment: Any, path: Path) -> Mapping[str, Any]:
  """Returns the variables of the experiment's network from the state dict in `path`.

  Each paper's `<paper>_names.py` knows the authors' names. Raises one `UserError` for a file that cannot be read,
  for a value that is not a tensor, and for keys that are missing, unknown or of another shape.
  """
  import jax
  import jax.numpy as jnp

  from mmjax.backbones import torch_file
  from mmjax.training import step

  network = experiment.network
  state_dict = torch_file.tensors(path)
  if all(key.startswith("module.") for key in state_dict):  # saved from DataParallel
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
  names = importlib.import_module(f"{type(network).__module__}_names")
  shapes = step.abstract(network, experiment.abstract_batch())
  return jax.tree.map(jnp.asarray, names.from_torch(network, state_dict, shapes, name=str(path)))


if __name__ == "__main__":
  config.main(run)
