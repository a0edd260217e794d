"""Do encoders come by name, and their weights from every layout in which people keep them?"""

import functools
import json
import shutil
from pathlib import Path

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from test_torch_file import mapping, tensor, write_legacy, write_zip

from mmjax.backbones import bert, pretrained, published
from mmjax.backbones.vision_layers import BatchNorm, batch_norm
from mmjax.errors import UserError
from mmjax.papers.m3 import ScoreLoss
from mmjax.training import mesh as meshes
from mmjax.training import step

CONFIG = golden.config("backbone_bert")["config"]["full"]
STATE = golden.state_dict("backbone_bert")
TEXT = {"ids": jnp.ones((1, 4), jnp.int32), "mask": jnp.ones((1, 4), bool)}
WAVE = {"wave": jnp.zeros((1, 16000)), "mask": jnp.ones((1, 16000), bool)}
IMAGE = {"image": jnp.zeros((1, 256, 256, 3))}


@pytest.fixture(autouse=True)
def without_network(monkeypatch, tmp_path):
  monkeypatch.setattr(pretrained, "_online", lambda: False)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


class Network(nn.Module):
  text_encoder: nn.Module | None = None
  audio_encoder: nn.Module | None = None
  more: tuple[nn.Module, ...] = ()

  @nn.compact
  def __call__(self, batch):
    found = [encoder(batch, train=False).pooled for encoder in (self.text_encoder, *self.more) if encoder]
    return nn.Dense(1, name="head")(sum(found))


def folder(path: Path, config: dict | None = CONFIG) -> Path:
  path.mkdir(parents=True)
  if config is not None:
    (path / "config.json").write_text(json.dumps(config))
  return path


