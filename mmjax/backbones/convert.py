"""From a PyTorch state dict to Flax parameters, by a table of names.

A table is a list of `(pattern, path, transform)`. `pattern` is a regular expression that must match a whole
source key; `path` is the parameter's slash-separated path, with groups as in `re.sub` (`\\1`), or None for a
key that is not needed; `transform` is one of the functions below, or None to take the array as it is.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from mmjax.errors import UserError

Transform = Callable[[np.ndarray], np.ndarray]
Table = Sequence[tuple[str, str | None, Transform | None]]


def transpose(x: np.ndarray) -> np.ndarray:
  """Linear: torch's [out, in] -> [in, out]."""
  return x.T


def conv1d(x: np.ndarray) -> np.ndarray:
  """Conv1d: torch's [out, in / groups, width] -> [width, in / groups, out]."""
  return x.transpose(2, 1, 0)


def linear(source: str, target: str) -> Table:
  """Returns the two rows of a Linear layer with bias."""
  return [
    (source + r"\.weight", target + "/kernel", transpose),
    (source + r"\.bias", target + "/bias", None),
  ]


def norm(source: str, target: str) -> Table:
  """Returns the two rows of a LayerNorm or GroupNorm; TF-era files call them gamma and beta."""
  return [
    (source + r"\.(?:weight|gamma)", target + "/scale", None),
    (source + r"\.(?:bias|beta)", target + "/bias", None),
  ]


def under(source: str, target: str, table: Table) -> Table:
  """Returns `table` for an encoder that sits below `source` (a regular expression) and goes below `target`."""
  return [(source + pattern, path and f"{target}/{path}", transform) for pattern, path, transform in table]


def split_in_proj(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns `source` with each packed `in_proj_weight` and `in_proj_bias` [3D, ...] as `q_proj`, `k_proj`, `v_proj`."""
  parts: dict[str, np.ndarray] = {}
  for key, value in source.items():
    stem, _, leaf = key.rpartition("in_proj_")
    if leaf not in ("weight", "bias"):
      parts[key] = value
      continue
    for name, part in zip("qkv", np.split(np.asarray(value), 3), strict=True):
      parts[f"{stem}{name}_proj.{leaf}"] = part
  return parts


def convert(
  source: Mapping[str, np.ndarray], shapes: Mapping[str, Any], table: Table, *, name: str = "checkpoint"
) -> dict[str, Any]:
  """Returns float32 parameters of the nesting and shapes of `shapes`, filled from `source`.

  Raises one `UserError` that lists every source key without a row, every parameter left without a value and
  every shape that differs.
  """
  rows = [(re.compile(pattern), path, transform) for pattern, path, transform in table]
  wanted = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
  params: dict[str, np.ndarray] = {}
  problems = []
  for key in source:
    found = next(((m, path, t) for p, path, t in rows if (m := p.fullmatch(key))), None)
    if found is None:
      problems.append(f"  not known: {key}")
      continue
    match, path, transform = found
    if path is None:
      continue
    target = match.expand(path)
    if target not in wanted:
      continue  # a part that this network leaves out, such as an unused pooler
    value = np.asarray(source[key], dtype=np.float32)
    value = transform(value) if transform else value
    if value.shape != wanted[target]:
      problems.append(f"  shape of {key}: found {value.shape}, expected {wanted[target]} ({target})")
    params[target] = value
  problems += [f"  missing: {path} {shape}" for path, shape in wanted.items() if path not in params]
  if problems:
    raise UserError(f"{name} does not fit the network that its configuration describes:\n" + "\n".join(problems))
  return traverse_util.unflatten_dict(params, sep="/")
