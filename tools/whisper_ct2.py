"""Turns the encoder of a CTranslate2 Whisper file into a Hugging Face folder.

    python tools/whisper_ct2.py model.bin data/assets/whisper-tiny.en

CTranslate2's file is a little-endian list: uint32 version; the specification's name and its uint32 revision;
uint32 number of variables, each of name, uint8 rank, uint32 sizes, uint8 type, uint32 bytes, data; then the
aliases. Names are a uint16 length and that many bytes, the last one zero.
"""

import argparse
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}

# CTranslate2's name -> Hugging Face's; {part} is weight or bias.
NAMES = [
  (r"conv([12])/(weight|bias)", r"conv\1.\2"),
  (r"position_encodings/encodings", r"embed_positions.weight"),
  (r"layer_norm/(gamma|beta)", r"layer_norm.\1"),
  (r"layer_(\d+)/self_attention/layer_norm/(gamma|beta)", r"layers.\1.self_attn_layer_norm.\2"),
  (r"layer_(\d+)/self_attention/linear_0/(weight|bias)", r"layers.\1.self_attn.qkv.\2"),
  (r"layer_(\d+)/self_attention/linear_1/(weight|bias)", r"layers.\1.self_attn.out_proj.\2"),
  (r"layer_(\d+)/ffn/layer_norm/(gamma|beta)", r"layers.\1.final_layer_norm.\2"),
  (r"layer_(\d+)/ffn/linear_0/(weight|bias)", r"layers.\1.fc1.\2"),
  (r"layer_(\d+)/ffn/linear_1/(weight|bias)", r"layers.\1.fc2.\2"),
]


def read(data: bytes) -> dict[str, np.ndarray]:
  """Returns the variables of a CTranslate2 file by name; ValueError says where a file is not one."""
  position = 0

  def number(kind: str) -> int:
    nonlocal position
    size = struct.calcsize(kind)
    if position + size > len(data):
      raise ValueError(f"the file ends at byte {len(data)}, expected more: is it truncated?")
    (value,) = struct.unpack_from("<" + kind, data, position)
    position += size
    return value

  def take(size: int) -> bytes:
    nonlocal position
    if position + size > len(data):
      raise ValueError(f"the file ends at byte {len(data)}, expected {position + size}: is it truncated?")
    position += size
    return data[position - size : position]

  version = number("I")
  if not 4 <= version <= 6:
    raise ValueError(f"found CTranslate2 binary version {version}, expected 4 to 6")
  take(number("H"))
  number("I")
  found = {}
  for _ in range(number("I")):
    name = take(number("H")).rstrip(b"\0").decode()
    shape = [number("I") for _ in range(number("B"))]
    kind, size = number("B"), number("I")
    if kind not in TYPES:
      raise ValueError(f"{name}: found type {kind}, expected one of {sorted(TYPES)}")
    found[name] = np.frombuffer(take(size), TYPES[kind]).reshape(shape)
  for _ in range(number("I")):
    alias = take(number("H")).rstrip(b"\0").decode()
    found[alias] = found[take(number("H")).rstrip(b"\0").decode()]
  return found


def convert(variables: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns (config.json, tensors) of a Hugging Face Whisper that has the encoder only."""
  tensors = {}
  for name, value in variables.items():
    if not name.startswith("encoder/") or value.ndim == 0:
      continue
    name = name.removeprefix("encoder/")
    matches = [m.expand(target) for source, target in NAMES if (m := re.fullmatch(source, name))]
    if not matches:
      raise ValueError(f"encoder/{name}: not a known part of a Whisper encoder")
    target = matches[0].replace(".gamma", ".weight").replace(".beta", ".bias")
    if ".qkv." in target:
      for part, piece in zip("qkv", np.split(value, 3), strict=True):
        if (part, target[-4:]) == ("k", "bias"):
          if np.any(piece):
            raise ValueError(f"encoder/{name}: the key's bias is not zero; Whisper has none")
          continue
        tensors["model.encoder." + target.replace("qkv", part + "_proj")] = np.ascontiguousarray(piece)
    else:
      tensors["model.encoder." + target] = value
  width, bins, _ = tensors["model.encoder.conv1.weight"].shape
  config = {
    "architectures": ["WhisperModel"],
    "model_type": "whisper",
    "activation_function": "gelu",
    "d_model": width,
    "num_mel_bins": bins,
    "encoder_layers": sum(name.endswith("fc1.bias") for name in tensors),
    "encoder_attention_heads": int(variables["encoder/num_heads"]),
    "encoder_ffn_dim": len(tensors["model.encoder.layers.0.fc1.bias"]),
    "max_source_positions": len(tensors["model.encoder.embed_positions.weight"]),
    "scale_embedding": False,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "init_std": 0.02,
    "torch_dtype": "float16",
  }
  return config, tensors


def main(arguments: list[str] | None = None) -> None:
  """Converts one file, named on the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("model", type=Path, help="model.bin as CTranslate2 writes it")
  parser.add_argument("folder", type=Path, help="where config.json and model.safetensors go")
  args = parser.parse_args(arguments)
  from safetensors.numpy import save_file

  try:
    config, tensors = convert(read(args.model.read_bytes()))
  except (OSError, ValueError) as error:
    print(f"{args.model}: {error}", file=sys.stderr)
    sys.exit(2)
  args.folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, args.folder / "model.safetensors", metadata={"format": "pt"})
  (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
  main()
