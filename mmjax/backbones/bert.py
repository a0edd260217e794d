"""BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805) and RoBERTa (Liu et al. 2019,
https://arxiv.org/abs/1907.11692): the same post-LN transformer, with two ways to count positions.

Numerically equal to Hugging Face's BertModel and RobertaModel in evaluation mode.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.backbones.convert import Table, linear, norm, under
from mmjax.errors import UserError
from mmjax.layers import Array, Attention, Encoded, Linear, run_layer

ROBERTA = ("roberta", "xlm-roberta")


def roberta_positions(ids: Array, pad_token_id: int) -> Array:
  """Returns position ids [B, T]: real tokens count up from `pad_token_id + 1`, padding has `pad_token_id`.

  What is padding follows from `ids` [B, T], not from the attention mask, as in the original.
  """
  real = (ids != pad_token_id).astype(jnp.int32)
  return jnp.cumsum(real, axis=1) * real + pad_token_id


class Embeddings(nn.Module):
  """Sum of word, position and type embeddings, normalised: [B, T] to [B, T, D] float32."""

  vocab_size: int
  hidden_size: int
  max_positions: int
  type_vocab_size: int
  layer_norm_eps: float
  dropout: float
  init_std: float

  @nn.compact
  def __call__(self, ids: Array, position_ids: Array, type_ids: Array, *, train: bool) -> Array:
    def table(name: str, rows: int) -> Array:
      init = nn.initializers.normal(self.init_std)
      return self.param(name, init, (rows, self.hidden_size), jnp.float32)

    # jnp.take gives NaN for an id beyond the table, where indexing would quietly take the last row.
    x = jnp.take(table("word", self.vocab_size), ids, axis=0)
    x = x + jnp.take(table("token_type", self.type_vocab_size), type_ids, axis=0)
    x = x + jnp.take(table("position", self.max_positions), position_ids, axis=0)
    x = _norm("norm", self.layer_norm_eps)(x)
    return nn.Dropout(self.dropout)(x, deterministic=not train)


class Layer(nn.Module):
  """One transformer layer, [B, T, D] to [B, T, D] float32: each half adds its input and is normalised after."""

  heads: int
  intermediate_size: int
  layer_norm_eps: float
  hidden_dropout: float
  attention_dropout: float
  init_std: float
  compute_dtype: Any

  @nn.compact
  def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
    def add_norm(name: str, y: Array, residual: Array) -> Array:
      y = nn.Dropout(self.hidden_dropout)(y, deterministic=not train)
      return _norm(name, self.layer_norm_eps)(y + residual)

    def dense(name: str, features: int) -> Linear:
      return Linear(features, init_std=self.init_std, compute_dtype=self.compute_dtype, name=name)

    attention = Attention(
      self.heads,
      self.attention_dropout,
      init_std=self.init_std,
      compute_dtype=self.compute_dtype,
      name="attention",
    )
    x = add_norm("attention_norm", attention(x, x, mask, train=train), x)
    inner = jax.nn.gelu(dense("ffn_in", self.intermediate_size)(x), approximate=False)
    return add_norm("ffn_norm", dense("ffn_out", x.shape[-1])(inner), x)


class Bert(nn.Module):
  """Hidden states [B, T, D] of a text, and with `pooler` one vector [B, D] from its first token.

  `text` holds `ids` and `mask` [B, T], and optionally `type_ids`. Hidden states at padded positions are
  what the network makes of them, as in Hugging Face. `pretrained` names where `pretrained.restore` finds
  the weights. Raises ValueError for more tokens than there are positions.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  max_positions: int
  type_vocab_size: int = 2
  pad_token_id: int = 0
  layer_norm_eps: float = 1e-12
  hidden_dropout: float = 0.1
  attention_dropout: float = 0.1
  init_std: float = 0.02
  roberta: bool = False  # positions as RoBERTa counts them
  pooler: bool = True
  compute_dtype: Any = jnp.float32
  remat: bool = False  # see layers.run_layer
  pretrained: str | None = None

  @property
  def max_tokens(self) -> int:
    """The longest text, special tokens included."""
    return self.max_positions - (self.pad_token_id + 1 if self.roberta else 0)

  @nn.compact
  def __call__(self, text: Mapping[str, Any], *, train: bool) -> Encoded:
    ids, mask = jnp.asarray(text["ids"]), jnp.asarray(text["mask"], bool)
    if ids.shape[1] > self.max_tokens:
      raise ValueError(
        f"{self.pretrained or 'Bert'}: found {ids.shape[1]} tokens, expected at most {self.max_tokens}, "
        "which is what its position table holds. Lower pipeline.Text.max_tokens."
      )
    if self.roberta:
      position_ids = roberta_positions(ids, self.pad_token_id)
    else:
      position_ids = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    type_ids = jnp.asarray(text.get("type_ids", jnp.zeros_like(ids)))

    x = Embeddings(
      vocab_size=self.vocab_size,
      hidden_size=self.hidden_size,
      max_positions=self.max_positions,
      type_vocab_size=self.type_vocab_size,
      layer_norm_eps=self.layer_norm_eps,
      dropout=self.hidden_dropout,
      init_std=self.init_std,
      name="embeddings",
    )(ids, position_ids, type_ids, train=train)
    self.sow("intermediates", "hidden_states", x.astype(self.compute_dtype))
    for i in range(self.num_layers):
      layer = Layer(
        self.num_heads,
        self.intermediate_size,
        self.layer_norm_eps,
        self.hidden_dropout,
        self.attention_dropout,
        self.init_std,
        self.compute_dtype,
        name=f"layer_{i}",
      )
      x = run_layer(layer, x, mask, remat=self.remat, train=train)
      self.sow("intermediates", "hidden_states", x.astype(self.compute_dtype))
    if not self.pooler:
      return Encoded(x.astype(self.compute_dtype), mask)
    # In float32: a small product, whose rounding in bfloat16 would be a good part of the whole error.
    pooled = jnp.tanh(Linear(self.hidden_size, init_std=self.init_std, name="pooler")(x[:, 0]))
    return Encoded(x.astype(self.compute_dtype), mask, pooled.astype(self.compute_dtype))


