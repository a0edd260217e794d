"""Self-MM against the authors' PyTorch code, and the rules by which it generates labels."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_self_mm import batch_of, finite, network_of, stream

from mmjax.backbones import bert
from mmjax.errors import UserError
from mmjax.papers import self_mm_names
from mmjax.papers.self_mm import LabelGeneration, SelfMM
from mmjax.training.optimizers import Adam, Group

NAMES = {"M": "fusion", "T": "text", "A": "audio", "V": "vision"}


def outputs_of(trace, epoch: int, batch: int) -> dict:
  """What the network would give for one batch of the golden trace."""
  scores = {head: trace[f"in_{head}"][epoch, batch, :, 0] for head in NAMES}
  return scores | {f"{head}_feature": trace[f"in_Feature_{name[0]}"][epoch, batch] for head, name in NAMES.items()}


def test_golden_network():
  case = "self_mm_net_mosi"
  arrays, config = golden.arrays(case), golden.config(case)
  (text,) = config["backbones"].values()
  network = SelfMM(text_encoder=bert.from_config({**text, "model_type": "bert"}, pooler=False))
  ids, mask, types = arrays["in_text"].transpose(1, 0, 2)
  batch = {"text": {"ids": ids.astype(np.int32), "mask": mask > 0, "type_ids": types.astype(np.int32)}}
  for name in ("audio", "vision"):
    features = arrays[f"in_{name}"]
    batch[name] = {"features": features, "mask": np.arange(features.shape[1]) < arrays[f"in_{name}_lengths"][:, None]}
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False))
  variables = self_mm_names.from_torch(network, golden.state_dict(case), shapes)
  apply = jax.jit(lambda v, b: network.apply(v, b, train=False, mutable=["intermediates"]))
  outputs, seen = apply(variables, batch)
  for head, name in NAMES.items():
    np.testing.assert_allclose(outputs[head], arrays[f"out_{head}"][:, 0], atol=1e-4)
    np.testing.assert_allclose(outputs[f"{head}_feature"], arrays[f"out_Feature_{name[0]}"], atol=1e-4)
  for mid, ours in (("text_cls", "text"), ("audio_tower", "audio"), ("vision_tower", "vision")):
    np.testing.assert_allclose(seen["intermediates"][f"{ours}_vector"][0], arrays[f"mid_{mid}"], atol=1e-4)


@pytest.mark.parametrize(("rule", "zero_in_positive"), [("selfmm", True), ("mmsa", False)])
def test_golden_labels_centres_and_losses_after_every_batch(rule, zero_in_positive):
  trace = golden.arrays("self_mm_label_trace")
  objective = LabelGeneration(zero_in_positive=zero_in_positive)
  memory = objective.init({"M": trace["in_labels"]}, outputs_of(trace, 0, 0))
  call = jax.jit(lambda o, b, m, epoch: objective(o, b, m, epoch=epoch, train=True))
  for epoch, batch in np.ndindex(4, 3):
    index = trace["in_index"][epoch, batch]
    data = {"labels": {"M": trace["in_labels"][index]}, "index": index, "valid": np.ones(len(index), bool)}
    losses, memory = call(outputs_of(trace, epoch, batch), data, memory, np.int32(epoch + 1))
    where = f"{rule} epoch {epoch + 1} batch {batch + 1}"
    got = [np.mean(losses[head]) for head in NAMES]
    np.testing.assert_allclose(got, trace[f"out_{rule}_loss_MTAV"][epoch, batch], atol=1e-4, err_msg=where)
    if epoch < 2:  # SM7, SM7b
      np.testing.assert_array_equal(got[1:], 0, err_msg=where)
    for head, name in NAMES.items():
      stored = {"labels": f"label_{name}", "positive": f"center_{name}_pos", "negative": f"center_{name}_neg"}
      for ours, theirs in stored.items():
        want = trace[f"out_{rule}_{theirs}"][epoch, batch]
        np.testing.assert_allclose(memory[ours][head], want, atol=1e-4, err_msg=f"{where} {theirs}")
  assert call._cache_size() == 1  # the epoch is data


def memory_and_batch(rows: int = 3, size: int = 5, **options):
  objective = LabelGeneration(**options)
  rng = np.random.default_rng(3)
  outputs = {head: rng.standard_normal(rows).astype(np.float32) for head in NAMES}
  outputs |= {f"{head}_feature": rng.standard_normal((rows, 4)).astype(np.float32) for head in NAMES}
  labels = {"M": np.linspace(-2, 2, size).astype(np.float32)}
  memory = objective.init(labels, outputs)
  index = np.arange(rows, dtype=np.int32)
  batch = {"labels": {"M": labels["M"][index]}, "index": index, "valid": np.ones(rows, bool)}
  return objective, outputs, batch, memory


def test_a_class_without_members_keeps_its_centre():
  """SM9: the mean of no rows would be NaN and reach every label."""
  objective, outputs, batch, memory = memory_and_batch()
  memory["labels"] = jax.tree.map(lambda label: jnp.abs(label) + 1, memory["labels"])
  memory["negative"]["M"] = jnp.full(4, 7.0)
  for epoch in (1, 2, 3):
    losses, memory = objective(outputs, batch, memory, epoch=np.int32(epoch), train=True)
    assert finite((losses, memory))
    np.testing.assert_array_equal(memory["negative"]["M"], 7)


def test_padding_rows_leave_the_memory_alone():
  objective, outputs, batch, memory = memory_and_batch()
  padded = jax.tree.map(lambda x: np.concatenate([x, np.full_like(x[:2], 3)]), (outputs, batch))
  padded[1]["valid"][3:] = False
  for wrong in (-1, 0, 1000):
    padded[1]["index"][3:] = wrong
    want, got = memory, memory
    for epoch in (1, 2, 3):
      _, want = objective(outputs, batch, want, epoch=np.int32(epoch), train=True)
      _, got = objective(*padded, got, epoch=np.int32(epoch), train=True)
    jax.tree.map(np.testing.assert_array_equal, want, got)
  np.testing.assert_array_equal(want["features"]["M"][3:], 0)  # rows 3 and 4 were in no batch
  assert np.any(want["labels"]["A"] != memory["labels"]["A"])


def test_evaluation_has_one_term_and_leaves_the_memory_alone():
  objective, outputs, batch, memory = memory_and_batch()
  losses, after = objective(outputs, batch, memory, epoch=np.int32(3), train=False)
  assert set(losses) == {"M"}  # SM14
  assert after is memory
  assert set(objective.predictions(outputs)) == set("MTAV")


def test_distances():
  """SM5, by hand: |F - C| of (3, 4) from 0 is 5; the paper's is 25 / sqrt(2)."""
  feature, near, far = jnp.array([[3.0, 4.0]]), jnp.array([3.0, 3.0]), jnp.zeros(2)
  np.testing.assert_allclose(LabelGeneration().offset(feature, near, far), (5 - 1) / 1)
  squared = LabelGeneration(distance="sq_over_sqrt_d", alpha_eps=1.0)
  np.testing.assert_allclose(squared.offset(feature, near, far), (24 / 2**0.5) / (1 / 2**0.5 + 1), rtol=1e-6)
  with pytest.raises(UserError, match="'norm' or 'sq_over_sqrt_d'"):
    LabelGeneration(distance="cosine")


