"""BERT as Google gives it out, in TensorFlow checkpoints such as chinese_L-12_H-768_A-12.

A folder holds bert_config.json, vocab.txt, bert_model.ckpt.index and bert_model.ckpt.data-*. Source:
https://github.com/google-research/bert
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.backbones.convert import Table, under
from mmjax.errors import UserError

CONFIG = "bert_config.json"
VOCABULARY = "vocab.txt"
INDEX = "bert_model.ckpt.index"
# Of the encoder's variables; the heads of pretraining (cls/) and the step count have none.
PREFIX = "bert/"


def _dense(source: str, target: str) -> Table:
  # TensorFlow's kernels are [in, out], as Flax's are.
  return [(f"{source}/{leaf}", f"{target}/{leaf}", None) for leaf in ("kernel", "bias")]


def _norm(source: str, target: str) -> Table:
  return [(f"{source}/gamma", f"{target}/scale", None), (f"{source}/beta", f"{target}/bias", None)]


_LAYER: Table = [
  *_dense("attention/self/(query|key|value)", r"attention/\2"),
  *_dense("attention/output/dense", "attention/out"),
  *_norm("attention/output/LayerNorm", "attention_norm"),
  *_dense("intermediate/dense", "ffn_in"),
  *_dense("output/dense", "ffn_out"),
  *_norm("output/LayerNorm", "ffn_norm"),
]
# From names without their prefix to the parameters of `bert.Bert`.
TABLE: Table = [
  (".*/adam_[mv]", None, None),
  ("embeddings/(word|position|token_type)_embeddings", r"embeddings/\1", None),
  *_norm("embeddings/LayerNorm", "embeddings/norm"),
  *under(r"encoder/layer_(\d+)/", r"layer_\1", _LAYER),
  *_dense("pooler/dense", "pooler"),
]


def alone(folder: Path) -> bool:
  """Returns whether a folder is as Google gives it out: with a vocabulary, but nothing of Hugging Face's."""
  others = ("config.json", "tokenizer.json", "tokenizer_config.json")
  there = [all((folder / name).is_file() for name in (CONFIG, VOCABULARY)), *((folder / n).exists() for n in others)]
  return there == [True, False, False, False]


def readers(index: Path) -> dict[str, Callable[[], np.ndarray]]:
  """Returns {name of a variable: function that reads it} of the checkpoint whose index file this is.

  Raises `UserError`, here or when reading, for files that are missing, damaged or cut short.
  """
  import tensorflow as tf

  if not any(index.parent.glob(f"{index.stem}.data-*")):
    raise UserError(
      f"{index} stands without its data: expected {index.stem}.data-00000-of-00001 beside it."
      " Get it from the same place."
    )
  # What is cut short raises IndexError.
  damage = (tf.errors.OpError, IndexError)

  def reading(read: Callable[[], Any]) -> Any:
    try:
      return read()
    except damage as error:
      raise UserError(f"{index} or its data is damaged or cut short ({error}). Get the files again.") from None

  checkpoint = reading(lambda: tf.train.load_checkpoint(str(index.with_suffix(""))))
  names = checkpoint.get_variable_to_shape_map()
  return {name: partial(reading, partial(checkpoint.get_tensor, name)) for name in sorted(names)}
