"""MMML against the authors' PyTorch code, and the rules of its options."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmjax.backbones import bert, speech
from mmjax.errors import UserError
from mmjax.papers import mmml_names
from mmjax.papers.mmml import MMML, MultiLoss

CASES = {
  "mmml_en_cc": ("cc", "v1", False),
  "mmml_en_cme_v1": ("cme", "v1", False),
  "mmml_en_cme_v2": ("cme", "v2", False),
  "mmml_en_cme_v3": ("cme", "v3", False),
  "mmml_en_cc_context": ("cc", "v1", True),
  "mmml_en_cme_context": ("cme", "v1", True),
  "mmml_ch_cc": ("cc", "v1", False),
  "mmml_ch_cme_v1": ("cme", "v1", False),
}
# Where a golden array stores every N-th channel, by its name's ending.
STEPS = {"_c4": 4, "_c16": 16, "_c32": 32}


def network_of(case: str, **overrides) -> MMML:
  fusion, version, context = CASES[case]
  text, audio = golden.config(case)["backbones"].values()
  kinds = ("bert", "hubert") if "_ch_" in case else ("roberta", "data2vec-audio")
  options = {
    "text_encoder": bert.from_config({**text, "model_type": kinds[0]}),
    "audio_encoder": speech.from_config({**audio, "model_type": kinds[1]}, padding="hf"),
    "fusion": fusion,
    "cme_version": version,
    "context": context,
    "cme_layers": 2,
    "empty_context": "silent",
  }
  return MMML(**{**options, **overrides})


def batch_of(arrays) -> dict:
  made = {}
  for name in ("text", "audio", "text_context", "audio_context"):
    if f"in_{name}_inputs" in arrays:
      key = "ids" if name.startswith("text") else "wave"
      made[name] = {key: arrays[f"in_{name}_inputs"], "mask": arrays[f"in_{name}_mask"] > 0}
  return made


def params_of(case: str, network: MMML, batch: dict) -> dict:
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False))
  return mmml_names.from_torch(network, golden.state_dict(case), shapes)["params"]


def forward(network: MMML, params, batch, **options):
  """The network's outputs, compiled: op by op, a first run takes several times as long."""
  return jax.jit(lambda p, b: network.apply({"params": p}, b, train=False, **options))(params, batch)


def close(got, arrays, name: str) -> None:
  """Compares with the golden array `name`, or the one stored thinned out under name_cN."""
  stored = next(key for key in arrays if key == name or (key.rpartition("_c")[0] == name and key[len(name) :] in STEPS))
  want = arrays[stored]
  got = np.asarray(got)[..., :: STEPS.get(stored[len(name) :], 1)].reshape(want.shape)
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0, err_msg=stored)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
  arrays = golden.arrays(case)
  network, batch = network_of(case), batch_of(arrays)
  params = params_of(case, network, batch)
  outputs, variables = forward(network, params, batch, mutable=["intermediates"])
  for head in "MTA":
    close(outputs[head], arrays, f"out_{head}")
  seen = variables["intermediates"]
  close(seen["audio_pooled"][0], arrays, "mid_audio_pooled")
  if network.fusion == "cme":
    for i, suffix in enumerate(("", "_context") if network.context else ("",)):
      for stream in ("text", "audio"):
        close(seen["cme"][f"{stream}_cls"][i], arrays, f"mid_cme_{stream}{suffix}_cls")
    if network.cme_version != "v1":
      close(seen["fused"][0], arrays, "mid_fused_input")


@pytest.mark.parametrize("case", CASES)
def test_golden_encoder_states(case):
  """The encoders inside the network: hidden states, pooled text, valid frames."""
  arrays = golden.arrays(case)
  network, batch = network_of(case), batch_of(arrays)
  params = params_of(case, network, batch)
  for suffix in ("", "_context") if network.context else ("",):
    text = forward(network.text_encoder, params["text_encoder"], batch[f"text{suffix}"])
    audio = forward(network, params, batch[f"audio{suffix}"], method=lambda m, *a, **k: m.encode_audio(*a, **k))
    close(text.hidden, arrays, f"mid_text{suffix}_hidden")
    close(text.pooled, arrays, f"mid_text{suffix}_pooler")
    close(audio.hidden, arrays, f"mid_audio{suffix}_hidden")
    np.testing.assert_array_equal(audio.mask.sum(axis=1), arrays[f"mid_audio{suffix}_frames"])


def test_bfloat16_stays_near():
  case = "mmml_en_cme_v1"
  arrays = golden.arrays(case)
  batch = batch_of(arrays)
  params = params_of(case, network_of(case), batch)
  text, audio = golden.config(case)["backbones"].values()
  half = network_of(
    case,
    text_encoder=bert.from_config({**text, "model_type": "roberta"}, compute_dtype="bfloat16"),
    audio_encoder=speech.from_config({**audio, "model_type": "data2vec-audio"}, padding="hf", compute_dtype="bfloat16"),
    compute_dtype="bfloat16",
  )
  outputs = forward(half, params, batch)
  for head in "MTA":
    want = arrays[f"out_{head}"][:, 0]
    assert outputs[head].dtype == jnp.float32
    assert np.max(np.abs(outputs[head] - want)) <= 2e-2 * np.max(np.abs(want))


