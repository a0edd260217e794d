"""Feature pickles as researchers hold them: MMSA's format, and the dictionaries of MulT and MultiBench.

MMSA: {split: {"text_bert" [N,3,T], "text" [N,T,D], "audio", "vision", "regression_labels" [N], "id", "raw_text",
"audio_lengths", ...}}, padded at the end. MulT: {split: {"text", "audio", "vision" [N,T,D], "labels" [N,1,1], "id"}},
padded in front. What comes out is one example at a time, of its true length. Needs no TensorFlow: whatever is wrong
with a file is said before anything slow is imported.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mmjax.data import raw_folder, safe_pickle
from mmjax.data.raw_folder import SPLITS
from mmjax.errors import UserError

RELEASE = 64  # examples after which the memory of the file is given back
FEATURES = ("text", "audio", "vision")
STREAMS = ("ids", *FEATURES)  # what a record may hold
LABELS = {
  "MMSA": {"M": "regression_labels", **{head: f"regression_labels_{head}" for head in "TAV"}},
  "MulT": {"M": "labels"},
}
LENGTHS = {"audio": "audio_lengths", "vision": "vision_lengths"}
# Everything that has one entry for each example, used or not.
COLUMNS = (
  "id", "raw_text", "text_bert", *FEATURES, *LENGTHS.values(), "annotations", "classification_labels",
  *LABELS["MMSA"].values(), *LABELS["MulT"].values(),
)  # fmt: skip


@dataclass
class Record:
  """One example of a feature file, without padding."""

  id: str
  text: str
  labels: dict[str, float]
  streams: dict[str, np.ndarray] = field(default_factory=dict)  # ids int32 [T], others float32 [T, D]
  replaced: dict[str, int] = field(default_factory=dict)  # by stream: values that were not finite, now 0

  @property
  def video_id(self) -> str:
    """The video it is from."""
    return self.id.split("$_$")[0]


class FeatureFile:
  """A feature pickle whose keys, sizes and labels have been checked.

  Attributes:
    format: "MMSA" or "MulT".
    aligned: whether all streams share their steps, and with them each example's true length.
    heads: the labels that are read, of M, T, A, V.
    streams: those of `wanted` that are read; only "ids" may be absent.
    widths: {stream: D} of the features.
  """

  def __init__(self, path: Path, dataset: str, *, wanted: Sequence[str], heads: Sequence[str] | None = None):
    """Reads `path`; raises one `UserError` that names file, split and key of what is not as expected.

    `wanted` are the streams to read, of `STREAMS`; `heads` the labels, None for those that the file has.
    """
    self.path, self.limit = Path(path), raw_folder.known(dataset).limit
    tree = safe_pickle.load(path)
    for split in SPLITS:
      if not isinstance(tree, dict) or not isinstance(tree.get(split), dict):
        found = f"a dict of {keys(tree)}" if isinstance(tree, dict) else f"a {type(tree).__name__}"
        self.fail([], found, f"a dict of {', '.join(SPLITS)}, each a dict of arrays")
    self.splits: dict[str, dict[str, Any]] = {split: tree[split] for split in SPLITS}
    train = self.splits["train"]
    self.format = "MulT" if "labels" in train and "regression_labels" not in train else "MMSA"
    names, usual = LABELS[self.format], raw_folder.known(dataset).heads or tuple("MTAV")
    there = [head for head, key in names.items() if head == "M" or (head in usual and key in train)]
    self.heads = list(heads or there)
    if not set(self.heads) <= set(names):
      self.fail(["split 'train'"], "labels of M alone, as MulT's files have", f"labels of {', '.join(self.heads)}")
    self.labels = {split: {head: self._labels(split, names[head]) for head in self.heads} for split in SPLITS}
    self.streams = [name for name in wanted if name != "ids" or "text_bert" in train]
    self.widths: dict[str, int] = {}
    self.widths |= {name: self._width("train", name) for name in self.streams if name != "ids"}
    for split in SPLITS:
      self._check(split)
    steps = [self._steps(key) for key in ("text_bert", *FEATURES) if key in train]
    given = any(key in train for key in LENGTHS.values())
    self.aligned = not given and len(steps) > 1 and len(set(steps)) == 1 and steps[0] > 1

  def fail(self, where: Iterable[str], found: str, expected: str) -> NoReturn:
    """Raises what is wrong `where` in the file."""
    raise UserError(
      f"{', '.join([str(self.path), *where])}: found {found}\nexpected {expected}\n"
      "correct the file, or name another: --gin.feature_pipeline.Features.file='\"/path/to/file.pkl\"'"
    )

  def _get(self, split: str, key: str) -> Any:
    values = self.splits[split].get(key)
    if values is None:
      found = f"no such key (there are {keys(self.splits[split])})"
      self.fail([f"split {split!r}", f"key {key!r}"], found, "an array or list with an entry for each example")
    if not isinstance(values, np.ndarray | list | tuple) or (isinstance(values, np.ndarray) and not values.ndim):
      found = f"a {type(values).__name__}"
      self.fail([f"split {split!r}", f"key {key!r}"], found, "an array or list with an entry for each example")
    return values

  def _labels(self, split: str, key: str) -> np.ndarray:
    """Returns float64 [N], whatever shape they have."""
    values, where = self._get(split, key), [f"split {split!r}", f"key {key!r}"]
    try:
      labels = np.asarray(values, np.float64)
    except (ValueError, TypeError):
      self.fail(where, "labels that are not numbers", "one number for each example")
    if not len(values):
      self.fail(where, "no example: the split is empty", "at least one")
    if labels.size != len(values):
      self.fail(where, f"labels of shape {list(labels.shape)}", "one number for each example: [N], [N, 1] or [N, 1, 1]")
    labels = labels.reshape(-1)
    bound = math.inf if self.limit is None else self.limit + 1e-3
    wrong = np.flatnonzero(~np.isfinite(labels) | (np.abs(labels) > bound))
    if len(wrong):
      span = "finite numbers" if self.limit is None else f"numbers in {-self.limit:g}..{self.limit:g}"
      self.fail(where, f"{labels[wrong[0]]:g} for example {wrong[0]} and {len(wrong)} labels out of range in all", span)
    return labels

  def _check(self, split: str) -> None:
    """Raises where `split` lacks a stream, or its arrays are not of equal length or not as wide as those of train."""
    names = LABELS[self.format]
    count = len(self.labels[split]["M"])
    for key in COLUMNS:
      if key in self.splits[split] and len(self._get(split, key)) != count:
        found = f"{len(self._get(split, key))} entries, but {count} under {names['M']!r}"
        self.fail([f"split {split!r}", f"key {key!r}"], found, "one entry for each example under every key")
    for name in self.streams:
      if name == "ids":
        self._get(split, "text_bert")
      else:
        self._width(split, name)

  def _width(self, split: str, name: str) -> int:
    values = self._get(split, name)
    first = self._features(split, name, 0)[0] if len(values) else np.zeros((0, 0))
    return first.shape[1]

  def _steps(self, key: str) -> int:
    """Returns the padded length of a key of the training split; -1 where it differs."""
    values, axis = self.splits["train"][key], 1 if key == "text_bert" else 0
    try:
      if isinstance(values, np.ndarray) and values.dtype != object:
        return values.shape[axis + 1]
      lengths = {np.shape(value)[axis] if axis else len(value) for value in values}
    except (ValueError, TypeError, IndexError):
      return -1
    return lengths.pop() if len(lengths) == 1 else -1

  def _features(self, split: str, name: str, row: int) -> tuple[np.ndarray, int]:
    """Returns an example's features, float32 [T, D] with finite values, and how many of them were not."""
    where = [f"split {split!r}", f"key {name!r}"]
    value = self.splits[split][name][row]
    try:
      if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
      with np.errstate(over="ignore", invalid="ignore"):
        values = np.array(value, np.float32)
    except (ValueError, TypeError, MemoryError):
      self.fail(where, f"values that are not numbers in example {row}", "features [steps, width] of each example")
    if values.ndim != 2 or values.shape[1] != self.widths.get(name, values.shape[1]):
      expected = f"[steps, {self.widths.get(name, 'width')}], so that all are [N, T, D]"
      self.fail(where, f"shape {list(values.shape)} of example {row}", expected)
    wrong = ~np.isfinite(values)
    values[wrong] = 0
    return values, int(wrong.sum())

  def _ids(self, split: str, row: int) -> np.ndarray:
    """Returns an example's token ids, int32 [T], as far as the mask of text_bert goes."""
    where = [f"split {split!r}", "key 'text_bert'"]
    try:
      values = np.asarray(self.splits[split]["text_bert"][row], np.float64)
    except (ValueError, TypeError, MemoryError):
      values = np.zeros(0)
    if values.ndim != 2 or values.shape[0] != 3:
      self.fail(where, f"example {row} of shape {list(values.shape)}", "[3, T]: token ids, mask and segments")
    ids = values[0, : end_of(values[1])]
    if not np.all((ids >= 0) & (ids < 2**31) & (ids == np.floor(ids))):
      self.fail(where, f"token ids of example {row} that are no whole numbers", "ids of a tokenizer's vocabulary")
    return ids.astype(np.int32)

  def _declared(self, split: str, name: str, row: int) -> int | None:
    """Returns the length that the file gives for a stream of an example; None where it gives none."""
    key = LENGTHS.get(name, "")
    if key not in self.splits[split]:
      return None
    value = np.asarray(self.splits[split][key][row])
    if value.size != 1 or value.dtype.kind not in "iuf" or not value.item() >= 0:
      self.fail([f"split {split!r}", f"key {key!r}"], f"{value.tolist()!r:.60} for example {row}", "a number of steps")
    return int(value.item())

  def record(self, split: str, row: int) -> Record:
    """Returns an example without its padding."""
    columns = self.splits[split]
    record = Record(
      id=name_of(columns["id"][row]) if "id" in columns else f"{split}$_${row}",
      text=text_of(columns["raw_text"][row]) if "raw_text" in columns else "",
      labels={head: float(values[row]) for head, values in self.labels[split].items()},
    )
    values = {}
    for stream in self.widths:
      values[stream], record.replaced[stream] = self._features(split, stream, row)
    real = {stream: np.any(x != 0, axis=1) for stream, x in values.items()}  # [T]
    if self.format == "MulT":
      starts = {stream: start_of(steps) for stream, steps in real.items()}
      if self.aligned:
        starts = dict.fromkeys(starts, min(starts.values(), default=0))
      record.streams = {stream: x[starts[stream] :] for stream, x in values.items()}
      return record
    ids = self._ids(split, row) if "text_bert" in columns else None
    ends = {}
    for stream, steps in real.items():
      declared = self._declared(split, stream, row) if stream != "text" or ids is None else len(ids)
      ends[stream] = end_of(steps) if declared is None else declared
    if self.aligned:
      # A word may lack a face or a sound, the last one too: the longest stream is the utterance.
      ends = dict.fromkeys(ends, max([*ends.values(), 0 if ids is None else len(ids)], default=0))
    record.streams = {stream: x[: ends[stream]] for stream, x in values.items()}
    if ids is not None and "ids" in self.streams:
      record.streams["ids"] = ids
    return record

  def records(self, split: str) -> Iterator[Record]:
    """Yields the examples of a split in the order of the file; what has been read is given back."""
    for row in range(len(self.labels[split]["M"])):
      if row % RELEASE == 0:
        for values in self.splits[split].values():
          if isinstance(values, np.ndarray):
            safe_pickle.release(values)
      yield self.record(split, row)


def keys(tree: dict[Any, Any]) -> str:
  """Returns the keys of a dict as text."""
  return ", ".join(str(key) for key in list(tree)[:20] if isinstance(key, str | int)) or "nothing"


def start_of(real: np.ndarray) -> int:
  """Returns the position of the first True of bool [T]; T where there is none."""
  return int(np.argmax(real)) if real.any() else len(real)


def end_of(real: np.ndarray) -> int:
  """Returns the position behind the last True (or value but 0) of [T]; 0 where there is none."""
  return len(real) - start_of(real[::-1] != 0)


def text_of(value: Any) -> str:
  """Returns a text as str: bytes are UTF-8, the parts of a list are joined by spaces."""
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace")
  if isinstance(value, np.ndarray | list | tuple):
    return " ".join(text_of(part) for part in value)
  return "" if value is None else str(value)


def name_of(value: Any) -> str:
  """Returns an example's name "video$_$clip"; MulT has a list of video, start and end."""
  if isinstance(value, np.ndarray | list | tuple) and len(value) > 1:
    video, *rest = map(text_of, value)
    return f"{video}$_${'_'.join(rest)}"
  return text_of(value)
