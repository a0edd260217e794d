"""Frames of a frozen encoder: extracted once, equal to the encoder on the single clip."""

import json
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import layers
from mmjax.backbones import pretrained
from mmjax.data import features


class Tiny(nn.Module):
  """A speech encoder of one frame each 400 samples, with context to the left; any padding is invisible."""

  width: int = 6
  compute_dtype: Any = jnp.float32
  pretrained: str | None = None
  normalize_wave: ClassVar[bool] = False

  @nn.compact
  def __call__(self, audio: dict, *, train: bool) -> layers.Encoded:
    wave = jnp.where(audio["mask"], audio["wave"], 0.0)
    batch, samples = wave.shape
    frames = samples // 400
    x = wave[:, : frames * 400].reshape(batch, frames, 400)  # [B, F, 400]
    mask = jnp.arange(frames) < jnp.sum(audio["mask"], axis=1, keepdims=True) // 400
    x = jnp.cumsum(layers.Linear(self.width, name="out")(x), axis=1)
    return layers.Encoded(x * mask[..., None], mask)


class Normalizing(Tiny):
  normalize_wave: ClassVar[bool] = True


class Clips:
  """Clips that count how often they are read."""

  def __init__(self, lengths: list[int]):
    rng = np.random.default_rng(1)
    self.data = [(3000 * rng.normal(size=n) + 500).astype(np.int16) for n in lengths]
    self.reads = 0

  def __len__(self) -> int:
    return len(self.data)

  def __getitem__(self, index: int) -> np.ndarray:
    self.reads += 1
    return self.data[index]


LENGTHS = [4000, 399, 1200, 16000, 0, 2500, 8000, 8001, 400, 5000, 6100]


def single(encoder: nn.Module, wave: np.ndarray) -> np.ndarray:
  """Returns the real frames [F, D] of one clip, run alone and unpadded."""
  audio = {"wave": jnp.asarray(wave, jnp.float32)[None], "mask": jnp.ones((1, len(wave)), bool)}
  network = features.Frozen(encoder)
  example = jnp.zeros((1, features.SAMPLE_RATE)), jnp.zeros((1, features.SAMPLE_RATE), bool)
  params = pretrained.restore(network, jax.jit(network.init)(jax.random.key(0), *example)["params"])
  encoded = encoder.apply({"params": params["encoder"]}, audio, train=False)
  return np.asarray(encoded.hidden[0])[np.asarray(encoded.mask[0])]


@pytest.mark.parametrize("time_pool", [1, 3])
def test_frames_equal_the_encoder_on_the_clip_alone(tmp_path: Path, time_pool: int):
  clips = Clips(LENGTHS)
  store = features.cached(
    clips, encoder=Tiny(), cache_dir=tmp_path, key="test", seconds=0.45, time_pool=time_pool, batch_size=3
  )
  assert len(store) == len(LENGTHS)
  assert store.width == 6
  for i, length in enumerate(LENGTHS):
    samples = min(length, 7200)
    assert store.lengths[i] == -(-(samples // 400) // time_pool)
    if samples < 400:
      assert store[i].shape == (0, 6)
      continue
    alone = single(Tiny(), clips.data[i][:samples] / 32768.0)
    groups = [alone[g : g + time_pool].mean(axis=0) for g in range(0, len(alone), time_pool)]
    np.testing.assert_allclose(store[i], groups, atol=1e-5)


def test_normalized_where_the_encoder_was_trained_so(tmp_path: Path):
  clips = Clips([4000, 800])
  store = features.cached(clips, encoder=Normalizing(), cache_dir=tmp_path, key="test")
  for i, wave in enumerate(clips.data):
    scaled = (wave - wave.mean()) / wave.std()
    np.testing.assert_allclose(store[i], single(Normalizing(), scaled), atol=1e-4)


def test_second_call_reads_no_clip_and_other_options_do(tmp_path: Path):
  def call(clips: Clips, **options: Any) -> features.Store:
    options = {"encoder": Tiny(), "key": "test"} | options
    return features.cached(clips, cache_dir=tmp_path, **options)

  first = call(Clips(LENGTHS))
  again = Clips(LENGTHS)
  np.testing.assert_array_equal(call(again, batch_size=2).frames, first.frames)
  assert again.reads == 0
  changes: list[dict] = [
    {"time_pool": 2},
    {"seconds": 0.3},
    {"normalize": True},
    {"encoder": Tiny(width=5)},
    {"encoder": Tiny(compute_dtype="bfloat16")},
    {"key": "other"},
  ]
  for change in changes:
    clips = Clips(LENGTHS)
    call(clips, **change)
    assert clips.reads > 0, change
  assert call(again, encoder=Tiny(compute_dtype="float32")).width == 6
  assert again.reads == 0


def test_weights_identify_the_cache_not_their_folder(tmp_path: Path):
  for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(content)
  a, b, c = (features.weights_identity(Tiny(pretrained=str(tmp_path / name))) for name in "abc")
  assert a == b != c
  assert features.describe(Tiny(pretrained="x")) == features.describe(Tiny(pretrained="y"))


def test_a_failure_leaves_nothing_behind(tmp_path: Path):
  class Broken(Clips):
    def __getitem__(self, index: int) -> np.ndarray:
      if self.reads >= 5:
        raise OSError("disk")
      return super().__getitem__(index)

  with pytest.raises(OSError, match="disk"):
    features.cached(
      Broken(LENGTHS), encoder=Tiny(), cache_dir=tmp_path, key="k", lengths=np.array(LENGTHS), batch_size=2
    )
  assert list((tmp_path / "features").iterdir()) == []


def test_provenance_says_what_the_frames_are(tmp_path: Path):
  features.cached(Clips([800]), encoder=Tiny(), cache_dir=tmp_path, key="set-1.0", time_pool=2)
  (folder,) = (tmp_path / "features").iterdir()
  assert folder.name.startswith("set-1.0-")
  found = json.loads((folder / "provenance.json").read_text())
  assert found["encoder"]["class"] == "Tiny"
  assert found["time_pool"] == 2
  assert found["clips"] == 1


def test_key_must_name_a_folder(tmp_path: Path):
  with pytest.raises(ValueError, match="key"):
    features.cached(Clips([800]), encoder=Tiny(), cache_dir=tmp_path, key="../x")


def test_whisper_frames_equal_whisper_on_the_clip_alone(tmp_path: Path):
  whisper = pytest.importorskip("mmjax.backbones.whisper")
  config = {
    "model_type": "whisper",
    "d_model": 16,
    "num_mel_bins": 80,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "max_source_positions": 1500,
    "activation_function": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "scale_embedding": False,
    "init_std": 0.02,
  }
  encoder = whisper.from_config(config)
  clips = Clips([3200, 16000, 9999, 8000])
  store = features.cached(clips, encoder=encoder, cache_dir=tmp_path, key="whisper", batch_size=2)
  for i, wave in enumerate(clips.data):
    np.testing.assert_allclose(store[i], single(encoder, wave / 32768.0), atol=1e-4)
