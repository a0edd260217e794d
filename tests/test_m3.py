"""M3 against the authors' PyTorch code, padding, missing modalities, and what training moves."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mmjax.errors import UserError
from mmjax.masking import ModalityMask
from mmjax.papers import m3, m3_names
from mmjax.papers.m3 import M3, ScoreLoss
from mmjax.training import mesh as meshes
from mmjax.training import step

WIDTHS = {"text": 6, "audio": 4, "vision": 3}
EQUAL = dict.fromkeys(m3.MODALITIES, 1.0)


def batch_of(lengths=(7, 1, 4, 7), steps: int = 7, seed: int = 0) -> dict:
  rng, rows = np.random.default_rng(seed), len(lengths)
  mask = np.arange(steps) < np.array(lengths)[:, None]
  batch: dict = {}
  for name, width in WIDTHS.items():
    features = rng.standard_normal((rows, steps, width)).astype(np.float32)
    batch[name] = {"features": np.where(mask[..., None], features, 0), "mask": mask}
  batch["labels"] = {"M": rng.uniform(-3, 3, rows).astype(np.float32)}
  batch["index"], batch["valid"] = np.arange(rows, dtype=np.int32), np.ones(rows, bool)
  return batch


def golden_batch(case: str) -> dict:
  arrays = golden.arrays(case)
  mask = np.arange(arrays["in_text"].shape[1]) < arrays["in_lengths"][:, None]
  return {
    name: {"features": arrays["in_visual" if name == "vision" else f"in_{name}"], "mask": mask}
    for name in m3.MODALITIES
  }


@pytest.mark.parametrize(
  ("case", "options"),
  [
    ("m3_classifier_full", {"pad_mask": False}),
    ("m3_classifier_full", {"pad_mask": True}),  # where nothing is padding there is nothing to mask
    ("m3_classifier_ragged", {"pad_mask": False}),
  ],
)
def test_golden(case, options):
  arrays, batch = golden.arrays(case), golden_batch(case)
  network = M3(hidden=golden.config(case)["config"]["hidden_size"], **options)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False))
  variables = m3_names.from_torch(network, golden.state_dict(case), shapes)
  run = jax.jit(lambda v, b: network.apply(v, b, train=False, mutable=["intermediates"]))
  outputs, variables = run(variables, batch)
  seen = variables["intermediates"]
  found = {"out_logits": outputs["M"][:, None]}
  for name in m3.MODALITIES:
    theirs = "visual" if name == "vision" else name
    found[f"mid_{theirs}_lstm"] = seen[name]["states"][0]
    found[f"mid_{theirs}_encoded"] = seen[f"{name}_encoded"][0]
  for first, second in m3.PAIRS:
    pair = f"mid_{first[0]}{second[0]}"
    found[f"{pair}_first"], found[f"{pair}_second"] = seen["fusion"][f"{first}_{second}"][0]
  found["mid_fused"] = seen["fused"][0]
  found["mid_tav"] = found["mid_fused"][..., -network.hidden :]
  found["mid_fused_lstm"] = seen["reader"]["states"][0]
  found["mid_fused_attended"] = seen["steps"][0]
  found["mid_rnn"] = found["mid_fused_attended"].sum(axis=1)
  assert found.keys() == {name for name in arrays if not name.startswith("in_")}
  for name, value in found.items():
    np.testing.assert_allclose(value, arrays[name], rtol=0, atol=1e-4, err_msg=name)


def test_the_authors_lengths_are_those_of_the_box():
  """M8: with "padded" a ragged batch gives what the authors' collator makes of it."""
  case, batch = "m3_classifier_full", golden_batch("m3_classifier_ragged")
  network = M3(hidden=16, lengths="padded", pad_mask=False)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False))
  variables = m3_names.from_torch(network, golden.state_dict(case), shapes)
  for stream in batch.values():
    stream["features"] = np.where(stream["mask"][..., None], stream["features"], 9)  # what padding holds is not read
  outputs = jax.jit(lambda v, b: network.apply(v, b, train=False))(variables, batch)
  np.testing.assert_allclose(outputs["M"][:, None], golden.arrays(case)["out_logits"], atol=1e-4)


@pytest.fixture(scope="module")
def evaluated():
  """A small network's parameters and its compiled evaluation."""
  network = M3(hidden=4)
  run = jax.jit(lambda p, b: network.apply({"params": p}, b, train=False)["M"])
  return tiny.init(network, batch_of()), run


def test_padding_is_invisible(evaluated):
  params, run = evaluated
  batch = batch_of()
  found = run(params, batch)
  for row, length in enumerate((7, 1, 4, 7)):
    alone = {name: {key: x[row : row + 1, :length] for key, x in batch[name].items()} for name in m3.MODALITIES}
    np.testing.assert_allclose(run(params, alone)[0], found[row], atol=1e-5)
  longer = batch_of(steps=7)
  for name in m3.MODALITIES:  # a longer box, and padding that is not zero
    x, mask = (np.pad(longer[name][key], ((0, 0), (0, 4), (0, 0))[: longer[name][key].ndim]) for key in longer[name])
    longer[name] = {"features": np.where(mask[..., None], x, 9), "mask": mask}
  np.testing.assert_allclose(run(params, longer), found, atol=1e-5)


