"""What an objective's memory looked like after each epoch: `workdir/trace/epoch_0001.npz` and so on.

An objective with `trace(memory) -> {name: [N]}` gets one file an epoch, with a row per training example; the report
draws them.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.errors import UserError

FOLDER = "trace"


def write(workdir: Path, epoch: int, objective: Any, memory: Any) -> None:
  """Writes the file of an epoch, whole or not at all, if the objective has a `trace`; a resumed run writes it again."""
  if not hasattr(objective, "trace"):
    return
  path = workdir / FOLDER / f"epoch_{epoch:04d}.npz"
  path.parent.mkdir(exist_ok=True)
  partial = path.with_suffix(".partial")
  arrays: dict[str, Any] = {name: np.asarray(values, np.float32) for name, values in objective.trace(memory).items()}
  with partial.open("wb") as file:
    np.savez_compressed(file, **arrays)
  partial.replace(path)


def read(workdir: Path) -> tuple[list[int], Mapping[str, np.ndarray]]:
  """Returns the epochs there are and {name: [epochs, N]}; none and {} for a run without traces."""
  epochs, found = [], []
  for path in sorted((workdir / FOLDER).glob("epoch_*.npz")):
    try:
      with np.load(path) as file:
        found.append(dict(file))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise UserError(f"{path} cannot be read ({error}). Remove it to write the report without it.") from None
    epochs.append(int(path.stem.removeprefix("epoch_")))
  return epochs, {name: np.stack([arrays[name] for arrays in found]) for name in (found[0] if found else ())}
