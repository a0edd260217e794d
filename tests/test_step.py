"""The train step: devices, accumulation, frozen parameters and padding rows do not change what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmjax.errors import UserError
from mmjax.papers.mmml import MultiLoss
from mmjax.training import mesh as meshes
from mmjax.training import step
from mmjax.training.optimizers import AdamW


def run(network, optimizer: AdamW, batches, *, devices: int = 1, fsdp: int = 1, updates=None):
  """Returns the losses of each step and the final state."""
  mesh = meshes.make(fsdp, devices=jax.devices()[:devices])
  shapes = step.abstract(network, batches[0])["params"]
  frozen = optimizer.frozen_mask(shapes)
  transformation = optimizer.build(shapes, total_steps=10)
  objective = MultiLoss()
  state, shardings = step.create_state(
    network,
    objective,
    transformation,
    frozen=frozen,
    accumulate=optimizer.accumulate,
    labels={"M": np.zeros(4, np.float32)},
    batch=batches[0],
    key=jax.random.key(1),
    mesh=mesh,
  )
  before = jax.device_get(state.params)
  train_step = jax.jit(
    step.make_train_step(network, objective, transformation, frozen=frozen),
    donate_argnums=0,
    out_shardings=(shardings, meshes.replicated(mesh)),
  )
  losses = []
  for i, batch in enumerate(batches):
    update = np.bool_(True if updates is None else updates[i])
    state, logs = train_step(state, meshes.put_batch(batch, mesh), update, jax.random.key(2))
    losses.append(sum(float(value) for name, value in logs.items() if name != "examples"))
  return losses, state, before


def largest_difference(a, b) -> float:
  return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("fsdp", [1, 4])
def test_eight_devices_equal_one(fsdp):
  batches = [tiny.batch(seed=i, context=True) for i in range(5)]
  network = tiny.mmml(context=True)
  optimizer = AdamW(learning_rate=1e-3)
  one, _, _ = run(network, optimizer, batches)
  many, state, _ = run(network, optimizer, batches, devices=8, fsdp=fsdp)
  np.testing.assert_allclose(many, one, rtol=1e-5)
  kernel = state.params["cme"]["layer_0"]["text_ffn_in"]["kernel"]
  moment = state.opt_state[0][0].mu["cme"]["layer_0"]["text_ffn_in"]["kernel"]
  for array in (kernel, moment):
    assert array.addressable_shards[0].data.size == array.size // fsdp


def test_mesh_refuses_what_does_not_divide():
  with pytest.raises(UserError, match="fsdp=3 does not divide the 8 devices"):
    meshes.make(3)


def test_accumulated_gradients_equal_the_whole_batch():
  whole = tiny.batch(rows=8)
  halves = [jax.tree.map(lambda x: x[:5], whole), jax.tree.map(lambda x: x[5:], whole)]
  network = tiny.mmml(dropout=0.0, text_encoder=tiny.bert(hidden_dropout=0.0, attention_dropout=0.0), tasks="T")
  _, at_once, _ = run(network, AdamW(learning_rate=1e-3, eps=1e-3), [whole])
  _, in_parts, before = run(network, AdamW(learning_rate=1e-3, eps=1e-3, accumulate=2), halves, updates=[False, True])
  assert largest_difference(at_once.params, before) > 1e-4
  assert largest_difference(at_once.params, in_parts.params) < 1e-6
  assert float(in_parts.examples) == 0


def test_frozen_parameters_keep_value_gradient_and_moments_out():
  optimizer = AdamW(learning_rate=1e-2, frozen=("audio_encoder/feature_extractor/.*",))
  _, state, before = run(tiny.mmml(), optimizer, [tiny.batch()] * 2)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), jax.device_get(state.params), before)
  assert not any(jax.tree.leaves(moved["audio_encoder"]["feature_extractor"]))
  assert all(jax.tree.leaves(moved["audio_encoder"]["projection"]))
  assert state.opt_state[0][0].mu["audio_encoder"]["feature_extractor"]["kernel"] is None


def test_padding_rows_change_nothing():
  batch = tiny.batch(rows=6)
  padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:2])]), batch)
  padded["index"][6:] = 1000
  network = tiny.mmml(dropout=0.0, text_encoder=tiny.bert(hidden_dropout=0.0, attention_dropout=0.0), tasks="T")
  optimizer = AdamW(learning_rate=1e-3, eps=1e-3)
  plain, state, _ = run(network, optimizer, [batch])
  with_rows, padded_state, _ = run(network, optimizer, [padded])
  np.testing.assert_allclose(with_rows, plain, rtol=1e-6)
  assert largest_difference(state.params, padded_state.params) < 1e-6


def test_schedule_warms_up_and_decays():
  schedule = AdamW(learning_rate=1.0, warmup_steps=2, decay="linear").schedule(6)
  np.testing.assert_allclose([float(schedule(i)) for i in range(7)], [0, 0.5, 1, 0.75, 0.5, 0.25, 0], atol=1e-6)


def test_adamw_is_torchs():
  """Two steps by hand: p -= lr * (m_hat / (sqrt(v_hat) + eps) + wd * p), decay on every parameter (MM20)."""
  params = {"w": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
  gradients = [
    {"w": jnp.array([0.3, -0.1]), "bias": jnp.array([1.0])},
    {"w": jnp.array([-0.2, 0.4]), "bias": jnp.array([0.5])},
  ]
  transformation = AdamW(learning_rate=0.1).build(params, total_steps=2)
  opt_state = transformation.init(params)
  got = params
  for gradient in gradients:
    updates, opt_state = transformation.update(gradient, opt_state, got)
    got = jax.tree.map(jnp.add, got, updates)
  for name in params:
    p, m, v = np.asarray(params[name], np.float64), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
      g = np.asarray(gradient[name], np.float64)
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      p = p - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.01 * p)
    np.testing.assert_allclose(got[name], p, atol=5e-6)  # float32 against float64