def without(batch: dict, *names: str) -> dict:
  """`batch` with modalities missing: no step of theirs is real."""
  gone = {name: jax.tree.map(np.zeros_like, batch[name]) for name in names}
  return {**batch, **gone}


def test_missing_modalities_and_empty_sequences_are_finite(evaluated):
  params, run = evaluated
  batch = batch_of((7, 0, 1, 4))
  found = {gone: run(params, without(batch, *gone)) for gone in ((), ("text",), ("audio", "vision"), m3.MODALITIES)}
  assert all(np.isfinite(score).all() for score in found.values())
  np.testing.assert_allclose(found[m3.MODALITIES], params["score"]["bias"][0], atol=1e-6)
  np.testing.assert_allclose(found[()][1], params["score"]["bias"][0], atol=1e-6)  # the empty one
  assert np.all(np.abs(found["text",] - found[()])[[0, 2, 3]] > 1e-6)
  # Its features at zero say the same as no step being real where every step is of one kind.
  np.testing.assert_array_equal(run(params, without(batch, "text"))[1], found[()][1])


def test_everything_masked_is_finite_in_training():
  network = M3(hidden=4, mask_before=ModalityMask(p=1.0), mask_after=ModalityMask(kind="soft", p=1.0))
  batch = batch_of((7, 0, 1, 4))
  params = tiny.init(network, batch)

  @jax.jit
  def gradient_of(batch):
    def loss(params):
      outputs = network.apply({"params": params}, batch, train=True, rngs={"dropout": jax.random.key(1)})
      return jnp.sum(jnp.abs(outputs["M"]))

    return jax.value_and_grad(loss)(params)

  for made in (batch, without(batch, *m3.MODALITIES)):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient_of(made)))


def test_masking_stands_before_and_after_the_fusion():
  """p = 1 on one modality: before the fusion all that comes of it is gone, after it only its own stream."""
  batch, hidden = batch_of((3,), steps=3), 4
  text = {name: float(name == "text") for name in m3.MODALITIES}
  before = M3(hidden=hidden, dropout=0.0, mask_before=ModalityMask(p=1.0, p_mod=text))
  after = M3(
    hidden=hidden, dropout=0.0, mask_after=ModalityMask(p=1.0, p_mod={**dict.fromkeys(m3.FUSED, 0.0), "text": 1.0})
  )
  params = tiny.init(before, batch)
  zero = {}
  for name, network in (("before", before), ("after", after)):
    options = {"train": True, "rngs": {"dropout": jax.random.key(0)}, "mutable": ["intermediates"]}
    _, seen = jax.jit(functools.partial(network.apply, **options))({"params": params}, batch)
    fused = np.asarray(seen["intermediates"]["fused"][0]).reshape(3, 7, hidden)
    zero[name] = [stream for i, stream in enumerate(m3.FUSED) if (fused[:, i] == 0).all()]
  assert zero == {"before": ["text", "all"], "after": ["text"]}


def test_loss_falls_and_every_leaf_moves():
  masks = {"mask_before": ModalityMask(p_mod=EQUAL), "mask_after": ModalityMask(kind="dropout", p=0.1)}
  network = M3(hidden=4, dropout=0.1, **masks)
  batch, objective, optimizer = batch_of((7, 1, 4, 5)), ScoreLoss(), optax.adam(2e-2)
  shapes = step.abstract(network, batch)["params"]
  frozen = jax.tree.map(lambda _: False, shapes)
  options = {"frozen": frozen, "accumulate": 1, "labels": batch["labels"], "batch": batch, "key": jax.random.key(1)}
  state, _ = step.create_state(network, objective, optimizer, **options, mesh=meshes.make(devices=jax.devices()[:1]))
  before = jax.device_get(state.params)
  train_step = jax.jit(step.make_train_step(network, objective, optimizer, frozen=frozen))
  losses = []
  for _ in range(40):
    state, logs = train_step(state, batch, np.bool_(True), jax.random.key(2))
    losses.append(float(logs["M"]))
  assert np.mean(losses[-5:]) < 0.5 * losses[0]
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
  assert all(jax.tree.leaves(moved)), moved


def test_initial_values_are_the_authors():
  """xavier-uniform attention; the rest as torch has it."""
  network, batch = M3(), batch_of()
  batch["text"]["features"] = np.zeros((4, 7, 300), np.float32)
  params = tiny.init(network, batch)
  kernel = params["fusion"]["text_from_audio"]["key"]["kernel"]
  assert kernel.shape == (100, 100)
  assert np.abs(kernel).max() == pytest.approx((6 / 200) ** 0.5, rel=0.01)
  assert np.abs(params["text"]["rnn"]["forward"]["input_kernel"]).max() == pytest.approx(0.1, rel=0.01)
  assert np.abs(params["score"]["kernel"]).max() == pytest.approx(200**-0.5, rel=0.05)


def test_mistakes_are_named():
  with pytest.raises(UserError, match=r"M3.lengths: found 'full'"):
    M3(lengths="full")
  batch = batch_of()
  batch["audio"] = {name: x[:, :5] for name, x in batch["audio"].items()}
  with pytest.raises(UserError, match="text 7, audio 5, vision 7 steps"):
    tiny.shapes(M3(), batch)
  with pytest.raises(UserError, match="features of text: found a batch with ids, mask"):
    tiny.shapes(M3(), {**batch_of(), "text": tiny.batch(4)["text"]})
