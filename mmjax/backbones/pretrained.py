"""Published encoders by name: the network from its configuration, the weights from a folder or the hub.

A name is a local folder with config.json, one with Google's TensorFlow checkpoint of BERT, one of the names in
`published.py` (built without a network), or any name on the Hugging Face hub. The hub's cache is used as it is; only
what it lacks is downloaded.
"""

import dataclasses
import difflib
import functools
import importlib
import json
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from mmjax.backbones import published, tf_checkpoint, torch_file
from mmjax.backbones.convert import convert
from mmjax.errors import UserError

MODULES = {
  "bert": "bert",
  "roberta": "bert",
  "xlm-roberta": "bert",
  "whisper": "whisper",
  "wav2vec2": "speech",
  "hubert": "speech",
  "data2vec-audio": "speech",
  "wavlm": "speech",
  "wav2vec1": "wav2vec1",
  "resnet": "resnet",
  "fabnet": "fabnet",
}
# Where an encoder sits in a state dict that also has heads or a decoder.
PREFIXES = (
  "bert.",
  "roberta.",
  "model.encoder.",
  "wav2vec2.",
  "hubert.",
  "data2vec_audio.",
  "wavlm.",
  "resnet.",
  tf_checkpoint.PREFIX,
)
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LOCAL = (*WEIGHTS, tf_checkpoint.INDEX)  # of several files, and nothing on the hub
MODALITIES = ("text", "audio", "vision")


def encoder(name: str, **overrides: Any) -> nn.Module:
  """Returns the encoder `name` describes, with `pretrained=name`; `overrides` replace its fields.

  Raises `UserError` for a name that is neither a folder, nor known, nor on the hub.
  """
  config = _config(name)
  kind = config.get("model_type")
  if kind not in MODULES:
    raise UserError(
      f"encoder {name!r}: found model_type {kind!r} in its {CONFIG}, expected one of {', '.join(MODULES)}."
    )
  backbone = importlib.import_module(f"mmjax.backbones.{MODULES[kind]}")
  try:
    return backbone.from_config(config, **{"pretrained": name, **overrides})
  except UserError as error:
    raise UserError(f"encoder {name!r}: {error}") from None
  except KeyError as error:
    raise UserError(f"encoder {name!r}: {CONFIG} of a {kind} model lacks {error}.") from error
  except TypeError as error:
    raise UserError(f"encoder {name!r}: {error}. Overrides given: {sorted(overrides) or 'none'}.") from error


def weights(name: str) -> Mapping[str, np.ndarray]:
  """Returns the state dict of `name`, read array by array as it is asked for; floats come as float32.

  Raises `UserError` if there is none, or if a file is missing, damaged or not what it says.
  """
  readers: dict[str, Callable[[], np.ndarray]] = {}
  for path in _weight_files(name):
    if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
      raise UserError(f"{path} is a Git LFS pointer, not the weights. Get the file itself: git lfs pull")
    readers.update(READERS.get(path.suffix, _torch)(path))
  return _Weights(readers)


