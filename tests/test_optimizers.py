"""Adam with groups against torch's equations, the two ways to accumulate, and the plateau."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_self_mm_runs
from tiny_self_mm import network_of

from mmjax.errors import UserError
from mmjax.papers.mmml import MultiLoss
from mmjax.papers.self_mm import LabelGeneration
from mmjax.training import fit, step
from mmjax.training import mesh as meshes
from mmjax.training.experiment import Experiment
from mmjax.training.optimizers import Adam, AdamW, Group, Plateau, with_plateau_scale
from mmjax.training.signals import Interrupted


def test_adam_is_torchs_with_a_rate_and_a_decay_for_each_group():
  """By hand: g += wd * p; p -= lr * m_hat / (sqrt(v_hat) + eps). A gradient of 0 still decays, at the full rate."""
  params = {"net": {"w": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}, "fixed": jnp.array([3.0])}
  gradients = [
    {"net": {"w": jnp.array([0.3, 0.0]), "bias": jnp.array([1.0])}, "fixed": None},
    {"net": {"w": jnp.array([-0.2, 0.0]), "bias": jnp.array([0.5])}, "fixed": None},
  ]
  groups = (Group(".*/bias", 0.1), Group("net/.*", 0.01, 0.5))
  transformation = Adam(groups=groups, frozen=("fixed",)).build(params, total_steps=2)
  got = {**params, "fixed": None}
  opt_state = transformation.init(got)
  for gradient in gradients:
    updates, opt_state = transformation.update(gradient, opt_state, got)
    got = jax.tree.map(jnp.add, got, updates)
  for name, rate, decay in (("bias", 0.1, 0.0), ("w", 0.01, 0.5)):
    p, m, v = np.asarray(params["net"][name], np.float64), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
      g = np.asarray(gradient["net"][name], np.float64) + decay * p
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      p = p - rate * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(got["net"][name], p, atol=5e-6)
  assert got["fixed"] is None


def test_a_schedule_scales_every_group():
  params = {"a": jnp.ones(1), "b": jnp.ones(1)}
  optimizer = Adam(groups=(Group("a", 0.1), Group("b", 0.01)), warmup_steps=2, decay="linear")
  transformation = optimizer.build(params, total_steps=4)
  opt_state = transformation.init(params)
  steps = []
  for _ in range(4):
    updates, opt_state = transformation.update(params, opt_state, params)
    steps.append([float(updates[name][0]) for name in params])
  np.testing.assert_allclose(steps, [[0, 0], [-0.05, -0.005], [-0.1, -0.01], [-0.05, -0.005]], atol=1e-6)


def test_a_parameter_of_no_group_is_named():
  params = {"text_encoder": {"w": jnp.ones(1)}, "head": {"w": jnp.ones(1), "bias": jnp.ones(1)}}
  with pytest.raises(UserError, match=r"no pattern matches:\n  head/w\nexpected one of 'text_encoder/\.\*', '\.\*/b"):
    Adam(groups=(Group("text_encoder/.*", 1.0), Group(".*/bias", 1.0))).build(params, total_steps=1)


def test_steps_of_an_epoch():
  """SM1: 10 micro-batches by 4 give 3 steps, or with the leftovers dropped 2."""

  def steps(optimizer: AdamW) -> list[int]:
    return [n for n in range(1, 11) if optimizer.is_update(n, 10)]

  keeps = AdamW(learning_rate=1.0, accumulate=4)
  drops = AdamW(learning_rate=1.0, accumulate=4, drop_leftovers=True)
  assert steps(keeps) == [4, 8, 10]
  assert steps(drops) == [4, 8]
  assert (keeps.updates(10), drops.updates(10), keeps.updates(8), drops.updates(8)) == (3, 2, 2, 2)
  with pytest.raises(UserError, match="3 batches in an epoch, fewer than accumulate=4"):
    drops.updates(3)


@pytest.mark.parametrize(
  ("options", "message"), [({"accumulation": "max"}, "'mean' or 'sum'"), ({"accumulate": 0}, "at least 1")]
)
def test_wrong_options_are_named(options, message):
  with pytest.raises(UserError, match=rf"Adam\.accum.*{message}"):
    Adam(groups=(), **options)


class Scale(nn.Module):
  """Its L2 loss against 0 has the gradient 2 w x^2 for a row x."""

  @nn.compact
  def __call__(self, batch: dict, *, train: bool) -> dict:
    return {"M": self.param("w", nn.initializers.ones, ()) * batch["x"]}


@pytest.mark.parametrize(("accumulation", "gradient"), [("mean", (2 + 8 + 18) / 3), ("sum", (2 + 8) / 2 + 18 / 1)])
def test_micro_batches_are_averaged_or_summed(accumulation, gradient):
  """SM2: rows 1 and 2, then row 3; the second batch's other row is padding."""
  batches = [
    {"x": np.float32([1, 2]), "labels": {"M": np.zeros(2, np.float32)}, "valid": np.array([True, True])},
    {"x": np.float32([3, 9]), "labels": {"M": np.zeros(2, np.float32)}, "valid": np.array([True, False])},
  ]
  network, objective, sgd, frozen = Scale(), MultiLoss(loss="l2"), optax.sgd(1.0), {"w": False}
  options = {"frozen": frozen, "accumulate": 2, "labels": {}, "batch": batches[0], "key": jax.random.key(0)}
  state, _ = step.create_state(network, objective, sgd, mesh=meshes.make(devices=jax.devices()[:1]), **options)
  train_step = jax.jit(step.make_train_step(network, objective, sgd, frozen=frozen, accumulation=accumulation))
  for batch, update in zip(batches, (False, True), strict=True):
    state, _ = train_step(state, batch, np.bool_(update), jax.random.key(0))
  np.testing.assert_allclose(state.params["w"], 1 - gradient, rtol=1e-6)
  assert float(state.examples) == float(state.gradient["w"]) == 0


