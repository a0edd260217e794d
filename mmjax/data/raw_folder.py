"""The raw-folder format: label.csv beside wav/<video_id>/<clip_id>.wav, as MOSI, MOSEI and SIMS come.

Needs no TensorFlow: everything that can be wrong with a folder is said before anything slow is imported.
"""

import csv
import io
import math
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mmjax.errors import UserError

SPLITS = ("train", "valid", "test")
COLUMNS = {"M": "label", "T": "label_T", "A": "label_A", "V": "label_V"}
LABELS = "label.csv"


@dataclass(frozen=True)
class Set:
  """What is known about a data set; the default is a user's own folder."""

  counts: Mapping[str, int] = field(default_factory=dict)  # published examples of each split
  limit: float | None = None  # labels lie in -limit..limit
  heads: tuple[str, ...] | None = None  # labels it has; None: M and what else label.csv holds
  clip_digits: int = 1  # clip ids are zero-padded to this in file names
  case: str = "as_is"  # how text is cased before tokenising (MM13)
  invalid: frozenset[str] = frozenset()  # damaged clips that the authors leave out (MM12)
  source: str = "a folder of your own in this format"


MOSEI_INVALID = frozenset(
  ("3aIQUQgawaI/12", "94ULum9MYX0/2", "94ULum9MYX0/11", "mRnEJOLkhp8/24", "mRnEJOLkhp8/26", "aE-X_QdDaqQ/3")
)
MMSA = "raw videos and label.csv as MMSA distributes them: https://github.com/thuiar/MMSA"
SETS = {
  "mosi": Set({"train": 1284, "valid": 229, "test": 686}, 3.0, ("M",), case="first_upper", source=f"CMU-MOSI, {MMSA}"),
  "mosei": Set(
    {"train": 16326, "valid": 1871, "test": 4659},
    3.0,
    ("M",),
    case="first_upper",
    invalid=MOSEI_INVALID,
    source=f"CMU-MOSEI, {MMSA}",
  ),
  "sims": Set(
    {"train": 1368, "valid": 456, "test": 457},
    1.0,
    ("M", "T", "A", "V"),
    clip_digits=4,
    source=f"CH-SIMS, {MMSA}",
  ),
  "simsv2": Set(
    {"train": 2722, "valid": 647, "test": 1034},
    1.0,
    ("M", "T", "A", "V"),
    source=f"CH-SIMS v2, {MMSA}",
  ),
}


def known(dataset: str) -> Set:
  """Returns what is known about `dataset`."""
  return SETS.get(dataset.lower(), Set())


@dataclass(frozen=True)
class Clip:
  """One row of label.csv."""

  video_id: str
  clip_id: str
  text: str
  labels: Mapping[str, float]  # by head
  split: str
  row: int  # in label.csv, whose header is row 1

  @property
  def name(self) -> str:
    """The clip as its file is named, without extension."""
    return f"{self.video_id}/{self.clip_id}"

  @property
  def id(self) -> str:
    """The clip as MMSA's files name it."""
    return f"{self.video_id}$_${self.clip_id}"

  @property
  def order(self) -> tuple[str, int, str]:
    """Sorting by it gives the authors' order (MM10): video, then clip by number."""
    number = int(self.clip_id) if self.clip_id.isdecimal() else -1
    return self.video_id, number, self.clip_id


def find(data_dir: Path, dataset: str) -> Path:
  """Returns the folder with label.csv: `data_dir`/`dataset` in any case, or `data_dir` itself."""
  data_dir, name = Path(data_dir), dataset.lower()
  found: list[str] = []
  if data_dir.is_dir():
    entries = sorted(data_dir.iterdir())
    for folder in entries:
      if folder.name.lower() == name and (folder / LABELS).is_file():
        return folder
    # A folder that bears another set's name is not this one.
    if (data_dir / LABELS).is_file() and data_dir.resolve().name.lower() not in SETS.keys() - {name}:
      return data_dir
    found = [entry.name + "/" * entry.is_dir() for entry in entries]
  state = f"holds {', '.join(found[:8]) or 'nothing'}" if data_dir.is_dir() else "does not exist"
  raise UserError(
    f"no {dataset} data: found that {data_dir} {state}\n"
    f"expected {data_dir / dataset / LABELS} and {data_dir / dataset}/wav/<video_id>/<clip_id>.wav\n"
    f"where they come from: {known(dataset).source}\n"
    "type --data_dir=<folder that holds them>; to see mmjax work without any data: bash tools/quickstart.sh"
  )