def torch_bytes(state: dict[str, np.ndarray]):
  kinds = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage", np.dtype(np.int64): "LongStorage"}
  strides = {key: tuple(s // x.itemsize for s in np.zeros(x.shape, x.dtype).strides) for key, x in state.items()}
  return mapping({key: tensor(key, kinds[x.dtype], x.size, x.shape, strides[key]) for key, x in state.items()})


def write_bin(path: Path, state: dict[str, np.ndarray]) -> None:
  write_zip(path, torch_bytes(state), {key: x.tobytes() for key, x in state.items()})


def write_old_bin(path: Path, state: dict[str, np.ndarray]) -> None:
  write_legacy(path, torch_bytes(state), {key: (x.size, x.tobytes()) for key, x in state.items()})


def write_shards(path: Path, state: dict[str, np.ndarray], stem: str, suffix: str, write) -> None:
  keys = list(state)
  parts = {f"{stem}-00001-of-00002{suffix}": keys[:20], f"{stem}-00002-of-00002{suffix}": keys[20:]}
  for file, part in parts.items():
    write(path / file, {key: state[key] for key in part})
  index = {"metadata": {}, "weight_map": {key: file for file, part in parts.items() for key in part}}
  (path / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def write_safetensors(path: Path, state: dict[str, np.ndarray]) -> None:
  save_file(state, path)


LAYOUTS = {
  "safetensors": lambda path, state: write_safetensors(path / "model.safetensors", state),
  "safetensors shards": lambda path, state: write_shards(path, state, "model", ".safetensors", write_safetensors),
  "bin": lambda path, state: write_bin(path / "pytorch_model.bin", state),
  "old bin": lambda path, state: write_old_bin(path / "pytorch_model.bin", state),
  "bin shards": lambda path, state: write_shards(path, state, "pytorch_model", ".bin", write_bin),
}


@functools.cache
def initial() -> dict:
  network = Network(text_encoder=bert.from_config(CONFIG))
  return jax.jit(network.init)(jax.random.key(0), TEXT)["params"]


def restored(path: Path) -> tuple[dict, dict]:
  """Returns flat parameters before and after loading an encoder from the folder."""
  network = Network(text_encoder=pretrained.encoder(str(path)))
  flat = [traverse_util.flatten_dict(p, sep="/") for p in (initial(), pretrained.restore(network, initial()))]
  return flat[0], flat[1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  path = folder(tmp_path_factory.mktemp("bert") / "expected")
  LAYOUTS["safetensors"](path, STATE)
  return restored(path)


def test_weights_arrive_and_the_rest_stays(expected):
  before, after = expected
  assert before.keys() == after.keys()
  np.testing.assert_array_equal(after["text_encoder/pooler/kernel"], STATE["pooler.dense.weight"].T)
  for key, value in after.items():
    if key.startswith("text_encoder/"):
      assert isinstance(value, np.ndarray), key
      assert value.flags.owndata, key
      assert value.flags.c_contiguous, key
    else:
      assert value is before[key]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_every_layout_gives_the_same(tmp_path, expected, layout, prefix):
  path = folder(tmp_path / "model")
  state = {prefix + key: value for key, value in STATE.items()}
  if prefix:
    state["cls.predictions.bias"] = np.zeros(60, np.float32)  # a head, which is not the encoder's
  LAYOUTS[layout](path, state)
  after = restored(path)[1]
  for key, value in expected[1].items():
    np.testing.assert_array_equal(after[key], value, err_msg=key)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "old bin"])
def test_half_precision(tmp_path, expected, layout):
  path = folder(tmp_path / "model")
  LAYOUTS[layout](path, {key: value.astype(np.float16) for key, value in STATE.items()})
  after = restored(path)[1]
  assert all(value.dtype == np.float32 for value in after.values())
  np.testing.assert_array_equal(
    after["text_encoder/pooler/kernel"], STATE["pooler.dense.weight"].T.astype(np.float16).astype(np.float32)
  )


def test_safetensors_are_preferred(tmp_path, expected):
  path = folder(tmp_path / "model")
  LAYOUTS["safetensors"](path, STATE)
  (path / "pytorch_model.bin").write_bytes(b"never read")
  np.testing.assert_array_equal(
    restored(path)[1]["text_encoder/pooler/kernel"], expected[1]["text_encoder/pooler/kernel"]
  )


def test_several_encoders_and_shapes(tmp_path):
  path = folder(tmp_path / "model")
  LAYOUTS["safetensors"](path, STATE)
  encoder = pretrained.encoder(str(path))
  network = Network(text_encoder=encoder, more=(encoder.clone(), encoder.clone(pretrained=None)))
  shapes = jax.eval_shape(network.init, jax.random.key(0), TEXT)["params"]
  assert set(shapes) == {"text_encoder", "more_0", "more_1", "head"}
  params = pretrained.restore(network, shapes)
  kinds = {key: type(jax.tree.leaves(part)[0]) for key, part in params.items()}
  assert kinds["text_encoder"] is kinds["more_0"] is np.ndarray
  assert kinds["more_1"] is kinds["head"] is jax.ShapeDtypeStruct
  del shapes["text_encoder"]
  assert "text_encoder" not in pretrained.restore(network, shapes)


def test_a_file_without_pooler_leaves_it_new(tmp_path, capsys):
  path = folder(tmp_path / "model")
  LAYOUTS["safetensors"](path, {key: value for key, value in STATE.items() if "pooler" not in key})
  before, after = restored(path)
  assert after["text_encoder/pooler/kernel"] is before["text_encoder/pooler/kernel"]
  assert "no weights for its pooler" in capsys.readouterr().err


def test_keys_that_do_not_fit_are_all_listed(tmp_path):
  path = folder(tmp_path / "model")
  state = {key: value for key, value in STATE.items() if not key.startswith("encoder.layer.1.output.dense")}
  LAYOUTS["bin"](path, {**state, "encoder.layer.0.surprise": np.zeros(2, np.float32)})
  with pytest.raises(UserError, match=r"not known: encoder\.layer\.0\.surprise(.*\n)+.*missing: .*\n.*missing: "):
    restored(path)


def test_overrides(tmp_path):
  path = folder(tmp_path / "model")
  encoder = pretrained.encoder(str(path), compute_dtype="bfloat16")
  assert (encoder.pretrained, encoder.compute_dtype) == (str(path), "bfloat16")
  assert pretrained.encoder(str(path), pretrained=None).pretrained is None
  with pytest.raises(UserError, match="bananas"):
    pretrained.encoder(str(path), bananas=1)


def test_check(tmp_path):
  path = folder(tmp_path / "model")
  network = Network(text_encoder=pretrained.encoder(str(path)))
  with pytest.raises(UserError, match=r"found none of model\.safetensors"):
    pretrained.check(network)
  pretrained.check(network, {"audio"})
  with pytest.raises(UserError, match="found none of"):
    pretrained.check(network, {"text"})
  LAYOUTS["bin shards"](path, STATE)
  pretrained.check(network, {"text"})


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("roberta-bass", r"(.*\n)*Did you mean 'roberta-base'"),
    ("whisper-tinny", r"(.*\n)*Did you mean 'openai/whisper-tiny'"),
    ("/no/such/folder", "no such folder, no known name, and the Hugging Face hub cannot be reached"),
  ],
)
def test_unknown_name(name, message):
  with pytest.raises(UserError, match=message):
    pretrained.encoder(name)


