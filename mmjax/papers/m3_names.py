"""The authors' state-dict names for M3."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.backbones.convert import Table, convert, linear, transpose
from mmjax.papers.m3 import M3, PAIRS
from mmjax.recurrent import torch_rows

# The Lightning module that the authors save keeps the network as `model`.
WRAPPER = r"(?:model\.)?"
MODALITIES = {"text": "text", "audio": "audio", "visual": "vision"}
PARTS = (("q", "query"), ("k", "key"), ("v", "value"))


def attentive_rnn(source: str, target: str) -> Table:
  """Returns the rows of a BiLSTM and its attention."""
  rows = list(torch_rows(rf"{source}rnn\.rnn\.", f"{target}/rnn", bidirectional=True))
  for part, field in PARTS:
    rows.append((rf"{source}attention\.{part}\.weight", f"{target}/attention/{field}/kernel", transpose))
  return rows


def table() -> Table:
  """Returns the table of the whole network."""
  rows: list = []
  for theirs, ours in MODALITIES.items():
    rows += attentive_rnn(rf"{WRAPPER}encoder\.{theirs}\.{theirs}\.", ours)
  fuser = rf"{WRAPPER}encoder\.fuser\."
  for pair in PAIRS:
    letters = "".join(name[0] for name in pair)
    # x is the pair's first modality: its keys and values (kx, vx) meet the other's queries (qy).
    for (one, other), query, context in ((pair, "x", "y"), (pair[::-1], "y", "x")):
      for part, field in PARTS:
        suffix = query if part == "q" else context
        source = rf"{fuser}att_fuser\.{letters}\.{part}{suffix}\.weight"
        rows.append((source, f"fusion/{one}_from_{other}/{field}/kernel", transpose))
  for part, field in PARTS:
    rows.append((rf"{fuser}att_fuser\.tav\.{part}\.weight", f"fusion/all/{field}/kernel", transpose))
  rows += attentive_rnn(rf"{fuser}rnn\.", "reader")
  return [*rows, *linear(rf"{WRAPPER}classifier", "score")]


def from_torch(
  network: M3, state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, name: str = "checkpoint"
) -> dict[str, Any]:
  """Returns the variables {"params": ...} of `network`, of the given `shapes`, from the authors' state dict.

  Raises one `UserError` that lists every key that is not known, every parameter left without a value and every
  shape that differs.
  """
  return {"params": convert(state_dict, shapes["params"], table(), name=name)}
