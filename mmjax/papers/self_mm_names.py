"""The state-dict names of Self-MM and of MMSA for the layers of `SelfMM`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.backbones import bert
from mmjax.backbones.convert import Table, convert, linear, under
from mmjax.papers.self_mm import SelfMM
from mmjax.recurrent import torch_rows

# Checkpoints of AMIO, the wrapper both repositories save, have this before each key.
WRAPPER = r"(?:Model\.)?"
HEADS = {"fusion": "M", "text": "T", "audio": "A", "video": "V"}
LAYERS = {1: "feature", 2: "dense", 3: "score"}


def table() -> Table:
  """Returns the table of all parameters, the text encoder's included."""
  rows: list = [*under(WRAPPER + r"text_model\.model\.", "text_encoder", bert.TABLE)]
  for theirs, ours in (("audio", "audio"), ("video", "vision")):
    rows += torch_rows(rf"{WRAPPER}{theirs}_model\.rnn\.", f"{ours}/lstm")
    rows += linear(rf"{WRAPPER}{theirs}_model\.linear_1", f"{ours}/out")
  for theirs, head in HEADS.items():
    for number, layer in LAYERS.items():
      rows += linear(rf"{WRAPPER}post_{theirs}_layer_{number}", f"{head}/{layer}")
  return rows


def from_torch(
  network: SelfMM, state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, name: str = "checkpoint"
) -> dict[str, Any]:
  """Returns the variables {"params": ...} of `network`, of the given `shapes`, from the authors' state dict.

  Raises one `UserError` that lists every key that is not known, every parameter left without a value and every
  shape that differs.
  """
  return {"params": convert(state_dict, shapes["params"], table(), name=name)}
