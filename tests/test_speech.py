"""Speech encoders against Hugging Face's, and that neither padding nor what is off changes a frame."""

import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mmjax.backbones import published, speech
from mmjax.backbones.convert import convert
from mmjax.errors import UserError

CASES = ["data2vec_audio", "hubert_base", "wav2vec2_base", "wav2vec2_large", "wavlm_base"]
TOLERANCE = 1e-4


def network_of(case: str, **overrides) -> speech.Speech:
  return speech.from_config(golden.config(f"backbone_{case}")["config"]["full"], **overrides)


def batch_of(case: str) -> dict[str, np.ndarray]:
  arrays = golden.arrays(f"backbone_{case}")
  return {"wave": arrays["in_input_values"], "mask": arrays["in_attention_mask"] > 0}


def clips(lengths, size, seed=0):
  mask = np.arange(size) < np.asarray(lengths)[:, None]
  wave = np.random.default_rng(seed).standard_normal(mask.shape).astype(np.float32)
  return {"wave": np.where(mask, wave, 0), "mask": mask}


def params_of(case: str, network: speech.Speech, source=None) -> dict:
  source = source or golden.state_dict(f"backbone_{case}")
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch_of(case), train=False))["params"]
  return convert(source, shapes, speech.TABLE)


def states_of(case: str, network: speech.Speech, audio) -> dict[str, np.ndarray]:
  """Returns what the golden files store, under their names."""
  params = params_of(case, network)
  run = jax.jit(lambda audio: network.apply({"params": params}, audio, train=False, mutable="intermediates"))
  encoded, sown = run(audio)
  made = {f"out_hidden_{i}": x for i, x in enumerate(sown["intermediates"]["hidden_states"])}
  made["mid_conv_features"], made["mid_projected"] = (
    sown["intermediates"][name][0] for name in ("conv_features", "projected")
  )
  made |= {"out_last_hidden_state": encoded.hidden, "out_frame_mask": encoded.mask}
  return {name: np.asarray(x, np.float32) for name, x in made.items()}


def train_output(network, params, audio, seed):
  return network.apply({"params": params}, audio, train=True, rngs={"dropout": jax.random.key(seed)}).hidden


@pytest.mark.parametrize("case", CASES)
def test_hugging_face_parity(case):
  expected = golden.arrays(f"backbone_{case}")
  network, audio = network_of(case, padding="hf"), batch_of(case)
  found = states_of(case, network, audio)
  mask = expected["out_frame_mask"][..., None] > 0
  for name, value in found.items():
    # The encoder gives zeros at padded frames; within, they are as Hugging Face leaves them.
    reference = expected[name] * mask if name == "out_last_hidden_state" else expected[name]
    np.testing.assert_allclose(value, reference, rtol=0, atol=TOLERANCE, err_msg=name)
  unmasked = states_of(case, network, {**audio, "mask": np.ones_like(audio["mask"])})["out_last_hidden_state"]
  np.testing.assert_allclose(unmasked, expected["out_last_hidden_state_no_mask"], rtol=0, atol=TOLERANCE)
  stored = {name for name in expected if not name.startswith("in_")}
  assert stored == {*found, "out_last_hidden_state_no_mask"}


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_stays_close(case):
  expected = golden.arrays(f"backbone_{case}")
  found = states_of(case, network_of(case, padding="hf", compute_dtype="bfloat16"), batch_of(case))
  mask = expected["out_frame_mask"][..., None] > 0
  for name in found.keys() - {"out_frame_mask"}:
    gap = np.abs((found[name] - expected[name]) * mask).max()
    assert gap <= 2e-2 * np.abs(expected[name] * mask).max(), name


def test_frame_counts_follow_the_convolutions():
  network = network_of("hubert_base")
  frames = golden.config("backbone_frame_lengths")["frames"]
  samples = np.array([int(n) for n in frames])
  np.testing.assert_array_equal(network.num_frames(samples), list(frames.values()))
  np.testing.assert_array_equal(jax.jit(network.num_frames)(samples), list(frames.values()))
  assert [network.num_frames(n) for n in (0, 1, 9, 10, 399, 400, 16000)] == [0, 0, 0, 0, 0, 1, 49]
  assert network.hop == 320


@pytest.mark.parametrize("case", CASES)
def test_padding_is_invisible(case):
  network = network_of(case)
  params = params_of(case, network)
  run = jax.jit(lambda audio: network.apply({"params": params}, audio, train=False))
  together = clips([6000, 4100, 400, 2345], 6000)
  # What lies beyond a clip's end must not matter, not even if it is not silence.
  noise = np.where(together["mask"], 0, np.random.default_rng(1).standard_normal(together["mask"].shape))
  noisy = run({**together, "wave": (together["wave"] + noise).astype(np.float32)})
  together_out = run(together)
  np.testing.assert_allclose(noisy.hidden, together_out.hidden, atol=1e-5)
  for i, length in enumerate([6000, 4100, 400, 2345]):
    alone = run({name: x[i : i + 1, :length] for name, x in together.items()})
    count = network.num_frames(length)
    assert alone.hidden.shape[1] == count
    assert np.asarray(together_out.mask[i]).sum() == count
    np.testing.assert_allclose(together_out.hidden[i, :count], alone.hidden[0], atol=1e-5)
    assert not np.asarray(together_out.hidden[i, count:]).any()


