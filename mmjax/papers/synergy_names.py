"""The authors' state-dict names for the four students of Synergy."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.backbones import bert, resnet, speech
from mmjax.backbones.convert import Table, convert, linear, norm, under
from mmjax.papers.synergy import Synergy

TABLES: dict[str, Table] = {
  "image": [
    *linear(r"encoder\.fc", "student/project"),
    *norm(r"fc\.0", "student/norm"),
    *linear(r"fc\.2", "student/score"),
  ],
  "speech": [
    *linear("linear", "student/project"),
    *linear(r"fc\.0", "student/dense"),
    *linear(r"fc\.2", "student/score"),
  ],
  "text": [
    *linear(r"linear_transform\.0", "student/project"),
    *norm(r"linear_transform\.1", "student/norm"),
    *linear("fc", "student/score"),
  ],
}
ENCODERS: dict[str, Table] = {"image": resnet.TABLE, "speech": speech.TABLE, "text": bert.TABLE}


def from_torch(
  network: Synergy, state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, name: str = "checkpoint"
) -> dict[str, Any]:
  """Returns the variables of `network`, of the given `shapes`, from the authors' state dict: {"params": ...} and,
  for images, {"batch_stats": ...}.

  Raises one `UserError` that lists every key that is not known, every parameter left without a value and every
  shape that differs.
  """
  (modality,) = network.streams
  rows = [*TABLES[network.kind], *under(r"encoder\.", f"{modality}_encoder", ENCODERS[network.kind])]
  return {collection: convert(state_dict, tree, rows, name=name) for collection, tree in shapes.items()}
