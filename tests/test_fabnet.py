"""FAb-Net's encoder against the authors'."""

import golden
import jax
import numpy as np
import pytest

from mmjax.backbones import fabnet
from mmjax.backbones.convert import convert
from mmjax.errors import UserError

CASE = "sse_ft_fabnet"


def test_authors_parity():
  arrays = golden.arrays(CASE)
  image = np.random.RandomState(0).rand(2, 3, 256, 256).astype(np.float32).transpose(0, 2, 3, 1)
  network = fabnet.from_config(golden.config(CASE)["config"])
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), {"image": image}, train=False))
  source = golden.state_dict(CASE) | {"decoder.1.weight": np.zeros(1), "encoder.3.num_batches_tracked": np.zeros(())}
  variables = {name: convert(source, tree, fabnet.TABLE) for name, tree in shapes.items()}
  run = jax.jit(lambda v, x: network.apply(v, {"image": x}, train=False, mutable="intermediates"))
  encoded, sown = run(variables, image)
  np.testing.assert_allclose(encoded.pooled, arrays["out_features"][:, :, 0, 0], rtol=0, atol=1e-4)
  assert encoded.hidden.shape == (2, 1, 256)
  assert encoded.mask.all()

  stored = sorted((name for name in arrays if name.startswith("mid_")), key=lambda name: int(name.split("_")[-1]))
  for name, state in zip(stored, sown["intermediates"]["states"], strict=True):
    np.testing.assert_allclose(np.mean(state, axis=(1, 2)), arrays[name], rtol=0, atol=1e-4, err_msg=name)


def test_images_of_another_kind_are_refused():
  network = fabnet.FabNet(filters=2)
  for shape in ((1, 128, 256, 3), (1, 256, 256, 1), (256, 256, 3)):
    with pytest.raises(ValueError, match="expected \\[batch, >= 256"):
      network.init(jax.random.key(0), {"image": np.zeros(shape, np.float32)}, train=False)
  with pytest.raises(UserError, match="input_nc 1"):
    fabnet.from_config({"input_nc": 1})
