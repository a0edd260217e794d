"""Does Bert equal Hugging Face's BertModel and RobertaModel, whatever the padding?"""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mmjax.backbones import bert
from mmjax.backbones.convert import convert
from mmjax.errors import UserError

CASES = ["backbone_bert", "backbone_roberta"]
TINY = {"vocab_size": 20, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 16}


def config(case: str) -> dict:
  return golden.config(case)["config"]["full"]


def text_of(case: str) -> dict:
  arrays = golden.arrays(case)
  text = {"ids": arrays["in_input_ids"], "mask": arrays["in_attention_mask"] > 0}
  if "in_token_type_ids" in arrays:
    text["type_ids"] = arrays["in_token_type_ids"]
  return text


def params_of(network: bert.Bert, state: dict) -> dict:
  text = {"ids": jnp.zeros((1, 2), jnp.int32), "mask": jnp.ones((1, 2), bool)}
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), text, train=False))["params"]
  return convert(state, shapes, bert.TABLE)


def outputs(case: str, **overrides) -> dict[str, np.ndarray]:
  network = bert.from_config(config(case), **overrides)
  params = params_of(network, golden.state_dict(case))
  apply = jax.jit(lambda p, text: network.apply({"params": p}, text, train=False, mutable="intermediates"))
  encoded, sown = apply(params, text_of(case))
  found = {f"out_hidden_{i}": x for i, x in enumerate(sown["intermediates"]["hidden_states"])}
  return found | {"out_last_hidden_state": encoded.hidden, "out_pooler_output": encoded.pooled}


@pytest.mark.parametrize("case", CASES)
def test_equals_hugging_face(case):
  found = outputs(case)
  expected = {name: x for name, x in golden.arrays(case).items() if name.startswith("out_")}
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close(case):
  found = outputs(case, compute_dtype="bfloat16")
  for name, x in found.items():
    expected = golden.arrays(case)[name]
    assert x.dtype == jnp.bfloat16
    assert np.max(np.abs(x.astype(np.float32) - expected)) <= 2e-2 * np.max(np.abs(expected)), name


def test_roberta_positions():
  arrays = golden.arrays("backbone_roberta")
  np.testing.assert_array_equal(bert.roberta_positions(arrays["in_input_ids"], 1), arrays["mid_position_ids"])
  # A padding token between real ones takes no position, and those after it go on counting.
  np.testing.assert_array_equal(bert.roberta_positions(jnp.array([[5, 1, 6, 1]]), 1), [[2, 1, 3, 1]])


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case):
  network = bert.from_config(config(case))
  params = params_of(network, golden.state_dict(case))
  text = text_of(case)
  apply = jax.jit(lambda text: network.apply({"params": params}, text, train=False))
  together = apply(text)
  for row, tokens in enumerate(text["mask"].sum(axis=1)):
    alone = apply({k: x[row : row + 1, :tokens] for k, x in text.items()})
    np.testing.assert_allclose(together.hidden[row, :tokens], alone.hidden[0], atol=1e-5)
    np.testing.assert_allclose(together.pooled[row], alone.pooled[0], atol=1e-5)


def test_text_without_a_token_is_finite():
  network = bert.Bert(**TINY, max_positions=8)
  text = {"ids": jnp.zeros((1, 3), jnp.int32), "mask": jnp.zeros((1, 3), bool)}
  encoded, _ = jax.jit(lambda key: network.init_with_output(key, text, train=False))(jax.random.key(0))
  assert np.isfinite(encoded.hidden).all()


@pytest.mark.parametrize(("roberta", "pad", "limit"), [(False, 0, 8), (True, 1, 6)])
def test_too_many_tokens(roberta, pad, limit):
  network = bert.Bert(**TINY, max_positions=8, roberta=roberta, pad_token_id=pad)

  def shapes(tokens: int):
    text = {"ids": jnp.full((1, tokens), 5), "mask": jnp.ones((1, tokens), bool)}
    return jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), text, train=False))

  assert shapes(limit)[0].hidden.shape == (1, limit, 8)
  with pytest.raises(ValueError, match=rf"found {limit + 1} tokens, expected at most {limit}.*max_tokens"):
    shapes(limit + 1)


def test_old_names_prefixes_and_heads():
  case = "backbone_roberta"
  network = bert.from_config(config(case))
  state = golden.state_dict(case)
  expected = params_of(network, state)
  renamed = {
    "roberta." + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
    for k, x in state.items()
  }
  renamed |= {"roberta.embeddings.position_ids": np.arange(34)[None]}
  renamed |= {"lm_head.dense.bias": np.zeros(48), "cls.predictions.bias": np.zeros(60)}
  jax.tree.map(np.testing.assert_array_equal, params_of(network, renamed), expected)
  with pytest.raises(UserError, match=r"not known: encoder\.surprise"):
    params_of(network, state | {"encoder.surprise": np.zeros(1)})


def test_without_pooler():
  network = bert.from_config(config("backbone_bert"), pooler=False)
  params = params_of(network, golden.state_dict("backbone_bert"))
  assert "pooler" not in params
  encoded = jax.eval_shape(lambda: network.apply({"params": params}, text_of("backbone_bert"), train=False))
  assert encoded.pooled is None


def test_gradient_reaches_every_parameter():
  network = bert.Bert(**TINY, max_positions=8)
  text = {"ids": jnp.array([[2, 7, 9, 3]]), "mask": jnp.ones((1, 4), bool)}
  params = jax.jit(lambda key: network.init(key, text, train=False))(jax.random.key(0))["params"]

  def loss(params, key):
    pooled = network.apply({"params": params}, text, train=True, rngs={"dropout": key}).pooled
    return jnp.sum(pooled * jnp.arange(1.0, 9.0))

  step = jax.jit(jax.value_and_grad(loss))
  first, gradients = step(params, jax.random.key(1))
  gradients = traverse_util.flatten_dict(gradients, sep="/")
  for path, gradient in gradients.items():
    assert np.isfinite(gradient).all(), path
    # A bias of the keys adds the same to every score of a query, and a softmax does not see it.
    if not path.endswith("attention/key/bias"):
      assert np.max(np.abs(gradient)) > 1e-6, path
  assert float(first) != float(step(params, jax.random.key(2))[0]), "dropout did not depend on its key"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new', expected 'gelu'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
    ({"model_type": "whisper"}, "model_type 'whisper'"),
  ],
)
def test_other_networks_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    bert.from_config(config("backbone_bert") | change)


def test_unknown_override():
  with pytest.raises(TypeError, match="hidden_dropuot"):
    bert.from_config(config("backbone_bert"), hidden_dropuot=0.0)
