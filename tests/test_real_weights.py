"""Published weights give the published network's numbers; runs where tools/quickstart.sh has put them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mmjax.backbones import bert, whisper
from mmjax.backbones.convert import convert

ASSETS = Path(__file__).parents[1] / "data" / "assets"


def encode(folder: str, backbone, inputs: dict):
  path = ASSETS / folder
  if not (path / "model.safetensors").exists():
    pytest.skip(f"data/assets/{folder} is absent (tools/quickstart.sh makes it)")
  network = backbone.from_config(json.loads((path / "config.json").read_text()))
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), inputs, train=False))["params"]
  params = convert(load_file(path / "model.safetensors"), shapes, backbone.TABLE, name=folder)
  return jax.jit(lambda p, x: network.apply({"params": p}, x, train=False))(params, inputs)


def test_minilm():
  ids = np.array(
    [
      [101, 1045, 2428, 2293, 2023, 3185, 999, 102],  # I really love this movie!
      [101, 2023, 2003, 6659, 1012, 102, 0, 0],  # This is terrible.
    ]
  )
  encoded = encode("minilm", bert, {"ids": ids, "mask": ids != 0})
  np.testing.assert_allclose(encoded.hidden[0, 0, :4], [-0.27863, -0.22772, -0.05134, 0.09371], atol=1e-4)
  np.testing.assert_allclose(encoded.pooled[0, :4], [-0.04448, 0.02549, 0.04927, 0.10167], atol=1e-4)


def test_whisper_tiny():
  time = np.arange(24_000) / 16_000
  wave = np.zeros((1, 480_000), np.float32)
  wave[0, : len(time)] = 0.5 * np.sin(2 * np.pi * (200 + 800 * time) * time)
  encoded = encode("whisper-tiny.en", whisper, {"wave": wave, "mask": np.ones(wave.shape, bool)})
  assert encoded.hidden.shape == (1, 1500, 384)
  np.testing.assert_allclose(encoded.hidden[0, 0, :4], [0.17208, -0.54663, 0.64318, -0.92633], atol=2e-3)
  np.testing.assert_allclose(encoded.hidden[0, 40, :4], [0.63127, 1.44735, -0.73936, 0.02432], atol=2e-3)
