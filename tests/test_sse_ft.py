"""SSE-FT against the authors' PyTorch code, and the rules of its options."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.papers import sse_ft, sse_ft_names
from mmjax.papers.sse_ft import SSEFT, EmotionLoss

LETTERS = {"t": "text", "a": "audio", "v": "vision"}
TINY = {"layers": 1, "cross_layers": 1, "heads": 2, "ffn_size": 8, "max_audio": 9, "max_vision": 7}


def network_of(case: str, **overrides) -> SSEFT:
  config = golden.config(case)["config"]
  modalities = sse_ft.MODALITIES if config["all_in"] else ("text", "audio")
  options = {
    "modalities": modalities,
    "task": "softmax",
    "classes": config["num_classes"],
    "ffn_size": config["encoder_ffn_embed_dim"],
    "heads": config["encoder_attention_heads"],
    "max_audio": config["max_positions_a"],
    "max_vision": config["max_positions_v"],
  }
  return SSEFT(**{**options, **overrides})


def batch_of(case: str) -> dict:
  arrays = golden.arrays(case)
  masks = {"text": arrays["mid_padding_mask_text"], "audio": arrays["mid_padding_mask_audio"][:, 1:]}
  if "mid_padding_mask_video" in arrays:
    masks["vision"] = arrays["mid_padding_mask_video"][:, 1:]
  return {
    name: {"features": arrays["in_video" if name == "vision" else f"in_{name}"], "mask": mask == 0}
    for name, mask in masks.items()
  }


def params_of(case: str, network: SSEFT, batch) -> dict:
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False))
  source = golden.state_dict(case) | {"model_wav2vec.feature_extractor.x": np.zeros(1)}
  return sse_ft_names.from_torch(network, source, shapes)["params"]


@pytest.mark.parametrize("case", ["sse_ft_all_in", "sse_ft_text_audio"])
def test_golden(case):
  arrays, network, batch = golden.arrays(case), network_of(case), batch_of(case)
  params = params_of(case, network, batch)
  run = jax.jit(lambda p, b: network.apply({"params": p}, b, train=False, mutable=["intermediates"]))
  outputs, variables = run(params, batch)
  seen = {name: value for name, (value,) in variables["intermediates"].items()}
  found = {"out_logits": outputs["class"]}
  for letter, name in LETTERS.items():
    theirs = {"t": "text", "a": "aud", "v": "vid"}[letter]
    if name in network.streams:
      found[f"out_rep_j_{theirs}"] = seen[f"{name}_vector"]
      found |= {
        f"out_rep_{letter}2{other}_r": seen[f"{name}_from_{LETTERS[other]}_vector"]
        for other in LETTERS
        if other != letter and LETTERS[other] in network.streams
      }
      if name != "text":
        authors = {"audio": "audio", "vision": "video"}[name]
        found |= {f"mid_{authors}_{kind}": seen[f"{name}_{kind}"] for kind in ("embedded", "encoded")}
  # Whole sequences of the cross-modal stacks, of which the network runs the first position only.
  for name, other in (("text", "audio"), ("audio", "text")):
    states = {"text": batch["text"]["features"] * batch["text"]["mask"][..., None], "audio": seen["audio_encoded"]}
    masks = {"text": batch["text"]["mask"], "audio": arrays["mid_padding_mask_audio"] == 0}
    stack = sse_ft.Stack(network.cross_layers, network.heads, network.ffn_size, 0.0, "float32")
    found[f"mid_{name}_from_{other}"] = stack.apply(
      {"params": params[f"{name}_from_{other}"]}, states[name], states[other], masks[other], train=False
    )
  compared = {name for name in arrays if not name.startswith(("in_", "mid_padding"))}
  assert found.keys() == compared
  for name, value in found.items():
    expected = arrays[name]
    if name.endswith("embedded"):  # stored as it is before padded steps are zeroed
      stream = name.split("_")[1]
      expected = expected * (arrays[f"mid_padding_mask_{stream}"] == 0)[..., None]
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["sse_ft_all_in", "sse_ft_text_audio"])
def test_bfloat16_stays_close(case):
  network, batch, expected = (
    network_of(case, compute_dtype="bfloat16"),
    batch_of(case),
    golden.arrays(case)["out_logits"],
  )
  params = params_of(case, network, batch)
  found = jax.jit(lambda p, b: network.apply({"params": p}, b, train=False))(params, batch)["class"]
  assert np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()


def tiny_batch(rows: int = 4, widths=(6, 4, 4), seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  batch: dict = {}
  for name, width, most in zip(sse_ft.MODALITIES, widths, (5, 8, 6), strict=True):
    mask = np.arange(most) < rng.integers(2, most + 1, rows)[:, None]
    batch[name] = {"features": rng.standard_normal((rows, most, width)).astype(np.float32), "mask": mask}
  batch["labels"] = {"M": np.float32([-1, 0.5, 2, 0]), "class": np.int32([0, 1, 2, 1])}
  batch["valid"] = np.ones(rows, bool)
  return batch


SUBSETS = [("text",), ("vision",), ("text", "vision"), ("audio", "vision"), ("vision", "text", "audio")]


@pytest.mark.parametrize("modalities", SUBSETS)
def test_left_out_modalities_are_not_there(modalities):
  network, batch = SSEFT(modalities=modalities, **TINY), tiny_batch()
  assert network.streams == set(modalities)
  batch = {name: batch[name] for name in modalities}
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False))["params"]
  assert {part for name in shapes for part in name.split("_")} & set(sse_ft.MODALITIES) == (
    set() if modalities == ("text",) else set(modalities)
  )
  widths = {"text": 6, "audio": 4, "vision": 4}
  assert shapes["dense"]["kernel"].shape[0] == sum(widths[name] for name in modalities)
  pairs = len(modalities) * (len(modalities) - 1)
  assert sum("_from_" in name for name in shapes) == pairs


@pytest.mark.parametrize("text_vector", ["first", "mean"])
def test_padding_is_invisible(text_vector):
  network, batch = SSEFT(text_vector=text_vector, start_init="normal", **TINY), tiny_batch()
  run = jax.jit(lambda p, b: network.apply({"params": p}, b, train=False)["M"])
  params = jax.jit(lambda: network.init(jax.random.key(0), batch, train=False))()["params"]
  found = run(params, batch)
  for name in sse_ft.MODALITIES:
    stream = batch[name]
    batch[name] = {**stream, "features": np.where(stream["mask"][..., None], stream["features"], 7)}
  np.testing.assert_allclose(run(params, batch), found, atol=1e-6)
  lengths = {name: int(batch[name]["mask"][1].sum()) for name in sse_ft.MODALITIES}
  alone = {name: {key: value[1:2, : lengths[name]] for key, value in batch[name].items()} for name in sse_ft.MODALITIES}
  np.testing.assert_allclose(run(params, alone)[0], found[1], atol=1e-5)


@pytest.mark.parametrize(("start_init", "zero"), [("zeros", True), ("normal", False)])
def test_start_tokens_begin_at_zero(start_init, zero):
  network = SSEFT(modalities=("audio",), start_init=start_init, **TINY)
  params = jax.jit(lambda: network.init(jax.random.key(0), tiny_batch(), train=False))()["params"]
  assert (np.abs(params["audio_start"]).max() == 0) == zero


@pytest.mark.parametrize(("case", "shape"), [("mosei_l1", (-1,)), ("meld", (-1, 7)), ("iemocap_binary", (-1, 4, 2))])
def test_losses_are_the_authors(case, shape):
  stored = golden.config("sse_ft_losses")["tasks"][case]
  logits = np.float32(stored["logits"])
  head = "M" if case == "mosei_l1" else "class"
  label = {"M": np.float32, "class": np.int32}[head](stored["targets"])

  def total(logits):
    outputs = {head: logits.reshape(shape)}
    terms, _ = EmotionLoss()(outputs, {"labels": {head: label}}, {}, epoch=jnp.int32(1), train=True)
    assert terms[head].shape == (len(label),)
    return terms[head].sum()

  loss, gradient = jax.value_and_grad(total)(logits)
  np.testing.assert_allclose(loss, stored["loss"], rtol=1e-6)
  np.testing.assert_allclose(gradient / len(label), stored["gradient_of_loss_over_sample_size"], atol=1e-6)
  predictions = EmotionLoss().predictions({head: logits.reshape(shape)})[head]
  correct = stored["logging_output"]["ncorrect"]
  if case == "meld":
    assert (predictions.argmax(axis=1) == label).sum() == correct
  elif case == "iemocap_binary":
    assert predictions.shape == (6, 4)
    assert ((predictions > 0) == (label[:, None] == np.arange(4))).sum() == correct


@pytest.mark.parametrize(("task", "classes"), [("softmax", 3), ("binary", 3)])
def test_loss_falls_and_everything_moves(task, classes):
  # The smaller network compiles quickly.
  modalities = sse_ft.MODALITIES if task == "softmax" else ("text",)
  network = SSEFT(modalities=modalities, task=task, classes=classes, dropout=0.0, **TINY)
  batch, objective = tiny_batch(), EmotionLoss()
  start = jax.jit(lambda: network.init(jax.random.key(0), batch, train=False))()["params"]

  @jax.jit
  def step(params):
    def loss(params):
      outputs = network.apply({"params": params}, batch, train=True, rngs={"dropout": jax.random.key(1)})
      terms, _ = objective(outputs, batch, {}, epoch=jnp.int32(1), train=True)
      return sum(jnp.mean(term) for term in terms.values())

    value, gradient = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

  params, losses = start, []
  for _ in range(25):
    value, params = step(params)
    losses.append(float(value))
  assert losses[-1] < 0.9 * losses[0]
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, start)
  # The bias of a key adds the same to every score of a query, which softmax takes no notice of.
  still = [path for path, value in jax.tree_util.tree_leaves_with_path(moved) if not value]
  assert all("key" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path) for path in still)


def test_mistakes_are_named():
  for options, message in (
    ({"modalities": ("text", "video")}, "SSEFT.modalities"),
    ({"modalities": ()}, "SSEFT.modalities"),
    ({"task": "l1"}, "SSEFT.task"),
    ({"task": "softmax"}, "SSEFT.classes"),
    ({"start_init": "ones"}, "SSEFT.start_init"),
  ):
    with pytest.raises(UserError, match=message):
      SSEFT(**options)
  network = SSEFT(**{**TINY, "max_audio": 8})
  with pytest.raises(ValueError, match="8 audio frames, expected at most SSEFT.max_audio - 1 = 7"):
    jax.eval_shape(lambda: network.init(jax.random.key(0), tiny_batch(), train=False))
