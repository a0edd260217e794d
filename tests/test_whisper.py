"""Does Whisper equal Hugging Face's extractor and encoder, and is padding invisible to it?"""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.backbones import whisper
from mmjax.backbones.convert import convert
from mmjax.errors import UserError

CASE = "backbone_whisper_encoder"
SECONDS_30 = 480_000


def config() -> dict:
  return golden.config(CASE)["config"]["full"]


def tiny(state: dict | None = None, **overrides):
  """Returns the golden network (30 positions: clips up to 9600 samples) and its parameters."""
  network = whisper.from_config(config(), **overrides)
  audio = {"mel": jnp.zeros((1, 4, 80)), "mask": jnp.ones((1, 4), bool)}
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), audio, train=False))["params"]
  return network, convert(golden.state_dict(CASE) if state is None else state, shapes, whisper.TABLE)


def run(audio: dict, **overrides):
  network, params = tiny(**overrides)
  apply = jax.jit(lambda p, audio: network.apply({"params": p}, audio, train=False, mutable="intermediates"))
  encoded, sown = apply(params, audio)
  found = {f"out_hidden_{i}": x for i, x in enumerate(sown["intermediates"]["hidden_states"])}
  return found | {"out_last_hidden_state": encoded.hidden}, encoded.mask


def mel_input() -> dict:
  mel = golden.arrays(CASE)["in_input_features"].transpose(0, 2, 1)
  return {"mel": mel, "mask": np.ones(mel.shape[:2], bool)}


def padded(clips: list[np.ndarray], samples: int, filler: float = 0.0) -> dict:
  wave = np.full((len(clips), samples), filler, np.float32)
  mask = np.zeros(wave.shape, bool)
  for row, clip in enumerate(clips):
    wave[row, : len(clip)], mask[row, : len(clip)] = clip, True
  return {"wave": wave, "mask": mask}


def test_encoder_equals_hugging_face():
  found, mask = run(mel_input())
  expected = {name: x for name, x in golden.arrays(CASE).items() if name.startswith("out_")}
  assert found.keys() == expected.keys()
  assert mask.all()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, atol=1e-5, rtol=0, err_msg=name)


def test_bfloat16_is_close():
  found, _ = run(mel_input(), compute_dtype="bfloat16")
  for name, x in found.items():
    expected = golden.arrays(CASE)[name]
    assert x.dtype == jnp.bfloat16
    assert np.max(np.abs(x.astype(np.float32) - expected)) <= 2e-2 * np.max(np.abs(expected)), name


def test_log_mel_equals_hugging_face_at_30_seconds():
  arrays = golden.arrays("backbone_whisper_log_mel")
  wave = np.zeros((1, SECONDS_30), np.float32)
  wave[0, : len(arrays["in_audio"])] = arrays["in_audio"]
  mel, mask = jax.jit(whisper.log_mel)(wave, np.ones(wave.shape, bool))
  assert mel.shape == (1, 3000, 80)
  assert mask.all()
  np.testing.assert_allclose(mel[0, :130].T, arrays["out_log_mel"], atol=1e-4, rtol=0)
  np.testing.assert_allclose(mel[0, 130:135].T, arrays["out_log_mel_frames_130_to_134"], atol=1e-4, rtol=0)
  silence = golden.config("backbone_whisper_log_mel")["value_of_all_frames_from_135"]
  np.testing.assert_allclose([mel[0, 135:].min(), mel[0, 135:].max()], silence, atol=1e-4)


def test_log_mel_at_its_own_length():
  """The clip's loudest frame is a valid one, so its own length gives the frames that 30 s give."""
  arrays = golden.arrays("backbone_whisper_log_mel")
  mel, mask = whisper.log_mel(arrays["in_audio"][None], np.ones((1, 20800), bool))
  assert mask.all()
  np.testing.assert_allclose(mel[0].T, arrays["out_log_mel"], atol=1e-4, rtol=0)


def test_mel_filters():
  filters = whisper.mel_filters(80)
  assert filters.shape == (201, 80)
  expected = golden.arrays("backbone_whisper_log_mel")["out_mel_filters_sum"]
  np.testing.assert_allclose(filters.sum(axis=0), expected, atol=1e-6)
  assert whisper.mel_filters(128).shape == (201, 128)
  assert (whisper.mel_filters(128).sum(axis=0) > 0).all()


