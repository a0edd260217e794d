"""Is Google's TensorFlow checkpoint of BERT the encoder that the same weights give in torch's names?"""

import json
import re
import shutil
from pathlib import Path

import golden
import jax
import numpy as np
import pytest
from test_bert import text_of

from mmjax.backbones import pretrained, tf_checkpoint
from mmjax.data import text
from mmjax.errors import UserError

CASE = "backbone_bert"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "我", "们", "cafe"]
# What Google's bert_config.json says, in which nothing names the kind of model.
SAYS = (
  "attention_probs_dropout_prob",
  "hidden_act",
  "hidden_dropout_prob",
  "hidden_size",
  "initializer_range",
  "intermediate_size",
  "max_position_embeddings",
  "num_attention_heads",
  "num_hidden_layers",
  "type_vocab_size",
  "vocab_size",
)


def google_name(key: str) -> str:
  key = re.sub(r"encoder\.layer\.(\d+)", r"encoder.layer_\1", key)
  key = re.sub(r"LayerNorm\.weight", "LayerNorm.gamma", key)
  key = re.sub(r"LayerNorm\.bias", "LayerNorm.beta", key)
  key = re.sub(r"_embeddings\.weight", "_embeddings", key)
  return "bert/" + re.sub(r"\.weight", ".kernel", key).replace(".", "/")


def variables() -> dict[str, np.ndarray]:
  """Returns the golden weights under Google's names, with what else such a file may hold."""
  state = golden.state_dict(CASE)
  found = {google_name(key): x.T if google_name(key).endswith("/kernel") else x for key, x in state.items()}
  slots = {f"{name}/adam_{m}": np.zeros_like(x) for name, x in found.items() if "layer_0" in name for m in "mv"}
  heads = {"cls/predictions/output_bias": np.zeros(3, np.float32), "cls/seq_relationship/output_bias": np.zeros(2)}
  return {**found, **slots, **heads, "global_step": np.int64(1000)}


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
  import tensorflow as tf

  folder.mkdir()
  prefix = str(folder / "bert_model.ckpt")
  names = list(tensors)
  tf.raw_ops.SaveV2(
    prefix=prefix,
    tensor_names=names,
    shape_and_slices=[""] * len(names),
    tensors=[tf.constant(np.ascontiguousarray(tensors[name])) for name in names],
  )
  config = golden.config(CASE)["config"]["full"]
  (folder / "bert_config.json").write_text(json.dumps({key: config[key] for key in SAYS}))
  (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
  return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return write(tmp_path_factory.mktemp("tf") / "uncased_L-3_H-48_A-4", variables())


class Network(pretrained.nn.Module):
  text_encoder: pretrained.nn.Module

  def __call__(self, batch):
    return self.text_encoder(batch, train=False)


def restored(place: Path) -> tuple[Network, dict]:
  network = Network(pretrained.encoder(str(place)))
  shapes = jax.eval_shape(network.init, jax.random.key(0), text_of(CASE))["params"]
  return network, pretrained.restore(network, shapes)


def test_gives_the_outputs_of_the_same_weights(place):
  network, params = restored(place)
  pretrained.check(network, {"text"})
  encoded = jax.jit(lambda p, batch: network.apply({"params": p}, batch))(params, text_of(CASE))
  arrays = golden.arrays(CASE)
  np.testing.assert_allclose(encoded.hidden, arrays["out_last_hidden_state"], atol=1e-4, rtol=0)
  np.testing.assert_allclose(encoded.pooled, arrays["out_pooler_output"], atol=1e-4, rtol=0)


def test_files_of_hugging_face_come_first(place, tmp_path):
  both = shutil.copytree(place, tmp_path / "both")
  assert tf_checkpoint.alone(both)
  config = {**golden.config(CASE)["config"]["full"], "num_hidden_layers": 1}
  (both / "config.json").write_text(json.dumps(config))
  assert pretrained.encoder(str(both)).num_layers == 1
  assert not tf_checkpoint.alone(both)


def test_what_does_not_fit_is_listed(tmp_path):
  tensors = variables()
  del tensors["bert/encoder/layer_1/output/dense/kernel"]
  with pytest.raises(UserError, match=r"not known: surprise(.*\n)+.*missing: layer_1/ffn_out/kernel"):
    restored(write(tmp_path / "bert", {**tensors, "bert/surprise": np.zeros(2, np.float32)}))


def test_damage(place, tmp_path):
  copy = shutil.copytree(place, tmp_path / "copy")
  data, index = copy / "bert_model.ckpt.data-00000-of-00001", copy / "bert_model.ckpt.index"
  whole = data.read_bytes()
  data.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match="damaged or cut short"):
    restored(copy)
  data.unlink()
  with pytest.raises(UserError, match="without its data"):
    pretrained.check(Network(pretrained.encoder(str(copy))))
  data.write_bytes(whole)
  index.write_bytes(index.read_bytes()[:40])
  with pytest.raises(UserError, match="damaged or cut short"):
    pretrained.weights(str(copy))
  index.unlink()
  with pytest.raises(UserError, match=r"found none of .*bert_model\.ckpt\.index"):
    pretrained.weights(str(copy))


@pytest.mark.parametrize(("more", "ids"), [([], [2, 5, 6, 7, 8, 9, 10, 3]), (["Hello"], [2, 11, 6, 7, 8, 9, 1, 3])])
def test_the_tokenizer_of_its_vocabulary(place, tmp_path, more, ids):
  """A vocabulary with upper case keeps it, and accents with it."""
  copy = shutil.copytree(place, tmp_path / "copy")
  (copy / "vocab.txt").write_text("".join(f"{word}\n" for word in [*WORDS, *more]), encoding="utf-8")
  tokenizer = text.load_tokenizer(str(copy))
  assert text.tokenize(tokenizer, ["Hello worlds 我们 Café"], max_tokens=20)[0].tolist() == ids
  assert tokenizer.pad_token_id == 0
