"""Opened data: the splits, the plan of an epoch, and the padded numpy batches that it names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mmjax.data import audio, plan
from mmjax.data.plan import Batches, Box
from mmjax.data.raw_folder import SPLITS

Batch = dict[str, Any]


@dataclass(kw_only=True)
class Stream:
  """One stream of a split, by row: `stream[i]` is what example `i` has of it, cut.

  Attributes:
    kind: "ids" int32 [T], "wave" float32 [S], "features" float32 [T, D].
    rows: `rows[i]` before cutting; waves as int16.
    lengths: of `rows`, then cut; int [N], may be 0.
    cap: the longest that is kept.
    side: which end of a longer one is kept, "first" or "last".
    width: D of features.
    normalize: whether each wave is scaled to zero mean and unit variance, after cutting.
  """

  kind: str
  rows: Any
  lengths: np.ndarray
  cap: int
  side: str = "first"
  width: int | None = None
  normalize: bool = False

  def __post_init__(self) -> None:
    self.lengths = np.minimum(self.lengths, self.cap)

  def __getitem__(self, row: int) -> np.ndarray:
    values: np.ndarray = audio.cut(self.rows[row], self.cap, self.side)
    return audio.as_float(values, normalize=self.normalize) if self.kind == "wave" else values


@dataclass
class Split:
  """One split in order; `streams` are by the names they have in a batch."""

  name: str
  clips: Sequence[Any]  # examples with id, video_id, text and labels {head: float}
  streams: dict[str, Stream] = field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.clips)

  @property
  def lengths(self) -> dict[str, np.ndarray]:
    """The length of each example in each stream, int [N]."""
    return {name: stream.lengths for name, stream in self.streams.items()}

  @property
  def sound(self) -> Any:
    """The sound by row: int16 [S], or float32 [F, D] where features were extracted."""
    return self.streams["audio"].rows

  @property
  def previous(self) -> Sequence[Sequence[int]]:
    """The rows of each clip's audio context, oldest first."""
    previous: Sequence[Sequence[int]] = self.streams["audio_context"].rows.previous
    return previous

  @property
  def ids(self) -> list[str]:
    """Names of the examples, "video$_$clip"."""
    return [clip.id for clip in self.clips]

  @property
  def video_ids(self) -> list[str]:
    """The video each example is from."""
    return [clip.video_id for clip in self.clips]

  @property
  def texts(self) -> list[str]:
    """The texts as the files have them."""
    return [clip.text for clip in self.clips]

  @property
  def labels(self) -> dict[str, np.ndarray]:
    """The labels of each head, float32 [N]."""
    return {head: np.array([clip.labels[head] for clip in self.clips], np.float32) for head in self.clips[0].labels}


def batch_shapes(
  box: Box, rows: int, *, heads: Sequence[str], kinds: Mapping[str, tuple[str, int | None]]
) -> dict[str, Any]:
  """Returns the shapes of a batch of `rows` padded to `box`; `kinds` {stream: (kind, width of features)}."""

  def shape(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *dims), dtype)

  batch: dict[str, Any] = {}
  for name, cap in box.items():
    kind, width = kinds[name]
    dims = (cap,) if width is None else (cap, width)
    batch[name] = {kind: shape(np.int32 if kind == "ids" else np.float32, *dims), "mask": shape(np.bool_, cap)}
  batch["labels"] = {head: shape(np.float32) for head in heads}
  return {**batch, "index": shape(np.int32), "valid": shape(np.bool_)}


@dataclass
class Data:
  """What the `open` of a pipeline returns.

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
  notes: Sequence[str] = ()  # what else a run says of its data
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
  def normalize(self) -> bool:
    """Whether each wave has zero mean and unit variance."""
    return self.train.streams["audio"].normalize

  @property
  def feature_width(self) -> int | None:
    """Size of a frame of audio features; None for waveforms."""
    return self.train.streams["audio"].width

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
    for name in box:
      stream = data.streams[name]
      for i, row in enumerate(rows):
        values = stream[int(row)]
        batch[name][stream.kind][i, : len(values)] = values
        batch[name]["mask"][i, : len(values)] = True
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
      if "ids" in batch[name]:
        batch[name]["ids"][:] = self.pad_id
    return batch

  def batch_shapes(self, box: Box, rows: int | None = None) -> dict[str, Any]:
    """Returns the shapes of a batch of `rows` (default: a training batch) padded to `box`."""
    heads = list(self.train.clips[0].labels)
    kinds = {name: (stream.kind, stream.width) for name, stream in self.train.streams.items()}
    return batch_shapes(box, rows or self.batch_size, heads=heads, kinds=kinds)

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
    lines += self.notes
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