def test_generated_labels_stay_within_the_bound():
  objective, outputs, batch, memory = memory_and_batch(label_bound=0.5)
  memory["labels"] = jax.tree.map(lambda label: label / 4, memory["labels"])
  for epoch in range(1, 7):
    _, memory = objective(outputs, batch, memory, epoch=np.int32(epoch), train=True)
  assert all(np.max(np.abs(memory["labels"][head])) <= 0.5 for head in "TAV")


def test_human_labels_take_the_place_of_generated_ones():
  """SM17."""
  _, outputs, batch, _ = memory_and_batch()
  objective = LabelGeneration(human_labels=True)
  labels = {head: np.full(5, value, np.float32) for value, head in enumerate("MTAV")}
  memory = objective.init(labels, outputs)
  batch["labels"] = {head: label[:3] for head, label in labels.items()}
  for epoch in (1, 2, 3):
    losses, memory = objective(outputs, batch, memory, epoch=np.int32(epoch), train=True)
  np.testing.assert_array_equal(memory["labels"]["V"], 3)
  np.testing.assert_allclose(losses["A"], np.tanh(2) * np.abs(outputs["A"] - 2), rtol=1e-6)
  with pytest.raises(UserError, match="no labels of T, A, V"):
    objective.init({"M": labels["M"]}, outputs)


def test_five_groups_as_the_authors_have_them():
  """Every parameter is of one; BERT's biases and norms are those without decay."""
  groups = (
    Group(r"text_encoder/.*/(bias|scale)", 5e-5),
    Group(r"text_encoder/.*", 5e-5, 0.001),
    Group(r"audio/.*", 1e-3, 0.01),
    Group(r"vision/.*", 1e-4, 0.001),
    Group(r"[MTAV]/.*", 1e-3, 0.001),
  )
  shapes = tiny.shapes(network_of(text_encoder=tiny.bert(pooler=False)), batch_of())
  found = Adam(groups=groups).group_of(shapes)
  assert {group.pattern for group in jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, Group))} == {
    group.pattern for group in groups
  }
  assert found["text_encoder"]["embeddings"]["norm"]["scale"].weight_decay == 0
  assert found["text_encoder"]["embeddings"]["word"].weight_decay == 0.001
  assert found["audio"]["lstm"]["input_bias"].weight_decay == 0.01


def test_extracted_text_is_refused():
  batch = batch_of()
  batch["text"] = stream(6, 3, 8, 3)
  with pytest.raises(UserError, match="token ids"):
    tiny.shapes(network_of(), batch)