def test_known_name_without_network_says_how_to_get_it():
  with pytest.raises(UserError) as error:
    pretrained.weights("facebook/data2vec-audio-base")
  assert "hf download facebook/data2vec-audio-base --local-dir data2vec-audio-base" in str(error.value)
  assert '  AUDIO_ENCODER = "/path/to/data2vec-audio-base"' in str(error.value)


def test_the_cache_of_the_hub_is_used_under_either_name(tmp_path):
  repository = tmp_path / "hub" / "models--FacebookAI--roberta-base"
  LAYOUTS["safetensors"](folder(repository / "snapshots" / "abc"), STATE)
  (repository / "refs").mkdir()
  (repository / "refs" / "main").write_text("abc")
  assert set(pretrained.weights("roberta-base")) == set(STATE)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, r"a folder without config\.json"),
    ("{", r"config\.json is not valid JSON"),
    ("[]", "holds a list"),
    ('{"model_type": "gpt2"}', "model_type 'gpt2'.*expected one of bert"),
    ("{}", "model_type None"),
    ('{"model_type": "bert"}', "lacks '"),
    ('{"model_type": "bert", "hidden_act": "relu"}', "encoder '.*model': found hidden_act 'relu'"),
  ],
)
def test_folder_mistakes(tmp_path, text, message):
  path = folder(tmp_path / "model", None)
  if text is not None:
    (path / "config.json").write_text(text)
  with pytest.raises(UserError, match=message):
    pretrained.encoder(str(path))