def test_hf_padding_is_visible():
  for case in ("hubert_base", "data2vec_audio"):
    network = network_of(case, padding="hf")
    params = params_of(case, network)
    audio = clips([4000, 3000], 4000)
    together = network.apply({"params": params}, audio, train=False).hidden[1, : network.num_frames(3000)]
    alone = network.apply({"params": params}, {k: v[1:, :3000] for k, v in audio.items()}, train=False).hidden[0]
    assert np.abs(together - alone).max() > 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", ["exact", "hf"])
def test_empty_clips_are_finite(case, padding):
  network = network_of(case, padding=padding)
  params = params_of(case, network)

  def loss(params, audio):
    encoded = network.apply({"params": params}, audio, train=False)
    return jnp.sum(jnp.square(encoded.hidden)), encoded

  for audio, counts in ((clips([0, 399, 1200], 1200), [0, 0, 3]), (clips([0, 200], 200), [0, 0])):
    grads, encoded = jax.jit(jax.grad(loss, has_aux=True))(params, audio)
    np.testing.assert_array_equal(encoded.mask.sum(axis=1), counts)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, encoded)))
    assert not np.asarray(encoded.hidden[:2]).any()


@pytest.mark.parametrize("case", ["hubert_base", "wavlm_base"])
def test_both_spellings_of_weight_norm_and_foreign_keys(case):
  source = golden.state_dict(f"backbone_{case}")
  names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
  stem = "encoder.pos_conv_embed.conv."
  model = case.split("_")[0]
  renamed = {f"{model}.{key}": value for key, value in source.items()}
  for old, new in names.items():
    renamed[f"{model}.{stem}{new}"] = renamed.pop(f"{model}.{stem}{old}")
  renamed |= {"lm_head.weight": np.zeros((2, 2)), "quantizer.codevectors": np.zeros(3), "project_q.bias": np.zeros(2)}
  network = network_of(case)
  first, second = params_of(case, network), params_of(case, network, renamed)
  assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
  with pytest.raises(UserError, match="encoder.surprise"):
    params_of(case, network, {**source, "encoder.surprise": np.zeros(2)})


def test_fresh_weight_norm_is_no_change():
  network = network_of("hubert_base")
  params = network.init(jax.random.key(0), batch_of("hubert_base"), train=False)["params"]["pos_0"]
  np.testing.assert_allclose(params["g"], np.sqrt(np.square(params["v"]).sum(axis=(1, 2))), rtol=1e-5)


def test_regularisation_is_off_until_asked_for():
  case = "wav2vec2_base"
  audio, rates = clips([16000, 9000], 16000), {"hidden_dropout": 0, "attention_dropout": 0, "activation_dropout": 0}
  full = golden.config(f"backbone_{case}")["config"]["full"]
  assert full["layerdrop"]
  assert full["mask_time_prob"]
  quiet = network_of(case, **rates)
  params = params_of(case, quiet)
  plain = quiet.apply({"params": params}, audio, train=False).hidden
  np.testing.assert_array_equal(train_output(quiet, params, audio, 0), plain)
  assert "masked_spec_embed" not in params
  changes = [
    {"hidden_dropout": 0.1},
    {"attention_dropout": 0.1},
    {"activation_dropout": 0.1},
    {"feat_proj_dropout": 0.1},
    {"layerdrop": 0.9},
    {"mask_time_prob": 0.2},
    {"mask_feature_prob": 0.5},
  ]
  for change in changes:
    network = network_of(case, **{**rates, **change})
    own = params_of(case, network)
    assert ("masked_spec_embed" in own) == ("mask_time_prob" in change)
    np.testing.assert_array_equal(network.apply({"params": own}, audio, train=False).hidden, plain)
    run = jax.jit(lambda seed, network=network, own=own: train_output(network, own, audio, seed))
    first, again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3, change
    assert np.abs(first - other).max() > 1e-3, change
    assert not np.asarray(first[1, network.num_frames(9000) :]).any()


