"""The masking layer: how often, and how dependently, it hides what; and what it leaves alone."""

import itertools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.masking import ModalityMask

NAMES = ("text", "audio", "vision")
P, SHARES = 0.5, (0.6, 0.2, 0.2)
DRAWS, ROWS, STEPS, WIDTH = 20_000, 4, 5, 2
WEIGHTS = dict(zip(NAMES, (3.0, 1.0, 1.0), strict=True))  # weights, not probabilities: they are divided by their sum


def apply(layer, streams, *, seed: int = 0, train: bool = True):
  return layer.apply({}, streams, train=train, rngs={"dropout": jax.random.key(seed)})


def hidden(layer, steps: int = STEPS) -> np.ndarray:
  """Whether each of a batch of ones became 0: [draw, row, step, feature, modality]."""
  ones = {name: jnp.ones((ROWS, steps, WIDTH)) for name in NAMES}

  def one(key):
    masked = layer.apply({}, ones, train=True, rngs={"dropout": key})
    return jnp.stack([masked[name] == 0 for name in NAMES], axis=-1)

  return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7), DRAWS)))


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean over draws, which are independent, and its standard error; `values` [draw, ...]."""
  return values.mean(axis=0), values.std(axis=0) / np.sqrt(len(values))


def correlation(x: np.ndarray, p, axis: int) -> tuple[np.ndarray, np.ndarray]:
  """Correlation of pairs along `axis` of [draw, row, step, feature, ...], whose mean is known to be `p`."""
  z = np.moveaxis((x.astype(np.float32) - p) / np.sqrt(p * (1 - p)), axis, 1)
  pairs = [z[:, i] * z[:, j] for i, j in itertools.combinations(range(z.shape[1]), 2)]
  return mean_and_error(np.mean(pairs, axis=(0, 2, 3)))


def close(found, expected, name: str, more_error=0.0) -> None:
  value, error = found
  distance = np.abs(value - np.asarray(expected))
  allowed = 3 * np.sqrt(np.square(error) + np.square(more_error)) + 1e-6
  assert (distance <= allowed).all(), f"{name}: {value} for {expected}, distance {distance} of {allowed}"


def expected_correlation(layer, axis: str):
  """What the layer promises for two places that differ in `axis` alone: (of any, of each modality)."""
  q = np.array(SHARES)
  if layer.kind == "hard":
    same_coin = {"row": layer.coin == "batch", "step": layer.coin != "step", "feature": True}[axis]
    same_pick = {"row": False, "step": not layer.sequential, "feature": True}[axis]
  else:
    same_coin = False
    same_pick = {"row": layer.coin == "batch", "step": not layer.sequential, "feature": True}[axis]
  both = (P if same_coin else P * P) * (q if same_pick else q * q)
  return float(same_coin), (both - (P * q) ** 2) / (P * q * (1 - P * q))


CASES = [
  (kind, coin, sequential)
  for kind in ("hard", "soft")
  for coin in ("step", "sample", "batch")
  for sequential in (True, False)
]


@pytest.mark.parametrize(("kind", "coin", "sequential"), CASES)
def test_probabilities_and_correlations(kind, coin, sequential):
  layer = ModalityMask(kind=kind, p=P, p_mod=WEIGHTS, coin=coin, sequential=sequential)
  x = hidden(layer)
  share = np.array(SHARES)
  close(mean_and_error(x.mean(axis=(1, 2, 3))), P * share, "modality")
  number = x[:, :, :, 0].sum(axis=-1)
  for n, probability in enumerate((1 - P, P, 0, 0)):
    close(mean_and_error((number == n).mean(axis=(1, 2))), probability, f"{n} hidden")
  for axis, name in enumerate(("row", "step", "feature"), 1):
    of_any, of_each = expected_correlation(layer, name)
    close(correlation(x, P * share, axis), of_each, f"correlation between {name}s")
    close(correlation(x.any(axis=-1), P, axis), of_any, f"correlation of any between {name}s")


@pytest.mark.parametrize(
  ("case", "kind", "sequential"),
  [
    ("hard_m3_sequential_true", "hard", True),
    ("hard_m3_sequential_false", "hard", False),
    ("soft_m3_sequential_false", "soft", False),
    ("soft_m3_sequential_true_typo_fixed", "soft", True),
  ],
)
def test_the_authors_layer(case, kind, sequential):
  stored = golden.config("m3_masking_stats")
  estimates = stored["estimates"][case]
  assert (stored["p"], estimates["batch"], estimates["features"]) == (P, ROWS, WIDTH)
  layer = ModalityMask(kind=kind, p=P, p_mod=WEIGHTS, coin="batch", sequential=sequential)
  x = hidden(layer, estimates["steps"])
  theirs = np.array(estimates["p_modality_masked_standard_error"])
  close(mean_and_error(x.mean(axis=(1, 2, 3))), estimates["p_modality_masked"], "modality", theirs)
  none = mean_and_error((~x[:, :, :, 0].any(axis=-1)).mean(axis=(1, 2)))
  close(none, estimates["p_none_masked_at_a_step"], "none", estimates["p_none_masked_standard_error"])
  axes = {"samples": 1, "steps": 2, "features": 3}
  if case.endswith("typo_fixed"):  # their index of a step is applied to the axis of the samples (M3)
    axes |= {"samples": 2, "steps": 1}
  for name, axis in axes.items():
    for values, p, which in ((x, P * np.array(SHARES), "modality"), (x.any(axis=-1), P, "any")):
      found = correlation(values, p, axis)
      close(found, estimates[f"correlation_across_{name}"][which], f"{which} between {name}", found[1])
  for name, expected in stored["expected_from_the_code"].get(case, {}).items():
    if name.startswith("correlation"):
      axis = "row" if name.endswith("samples") else "step"
      np.testing.assert_allclose(expected_correlation(layer, axis)[1], expected["modality"], atol=1e-5)


def ragged(batch: int = 3):
  rng = np.random.default_rng(0)
  shapes = {"text": (batch, 6, 8), "audio": (batch, 11, 4), "vision": (batch, 5)}
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("coin", ["sample", "batch"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_streams_of_any_lengths_and_widths(kind, coin):
  """A fusion of unaligned streams, as of MMML or Self-MM, draws at samples."""
  streams = ragged(64)
  found = apply(ModalityMask(kind=kind, p=0.7, coin=coin, sequential=False), streams)
  assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in streams.items()}
  gone = {name: np.asarray(x == 0).reshape(64, -1) for name, x in found.items()}
  assert (sum(part.any(axis=1) for part in gone.values()) <= 1).all()  # of each sample one at most
  if kind == "hard":
    assert all((part.any(axis=1) == part.all(axis=1)).all() for part in gone.values())


@pytest.mark.parametrize("options", [{"coin": "step", "sequential": False}, {"coin": "sample"}, {"kind": "soft"}])
def test_draws_at_steps_need_equal_lengths(options):
  with pytest.raises(UserError, match=r"audio 11, text 6, vision 1 steps.*\n?.*ModalityMask.sequential = False"):
    apply(ModalityMask(**options), ragged())


def test_evaluation_changes_nothing():
  streams = ragged()
  for options in ({}, {"kind": "soft"}, {"kind": "dropout"}, {"kind": "none"}, {"rescale": "train"}):
    found = ModalityMask(**options).apply({}, streams, train=False)
    jax.tree.map(np.testing.assert_array_equal, found, streams)


def test_what_is_off_draws_nothing():
  streams = ragged()
  for options in ({"kind": "none"}, {"p": 0.0}, {"kind": "dropout", "noop_multidropout": True}):
    jax.tree.map(np.testing.assert_array_equal, ModalityMask(**options).apply({}, streams, train=True), streams)


def test_plain_dropout_is_not_the_authors_baseline():
  """M5."""
  ones = {name: jnp.ones((50, 40)) for name in NAMES}
  found = apply(ModalityMask(kind="dropout", p=0.25), ones)
  for name in NAMES:
    assert set(np.unique(found[name])) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(found[name] == 0) == pytest.approx(0.25, abs=0.05)
  assert np.any((found["text"] == 0) != (found["audio"] == 0))


def test_rescaling_keeps_the_mean_of_each_modality():
  """M4: each by its own probability of being kept."""
  for kind in ("hard", "soft"):
    layer = ModalityMask(kind=kind, p=P, p_mod=WEIGHTS, rescale="train")
    found = apply(layer, {name: jnp.ones((400, 100, 2)) for name in NAMES})
    for name, share in zip(NAMES, SHARES, strict=True):
      assert np.max(found[name]) == np.float32(1 / (1 - P * share))
      assert np.mean(found[name]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("train", [False, True])
def test_the_authors_rescaling(train):
  """M16: 1 - p/3 whatever p_mod is, and in evaluation."""
  ones = {name: jnp.ones((9, 3)) for name in NAMES}
  found = apply(ModalityMask(p=P, p_mod=WEIGHTS, rescale="repo"), ones, train=train)
  expected = golden.config("m3_masking_stats")["masking_false_rescale"]["value_of_ones_in_eval_mode"][0]
  for x in found.values():
    assert np.max(x) == pytest.approx(expected)
    assert train or np.min(x) == pytest.approx(expected)


@pytest.mark.parametrize("rescale", [None, "train", "repo"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_everything_hidden_is_zero_and_finite(kind, rescale):
  streams = {"text": jnp.full((2, 3, 4), 5.0), "audio": jnp.ones((2, 3, 1))}
  layer = ModalityMask(kind=kind, p=1.0, p_mod={"text": 1.0, "audio": 0.0}, rescale=rescale)
  value, gradient = jax.value_and_grad(lambda s: sum(jnp.sum(x) for x in apply(layer, s).values()))(streams)
  assert np.isfinite(value)
  assert (np.asarray(gradient["text"]) == 0).all()
  assert (np.asarray(gradient["audio"]) == (2.0 if rescale == "repo" else 1.0)).all()
  alone = ModalityMask(kind=kind, p=1.0, rescale=rescale)
  np.testing.assert_array_equal(apply(alone, {"text": streams["text"]})["text"], 0)


def test_draws_are_the_same_with_and_without_jit_and_keep_the_type():
  streams = {name: jnp.ones((3, 4, 2), jnp.bfloat16) for name in NAMES}
  layer = ModalityMask(p=0.9, p_mod=WEIGHTS, rescale="train")
  plain, compiled = apply(layer, streams), jax.jit(lambda s: apply(layer, s))(streams)
  jax.tree.map(np.testing.assert_array_equal, plain, compiled)
  assert all(x.dtype == jnp.bfloat16 for x in plain.values())
  assert hash(layer) == hash(ModalityMask(p=0.9, p_mod=WEIGHTS, rescale="train"))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"kind": "m3"}, "ModalityMask.kind: found 'm3'"),
    ({"coin": "epoch"}, "ModalityMask.coin"),
    ({"rescale": "eval"}, "ModalityMask.rescale"),
    ({"kind": "dropout", "rescale": "train"}, "scales by itself"),
    ({"p": 1.5}, "ModalityMask.p: found 1.5"),
    ({"p_mod": {"text": -1.0}}, "ModalityMask.p_mod"),
    ({"p_mod": {"text": 0.0}}, "ModalityMask.p_mod"),
  ],
)
def test_mistakes_are_named(options, message):
  with pytest.raises(UserError, match=message):
    ModalityMask(**options)


def test_shares_name_the_streams():
  with pytest.raises(UserError, match="found audio, text, expected audio, text, vision"):
    apply(ModalityMask(p_mod={"text": 0.5, "audio": 0.5}), {name: jnp.ones((1, 1, 1)) for name in NAMES})