def restore(network: nn.Module, params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `params` with the published weights of every encoder among the fields of `network`.

  Arrays of a loaded encoder are float32 numpy arrays; what has no published weights stays as it is.
  """
  params = dict(params)
  for name, module in _modules(network):
    if name not in params:
      continue
    source = getattr(module, "pretrained", None)
    params[name] = _load(module, params[name], source) if source else restore(module, params[name])
  return params


def check(network: nn.Module, streams: Collection[str] | None = None) -> None:
  """Raises `UserError` if the weights of an encoder that `streams` need cannot be had; downloads those it can.

  The fields of the network say what they encode: `text_encoder` is not needed without the stream "text".
  """
  for field, module in _modules(network):
    modality = field.split("_")[0]
    if streams is not None and modality in MODALITIES and modality not in streams:
      continue
    source = getattr(module, "pretrained", None)
    if source:
      weights(source)
    else:
      check(module, streams)


class _Weights(Mapping[str, np.ndarray]):
  def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
    self._readers = readers

  def __getitem__(self, key: str) -> np.ndarray:
    value = self._readers[key]()
    # bfloat16 is not a float to numpy ("V").
    return value.astype(np.float32, copy=False) if value.dtype.kind in "fV" else value

  def __iter__(self) -> Iterator[str]:
    return iter(self._readers)

  def __len__(self) -> int:
    return len(self._readers)


def _safetensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
  from safetensors import SafetensorError, safe_open

  try:
    file = safe_open(path, framework="numpy")
    return {key: functools.partial(file.get_tensor, key) for key in file.keys()}  # noqa: SIM118
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is damaged or cut short ({error}). Get the file again.") from None


def _torch(path: Path) -> dict[str, Callable[[], np.ndarray]]:
  return {key: functools.partial(np.asarray, value) for key, value in torch_file.tensors(path).items()}


READERS = {".safetensors": _safetensors, ".index": tf_checkpoint.readers}


def _modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
  """Yields the submodules among the fields of `network`, each with the name that its parameters have."""
  for field in dataclasses.fields(network):
    value = getattr(network, field.name)
    if field.name == "parent":
      continue
    if isinstance(value, nn.Module):
      yield value.name or field.name, value
    elif isinstance(value, (tuple, list)):
      for i, item in enumerate(value):
        if isinstance(item, nn.Module):
          yield item.name or f"{field.name}_{i}", item


def _load(module: nn.Module, params: Mapping[str, Any], name: str) -> dict[str, Any]:
  source = weights(name)
  prefixes = (*PREFIXES, "encoder.") if "encoder.conv1.weight" in source else PREFIXES
  prefix = next((p for p in prefixes if any(key.startswith(p) for key in source)), "")
  keys = {key.removeprefix(prefix): key for key in source if key.startswith(prefix)}
  shapes = dict(params)
  fresh = {}
  if "pooler" in shapes and not any(key.startswith(("pooler.", "pooler/")) for key in keys):
    # Some files were written by a masked language model, which has none; Hugging Face draws it anew, too.
    fresh["pooler"] = shapes.pop("pooler")
    print(f"{name} has no weights for its pooler, which starts from random values", file=sys.stderr, flush=True)
  from_tf = prefix == tf_checkpoint.PREFIX
  table = tf_checkpoint.TABLE if from_tf else importlib.import_module(type(module).__module__).TABLE
  readers = {key: functools.partial(source.__getitem__, full) for key, full in keys.items()}
  return {**_own(convert(_Weights(readers), shapes, table, name=name)), **fresh}


def _own(tree: Any) -> Any:
  """Returns copies: a view of the mapped file would change, or vanish, with the file."""
  if isinstance(tree, dict):
    return {key: _own(value) for key, value in tree.items()}
  return np.array(tree, dtype=np.float32, order="C")


def _config(name: str) -> Mapping[str, Any]:
  if not Path(name).is_dir():
    known = published.CONFIGS.get(published.ALIASES.get(name, name))
    if known is not None:
      return known
  path = _file(name, CONFIG)
  google = Path(name, tf_checkpoint.CONFIG)
  if path is None and google.is_file():
    return {"model_type": "bert", **_json(google)}
  if path is None and Path(name).is_dir():
    raise UserError(f"encoder {name!r}: found a folder without {CONFIG}, expected the files of a published model.")
  if path is None:
    raise UserError(_unknown(name))
  return _json(path)


def _json(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is not valid JSON ({error}). Get the file again.") from None
  if not isinstance(content, dict):
    raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object. Get the file again.")
  return content


def _weight_files(name: str) -> list[Path]:
  path = next((found for file in LOCAL if (found := _file(name, file, download=False))), None)
  if path is None and not Path(name).is_dir():
    path = next((found for file in WEIGHTS if (found := _file(name, file))), None)
  if path is None:
    raise UserError(_without_weights(name))
  if path.suffix != ".json":
    return [path]
  shards = _json(path).get("weight_map")
  if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
    raise UserError(f"{path} has no usable weight_map. Get the file again.")
  files = {shard: _file(name, shard) for shard in sorted(set(shards.values()))}
  missing = [shard for shard, file in files.items() if file is None]
  if missing:
    raise UserError(f"{path} names files that are missing: {', '.join(missing)}. Get them from the same place.")
  return [file for file in files.values() if file]


def _file(name: str, file: str, *, download: bool = True) -> Path | None:
  """Returns the file of a folder, of the hub's cache or (with `download`) of the hub; None if there is none."""
  if Path(name).is_dir():
    return Path(name, file) if Path(name, file).is_file() else None
  from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

  canonical = published.ALIASES.get(name, name)
  try:
    for alias in (name, canonical, *(a for a, c in published.ALIASES.items() if c == canonical)):
      cached = try_to_load_from_cache(alias, file)
      if isinstance(cached, str):
        return Path(cached)
    if not download or not _online():
      return None
    return Path(hf_hub_download(name, file))
  except errors.GatedRepoError:
    raise UserError(
      f"{name} asks its users to accept terms on the Hugging Face hub first, then: hf auth login"
    ) from None
  except (errors.RepositoryNotFoundError, errors.HFValidationError):
    return None
  except OSError as error:
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
      return None
    raise UserError(f"{name}: {file} could not be downloaded ({error}). Try again later.") from None


@functools.cache
def _online() -> bool:
  """Returns whether the hub answers within seconds; its own client retries for half a minute, per file."""
  from huggingface_hub import constants

  if constants.HF_HUB_OFFLINE:
    return False
  try:
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    urllib.request.urlopen(request, timeout=3).close()
  except urllib.error.HTTPError:
    return True
  except (OSError, ValueError) as error:
    return isinstance(getattr(error, "reason", None), ssl.SSLError)
  return True


def _unknown(name: str) -> str:
  names = [*published.CONFIGS, *published.ALIASES]
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.5) or difflib.get_close_matches(
    name.rpartition("/")[2], names, n=1, cutoff=0.5
  )
  reach = "the hub has none by that name" if _online() else "the Hugging Face hub cannot be reached"
  return (
    f"encoder {name!r}: found no such folder, no known name, and {reach}.\n"
    f"Expected a folder with {CONFIG}, a name on the hub, or one of: {', '.join(published.CONFIGS)}."
    + (f"\nDid you mean {close[0]!r}?" if close else "")
  )


def _without_weights(name: str) -> str:
  if Path(name).is_dir():
    return f"encoder {name!r}: found none of {', '.join(LOCAL)} in that folder. Put the model's weights there."
  short = name.rpartition("/")[2]
  reach = "there are none on the Hugging Face hub" if _online() else "the Hugging Face hub cannot be reached"
  kind = published.CONFIGS.get(published.ALIASES.get(name, name), {}).get("model_type", "bert")
  macro = "TEXT_ENCODER" if MODULES[kind] == "bert" else "AUDIO_ENCODER"
  return (
    f"encoder {name!r}: its weights are not on this machine and {reach}.\n"
    f"On a machine with a network type\n  hf download {name} --local-dir {short}\n"
    "copy that folder here and give it in place of the name, in the gin file\n"
    f'  {macro} = "/path/to/{short}"\n'
    f"or on the command line\n  --gin.{macro}='\"/path/to/{short}\"'"
  )