def test_layerdrop_leaves_whole_layers_out():
  rates = {"hidden_dropout": 0, "attention_dropout": 0, "activation_dropout": 0}
  network = network_of("wav2vec2_base", **rates, layerdrop=1.0)
  audio = batch_of("wav2vec2_base")
  params = params_of("wav2vec2_base", network)
  rngs = {"dropout": jax.random.key(0)}
  _, sown = network.apply({"params": params}, audio, train=True, rngs=rngs, mutable="intermediates")
  states = sown["intermediates"]["hidden_states"]
  np.testing.assert_array_equal(states[0], states[-1])


def test_spans_stay_inside_the_clip():
  lengths = jnp.array([0, 3, 5, 12, 40, 100])
  make = jax.jit(lambda key: speech.span_mask(key, lengths, 100, prob=0.5, span=5, min_masks=2))
  masks = np.stack([make(key) for key in jax.random.split(jax.random.key(0), 200)])  # [200, 6, 100]
  assert not (masks & (np.arange(100) >= np.asarray(lengths)[:, None])).any()
  counts = masks.sum(axis=2)
  assert not counts[:, :2].any()
  assert (counts[:, 2] == 5).all()
  assert counts[:, 3].min() >= 6, "two spans of 5 with different starts"
  assert counts[:, 5].max() <= 55
  assert 0.3 < counts[:, 5].mean() / 100 < 0.45  # ten spans, some of which overlap
  coverage = masks[:, 5].mean(axis=0)
  assert coverage[10:90].min() > 0.2
  edges = np.diff(np.pad(masks[:, 4].astype(int), ((0, 0), (1, 1))), axis=1)
  runs = np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]
  assert runs.min() >= 5


@pytest.mark.parametrize("case", ["data2vec_audio", "hubert_base"])
def test_a_frozen_extractor_keeps_nothing_for_the_backward_pass(case):
  network, audio = network_of(case), clips([8000, 6000], 8000)
  params = params_of(case, network)

  def loss(params, frozen: bool):
    if frozen:
      params = {**params, "feature_extractor": jax.lax.stop_gradient(params["feature_extractor"])}
    rngs = {"dropout": jax.random.key(0)}
    return jnp.sum(jnp.sin(network.apply({"params": params}, audio, train=True, rngs=rngs).hidden))

  grads = {frozen: traverse_util.flatten_dict(jax.grad(loss)(params, frozen), sep="/") for frozen in (False, True)}
  for path, grad in grads[True].items():
    if path.startswith("feature_extractor/"):
      assert not np.asarray(grad).any(), path
      assert np.asarray(grads[False][path]).any(), path
    else:
      np.testing.assert_allclose(grad, grads[False][path], atol=1e-5, err_msg=path)
  # Arrays longer than the frames [B, 24, ...] belong to the extractor.
  kept = {
    frozen: [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda p, f=frozen: jax.vjp(lambda p: loss(p, f), p)[1], params))]
    for frozen in (False, True)
  }
  frames = network.num_frames(8000)
  assert any(len(shape) == 3 and shape[0] == 2 and shape[1] > 2 * frames for shape in kept[False])
  assert not any(len(shape) == 3 and shape[0] == 2 and shape[1] > 2 * frames for shape in kept[True])


def test_convolutions_by_group_equal_the_grouped_one(monkeypatch):
  x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 20, 12), (8, 3, 12)]))
  by_group = speech.grouped_conv(x, kernel, 4)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  np.testing.assert_allclose(speech.grouped_conv(x, kernel, 4), by_group, atol=1e-5)
  assert by_group.shape == x.shape


def test_wrong_configurations_are_named():
  config = golden.config("backbone_hubert_base")["config"]["full"]
  with pytest.raises(UserError, match="conv_pos_batch_norm"):
    speech.from_config({**config, "conv_pos_batch_norm": True})
  with pytest.raises(UserError, match="model_type 'unispeech'"):
    speech.from_config({**config, "model_type": "unispeech"})
  with pytest.raises(UserError, match=r"Speech\.padding: found 'none'"):
    speech.from_config(config, padding="none")
  with pytest.raises(TypeError):
    speech.from_config(config, dropuot=0.1)


@pytest.mark.parametrize("name", [name for name, c in published.CONFIGS.items() if c["model_type"] in speech.KINDS])
def test_published_configurations_build(name):
  network = speech.from_config(published.CONFIGS[name], layerdrop=0.1, mask_time_prob=0.05, compute_dtype="bfloat16")
  audio = {"wave": jax.ShapeDtypeStruct((1, 16000), jnp.float32), "mask": jax.ShapeDtypeStruct((1, 16000), bool)}
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  shapes = jax.eval_shape(lambda audio: network.init_with_output(rngs, audio, train=True), audio)
  assert shapes[0].hidden.shape == (1, 49, network.hidden_size)
  count = sum(x.size for x in jax.tree.leaves(shapes[1]["params"]))
  low, high = (93e6, 96e6) if network.hidden_size == 768 else (311e6, 318e6)
  assert low < count < high, json.dumps({name: count})