def _mistake(path: Path, found: str, expected: str, remedy: str = "") -> UserError:
  return UserError(f"{path}: found {found}\nexpected {expected}" + (f"\n{remedy}" if remedy else ""))


def _number(path: Path, row: int, column: str, text: str, limit: float | None) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not math.isfinite(value) or (limit is not None and abs(value) > limit + 1e-3):
    span = "a finite number" if limit is None else f"a number in {-limit:g}..{limit:g}"
    raise _mistake(path, f"{column} {text!r} in row {row}", span, "correct that row or remove it")
  return value


def read_labels(
  folder: Path, dataset: str, *, heads: Iterable[str] | None = None, drop_invalid: bool = True
) -> tuple[dict[str, list[Clip]], dict[str, str]]:
  """Returns the clips of each split in the authors' order (MM10), and {clip name: why it was left out}.

  `heads` are the labels to read; None reads what the data set is known for, or else what the file holds.
  Raises `UserError` for a file that is not as expected, with the row.
  """
  path, info = folder / LABELS, known(dataset)
  try:
    text = path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise _mistake(path, f"byte {error.start} that is not UTF-8", "UTF-8 text", "save it as CSV UTF-8") from None
  if not text.strip():
    raise _mistake(path, "an empty file", "a header and one row a clip", "get the file again")
  reader = csv.DictReader(io.StringIO(text, newline=""))
  try:
    columns = [(name or "").strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    if heads is None:
      heads = info.heads or tuple(head for head, column in COLUMNS.items() if head == "M" or column in columns)
    wanted = {head: COLUMNS[head] for head in heads}
    missing = [c for c in ("video_id", "clip_id", "text", "mode", *wanted.values()) if c not in columns]
    if missing:
      expected = f"also {', '.join(missing)} (in any order, further columns do not matter)"
      raise _mistake(path, f"columns {', '.join(columns)}", expected, f"add the column to the header of {path.name}")
    clips = [_clip(path, number, row, wanted, info) for number, row in enumerate(reader, 2)]
  except csv.Error as error:
    raise _mistake(path, f"{error} near line {reader.line_num}", "comma-separated values") from None

  splits: dict[str, list[Clip]] = {split: [] for split in SPLITS}
  seen: dict[tuple[str, str], int] = {}
  dropped: dict[str, str] = {}
  for clip in clips:
    earlier = seen.setdefault((clip.video_id, clip.clip_id), clip.row)
    if earlier != clip.row:
      found = f"clip {clip.name} in rows {earlier} and {clip.row}"
      raise _mistake(path, found, "each clip once", "remove one of the two rows")
    if drop_invalid and clip.name in info.invalid:
      dropped[clip.name] = "damaged in the official release (MM12)"
    else:
      splits[clip.split].append(clip)
  for split, found_clips in splits.items():
    if not found_clips:
      counts = ", ".join(f"{name} {len(c)}" for name, c in splits.items())
      expected = "at least one in each"
      raise _mistake(path, f"no clip with mode {split} ({counts})", expected, f"set mode to {split} in some rows")
    found_clips.sort(key=lambda clip: clip.order)
  return splits, dropped


def _clip(path: Path, number: int, row: Mapping[str | None, str], wanted: Mapping[str, str], info: Set) -> Clip:
  values = dict(row)
  if None in values:
    raise _mistake(path, f"more fields than columns in row {number}", "as many", "put quotes around texts with commas")
  absent = [name for name, value in values.items() if value is None]
  if absent:
    raise _mistake(path, f"no {absent[0]} in row {number}", "a value for each column", "complete or remove that row")
  ids = {name: values[name].strip() for name in ("video_id", "clip_id")}
  for name, value in ids.items():
    if not value or "/" in value or value in (".", ".."):
      raise _mistake(path, f"{name} {value!r} in row {number}", "the name of a folder or file", "correct that row")
  split = values["mode"].strip()
  if split not in SPLITS:
    expected, remedy = f"one of {', '.join(SPLITS)}", "replace it by the split that is meant (dev: valid)"
    raise _mistake(path, f"mode {split!r} in row {number}", expected, remedy)
  labels = {head: _number(path, number, name, values[name], info.limit) for head, name in wanted.items()}
  return Clip(**ids, text=values["text"], labels=labels, split=split, row=number)


class Wavs:
  """Finds the wav of each clip; letter case and leading zeros may differ where that is unambiguous."""

  def __init__(self, folder: Path, dataset: str, videos: Collection[str]):
    self.digits = known(dataset).clip_digits
    self.videos = frozenset(videos)
    names = ("wav", "WAV", "Wav")
    self.root = next((folder / name for name in names if (folder / name).is_dir()), folder / "wav")
    if not self.root.is_dir():
      has_raw = any((folder / name).is_dir() for name in ("raw", "Raw", "RAW"))
      found = f"no folder {self.root}" + (" (only the videos in raw/)" if has_raw else "")
      raise UserError(
        f"{found}\nexpected {self.root}/<video_id>/<clip_id>.wav\n"
        "extract the sound of each clip:\n"
        f"  python -m mmjax.prepare --dataset={dataset} --data_dir={shlex.quote(str(folder))}\n"
        "or train on text alone: --gin.mmml.MMML.tasks='\"T\"'"
      )
    self.files: dict[Path, dict[str, Path]] = {}

  @cached_property
  def folders(self) -> dict[str, list[Path]]:
    """The video folders by lower-case name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(self.root.iterdir()):
      found.setdefault(path.name.lower(), []).append(path)
    return found

  def path(self, clip: Clip) -> Path | None:
    """Returns the clip's wav, or None where there is none."""
    similar = self.folders.get(clip.video_id.lower(), [])
    # YouTube's ids differ by case alone, so that a folder another video owns is not a misspelling of this one.
    spare = [path for path in similar if path.name not in self.videos]
    folder = next((path for path in similar if path.name == clip.video_id), spare[0] if len(spare) == 1 else None)
    if folder is None:
      return None
    if folder not in self.files:
      self.files[folder] = {}
      for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() == ".wav":
          self.files[folder].setdefault(path.stem.lower(), path)
    stems = self.files[folder]
    names = [clip.clip_id.lower(), clip.clip_id.zfill(self.digits).lower()]
    if clip.clip_id.isdecimal():
      names += [stem for stem in stems if stem.isdecimal() and int(stem) == int(clip.clip_id)]
    return next((stems[name] for name in names if name in stems), None)


def find_wavs(
  folder: Path, dataset: str, clips: Collection[Clip], *, damaged: str = "fatal"
) -> tuple[dict[str, Path], dict[str, str]]:
  """Returns {clip name: wav} and, with `damaged="skip"`, {clip name: why it has none}.

  Raises `UserError` for missing files otherwise, and if there is none at all.
  """
  wavs = Wavs(folder, dataset, {clip.video_id for clip in clips})
  found = {clip.name: wavs.path(clip) for clip in clips}
  paths = {name: path for name, path in found.items() if path is not None}
  missing = [name for name, path in found.items() if path is None]
  if missing and (damaged == "fatal" or not paths):
    listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    raise UserError(
      f"{len(missing)} of {len(found)} clips in {folder / LABELS} have no wav: {listed}\n"
      f"expected for the first: {wavs.root}/{missing[0]}.wav\n"
      "add the files, or leave those clips out and count them: --gin.pipeline.Pipeline.damaged='\"skip\"'"
    )
  return paths, dict.fromkeys(missing, "no wav file")