@pytest.mark.parametrize("samples", [9600, 4001, 1761, 333, 160])
def test_padding_changes_nothing(samples):
  rng = np.random.default_rng(samples)
  clip = rng.standard_normal(samples).astype(np.float32)
  clip[: samples // 2] = 0  # at the floor that the maximum sets, and the loudest window is one past the last frame
  clip[-20:] *= 30
  louder = rng.standard_normal(9600).astype(np.float32)
  alone, alone_mask = run(padded([clip], samples))
  together, mask = run(padded([louder, clip, clip[:70]], 9600, filler=7.0))
  frames = int(whisper.num_frames(samples))
  assert alone_mask.shape == (1, frames)
  np.testing.assert_array_equal(mask.sum(axis=1), [30, frames, 0])
  np.testing.assert_array_equal(mask[1, :frames], True)
  for name, x in together.items():
    np.testing.assert_allclose(x[1, :frames], alone[name][0], atol=1e-5, err_msg=name)
  assert not np.any(together["out_last_hidden_state"][1, frames:])


def test_zeros_that_are_valid_are_part_of_the_clip():
  clip = np.random.default_rng(0).standard_normal(3200).astype(np.float32)
  short, _ = run(padded([clip], 3200))
  long, _ = run(padded([np.concatenate([clip, np.zeros(3200, np.float32)])], 6400))
  assert np.max(np.abs(long["out_last_hidden_state"][:, :10] - short["out_last_hidden_state"])) > 1e-2


def test_mel_input_is_the_same_path():
  clip = np.random.default_rng(1).standard_normal(4000).astype(np.float32)
  audio = padded([clip], 9600)
  mel, mask = whisper.log_mel(audio["wave"], audio["mask"])
  assert mel.shape == (1, 60, 80)
  filled = jnp.where(mask[..., None], mel, 3.0)
  from_wave, from_mel = run(audio)[0], run({"mel": filled, "mask": mask})[0]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), from_wave, from_mel)


@pytest.mark.parametrize("samples", [100, 4000])
def test_empty_clip_is_finite(samples):
  found, mask = run(padded([np.zeros(0, np.float32)], samples, filler=np.nan))
  assert not mask.any()
  for x in found.values():
    assert np.isfinite(x).all()
  assert not np.any(found["out_last_hidden_state"])


def test_num_frames():
  network, _ = tiny()
  np.testing.assert_array_equal(
    network.num_frames(np.array([0, 159, 160, 479, 480, SECONDS_30])), [0, 0, 1, 1, 2, 1500]
  )
  assert whisper.num_frames(SECONDS_30 - 1) == 1500


@pytest.mark.parametrize(
  ("audio", "message"),
  [
    (padded([], 9601), r"found 9601 samples, expected at most 9600 \(0\.6 s\)\. Lower pipeline\.Audio\.seconds"),
    ({"mel": np.zeros((1, 61, 80)), "mask": np.ones((1, 61), bool)}, "found 61 mel frames, expected at most 60"),
    ({"mel": np.zeros((1, 10, 40)), "mask": np.ones((1, 10), bool)}, "found 40 mel bands.*expected 80"),
  ],
)
def test_what_does_not_fit(audio, message):
  network, params = tiny()
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: network.apply({"params": params}, audio, train=False))


def test_names_of_whole_models():
  _, expected = tiny()
  state = {"model." + key: x for key, x in golden.state_dict(CASE).items()}
  state |= {"model.decoder.layer_norm.weight": np.zeros(3), "proj_out.weight": np.zeros(3)}
  jax.tree.map(np.testing.assert_array_equal, tiny(state)[1], expected)
  stripped = {key.removeprefix("encoder."): x for key, x in golden.state_dict(CASE).items()}
  jax.tree.map(np.testing.assert_array_equal, tiny(stripped)[1], expected)
  with pytest.raises(UserError, match=r"not known: encoder\.surprise"):
    tiny(golden.state_dict(CASE) | {"encoder.surprise": np.zeros(1)})


def test_positions_start_as_sinusoids():
  network, _ = tiny()
  audio = {"wave": jnp.zeros((1, 640)), "mask": jnp.ones((1, 640), bool)}
  positions = jax.jit(lambda key: network.init(key, audio, train=False))(jax.random.key(0))["params"]["positions"]
  assert positions.shape == (30, 32)
  np.testing.assert_allclose(positions[3, 0], np.sin(3), rtol=1e-6)
  np.testing.assert_allclose(positions[3, 31], np.cos(3e-4), rtol=1e-6)


def test_other_networks_are_refused():
  with pytest.raises(UserError, match="activation_function 'relu', expected 'gelu'"):
    whisper.from_config(config() | {"activation_function": "relu"})
  with pytest.raises(TypeError, match="dropuot"):
    whisper.from_config(config(), dropuot=0.0)
