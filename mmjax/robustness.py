"""What a trained network says when something of its input is missing.

Two questions, each a row of scores over a whole split:

- a modality is missing: all of its steps are padding. Values are 0, token ids the padding id, the mask is False;
- steps are lost at random, as in LNLN (Zhang, Wang, Yu; NeurIPS 2024; https://arxiv.org/abs/2409.20012, code
  https://github.com/Haoyu-ha/LNLN): each step of each stream by itself with the same probability. A lost frame of
  features is zeros, and so are a lost 20 ms of waveform; the mask still counts them, as LNLN's lengths do. A lost
  token becomes padding (where LNLN writes [UNK] and lets it count); the first and the last token, [CLS] and [SEP],
  are never lost, in both. The draws of one example are the same at every rate, so that what is lost at 10% is lost
  at 20%, too (as there); unlike there each stream has draws of its own, instead of one seed for all of them.

The draws are a function of (seed, split, stream, row): neither box nor batch changes them. A context stream
(`text_context`) goes with its modality.
"""

import dataclasses
import itertools
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.errors import UserError

MODALITIES = ("text", "audio", "vision")
RATES = (10, 20, 30, 40, 50, 60, 70, 80, 90)  # percent of the steps
SPAN = 320  # samples of a waveform that are lost together: 20 ms at 16 kHz
NONE = "none"


