"""Opened data: the splits, the plan of an epoch, and the padded numpy batches that it names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mmjax.data import audio, plan
from mmjax.data.plan import Batches, Box
from mmjax.data.raw_folder import SPLITS, Clip

Batch = dict[str, Any]


@dataclass
class Split:
  """One split in order: everything but the sound is in memory."""

  name: str
  clips: Sequence[Clip]
  tokens: dict[str, list[np.ndarray]] = field(default_factory=dict)  # text, text_context: int32 [T]
  sound: Any = None  # by row: int16 [S], or float32 [F, D] where features were extracted
  previous: Sequence[Sequence[int]] | None = None  # rows of each clip's audio context, oldest first
  lengths: dict[str, np.ndarray] = field(default_factory=dict)  # by field, int [N]

  def __len__(self) -> int:
    return len(self.clips)

  @property
  def ids(self) -> list[str]:
    """Names of the clips, "video$_$clip"."""
    return [clip.id for clip in self.clips]

  @property
  def video_ids(self) -> list[str]:
    """The video each clip is from."""
    return [clip.video_id for clip in self.clips]

  @property
  def texts(self) -> list[str]:
    """The texts as label.csv has them."""
    return [clip.text for clip in self.clips]

  @property
  def labels(self) -> dict[str, np.ndarray]:
    """The labels of each head, float32 [N]."""
    return {head: np.array([clip.labels[head] for clip in self.clips], np.float32) for head in self.clips[0].labels}


def batch_shapes(
  box: Box, rows: int, *, heads: Sequence[str], feature_width: int | None
) -> dict[str, jax.ShapeDtypeStruct | Any]:
  """Returns the shapes of a batch of `rows` padded to `box`; sound is a waveform without `feature_width`."""

  def shape(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *dims), dtype)

  batch: dict[str, Any] = {}
  for name, cap in box.items():
    if name.startswith("text"):
      batch[name] = {"ids": shape(np.int32, cap), "mask": shape(np.bool_, cap)}
    elif feature_width is None:
      batch[name] = {"wave": shape(np.float32, cap), "mask": shape(np.bool_, cap)}
    else:
      batch[name] = {"features": shape(np.float32, cap, feature_width), "mask": shape(np.bool_, cap)}
  batch["labels"] = {head: shape(np.float32) for head in heads}
  return {**batch, "index": shape(np.int32), "valid": shape(np.bool_)}


@dataclass
class Data:
  """What `Pipeline.open` returns.

  Attributes:
    name: of the data set.
    splits: by name.
    boxes: the training boxes, cheapest first; what a workdir keeps.
    full: the configured maxima, which hold every example of any split.
  """

  name: str
  splits: dict[str, Split]
  boxes: list[Box]
  full: Box
  costs: Mapping[str, float]
  batch_size: int
  eval_batch_size: int
  published: Mapping[str, int]
  dropped: Mapping[str, str]  # {clip name: reason}
  pad_id: int = 0
  sides: Mapping[str, str] = field(default_factory=dict)  # of audio, audio_context: which end is kept
  normalize: bool = False
  feature_width: int | None = None
  prefetch: int = 2

  @property
  def train(self) -> Split:
    """The training split."""
    return self.splits["train"]

  @property
  def valid(self) -> Split:
    """The validation split."""
    return self.splits["valid"]

  @property
  def test(self) -> Split:
    """The test split."""
    return self.splits["test"]

  @property
  def eval_boxes(self) -> list[Box]:
    """The training boxes, and the full one if that is larger: other splits may hold longer examples."""
    return self.boxes if self.boxes[-1] == self.full else [*self.boxes, self.full]

  def plan(self, split: str, *, seed: int | None, epoch: int = 0) -> Batches:
    """Returns the batches of an epoch, [(box number, rows)]; without a seed in the fixed order of evaluation."""
    boxes, size = (self.eval_boxes, self.eval_batch_size) if seed is None else (self.boxes, self.batch_size)
    return plan.plan(self.splits[split].lengths, boxes, size, seed=seed, epoch=epoch)

  def batch(self, split: str, rows: np.ndarray, box: Box, size: int) -> Batch:
    """Returns the examples `rows` as numpy arrays padded to `box` and to `size` rows.

    Rows that do not exist have `valid` False, empty masks and an `index` behind the split's end.
    """
    data, count = self.splits[split], len(rows)
    batch = self._empty(box, size)
    for name, stream in batch.items():
      if name.startswith(("text", "audio")):
        for i, row in enumerate(rows):
          values = data.tokens[name][row] if name in data.tokens else self._sound(data, name, int(row))
          value_name = next(key for key in stream if key != "mask")
          stream[value_name][i, : len(values)] = values
          stream["mask"][i, : len(values)] = True
    for head in batch["labels"]:
      batch["labels"][head][:count] = [data.clips[row].labels[head] for row in rows]
    batch["index"][:] = len(data)
    batch["index"][:count] = rows
    batch["valid"][:count] = True
    return batch

  def _empty(self, box: Box, size: int) -> Batch:
    shapes = self.batch_shapes(box, size)
    batch: Batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    for name in box:
      if name.startswith("text"):
        batch[name]["ids"][:] = self.pad_id
    return batch

  def _sound(self, data: Split, name: str, row: int) -> np.ndarray:
    """Returns one example's stream: float32 [S] or [F, D]."""
    if name == "audio":
      sound = data.sound[row]
    else:
      assert data.previous is not None
      parts = [data.sound[other] for other in data.previous[row]]
      sound = np.concatenate(parts) if parts else data.sound[row][:0]
    sound = audio.cut(sound, self.full[name], self.sides[name])
    return sound if self.feature_width is not None else audio.as_float(sound, normalize=self.normalize)

  def batch_shapes(self, box: Box, rows: int | None = None) -> dict[str, Any]:
    """Returns the shapes of a batch of `rows` (default: a training batch) padded to `box`."""
    heads = list(self.train.clips[0].labels)
    return batch_shapes(box, rows or self.batch_size, heads=heads, feature_width=self.feature_width)

  def first_batch(self, *, row_multiple: int = 1) -> Batch:
    """Returns one real training batch, whole on every process."""
    box, rows = self.plan("train", seed=None)[0]
    return self.batch("train", rows, self.eval_boxes[box], padded(len(rows), row_multiple))

  def batches(
    self,
    split: str,
    batches: Batches,
    *,
    start: int = 0,
    row_multiple: int = 1,
    process_index: int | None = None,
    process_count: int | None = None,
  ) -> Iterator[Batch]:
    """Yields the batches of a plan from number `start` on, as numpy arrays, prefetched by tf.data.

    Each has as many rows as the plan's largest, made a multiple of `row_multiple`; each of several processes
    (default: jax's) gets its own equal slice of the rows.
    """
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    count = jax.process_count() if process_count is None else process_count
    number = jax.process_index() if process_index is None else process_index
    total = padded(max(len(rows) for _, rows in batches), int(np.lcm(row_multiple, count)))
    size = total // count
    boxes = self.eval_boxes
    example = jax.tree.flatten(self.batch_shapes(boxes[0], size))

    def fetch(i: np.ndarray) -> list[np.ndarray]:
      box, rows = batches[int(i)]
      return jax.tree.leaves(self.batch(split, rows[number * size : (number + 1) * size], boxes[box], size))

    types = [tf.as_dtype(leaf.dtype) for leaf in example[0]]
    dataset = tf.data.Dataset.range(start, len(batches))
    dataset = dataset.map(
      lambda i: tf.numpy_function(fetch, [i], types, stateful=False),
      num_parallel_calls=tf.data.AUTOTUNE,
      deterministic=True,
    )
    for leaves in dataset.prefetch(self.prefetch).as_numpy_iterator():
      yield jax.tree.unflatten(example[1], leaves)

  def describe(self) -> str:
    """Returns the table of counts beside the published ones, what was left out and why, and the boxes."""
    lines = [f"{self.name:<12}{'examples':>10}{'published':>11}{'difference':>12}"]
    for split in SPLITS:
      found, expected = len(self.splits[split]), self.published.get(split)
      known = f"{expected:>11}{found - expected:>+12}" if expected else f"{'-':>11}{'-':>12}"
      lines.append(f"{split:<12}{found:>10}{known}")
    reasons: dict[str, list[str]] = {}
    for name, reason in self.dropped.items():
      reasons.setdefault(reason, []).append(name)
    if not self.dropped:
      lines.append("no clip was left out")
    for reason, names in reasons.items():
      listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
      lines.append(f"left out {len(names)}: {reason}: {listed}")
    batches = self.plan("train", seed=0)
    lines.append("\nbox   batches  " + "".join(f"{name:>15}" for name in self.full))
    for i, box in enumerate(self.boxes):
      share = sum(number == i for number, _ in batches)
      lines.append(f"{i:<6}{share:>7}  " + "".join(f"{box[name]:>15}" for name in self.full))
    options: dict[str, Any] = {"batch_size": self.batch_size, "costs": self.costs}
    waste = plan.padding_share(self.train.lengths, self.boxes, batches, **options)
    lines.append(f"{waste:.0%} of the encoder cost of an epoch is spent on padding")
    return "\n".join(lines)


def padded(rows: int, multiple: int) -> int:
  """Returns `rows` rounded up to a multiple."""
  return -(-rows // multiple) * multiple
