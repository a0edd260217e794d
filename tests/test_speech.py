"""Speech encoders against Hugging Face's, and that neither padding nor what is off changes a frame."""

import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mmjax.backbones import published, speech, speech_layers
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
  network = network_of(case, num_layers=2)
  params = params_of(case, network)
  run = jax.jit(lambda audio: network.apply({"params": params}, audio, train=False))
  lengths = [6000, 4100, 400, 2345]
  audio = clips(lengths, 6000)
  together = run(audio)
  np.testing.assert_array_equal(together.mask.sum(axis=1), network.num_frames(np.array(lengths)))
  assert not np.asarray(together.hidden)[~np.asarray(together.mask)].any()
  # What lies beyond a clip's end must not matter, not even if it is not silence.
  noise = clips([6000] * 4, 6000, seed=1)["wave"]
  noisy = run({**audio, "wave": np.where(audio["mask"], audio["wave"], noise)})
  np.testing.assert_allclose(noisy.hidden, together.hidden, atol=1e-5)
  for i in (1, 2):
    alone = run({name: x[i : i + 1, : lengths[i]] for name, x in audio.items()})
    assert alone.mask.all()
    np.testing.assert_allclose(together.hidden[i, : alone.hidden.shape[1]], alone.hidden[0], atol=1e-5)


@pytest.mark.parametrize("case", ["data2vec_audio", "hubert_base"])
def test_hf_padding_is_visible(case):
  network = network_of(case, padding="hf", num_layers=1)
  params = params_of(case, network)
  run = jax.jit(lambda audio: network.apply({"params": params}, audio, train=False).hidden)
  audio = clips([4000, 3000], 4000)
  alone = run({name: x[1:, :3000] for name, x in audio.items()})[0]
  assert np.abs(run(audio)[1, : len(alone)] - alone).max() > 1e-3


@pytest.mark.parametrize(
  ("case", "padding"),
  [("data2vec_audio", "exact"), ("hubert_base", "exact"), ("hubert_base", "hf"), ("wavlm_base", "exact")],
)
def test_empty_clips_are_finite(case, padding):
  network = network_of(case, padding=padding, num_layers=1)
  params = params_of(case, network)

  def loss(params, audio):
    encoded = network.apply({"params": params}, audio, train=False)
    return jnp.sum(jnp.square(encoded.hidden)), encoded

  grads, encoded = jax.jit(jax.grad(loss, has_aux=True))(params, clips([0, 399, 1200], 1200))
  np.testing.assert_array_equal(encoded.mask.sum(axis=1), [0, 0, 3])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, encoded)))
  assert not np.asarray(encoded.hidden[:2]).any()
  short = jax.jit(loss)(params, clips([0, 200], 200))[1]
  assert short.hidden.shape == (2, 1, network.hidden_size)
  assert not short.mask.any()
  assert not np.asarray(short.hidden).any()


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
  network, audio = network_of("hubert_base", num_layers=1), batch_of("hubert_base")
  params = jax.jit(lambda: network.init(jax.random.key(0), audio, train=False)["params"]["pos_0"])()
  np.testing.assert_allclose(params["g"], np.sqrt(np.square(params["v"]).sum(axis=(1, 2))), rtol=1e-5)


NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
REGULARISERS = [
  {"hidden_dropout": 0.1},
  {"attention_dropout": 0.1},
  {"activation_dropout": 0.1},
  {"feat_proj_dropout": 0.1},
  {"layerdrop": 0.5},
  {"mask_time_prob": 0.2},
  {"mask_feature_prob": 0.5},
]


@pytest.fixture(scope="module")
def plain():
  network = network_of("wav2vec2_base", **NO_DROPOUT, num_layers=1)
  params = params_of("wav2vec2_base", network)
  audio = clips([8000, 6000], 8000)
  run = jax.jit(lambda train: network.apply({"params": params}, audio, train=train).hidden, static_argnums=0)
  # Needs no random numbers: LayerDrop and SpecAugment are off, although the configuration has them (MM28).
  np.testing.assert_allclose(run(True), run(False), atol=1e-6)
  return run(False)