def test_heads_and_towers_follow_tasks():
  batch = tiny.batch(context=True)
  for tasks, towers in (("T", {"text_encoder"}), ("A", {"audio_encoder"}), ("AM", {"text_encoder", "audio_encoder"})):
    network = tiny.mmml(tasks=tasks, context=True)
    params = tiny.shapes(network, batch)
    assert {name for name in params if name.endswith("encoder")} == towers
    outputs = jax.eval_shape(lambda p, n=network: n.apply({"params": p}, batch, train=False), params)
    assert set(outputs) == set(tasks)


@pytest.mark.parametrize("options", [{"fusion": "cc"}, *({"cme_version": v} for v in ("v1", "v2", "v3"))])
@pytest.mark.parametrize("context", [False, True])
def test_padding_is_invisible(options, context):
  """The same examples give the same scores in a larger box."""
  network = tiny.mmml(context=context, **options)
  small = tiny.batch(context=context)
  params = tiny.init(network, small)

  def widen(stream):
    extra = {"ids": 7, "mask": 7, "wave": 1600} if "ids" in stream else {"wave": 1600, "mask": 1600}
    return {name: np.pad(value, ((0, 0), (0, extra[name]))) for name, value in stream.items()}

  large = {
    name: widen(value) if isinstance(value, dict) and "mask" in value else value for name, value in small.items()
  }
  want = forward(network, params, small)
  got = forward(network, params, large)
  for head in want:
    np.testing.assert_allclose(got[head], want[head], atol=1e-5)


def test_an_empty_audio_context_is_left_out_by_default():
  """Row 1 of the tiny batch has none (MM9): what its waveform holds cannot matter."""
  batch = tiny.batch(context=True)
  network = tiny.mmml(context=True)
  params = tiny.init(network, batch)
  want = forward(network, params, batch)
  batch["audio_context"]["wave"][1] = 1.0
  got = forward(network, params, batch)
  for head in want:
    np.testing.assert_array_equal(got[head], want[head])
  silent = forward(tiny.mmml(context=True, empty_context="silent"), params, batch)
  assert abs(float(silent["M"][1] - want["M"][1])) > 1e-4
  np.testing.assert_allclose(np.delete(silent["M"], 1), np.delete(want["M"], 1), atol=1e-6)


def test_context_shares_the_cme_unless_told_otherwise():
  batch = tiny.batch(context=True)
  assert "cme_context" not in tiny.shapes(tiny.mmml(context=True), batch)
  assert "cme_context" in tiny.shapes(tiny.mmml(context=True, share_cme=False), batch)


def test_features_take_the_place_of_an_audio_encoder():
  batch = tiny.batch()
  with pytest.raises(UserError, match=r"bind MMML\.audio_encoder"):
    tiny.shapes(tiny.mmml(audio_encoder=None), batch)
  features = np.random.default_rng(0).standard_normal((8, 5, 20)).astype(np.float32)
  batch["audio"] = {"features": features, "mask": np.ones((8, 5), bool)}
  network = tiny.mmml(audio_encoder=None, head_width=4)
  outputs, _ = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), batch, train=False))
  assert outputs["M"].shape == (8,)


def test_every_trained_leaf_moves_and_the_loss_falls():
  batch = jax.tree.map(jnp.asarray, tiny.batch(context=True))
  network = tiny.mmml(context=True, cme_version="v3", dropout=0.0)
  params, objective = tiny.init(network, batch), MultiLoss()

  def loss(params):
    terms, _ = objective(network.apply({"params": params}, batch, train=False), batch, {}, epoch=1, train=True)
    return sum(jnp.mean(term) for term in terms.values())

  step = jax.jit(jax.value_and_grad(loss))
  first, gradient = step(params)
  still = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    if not np.any(leaf)
  ]
  # Softmax does not see a bias that all keys share.
  assert [path for path in still if not path.endswith("key/bias")] == []
  for _ in range(30):
    value, gradient = step(params)
    params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient)
  assert value < 0.7 * first


def test_losses_and_labels():
  outputs = {"M": jnp.array([1.0, 2.0]), "T": jnp.array([0.0, 0.0])}
  batch = {"labels": {"M": jnp.array([0.0, 4.0])}}
  losses, memory = MultiLoss()(outputs, batch, {}, epoch=1, train=True)
  np.testing.assert_array_equal(losses["M"], [1, 2])
  np.testing.assert_array_equal(losses["T"], [0, 4])  # MOSI: T learns M's label (MM17)
  assert memory == {}
  batch["labels"]["T"] = jnp.array([-1.0, 3.0])  # SIMS: its own
  losses, _ = MultiLoss(loss="l2")(outputs, batch, {}, epoch=1, train=True)
  np.testing.assert_array_equal(losses["M"], [1, 4])
  np.testing.assert_array_equal(losses["T"], [1, 9])
  with pytest.raises(UserError, match="'l1' or 'l2'"):
    MultiLoss(loss="l3")
