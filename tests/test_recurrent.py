"""LSTM and GRU against a loop in numpy, one example at a time over its true length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.backbones.convert import convert
from mmjax.errors import UserError
from mmjax.recurrent import LSTM, BiLSTM, torch_rows

WIDTH, INPUTS = 4, 3


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def lstm_loop(x, weights, end):
  """PyTorch's documented equations; returns the outputs of all steps of `x` [T, I]."""
  h = c = np.zeros(WIDTH)
  outputs = []
  for step in x:
    gates = weights[f"weight_ih_{end}"] @ step + weights[f"bias_ih_{end}"]
    gates = gates + weights[f"weight_hh_{end}"] @ h + weights[f"bias_hh_{end}"]
    i, f, g, o = np.split(gates, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    outputs.append(h)
  return outputs


def gru_loop(x, weights, end):
  h = np.zeros(WIDTH)
  outputs = []
  for step in x:
    r, z, n = np.split(weights[f"weight_ih_{end}"] @ step + weights[f"bias_ih_{end}"], 3)
    r_h, z_h, n_h = np.split(weights[f"weight_hh_{end}"] @ h + weights[f"bias_hh_{end}"], 3)
    r, z = sigmoid(r + r_h), sigmoid(z + z_h)
    n = np.tanh(n + r * n_h)
    h = (1 - z) * n + z * h
    outputs.append(h)
  return outputs


LOOPS = {"lstm": (lstm_loop, 4), "gru": (gru_loop, 3)}


def torch_weights(cell: str, *, seed: int = 0) -> dict[str, np.ndarray]:
  rng, gates = np.random.default_rng(seed), LOOPS[cell][1] * WIDTH
  shapes = {"weight_ih": (gates, INPUTS), "weight_hh": (gates, WIDTH), "bias_ih": (gates,), "bias_hh": (gates,)}
  return {
    f"rnn.{name}_l0{side}": rng.standard_normal(shape).astype(np.float32)
    for side in ("", "_reverse")
    for name, shape in shapes.items()
  }


def ragged(lengths, steps: int):
  x = np.random.default_rng(1).standard_normal((len(lengths), steps, INPUTS)).astype(np.float32)
  return x, np.arange(steps) < np.asarray(lengths)[:, None]


def params_of(module, weights, x, mask):
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, mask))["params"]
  rows = torch_rows(r"rnn\.", "rnn", bidirectional=isinstance(module, BiLSTM))
  if not isinstance(module, BiLSTM):
    weights = {key: value for key, value in weights.items() if not key.endswith("_reverse")}
  return {"params": convert(weights, {"rnn": shapes}, rows)["rnn"]}


@pytest.mark.parametrize("cell", LOOPS)
def test_both_directions_equal_a_loop_over_the_true_length(cell):
  lengths = [6, 1, 0, 4]
  x, mask = ragged(lengths, 6)
  weights = torch_weights(cell)
  loop = LOOPS[cell][0]
  short = {key.removeprefix("rnn."): value for key, value in weights.items()}
  for merge, join in (("concat", np.concatenate), ("sum", lambda pair: pair[0] + pair[1])):
    module = BiLSTM(WIDTH, merge, cell)
    outputs, last = jax.jit(module.apply)(params_of(module, weights, x, mask), x, mask)
    for row, length in enumerate(lengths):
      there = loop(x[row, :length], short, "l0")
      back = loop(x[row, :length][::-1], short, "l0_reverse")
      want = [join([a, b]) for a, b in zip(there, back[::-1], strict=True)]
      want_last = join([there[-1], back[-1]]) if length else np.zeros(outputs.shape[-1])
      np.testing.assert_allclose(outputs[row, :length], np.reshape(want, (length, outputs.shape[-1])), atol=1e-5)
      np.testing.assert_array_equal(outputs[row, length:], 0)
      np.testing.assert_allclose(last[row], want_last, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_invisible(reverse):
  """The same examples in a longer box, with something other than zeros behind their end."""
  x, mask = ragged([5, 2, 1], 5)
  module = LSTM(WIDTH, reverse)
  variables = module.init(jax.random.key(0), x, mask)
  outputs, last = module.apply(variables, x, mask)
  wide, wide_mask = np.pad(x, ((0, 0), (0, 7), (0, 0)), constant_values=9.0), np.pad(mask, ((0, 0), (0, 7)))
  wide[~wide_mask] = np.nan
  wide_outputs, wide_last = module.apply(variables, wide, wide_mask)
  np.testing.assert_allclose(wide_outputs[:, :5], outputs, atol=1e-6)
  np.testing.assert_allclose(wide_last, last, atol=1e-6)


@pytest.mark.parametrize("cell", LOOPS)
def test_one_step_and_no_step_have_finite_gradients(cell):
  x, mask = ragged([1, 0], 1)
  module = BiLSTM(WIDTH, cell=cell)
  variables = module.init(jax.random.key(0), x, mask)

  def total(variables, x):
    outputs, last = module.apply(variables, x, mask)
    return jnp.sum(outputs) + jnp.sum(last)

  gradient, inner = jax.jit(jax.grad(total, argnums=(0, 1)))(variables, x)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  assert np.any(inner[0])
  assert not np.any(inner[1])


def test_initial_values_are_torchs():
  x, mask = ragged([3], 3)
  params = LSTM(64).init(jax.random.key(0), x, mask)["params"]
  assert set(params) == {"input_kernel", "recurrent_kernel", "input_bias", "recurrent_bias"}
  for name, value in params.items():
    assert 0.7 / 8 < np.max(np.abs(value)) <= 1 / 8, name


def test_half_precision_stays_near():
  x, mask = ragged([6, 3], 6)
  variables = LSTM(WIDTH).init(jax.random.key(0), x, mask)
  want, _ = LSTM(WIDTH).apply(variables, x, mask)
  got, last = LSTM(WIDTH, compute_dtype=jnp.bfloat16).apply(variables, x, mask)
  assert last.dtype == jnp.float32
  assert np.max(np.abs(got - want)) <= 2e-2 * np.max(np.abs(want))


def test_wrong_options_are_named():
  with pytest.raises(UserError, match="'lstm' or 'gru'"):
    LSTM(4, cell="rnn")
  with pytest.raises(UserError, match="'sum' or 'concat'"):
    BiLSTM(4, "mean")
