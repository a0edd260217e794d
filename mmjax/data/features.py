"""Features of a frozen encoder: extracted once, kept on disk, read back by clip.

One mechanism for every encoder that a run does not train: the quickstart's Whisper, the inputs of the papers
that work on extracted features, and frozen teachers.
"""

import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import layers
from mmjax.backbones import pretrained
from mmjax.data import audio, plan
from mmjax.errors import UserError
from mmjax.progress import Progress

SAMPLE_RATE = 16_000
FORMAT = 1  # raise when frames of the same options would come out different
PROGRAMS = 6  # batch lengths, each compiled once


class Waves(Protocol):
  """Clips by number: `waves[i]` is int16 [S] at 16 kHz."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Store:
  """Frames of all clips in one memory-mapped array; `store[i]` is float32 [lengths[i], width]."""

  frames: np.ndarray  # [total, D]
  starts: np.ndarray  # [N]
  lengths: np.ndarray  # [N] frames of each clip

  @property
  def width(self) -> int:
    """Size of one frame."""
    return int(self.frames.shape[1])

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: int) -> np.ndarray:
    start = self.starts[index]
    return self.frames[start : start + self.lengths[index]]


class Frozen(nn.Module):
  """An encoder run for its features: `wave` [B, S] and `mask` to frames [B, G, D] and their number [B]."""

  encoder: nn.Module
  time_pool: int = 1

  def __call__(self, wave: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pool(self.encoder({"wave": wave, "mask": mask}, train=False), self.time_pool)


def pool(encoded: layers.Encoded, size: int) -> tuple[jax.Array, jax.Array]:
  """Returns means of `size` consecutive real frames [B, G, D], and how many there are of each clip [B].

  The last group of a clip averages the frames it has. Masks are prefixes.
  """
  batch, frames, width = encoded.hidden.shape
  groups = -(-frames // size)
  weights = jnp.pad(encoded.mask.astype(jnp.float32), ((0, 0), (0, groups * size - frames)))
  hidden = jnp.pad(encoded.hidden.astype(jnp.float32), ((0, 0), (0, groups * size - frames), (0, 0)))
  weights = weights.reshape(batch, groups, size, 1)  # [B, G, size, 1]
  total = jnp.sum(hidden.reshape(batch, groups, size, width) * weights, axis=2)  # [B, G, D]
  pooled = total / jnp.maximum(jnp.sum(weights, axis=2), 1.0)
  return pooled, -(-jnp.sum(encoded.mask, axis=1) // size)


def cached(
  waves: Waves,
  *,
  encoder: nn.Module,
  cache_dir: str | os.PathLike[str],
  key: str,
  lengths: np.ndarray | None = None,
  seconds: float | None = None,
  time_pool: int = 1,
  normalize: bool | None = None,
  batch_size: int = 8,
) -> Store:
  """Returns the frames of every clip, extracting them if no earlier call with the same options did.

  They lie in `cache_dir/features/<key>-<fingerprint>`; `key` names the clips (data set and a fingerprint of
  its source), the fingerprint covers the encoder's configuration, its weights and the options here.

  Args:
    waves: the clips; only read when frames are missing.
    encoder: a speech encoder (design.md "encoders"); `pretrained` says where its weights come from.
    lengths: samples of each clip, where the caller knows them already.
    seconds: clips are cut after this time; None keeps them whole.
    time_pool: number of consecutive frames that are averaged into one.
    normalize: zero mean and unit variance for each clip; None does what the encoder was trained with.
    batch_size: clips per encoder call; changes speed and memory only.
  """
  if not re.fullmatch(r"[\w.-]+", key):
    raise ValueError(f"key: found {key!r}, expected letters, digits, '.', '_' and '-' (it names a folder)")
  if time_pool < 1 or batch_size < 1:
    raise UserError(f"time_pool={time_pool}, batch_size={batch_size}: expected at least 1")
  if normalize is None:
    normalize = bool(getattr(type(encoder), "normalize_wave", False))
  options: dict[str, Any] = {
    "format": FORMAT,
    "clips": len(waves),
    "encoder": describe(encoder),
    "weights": weights_identity(encoder),
    "seconds": seconds,
    "time_pool": time_pool,
    "normalize": normalize,
  }
  text = json.dumps(options, indent=2, sort_keys=True)
  folder = Path(cache_dir) / "features" / f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
  if not folder.is_dir():
    cap = sys.maxsize if seconds is None else round(seconds * SAMPLE_RATE)
    if lengths is None:
      lengths = np.array([len(waves[i]) for i in range(len(waves))], dtype=np.int64)
    batches = extract(
      waves, Frozen(encoder, time_pool), np.minimum(lengths, cap), normalize=normalize, batch_size=batch_size
    )
    write(folder, batches, len(waves), text)
  index = np.load(folder / "index.npy")
  return Store(np.load(folder / "frames.npy", mmap_mode="r"), index[:, 0], index[:, 1])


def extract(
  waves: Waves, network: Frozen, lengths: np.ndarray, *, normalize: bool, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields `(clip, frames [F, D])` for every clip, in the order of the batches."""
  # Evenly spaced: splits whose longest clips are cut alike then share their programs.
  longest = max(int(np.max(lengths, initial=1)), PROGRAMS)
  boxes = [{"audio": -(-longest * (k + 1) // PROGRAMS)} for k in range(PROGRAMS)]
  variables = jax.device_put(variables_of(network))

  with Progress(f"{type(network.encoder).__name__} features", len(lengths), unit="clips") as progress:
    for box, rows in plan.plan({"audio": lengths}, boxes, batch_size, seed=None, epoch=0):
      wave = np.zeros((batch_size, boxes[box]["audio"]), np.float32)
      mask = np.zeros(wave.shape, bool)
      for row, clip in enumerate(rows):
        samples = audio.as_float(waves[clip][: lengths[clip]], normalize=normalize)
        wave[row, : len(samples)] = samples
        mask[row, : len(samples)] = True
      pooled, counts = jax.device_get(apply(network, variables, wave, mask))
      for row, clip in enumerate(rows):
        yield int(clip), pooled[row, : counts[row]]
        progress.step()


@functools.partial(jax.jit, static_argnums=0)
def apply(network: Frozen, variables: Any, wave: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns what `network` does, compiled once for equal networks and shapes."""
  outputs: Any = network.apply(variables, wave, mask)
  return outputs


def variables_of(network: Frozen) -> dict[str, Any]:
  """Returns the encoder's variables: published weights and statistics, or those of a fixed seed where it names none."""
  init = functools.partial(network.init, jax.random.key(0))
  example = jnp.zeros((1, SAMPLE_RATE)), jnp.ones((1, SAMPLE_RATE), bool)
  published = getattr(network.encoder, "pretrained", None)
  variables = jax.eval_shape(init, *example) if published else jax.jit(init)(*example)
  return {collection: pretrained.restore(network, tree) for collection, tree in variables.items()}


def write(folder: Path, clips: Iterator[tuple[int, np.ndarray]], count: int, options: str) -> None:
  """Writes frames, index and provenance; `folder` appears only once it is whole."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  try:
    index = np.zeros((count, 2), np.int64)
    total, width = 0, 0
    with open(partial / "frames.npy", "wb") as file:
      # numpy leaves room in the header for a first axis that grows, so the true size is written over at the end.
      for clip, frames in clips:
        if not width:
          width = frames.shape[1]
          file.write(header(0, width))
        index[clip] = total, len(frames)
        total += len(frames)
        file.write(np.ascontiguousarray(frames, "<f4").tobytes())
      file.seek(0)
      file.write(header(total, width))
    np.save(partial / "index.npy", index)
    (partial / "provenance.json").write_text(options)
    try:
      partial.rename(folder)
    except OSError:
      if not folder.is_dir():  # otherwise another process was quicker, with the same frames
        raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def header(total: int, width: int) -> bytes:
  """Returns the .npy header of a float32 array [total, width]; its size does not depend on `total`."""
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (total, width)})
  return file.getvalue()


def describe(module: nn.Module) -> dict[str, Any]:
  """Returns the fields that decide what an encoder computes; not where its weights lie, nor its name."""
  found: dict[str, Any] = {"class": type(module).__name__}
  for field in fields(module):
    value = getattr(module, field.name)
    if field.name in ("parent", "name", "pretrained"):
      continue
    if field.name == "compute_dtype":
      found[field.name] = jnp.dtype(value).name
    elif isinstance(value, nn.Module):
      found[field.name] = describe(value)
    else:
      found[field.name] = str(value)
  return found


def weights_identity(module: nn.Module) -> Mapping[str, str]:
  """Returns SHA-256 by file name of a local folder's weights, or the name under which others publish them."""
  name = getattr(module, "pretrained", None)
  folder = Path(name) if name else None
  if folder is None or not folder.is_dir():
    return {"name": str(name)}
  found = {}
  for path in sorted(folder.iterdir()):
    if path.suffix in (".safetensors", ".bin"):
      with open(path, "rb") as file:
        found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
  return found
