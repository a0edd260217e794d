"""ResNets against Hugging Face's and torchvision's, and BatchNorm against torch's convention."""

import json
import re

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.backbones import pretrained, resnet
from mmjax.backbones.convert import convert
from mmjax.backbones.vision_layers import BatchNorm, convolve
from mmjax.errors import UserError

CASES = ["backbone_resnet18", "backbone_resnet34"]
TINY = {"depths": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 4}


def variables_of(network, image, source) -> dict:
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), {"image": image}, train=False))
  return {name: convert(source, tree, resnet.TABLE) for name, tree in shapes.items()}


def torchvision_names(source: dict) -> dict:
  """Returns Hugging Face's state dict under torchvision's names."""

  def rename(key: str) -> str:
    key = key.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    key = re.sub(r"encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}", key)
    key = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", key)
    key = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", key)
    return key.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")

  return {rename(key): value for key, value in source.items()}


@pytest.mark.parametrize("case", CASES)
def test_hugging_face_parity(case):
  arrays, source = golden.arrays(case), golden.state_dict(case)
  image = arrays["in_pixels"].transpose(0, 2, 3, 1).astype(np.float32) / 255
  network = resnet.from_config(golden.config(case)["config"]["full"])
  variables = variables_of(network, image, source)
  renamed = variables_of(network, image, {**torchvision_names(source), "fc.weight": np.zeros(1)})
  jax.tree.map(np.testing.assert_array_equal, variables, renamed)

  run = jax.jit(lambda v, x: network.apply(v, {"image": x}, train=False, mutable="intermediates"))
  encoded, sown = run(variables, image)
  found = {f"out_hidden_{i}": x for i, x in enumerate(sown["intermediates"]["hidden_states"])}
  b, _, h, w = arrays["out_last_hidden_state"].shape
  found["out_last_hidden_state"] = encoded.hidden.reshape(b, h, w, -1)
  found["out_pooler_output"] = encoded.pooled[:, None, None, :]
  assert found.keys() == {name for name in arrays if name.startswith("out_")}
  for name, value in found.items():
    np.testing.assert_allclose(value.transpose(0, 3, 1, 2), arrays[name], rtol=0, atol=1e-4, err_msg=name)
  assert encoded.mask.all()
  assert encoded.mask.shape == encoded.hidden.shape[:2]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (7, 2, 3), (4, 2, 1)])
def test_small_images_are_convolved_alike(size, kernel, stride, padding):
  if size + 2 * padding < kernel:
    pytest.skip("the kernel does not fit")
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, size, size + 1, 3)).astype(np.float32)
  w = rng.standard_normal((kernel, kernel, 3, 4)).astype(np.float32)
  expected = jax.lax.conv_general_dilated(
    x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  np.testing.assert_allclose(convolve(x, w, stride, padding), expected, atol=1e-5)


def test_running_statistics_after_two_training_steps():
  network = BatchNorm()
  rng = np.random.default_rng(0)
  batches = rng.normal(2, 3, (2, 5, 3, 2, 4)).astype(np.float32)
  variables = network.init(jax.random.key(0), batches[0], train=True)
  params = {"scale": np.float32([1, 2, 3, 4]), "bias": np.float32([0, 1, 0, 1])}
  mean, var = np.zeros(4), np.ones(4)
  stats = variables["batch_stats"]
  np.testing.assert_array_equal(stats["var"], var)  # init counts no batch
  for x in batches:
    y, state = network.apply({"params": params, "batch_stats": stats}, x, train=True, mutable="batch_stats")
    stats = state["batch_stats"]
    flat = x.reshape(-1, 4).astype(np.float64)
    mean = 0.9 * mean + 0.1 * flat.mean(axis=0)
    var = 0.9 * var + 0.1 * flat.var(axis=0, ddof=1)
    expected = (flat - flat.mean(axis=0)) / np.sqrt(flat.var(axis=0) + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y.reshape(-1, 4), expected, atol=1e-5)
  np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
  np.testing.assert_allclose(stats["var"], var, rtol=1e-6)
  y = network.apply({"params": params, "batch_stats": stats}, batches[0], train=False)
  expected = (batches[0] - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_padding_rows_change_nothing(channels):
  network = resnet.ResNet(**TINY)
  image = np.random.default_rng(0).random((5, 28, 28, channels)).astype(np.float32)
  image[3:] = 1e3
  valid = np.arange(5) < 3
  variables = jax.jit(lambda: network.init(jax.random.key(0), {"image": image}, train=False))()

  @jax.jit
  def step(image, valid):
    def loss(params):
      encoded, state = network.apply(
        {**variables, "params": params}, {"image": image}, train=True, valid=valid, mutable="batch_stats"
      )
      return jnp.sum(jnp.where(valid[:, None], encoded.pooled**2, 0)), state

    return jax.grad(loss, has_aux=True)(variables["params"])

  padded, alone = step(image, valid), step(image[:3], valid[:3])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), padded, alone)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), padded[1]["batch_stats"], variables["batch_stats"])
  assert all(jax.tree.leaves(moved))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(padded[0]))


def test_a_batch_of_padding_leaves_the_statistics():
  network, x = BatchNorm(), np.ones((2, 3, 3, 1), np.float32)
  variables = network.init(jax.random.key(0), x, train=False)
  _, state = network.apply(variables, x, np.zeros(2, bool), train=True, mutable="batch_stats")
  np.testing.assert_array_equal(state["batch_stats"]["mean"], [0])
  np.testing.assert_array_equal(state["batch_stats"]["var"], [1])


def test_bottleneck_blocks_are_refused():
  config = golden.config("backbone_resnet18")["config"]["full"]
  with pytest.raises(UserError, match="layer_type 'bottleneck'"):
    resnet.from_config({**config, "layer_type": "bottleneck"})
  with pytest.raises(UserError, match="4 numbers"):
    resnet.ResNet(depths=(2, 2))


def test_published_weights_come_with_their_statistics(tmp_path):
  case = "backbone_resnet18"
  source = {f"resnet.{key}": value for key, value in golden.state_dict(case).items()}
  save_file({**source, "classifier.1.bias": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(golden.config(case)["config"]["full"]))

  class Network(nn.Module):
    vision_encoder: nn.Module

    def __call__(self, batch):
      return self.vision_encoder(batch["vision"], train=False)

  network = Network(pretrained.encoder(str(tmp_path)))
  batch = {"vision": {"image": np.zeros((1, 32, 32, 3), np.float32)}}
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch))
  found = {name: pretrained.restore(network, tree)["vision_encoder"] for name, tree in shapes.items()}
  expected = variables_of(network.vision_encoder, batch["vision"]["image"], golden.state_dict(case))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
