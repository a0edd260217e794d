"""The golden cases: arrays made with the authors' PyTorch code, and the rule that made their weights.

`tests/golden/NAME.npz` holds `in_*`, `mid_*`, `out_*`; `NAME.keys.tsv` every key of the PyTorch state dict with
its shape and kind. The weights are not stored: `weight` makes each from its key.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden"


def weight(key: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
  r = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).randn(*shape).astype(np.float32)
  if kind in ("norm_scale", "weight_g"):
    return 1 + 0.1 * r
  if kind == "running_var":
    return 1 + 0.1 * np.abs(r)
  scale = {"running_mean": 0.1, "vector": 0.05, "embedding": 0.5}.get(kind)
  if scale is None:
    scale = 1 / math.sqrt(math.prod(shape[1:]))
  return np.float32(scale) * r


def state_dict(case: str, prefix: str = "") -> dict[str, np.ndarray]:
  """Weights of `case` whose key starts with `prefix`, which is cut off (the rule uses the whole key)."""
  weights = {}
  for line in (FOLDER / f"{case}.keys.tsv").read_text().splitlines():
    key, dims, kind = line.split("\t")
    if key.startswith(prefix) and kind != "buffer" and not kind.startswith("alias:"):
      shape = tuple(int(d) for d in dims.split(",") if d)
      weights[key[len(prefix) :]] = weight(key, shape, kind)
  return weights


def arrays(case: str) -> dict[str, np.ndarray]:
  with np.load(FOLDER / f"{case}.npz") as file:
    return dict(file)


def config(case: str) -> dict:
  path = FOLDER / f"{case}.json"
  return json.loads((path if path.exists() else FOLDER / f"{case}.config.json").read_text())