@dataclasses.dataclass(frozen=True)
class Lossy:
  """Opened data whose batches lack something; all else is that of `data`.

  Attributes:
    data: what `Pipeline.open` returned.
    missing: modalities that are wholly padding.
    percent: the share of steps that is lost in every other stream.
    seed: of the draws.
  """

  data: Any
  missing: frozenset[str] = frozenset()
  percent: int = 0
  seed: int = 0

  def __getattr__(self, name: str) -> Any:
    return getattr(self.data, name)

  def batches(self, split: str, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
    """Yields the batches of `data.batches` with the losses."""
    for batch in self.data.batches(split, *args, **options):
      yield self.lose(batch, split)

  def lose(self, batch: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Returns a copy of the numpy `batch` of `split` with the losses."""
    lossy = dict(batch)
    for name, stream in batch.items():
      modality = name.removesuffix("_context")
      if modality in self.missing:
        blank = {"ids": getattr(self.data, "pad_id", 0)}
        lossy[name] = {key: np.full_like(values, blank.get(key, 0)) for key, values in stream.items()}
      elif modality in MODALITIES and self.percent and "mask" in stream:
        lost = np.zeros_like(stream["mask"])
        for i, length in enumerate(stream["mask"].sum(axis=1)):
          if batch["valid"][i]:
            lost[i, :length] = self.draw(f"{split}/{name}", int(batch["index"][i]), int(length), stream)
        lossy[name] = blanked(stream, lost, getattr(self.data, "pad_id", 0))
    return lossy

  def draw(self, place: str, row: int, length: int, stream: Collection[str]) -> np.ndarray:
    """Returns which of the `length` real steps of example `row` are lost, bool [length]."""
    random = np.random.default_rng((self.seed, zlib.crc32(place.encode()), row))
    span = SPAN if "wave" in stream else 1
    lost = np.repeat(random.random(-(-length // span)) < self.percent / 100, span)[:length]
    if "ids" in stream:
      lost[:1] = lost[-1:] = False
    return lost


def blanked(stream: Mapping[str, Any], lost: np.ndarray, pad_id: int) -> dict[str, Any]:
  """Returns `stream` with its steps where `lost` [B, T] is True made zeros, or padding where it holds token ids."""
  if "ids" in stream:
    return {"ids": np.where(lost, pad_id, stream["ids"]), "mask": stream["mask"] & ~lost}
  found = {}
  for key, values in stream.items():
    wide = lost.reshape(*lost.shape, *(1,) * (values.ndim - 2))
    found[key] = values if key == "mask" else np.where(wide, np.zeros_like(values), values)
  return found


def subsets(modalities: Collection[str]) -> list[tuple[str, ...]]:
  """Returns every subset of `modalities` that can be missing: none, each one, each pair, all."""
  order = [name for name in MODALITIES if name in modalities]
  return [subset for count in range(len(order) + 1) for subset in itertools.combinations(order, count)]


def parse(drop: str) -> tuple[str, ...]:
  """Returns the modalities of the flag --drop, "audio,vision", in the usual order; UserError for another name."""
  names = [name.strip() for name in drop.split(",")]
  wrong = [name for name in names if name not in MODALITIES]
  if wrong or len(set(names)) < len(names):
    raise UserError(f"--drop={drop}: expected names of {', '.join(MODALITIES)}, each once, such as --drop=audio,vision")
  return tuple(name for name in MODALITIES if name in names)


def evaluate(
  experiment: Any,
  *,
  workdir: Path,
  checkpoint: str,
  split: str,
  data_dir: Path,
  cache_dir: Path,
  drop: Sequence[str] | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Scores a checkpoint of `workdir` on `split` without the modalities `drop`, or in every way (`drop=None`).

  Returns the checkpoint's and split's part of results.json, which it adds to what the file holds:
  {"seed", "missing": {"none", "audio", "audio+vision", ...: scores}, "lost": {"0", "10", ... "90": scores}}, where
  scores are as elsewhere in the file, {"loss": ..., head: {metric: value}}.
  """
  from mmjax.training.evaluation import write_json

  evaluator, score_of, name, number = opened(
    experiment, workdir=workdir, checkpoint=checkpoint, split=split, data_dir=data_dir, cache_dir=cache_dir
  )
  data = evaluator.data
  read = {stream.removesuffix("_context") for stream in data.full}
  unread = sorted(set(drop or ()) - read)
  if unread:
    raise UserError(
      f"--drop={','.join(unread)}: the network does not read it; expected some of {', '.join(sorted(read))}"
    )

  def summary(**losses: Any) -> dict[str, Any]:
    evaluator.data = Lossy(data, seed=seed, **losses)
    found: dict[str, Any] = score_of(evaluator).summary()
    return found

  path = workdir / "results.json"
  results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
  places = results.setdefault("robustness", {}).setdefault(name, {})
  if places.get("step") != number:
    places.clear()  # scores of a checkpoint that is no more
  places["step"] = number
  part = places.setdefault(split, {"seed": seed, "missing": {}, "lost": {}})
  part["seed"] = seed
  for missing in subsets(read) if drop is None else [tuple(drop)]:
    part["missing"]["+".join(missing) or NONE] = summary(missing=frozenset(missing))
  if drop is None:
    part["lost"] = {"0": part["missing"][NONE], **{str(rate): summary(percent=rate) for rate in RATES}}
  write_json(path, results)
  return part


def opened(
  experiment: Any, *, workdir: Path, checkpoint: str, split: str, data_dir: Path, cache_dir: Path
) -> tuple[Any, Any, str, int]:
  """Returns an evaluator, what scores `split` with one (a function of it), the checkpoint's name and its step."""
  import jax

  from mmjax.training import checkpoints, evaluation, step
  from mmjax.training import mesh as meshes

  saved = checkpoints.Checkpoints(workdir, read_only=True)
  name = saved.find(checkpoint)
  boxes_file = workdir / "boxes.json"
  boxes = json.loads(boxes_file.read_text()) if boxes_file.exists() else None
  data = experiment.open_data(data_dir, cache_dir, boxes)
  mesh = meshes.make(experiment.fsdp)
  batch = data.first_batch(row_multiple=mesh.size)
  shapes = step.abstract(experiment.network, batch)
  like = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    meshes.shardings(shapes, mesh),
  )
  outputs = jax.eval_shape(lambda v, b: experiment.network.apply(v, b, train=False), shapes, batch)
  memory = experiment.objective.init(data.splits["train"].labels, outputs)
  info = saved.info(name)
  variables = saved.restore(name, "variables", like)

  def score_of(evaluator: Any) -> Any:
    return evaluator.score(variables, memory, np.int32(info["epoch"]), split)

  return evaluation.Evaluator(experiment, data, mesh), score_of, name, int(info["step"])
