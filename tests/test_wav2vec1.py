"""wav2vec 1.0 against fairseq's, and that padding changes no frame."""

import golden
import jax
import numpy as np
import pytest

from mmjax.backbones import wav2vec1
from mmjax.backbones.convert import convert
from mmjax.errors import UserError

CASE = "sse_ft_wav2vec"


def network_of(**overrides) -> wav2vec1.Wav2Vec1:
  return wav2vec1.from_config(golden.config(CASE)["config"], **overrides)


def params_of(network: wav2vec1.Wav2Vec1) -> dict:
  audio = {"wave": np.zeros((1, 1000), np.float32), "mask": np.ones((1, 1000), bool)}
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), audio, train=False))["params"]
  return convert(golden.state_dict(CASE), shapes, wav2vec1.TABLE)


@pytest.fixture(scope="module")
def params() -> dict:
  return params_of(network_of())


@pytest.mark.parametrize("padding", ["exact", "repo"])
def test_fairseq_parity(padding, params):
  arrays = golden.arrays(CASE)
  network, wave = network_of(padding=padding), arrays["in_audio"]
  run = jax.jit(lambda a: network.apply({"params": params}, a, train=False, mutable="intermediates"))
  encoded, sown = run({"wave": wave, "mask": np.ones(wave.shape, bool)})
  np.testing.assert_allclose(encoded.hidden.transpose(0, 2, 1), arrays["out_c"], rtol=0, atol=1e-4)
  features = sown["intermediates"]["conv_features"][0]
  np.testing.assert_allclose(features.transpose(0, 2, 1), arrays["out_z"], rtol=0, atol=1e-4)
  assert encoded.mask.all()


def test_bfloat16_stays_close(params):
  arrays, network = golden.arrays(CASE), network_of(compute_dtype="bfloat16")
  audio = {"wave": arrays["in_audio"], "mask": np.ones(arrays["in_audio"].shape, bool)}
  found = jax.jit(lambda a: network.apply({"params": params}, a, train=False).hidden)(audio)
  gap = np.abs(np.asarray(found, np.float32).transpose(0, 2, 1) - arrays["out_c"]).max()
  assert gap <= 2e-2 * np.abs(arrays["out_c"]).max()


def test_zero_padding_as_fairseq_sees_it(params):
  # The stored clips padded with zeros are clips themselves to fairseq: all of it counts.
  network, exact = network_of(padding="repo"), network_of()
  wave = np.pad(golden.arrays(CASE)["in_audio"][:, :4000], ((0, 0), (0, 2000)))
  mask = np.broadcast_to(np.arange(6000) < 4000, wave.shape)
  run = jax.jit(lambda n, a: n.apply({"params": params}, a, train=False), static_argnums=0)
  whole = run(network, {"wave": wave, "mask": np.ones_like(mask)})
  part = run(network, {"wave": wave, "mask": mask})
  frames = part.mask.sum(axis=1)
  np.testing.assert_array_equal(frames, whole.mask.shape[1] - network.num_frames(2000))
  np.testing.assert_allclose(part.hidden, whole.hidden * part.mask[..., None], atol=1e-6)
  found = run(exact, {"wave": wave, "mask": mask})
  assert np.abs(found.hidden - part.hidden)[:, :20].max() > 1e-3


def test_padding_is_invisible(params):
  network = network_of()
  run = jax.jit(lambda a: network.apply({"params": params}, a, train=False))
  lengths = [6000, 4100, 465, 464, 0]
  mask = np.arange(6000) < np.array(lengths)[:, None]
  noise = np.random.default_rng(0).standard_normal(mask.shape).astype(np.float32)
  together = run({"wave": noise, "mask": mask})  # what lies beyond a clip's end is not even silence
  np.testing.assert_array_equal(together.mask.sum(axis=1), network.num_frames(np.array(lengths)))
  assert np.isfinite(together.hidden).all()
  assert not np.asarray(together.hidden)[~np.asarray(together.mask)].any()
  for i in (1, 2):
    alone = run({"wave": noise[i : i + 1, : lengths[i]], "mask": mask[i : i + 1, : lengths[i]]})
    assert alone.mask.all()
    np.testing.assert_allclose(together.hidden[i, : alone.hidden.shape[1]], alone.hidden[0], atol=1e-5)
  short = run({"wave": noise[:1, :100], "mask": np.ones((1, 100), bool)})
  assert short.hidden.shape[1] == 1
  assert not short.mask.any()


def test_frame_counts():
  network, stored = wav2vec1.Wav2Vec1(), golden.config("sse_ft_wav2vec_lengths")
  samples = np.array([int(n) for n in stored["frames"]])
  np.testing.assert_array_equal(network.num_frames(samples), list(stored["frames"].values()))
  padded = stored["masked_frames_of_935_by_padded_amount"]
  np.testing.assert_array_equal(network.num_frames(np.array([int(n) for n in padded])), list(padded.values()))
  assert network.hop == 160
  assert network.num_frames(464) == 0


def test_variants_are_refused():
  config = golden.config(CASE)["config"]
  for change, message in (
    ({"aggregator": "gru"}, "aggregator 'gru'"),
    ({"skip_connections_feat": True}, "skip_connections_feat"),
    ({"conv_aggregator_layers": "[(8, 2, 1)]"}, "channels"),
    ({"conv_aggregator_layers": "[(16, 2, 2)]"}, "strides"),
    ({"conv_feature_layers": "[(16, 2)]"}, "expected \\[\\(width"),
  ):
    with pytest.raises(UserError, match=message):
      wav2vec1.from_config({**config, **change})
  with pytest.raises(UserError, match="'exact' or 'repo'"):
    wav2vec1.Wav2Vec1(padding="hf")
