"""Synergy against the authors' PyTorch code, and the rules of its options."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmjax.backbones import bert, resnet, speech
from mmjax.errors import UserError
from mmjax.layers import Encoded
from mmjax.papers import synergy, synergy_names
from mmjax.papers.synergy import Student, Synergy, SynergyLoss, Teacher

EPOCH = jnp.int32(1)


def variables_of(case: str, network: Synergy, batch) -> dict:
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False))
  return synergy_names.from_torch(network, golden.state_dict(case), shapes)


def run(network, variables, batch, **options):
  return jax.jit(lambda v, b: network.apply(v, b, train=False, **options))(variables, batch)


def close(found, expected, name="") -> None:
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("modality", ["vision", "audio"])
def test_avmnist_golden(modality):
  case = f"synergy_avmnist_{modality}"
  arrays = golden.arrays(case)
  image = arrays["in_pixels"].transpose(0, 2, 3, 1).astype(np.float32) / 255
  batch = {modality: {"image": image}}
  width = golden.config(case)["config"]["encoder_dim"]
  network = Synergy(**{f"{modality}_encoder": resnet.ResNet()}, feature_width=width)
  assert (network.kind, network.streams) == ("image", {modality})
  variables = variables_of(case, network, batch)
  outputs, sown = run(network, variables, batch, mutable="intermediates")
  close(outputs["class"], arrays["out_logits"])
  close(outputs["feature"], arrays["out_feature"])
  states = sown["intermediates"][f"{modality}_encoder"]["hidden_states"]
  for name, state in zip(("stem", "layer1", "layer2", "layer3", "layer4"), states, strict=True):
    close(np.mean(state, axis=(1, 2)), arrays[f"mid_{name}_mean"], name)


def test_iemocap_text_golden():
  case = "synergy_iemocap_text"
  arrays, config = golden.arrays(case), golden.config(case)["config"]
  encoder = bert.from_config({**config["bert"], "model_type": "bert"}, pooler=False)
  network = Synergy(text_encoder=encoder, feature_width=config["hidden_size"], classes=6)
  batch = {"text": {"ids": arrays["in_input_ids"], "mask": arrays["in_attention_mask"] > 0}}
  variables = variables_of(case, network, batch)
  outputs = run(network, variables, batch)
  close(outputs["class"], arrays["out_logits"])
  close(outputs["feature"], arrays["out_feature"])

  frozen = {"params": {"encoder": variables["params"]["text_encoder"]}}
  whole = Teacher(encoder, pool="repo").apply(frozen, batch["text"])
  close(whole, arrays["out_teacher_mean_over_all_tokens"])
  mask = batch["text"]["mask"][..., None]
  expected = (arrays["mid_encoder_last_hidden_state"] * mask).sum(axis=1) / mask.sum(axis=1)
  close(Teacher(encoder).apply(frozen, batch["text"]), expected)
  assert np.abs(whole - expected).max() > 1e-3


def test_iemocap_audio_golden():
  case = "synergy_iemocap_audio"
  arrays, config = golden.arrays(case), golden.config(case)["config"]
  encoder = speech.from_config({**config["wav2vec2"], "model_type": "wav2vec2"}, padding="hf")
  network = Synergy(audio_encoder=encoder, feature_width=config["text_hidden_size"], classes=6)
  wave = arrays["in_audio"]
  mask = np.arange(wave.shape[1]) < arrays["out_attention_mask_lengths"][:, None]
  batch = {"audio": {"wave": wave, "mask": mask}}
  variables = variables_of(case, network, batch)
  outputs, sown = run(network, variables, batch, mutable="intermediates")
  # The first clip is not padded: frames and their mean are the authors'.
  close(outputs["class"][0], arrays["out_logits"][0])
  close(outputs["feature"][0], arrays["out_feature"][0])

  # Their pooling reaches into padded frames (P23), of which the encoder gives none: taken from inside it.
  hidden = sown["intermediates"]["audio_encoder"]["hidden_states"][-1]
  close(hidden, arrays["mid_encoder_last_hidden_state"])
  frames = synergy.rounded_frames(jnp.asarray(mask), hidden.shape[1])
  np.testing.assert_array_equal(frames.sum(axis=1), arrays["out_pooled_frames"])
  student = Student("speech", config["text_hidden_size"], 6)
  (feature, scores), sown = student.apply(
    {"params": variables["params"]["student"]}, Encoded(hidden, frames), mutable="intermediates"
  )
  close(sown["intermediates"]["pooled"][0], arrays["mid_pooled"][:, 0])
  close(feature, arrays["out_feature"])
  close(scores, arrays["out_logits"])
  close(np.mean(hidden, axis=1), arrays["out_teacher_mean_over_all_frames"])


def test_loss_is_the_authors():
  stored = golden.config("synergy_loss")
  batch = {"labels": {"class": np.int32(stored["label"])}, "teacher": {"features": np.float32(stored["a"])}}
  objective = SynergyLoss(lam=stored["lam"])

  def loss(logits, feature):
    terms, _ = objective({"class": logits, "feature": feature}, batch, {}, epoch=EPOCH, train=True)
    return sum(jnp.mean(term) for term in terms.values()), terms

  logits, feature = np.float32(stored["logits"]), np.float32(stored["b"])
  (value, terms), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(logits, feature)
  np.testing.assert_allclose(value, stored["loss"], rtol=1e-6)
  np.testing.assert_allclose(np.mean(terms["class"]), (1 - stored["lam"]) * stored["cls_loss"], rtol=1e-6)
  np.testing.assert_allclose(np.mean(terms["teacher"]), stored["lam"] * stored["latent_loss"], rtol=1e-6)
  np.testing.assert_allclose(gradients[0], stored["gradient_logits"], atol=1e-6)
  np.testing.assert_allclose(gradients[1], stored["gradient_b"], atol=1e-6)

  outputs = {"class": logits, "feature": feature}
  terms, _ = objective(outputs, {"labels": batch["labels"]}, {}, epoch=EPOCH, train=False)
  assert terms.keys() == {"class"}
  np.testing.assert_allclose(np.mean(terms["class"]), stored["cls_loss"], rtol=1e-6)
  assert np.mean(objective.predictions(outputs)["class"].argmax(axis=1) == stored["label"]) == stored["count_acc"]


def test_baseline_needs_no_teacher():
  outputs = {"class": np.zeros((2, 3), np.float32), "feature": np.ones((2, 4), np.float32)}
  batch = {"labels": {"class": np.int32([0, 1])}}
  baseline = SynergyLoss(lam=0.0)
  terms, _ = baseline(outputs, batch, {}, epoch=EPOCH, train=True)
  np.testing.assert_allclose(terms["class"], np.log(3), rtol=1e-6)
  assert (baseline.streams, SynergyLoss().streams) == (frozenset(), {"teacher"})


@pytest.mark.parametrize("kind", ["image", "speech", "text"])
def test_loss_falls_and_everything_moves(kind):
  whole = tiny.batch(6, tokens=6, samples=1600)
  image = np.random.default_rng(0).random((6, 16, 16, 1)).astype(np.float32)
  modality, stream, encoder = {
    "image": ("vision", {"image": image}, resnet.ResNet((1, 1, 1, 1), (4, 4, 4, 8), 4)),
    "speech": ("audio", whole["audio"], tiny.TinySpeech()),
    "text": ("text", whole["text"], tiny.bert(60, pooler=False, num_layers=1, hidden_dropout=0.0)),
  }[kind]
  network = Synergy(**{f"{modality}_encoder": encoder}, feature_width=5, classes=3, ln=True)
  assert network.kind == kind
  batch = {
    modality: stream,
    "teacher": {"features": np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)},
    "labels": {"class": np.int32([0, 1, 2, 0, 1, 2])},
    "valid": np.arange(6) < 5,
  }
  start = jax.jit(lambda: network.init(jax.random.key(0), batch, train=False))()

  @jax.jit
  def step(params, state):
    def loss(params):
      outputs, moved = network.apply(
        {"params": params, **state}, batch, train=True, rngs={"dropout": jax.random.key(1)}, mutable=list(state)
      )
      terms, _ = SynergyLoss()(outputs, batch, {}, epoch=EPOCH, train=True)
      return sum(jnp.mean(term, where=batch["valid"]) for term in terms.values()), moved

    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), state

  params, losses = start["params"], []
  state = {name: tree for name, tree in start.items() if name != "params"}
  for _ in range(25):
    value, params, state = step(params, state)
    losses.append(float(value))
  assert losses[-1] < 0.9 * losses[0]
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), {"params": params, **state}, start)
  still = [jax.tree_util.keystr(path) for path, value in jax.tree_util.tree_leaves_with_path(moved) if not value]
  assert all("key" in path and "bias" in path for path in still)


def test_clips_are_normalised_over_their_own_frames():
  hidden = np.random.default_rng(0).normal(3, 2, (2, 4, 5)).astype(np.float32)
  mask = np.arange(4) < np.array([[4], [2]])
  found = synergy.normalize_clips(Encoded(jnp.asarray(hidden), jnp.asarray(mask)))
  close(found[1, :2], (hidden[1, :2] - hidden[1, :2].mean()) / np.sqrt(hidden[1, :2].var() + 1e-5))
  assert not found[1, 2:].any()


def test_mistakes_are_named():
  with pytest.raises(UserError, match="found none bound, expected exactly one"):
    Synergy()
  with pytest.raises(UserError, match="found text_encoder, audio_encoder bound"):
    Synergy(text_encoder=tiny.bert(), audio_encoder=tiny.TinySpeech())
  with pytest.raises(UserError, match=r"Synergy\.pool"):
    Synergy(audio_encoder=tiny.TinySpeech(), pool="mean")
  with pytest.raises(UserError, match=r"Teacher\.pool"):
    Teacher(tiny.TinySpeech(), pool="mean")
  with pytest.raises(UserError, match="from 0 to 1"):
    SynergyLoss(lam=1.5)
  with pytest.warns(UserWarning, match="nothing is learned"):
    SynergyLoss(lam=1.0)
  outputs = {"class": np.zeros((2, 3), np.float32), "feature": np.ones((2, 4), np.float32)}
  batch = {"labels": {"class": np.int32([0, 1])}, "teacher": {"features": np.ones((2, 8), np.float32)}}
  with pytest.raises(UserError, match=r"Set Synergy\.feature_width = 8"):
    SynergyLoss()(outputs, batch, {}, epoch=EPOCH, train=True)
