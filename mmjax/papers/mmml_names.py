"""The authors' state-dict names for MMML's own layers, English and Chinese, with and without context."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.backbones import bert, speech
from mmjax.backbones.convert import Table, convert, linear, norm, split_in_proj, transpose, under
from mmjax.papers.mmml import FUSED_WIDTHS, MMML

ATTENTION_PARTS = (("query", "query"), ("key", "key"), ("value", "value"))
STREAMS = (("lang", "text"), ("audio", "audio"))


def cme_layer() -> Table:
  """Returns the rows of one cross-modality layer; `\\1` is its number."""
  source, target = r"CME_layers\.(\d+)\.", r"cme/layer_\1/"
  rows: list = []
  for theirs, ours in STREAMS:
    for block, inner, name in (("_attention", "att", "_cross"), ("_self_att", "self", "_self")):
      for part, field in ATTENTION_PARTS:
        rows += linear(rf"{source}{theirs}{block}\.{inner}\.{part}", f"{target}{ours}{name}/{field}")
      rows += linear(rf"{source}{theirs}{block}\.output\.dense", f"{target}{ours}{name}/out")
      rows += norm(rf"{source}{theirs}{block}\.output\.LayerNorm", f"{target}{ours}{name}_add/norm")
    rows += linear(rf"{source}{theirs}_inter\.dense", f"{target}{ours}_ffn_in")
    rows += linear(rf"{source}{theirs}_output\.dense", f"{target}{ours}_ffn_out")
    rows += norm(rf"{source}{theirs}_output\.LayerNorm", f"{target}{ours}_ffn_add/norm")
  return rows


def mix_layers() -> Table:
  """Returns the rows of v3's transformer layers; keys come after `convert.split_in_proj`."""
  rows: list = []
  for stream in ("text", "audio"):
    source, target = rf"{stream}_encoder\.layers\.(\d+)\.", rf"cme/{stream}_mix_\1/"
    for part, field in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
      rows += linear(rf"{source}self_attn\.{part}", f"{target}self/{field}")
    rows += [*linear(source + "linear1", target + "ffn_in"), *linear(source + "linear2", target + "ffn_out")]
    rows += [*norm(source + "norm1", target + "self_add/norm"), *norm(source + "norm2", target + "ffn_add/norm")]
  return rows


def table(*, fused_layers: int) -> Table:
  """Returns the table of all that is not an encoder; the fused head has `fused_layers` Linear layers.

  Modules that a version registers without using them (MM16) are skipped, since the network does not have them.
  """
  rows: list = [*cme_layer(), *mix_layers()]
  for head in "TA":
    rows += linear(rf"{head}_output_layers\.1", f"{head}/score")
  for i in range(fused_layers):
    name = "score" if i == fused_layers - 1 else f"dense_{i}"
    rows += linear(rf"fused_output_layers\.{2 * i + 1}", f"M/{name}")
  for stream in ("text", "audio"):
    rows.append((rf"{stream}_cls_emb\.weight", f"cme/{stream}_cls", lambda x: x[0]))
    rows.append((rf"{stream}_mixed_cls_emb\.weight", f"cme/{stream}_mix_cls", lambda x: x[0]))
    rows.append((rf"{stream}_mixed_layer\.1\.weight", f"cme/{stream}_mix/kernel", transpose))
    rows.append((rf"{stream}_mixed_layer\.1\.bias", f"cme/{stream}_mix/bias", None))
  return rows


def from_torch(
  network: MMML, state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, name: str = "checkpoint"
) -> dict[str, Any]:
  """Returns the variables {"params": ...} of `network`, of the given `shapes`, from the authors' state dict.

  Raises one `UserError` that lists every key that is not known, every parameter left without a value and every
  shape that differs.
  """
  widths = network.fused_widths or FUSED_WIDTHS[network.fusion, network.context]
  rows = [
    *table(fused_layers=len(widths) + 1),
    *under(r"roberta_model\.", "text_encoder", bert.TABLE),
    *under(r"(?:data2vec|hubert)_model\.", "audio_encoder", speech.TABLE),
  ]
  return {"params": convert(split_in_proj(state_dict), shapes["params"], rows, name=name)}