def torchs_rates(losses: list[float], rates: list[float], plateau: Plateau) -> list[list[float]]:
  """The rates after each loss, by the algorithm that PyTorch documents: mode "min", threshold_mode "rel", eps 1e-8."""
  best, bad, cooling, history = math.inf, 0, 0, []
  rates = list(rates)
  for loss in losses:
    better = loss < best * (1.0 - plateau.threshold)
    best, bad = (loss, 0) if better else (best, bad + 1)
    if cooling:
      cooling, bad = cooling - 1, 0
    if bad > plateau.patience:
      lower = [max(rate * plateau.factor, plateau.min_rate) for rate in rates]
      rates = [new if old - new > 1e-8 else old for old, new in zip(rates, lower, strict=True)]
      cooling, bad = plateau.cooldown, 0
    history.append(list(rates))
  return history


def test_the_plateau_is_torchs_group_by_group():
  plateau, groups = Plateau(), (Group("a", 5e-4), Group("b", 4e-5), Group("c", 1e-5))
  losses = [1.0, 0.9, 0.9, 0.89995, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, *[0.9] * 30, 0.5, *[0.6] * 12]
  params = {name: jnp.ones(1) for name in "abc"}
  transformation = plateau.transformation(Adam(groups=groups, plateau=plateau).rates(params))
  update, state, counters, found = jax.jit(transformation.update), transformation.init(params), {}, []
  for loss in losses:
    counters = json.loads(json.dumps(plateau.after(counters, loss)))  # as a checkpoint keeps them
    state = with_plateau_scale(state, np.float32(plateau.scale(counters)))
    factors, _ = update(params, state)
    found.append([group.learning_rate * float(factors[group.pattern][0]) for group in groups])
  expected = torchs_rates(losses, [group.learning_rate for group in groups], plateau)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  # By hand: .89995 is within the threshold of .9, so the third epoch after it reduces; two cool down, three are borne.
  first = [row[0] for row in expected]
  assert first[3:6] == [5e-4, 2.5e-4, 2.5e-4]
  assert first.index(1.25e-4) == 9
  assert [len({row[i] for row in expected}) for i in range(3)] == [6, 2, 1]
  assert update._cache_size() == 1


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_plateau_scales_the_whole_update(kind):
  """Weight decay follows the rate, frozen parameters stay, another factor is no other program."""
  common = {"plateau": Plateau(min_rate=1e-3), "frozen": ("fixed",), "warmup_steps": 0}
  optimizer = {
    "adam": Adam(groups=(Group(".*", 1e-1, 0.5),), **common),
    "adamw": AdamW(learning_rate=1e-1, weight_decay=0.5, **common),
  }[kind]
  params = {"w": jnp.array([2.0, -1.0]), "fixed": None}
  shapes = {"w": params["w"], "fixed": jnp.ones(1)}
  transformation = optimizer.build(shapes, total_steps=3)
  plain = dataclasses.replace(optimizer, plateau=None).build(shapes, total_steps=3)
  gradient = {"w": jnp.array([0.3, 0.7]), "fixed": None}
  whole, _ = plain.update(gradient, plain.init(params), params)
  update = jax.jit(transformation.update)
  for scale, factor in ((1.0, 1.0), (0.25, 0.25), (1e-6, 1e-2)):
    state = with_plateau_scale(transformation.init(params), jnp.float32(scale))
    updates, _ = update(gradient, state, params)
    np.testing.assert_allclose(updates["w"], factor * whole["w"], rtol=1e-5)
    assert updates["fixed"] is None
  assert update._cache_size() == 1


def test_wrong_plateaus_are_named():
  with pytest.raises(UserError, match=r"Plateau.factor: found 2"):
    Plateau(factor=2)
  with pytest.raises(UserError, match=r"Plateau.patience: found -1"):
    Plateau(patience=-1)


def test_the_loop_lowers_the_rate_and_resumes_with_it(tmp_path, monkeypatch):
  """With a threshold that no loss meets, each epoch after the second begins at half the rate of the last."""
  mesh = meshes.make(devices=jax.devices()[:1])
  monkeypatch.setattr(meshes, "make", lambda fsdp: mesh)
  halving = Plateau(patience=0, cooldown=0, min_rate=0.0, threshold=0.999)

  def train(name: str, plateau: Plateau | None, stop_at: int | None = None) -> list:
    optimizer = Adam(groups=(Group(".*", 1e-2),), plateau=plateau)
    data = test_self_mm_runs.InMemory(stop_at)
    experiment = Experiment(
      network=network_of(), objective=LabelGeneration(), data=data, optimizer=optimizer, epochs=3, log_every=1
    )
    fit.fit(experiment, workdir=tmp_path / name, data_dir=tmp_path, cache_dir=tmp_path, records={})
    return test_self_mm_runs.losses_of(tmp_path / name)

  straight = train("straight", halving)
  with pytest.raises(Interrupted):
    train("stopped", halving, stop_at=13)
  rest = test_self_mm_runs.latest(tmp_path / "stopped")
  scales = [
    float(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(rest["opt_state"])
    if "plateau_scale" in jax.tree_util.keystr(path)
  ]
  assert scales == [0.5]
  assert train("stopped", halving) == straight
  never = train("never", None)
  # The third epoch's first loss is from before its first step; only the next one tells the rates apart.
  assert straight[:11] == never[:11]
  assert straight[11] != never[11]