def test_the_configuration_does_not_turn_on_layerdrop_or_spec_augment(plain):
  config = golden.config("backbone_wav2vec2_base")["config"]["full"]
  assert config["layerdrop"]
  assert config["mask_time_prob"]
  network = network_of("wav2vec2_base")
  assert (network.layerdrop, network.mask_time_prob, network.mask_feature_prob) == (0, 0, 0)
  assert "masked_spec_embed" not in params_of("wav2vec2_base", network)


@pytest.mark.parametrize("change", REGULARISERS, ids=lambda change: next(iter(change)))
def test_each_regulariser_acts_in_training_only(change, plain):
  network = network_of("wav2vec2_base", **{**NO_DROPOUT, "num_layers": 1, **change})
  params = params_of("wav2vec2_base", network)
  assert ("masked_spec_embed" in params) == ("mask_time_prob" in change)
  audio = clips([8000, 6000], 8000)

  @jax.jit
  def run(key):
    evaluated = network.apply({"params": params}, audio, train=False).hidden
    return evaluated, network.apply({"params": params}, audio, train=True, rngs={"dropout": key}).hidden

  outputs = [run(jax.random.key(seed)) for seed in range(8)]
  np.testing.assert_allclose(outputs[0][0], plain, atol=1e-6)
  np.testing.assert_array_equal(outputs[0][1], run(jax.random.key(0))[1])
  assert len({x.tobytes() for _, x in jax.tree.map(np.asarray, outputs)}) >= 2
  assert max(np.abs(trained - plain).max() for _, trained in outputs) > 1e-3
  assert not any(np.asarray(trained[1, network.num_frames(6000) :]).any() for _, trained in outputs)


def test_layerdrop_leaves_whole_layers_out():
  network = network_of("wav2vec2_base", **NO_DROPOUT, layerdrop=1.0)
  audio = batch_of("wav2vec2_base")
  params = params_of("wav2vec2_base", network)
  rngs = {"dropout": jax.random.key(0)}
  run = jax.jit(lambda: network.apply({"params": params}, audio, train=True, rngs=rngs, mutable="intermediates"))
  states = run()[1]["intermediates"]["hidden_states"]
  np.testing.assert_array_equal(states[0], states[-1])


def test_spans_stay_inside_the_clip():
  lengths = jnp.array([0, 3, 5, 12, 40, 100])
  make = jax.jit(lambda key: speech_layers.span_mask(key, lengths, 100, prob=0.5, span=5, min_masks=2))
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
  network, audio = network_of(case, num_layers=1), clips([8000, 6000], 8000)
  params = params_of(case, network)

  def loss(params, frozen):
    if frozen:
      params = {**params, "feature_extractor": jax.lax.stop_gradient(params["feature_extractor"])}
    rngs = {"dropout": jax.random.key(0)}
    return jnp.sum(jnp.sin(network.apply({"params": params}, audio, train=True, rngs=rngs).hidden))

  def kept(frozen):
    """Shapes [B, T, ...] kept for the backward pass that are longer than the frames: those of the extractor."""
    residuals = jax.eval_shape(lambda params: jax.vjp(lambda params: loss(params, frozen), params)[1], params)
    shapes = [x.shape for x in jax.tree.leaves(residuals)]
    return [shape for shape in shapes if shape[:1] == (2,) and shape[1] > 2 * network.num_frames(8000)]

  assert len(kept(False)) >= 7
  assert not kept(True)
  free, frozen = (
    traverse_util.flatten_dict(jax.jit(jax.grad(loss), static_argnums=1)(params, flag), sep="/")
    for flag in (False, True)
  )
  for path, grad in frozen.items():
    assert np.asarray(free[path]).any(), path
    expected = np.zeros_like(grad) if path.startswith("feature_extractor/") else free[path]
    # Two programs round differently: by under 1e-6 of the largest entry.
    atol = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(grad, expected, rtol=0, atol=atol, err_msg=path)


def test_convolutions_by_group_equal_the_grouped_one(monkeypatch):
  for width in (7, 8):
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 70, 12), (width, 3, 12)]))
    by_group = speech_layers.grouped_conv(x, kernel, 4)
    assert by_group.shape == x.shape
    with monkeypatch.context() as patch:
      patch.setattr(jax, "default_backend", lambda: "gpu")
      np.testing.assert_allclose(speech_layers.grouped_conv(x, kernel, 4), by_group, atol=1e-5)


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