def _norm(name: str, epsilon: float) -> nn.LayerNorm:
  # float32 between the layers: in bfloat16 the rounding of the residual sums adds up over their number.
  return nn.LayerNorm(epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


def from_config(config: Mapping[str, Any], **overrides: Any) -> Bert:
  """Returns the encoder that a Hugging Face config.json describes; `overrides` replace fields of `Bert`.

  Raises `UserError` for a variant that `Bert` does not compute, KeyError for a size that is missing.
  """
  kind = config["model_type"]
  if kind not in ("bert", *ROBERTA):
    raise UserError(f"found model_type {kind!r}, expected bert, {' or '.join(ROBERTA)}.")
  for option, expected in {"hidden_act": "gelu", "position_embedding_type": "absolute"}.items():
    if config.get(option, expected) != expected:
      raise UserError(f"found {option} {config[option]!r}, expected {expected!r}. Choose another text encoder.")
  fields = {
    "vocab_size": config["vocab_size"],
    "hidden_size": config["hidden_size"],
    "num_layers": config["num_hidden_layers"],
    "num_heads": config["num_attention_heads"],
    "intermediate_size": config["intermediate_size"],
    "max_positions": config["max_position_embeddings"],
    "type_vocab_size": config.get("type_vocab_size", 2),
    "pad_token_id": config.get("pad_token_id", 1 if kind in ROBERTA else 0),
    "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
    "hidden_dropout": config.get("hidden_dropout_prob", 0.1),
    "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
    "init_std": config.get("initializer_range", 0.02),
    "roberta": kind in ROBERTA,
  }
  return Bert(**{**fields, **overrides})


_LAYER: Table = [
  *linear(r"attention\.self\.(query|key|value)", r"attention/\2"),
  *linear(r"attention\.output\.dense", "attention/out"),
  *norm(r"attention\.output\.LayerNorm", "attention_norm"),
  *linear(r"intermediate\.dense", "ffn_in"),
  *linear(r"output\.dense", "ffn_out"),
  *norm(r"output\.LayerNorm", "ffn_norm"),
]
_MODEL: Table = [
  (r"embeddings\.(word|position|token_type)_embeddings\.weight", r"embeddings/\1", None),
  *norm(r"embeddings\.LayerNorm", "embeddings/norm"),
  (r"embeddings\.(?:position|token_type)_ids", None, None),
  *under(r"encoder\.layer\.(\d+)\.", r"layer_\1", _LAYER),
  *linear(r"pooler\.dense", "pooler"),
]
TABLE: Table = [
  *((r"(?:bert\.|roberta\.)?" + pattern, path, transform) for pattern, path, transform in _MODEL),
  (r"(?:cls|lm_head|classifier|qa_outputs)\..*", None, None),
]