def test_damaged_weights(tmp_path):
  path = folder(tmp_path / "model")
  for file in ("model.safetensors", "pytorch_model.bin"):
    LAYOUTS["safetensors" if file == "model.safetensors" else "bin"](path, STATE)
    whole = (path / file).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1]):
      (path / file).write_bytes(content)
      with pytest.raises(UserError, match=rf"{file} is damaged or cut short"):
        pretrained.weights(str(path))
    (path / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
      pretrained.weights(str(path))
    (path / file).unlink()


def test_shard_mistakes(tmp_path):
  path = folder(tmp_path / "model")
  LAYOUTS["bin shards"](path, STATE)
  (path / "pytorch_model-00002-of-00002.bin").unlink()
  with pytest.raises(UserError, match=r"missing: pytorch_model-00002-of-00002\.bin"):
    pretrained.weights(str(path))
  for index in ({}, {"weight_map": {"a": "../../secret.bin"}}, {"weight_map": {"a": 3}}):
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no usable weight_map"):
      pretrained.weights(str(path))


def test_weights_are_copies(tmp_path):
  path = folder(tmp_path / "model")
  LAYOUTS["bin"](path, STATE)
  after = restored(path)[1]
  shutil.rmtree(path)
  np.testing.assert_array_equal(after["text_encoder/pooler/kernel"], STATE["pooler.dense.weight"].T)


# Counted with transformers 5.23 (the models' own parameters, with the pooler and whisper's positions).
COUNTS = {
  "roberta-base": 124_645_632,
  "roberta-large": 355_359_744,
  "bert-base-uncased": 109_482_240,
  "bert-base-chinese": 102_267_648,
  "hfl/chinese-roberta-wwm-ext": 102_267_648,
  "sentence-transformers/all-MiniLM-L6-v2": 22_713_216,
  "openai/whisper-tiny": 8_208_384,
  "openai/whisper-tiny.en": 8_208_384,
  "openai/whisper-base": 20_590_592,
  "openai/whisper-base.en": 20_590_592,
  "openai/whisper-small": 88_154_112,
  "openai/whisper-small.en": 88_154_112,
  "openai/whisper-medium": 307_216_384,
  "openai/whisper-large-v3": 636_968_960,
  "facebook/data2vec-audio-base": 93_164_288,
  "facebook/data2vec-audio-base-960h": 93_164_288,
  "facebook/data2vec-audio-large": 313_276_416,
  "facebook/data2vec-audio-large-960h": 313_276_416,
  "facebook/wav2vec2-base": 94_371_712,
  "facebook/wav2vec2-base-960h": 94_371_712,
  "facebook/wav2vec2-large": 315_428_992,
  "facebook/wav2vec2-large-960h": 315_428_992,
  "facebook/hubert-base-ls960": 94_371_712,
  "TencentGameMate/chinese-hubert-base": 94_371_712,
  # Without the classifier, the decoder and the predictions of pretraining.
  "wav2vec_large": 29_390_848,
  "microsoft/resnet-18": 11_176_512,
  "microsoft/resnet-34": 21_284_672,
  "timm/resnet18.tv_in1k": 11_176_512,
  "timm/resnet34.tv_in1k": 21_284_672,
  "fabnet": 4_887_904,
}


@pytest.mark.parametrize("name", published.CONFIGS)
def test_known_names_have_the_published_size(name):
  assert pretrained.encoder(name).pretrained == name
  kind = pretrained.MODULES[published.CONFIGS[name]["model_type"]]
  # SpecAugment, off by default, has a parameter of its own.
  encoder = pretrained.encoder(name, **({"mask_time_prob": 0.05} if kind == "speech" else {}))
  example = {"bert": TEXT, "resnet": IMAGE, "fabnet": IMAGE}.get(kind, WAVE)
  shapes = jax.eval_shape(lambda key: encoder.init(key, example, train=False), jax.random.key(0))["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_whisper_leaves_its_decoder_behind(tmp_path, prefix):
  path = folder(tmp_path / "model", golden.config("backbone_whisper_encoder")["config"]["full"])
  state = {prefix + key: value for key, value in golden.state_dict("backbone_whisper_encoder").items()}
  state |= {prefix + "decoder.embed_tokens.weight": np.zeros((2, 2), np.float32)}
  LAYOUTS["safetensors"](path, state)
  network = Network(audio_encoder=pretrained.encoder(str(path)))
  wave = {"wave": jnp.zeros((1, 8000)), "mask": jnp.ones((1, 8000), bool)}
  init = functools.partial(network.audio_encoder.init, train=False)
  params = {"audio_encoder": jax.eval_shape(init, jax.random.key(0), wave)["params"]}
  found = pretrained.restore(network, params)["audio_encoder"]
  np.testing.assert_array_equal(found["positions"], state[prefix + "encoder.embed_positions.weight"])


def test_aliases_are_known():
  assert set(published.ALIASES.values()) <= set(published.CONFIGS)
  assert pretrained.encoder("FacebookAI/roberta-base").pretrained == "FacebookAI/roberta-base"


TABLE = batch_norm("norm", "norm")  # of `Normalized`, whose file has torch's names


class Normalized(nn.Module):
  pretrained: str | None = None

  @nn.compact
  def __call__(self, x, *, train):
    return BatchNorm(name="norm")(x, None, train=train)


class Images(nn.Module):
  vision_encoder: nn.Module

  @nn.compact
  def __call__(self, batch, *, train):
    x = BatchNorm(name="own")(self.vision_encoder(batch["image"], train=train), train=train)
    return {"M": nn.Dense(1, name="score")(x)[:, 0]}


def test_a_run_starts_from_the_published_statistics(tmp_path):
  names = ("weight", "bias", "running_mean", "running_var")
  values = {f"norm.{name}": np.full(3, i + 2, np.float32) for i, name in enumerate(names)}
  write_safetensors(folder(tmp_path / "model") / "model.safetensors", values)
  network = Images(Normalized(pretrained=str(tmp_path / "model")))
  state, _ = step.create_state(
    network,
    ScoreLoss(),
    optax.sgd(0.1),
    frozen=jax.tree.map(lambda _: False, step.abstract(network, {"image": np.zeros((2, 3))})["params"]),
    accumulate=1,
    labels={"M": np.zeros(2)},
    batch={"image": np.zeros((2, 3), np.float32)},
    key=jax.random.key(0),
    mesh=meshes.make(devices=jax.devices()[:1]),
    restore=lambda tree: pretrained.restore(network, tree),
  )
  np.testing.assert_array_equal(state.params["vision_encoder"]["norm"]["scale"], [2, 2, 2])
  statistics = state.model_state["batch_stats"]
  np.testing.assert_array_equal(statistics["vision_encoder"]["norm"]["mean"], [4, 4, 4])
  np.testing.assert_array_equal(statistics["vision_encoder"]["norm"]["var"], [5, 5, 5])
  np.testing.assert_array_equal(statistics["own"]["var"], [1, 1, 1])
