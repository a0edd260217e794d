"""The authors' state-dict names for SSE-FT's own layers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.backbones.convert import Table, convert, linear, norm, split_in_proj, transpose
from mmjax.papers.sse_ft import SSEFT

LETTERS = {"t": "text", "a": "audio", "v": "vision"}
ENCODER = r"decoder\.sentence_encoder\."


def stack(source: str, target: str) -> Table:
  """Returns the rows of a stack of layers; keys come after `convert.split_in_proj`."""
  source, target = rf"{ENCODER}layers_{source}\.(\d+)\.", rf"{target}/layer_\1/"
  rows: list = []
  for part, field in (("q", "query"), ("k", "key"), ("v", "value")):
    # Cross-attention keeps the three matrices apart, but not their biases.
    rows.append((rf"{source}self_attn\.{part}_proj[._]weight", f"{target}attention/{field}/kernel", transpose))
    rows.append((rf"{source}self_attn\.{part}_proj\.bias", f"{target}attention/{field}/bias", None))
  rows += linear(rf"{source}self_attn\.out_proj", f"{target}attention/out")
  rows += [*norm(rf"{source}self_attn_layer_norm", f"{target}attention_norm")]
  rows += [*linear(rf"{source}fc1", f"{target}ffn_in"), *linear(rf"{source}fc2", f"{target}ffn_out")]
  return [*rows, *norm(rf"{source}final_layer_norm", f"{target}ffn_norm")]


def table() -> Table:
  """Returns the table of the whole network; the frozen encoders that the authors save with it are left out (F9)."""
  rows: list = [(r"model_(?:text2vec|wav2vec|vid2vec)\..*", None, None)]
  for letter, name in LETTERS.items():
    for other in LETTERS:
      if other != letter:
        rows += stack(letter + other, f"{name}_from_{LETTERS[other]}")
    if name == "text":
      continue
    rows += stack(letter, f"{name}_self")
    rows += norm(rf"{ENCODER}emb_layer_norm_{letter}", f"{name}_norm")
    rows.append((rf"{ENCODER}SE_embeddings_{letter}\.weight", f"{name}_start", lambda x: x[0]))
    # fairseq counts positions from 2; the rows before that are for padding.
    rows.append((rf"{ENCODER}embed_positions_{letter}\.weight", f"{name}_positions", lambda x: x[2:]))
  head = r"classification_heads\.emotion_classification_head\."
  return [*rows, *linear(rf"{head}dense", "dense"), *linear(rf"{head}out_proj", "score")]


def from_torch(
  network: SSEFT, state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, name: str = "checkpoint"
) -> dict[str, Any]:
  """Returns the variables {"params": ...} of `network`, of the given `shapes`, from the authors' state dict.

  Raises one `UserError` that lists every key that is not known, every parameter left without a value and every
  shape that differs.
  """
  return {"params": convert(split_in_proj(state_dict), shapes["params"], table(), name=name)}
