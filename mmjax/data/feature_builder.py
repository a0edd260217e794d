"""The TFDS builder of feature pickles: their examples to records of text, labels and unpadded streams.

Importing this takes seconds (TensorFlow), so the pipeline does it after everything else has been checked.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmjax.data import known_files
from mmjax.data.builder import finished, remove_empty
from mmjax.data.feature_file import FeatureFile, Record
from mmjax.data.raw_folder import SPLITS
from mmjax.errors import UserError
from mmjax.progress import Progress, track

FORMAT = 1  # raise when records of the same source would come out different


class FeaturePickle(tfds.core.GeneratorBasedBuilder):
  """Records {id, raw_text, labels, and those of ids, text, audio, vision that are read} in the file's order.

  Metadata: `file`, `sha1` and `source` say where they come from, `format`, `aligned`, `streams` and `widths` what was
  found, `replaced` {split: {stream: values that were not finite}}, `examples` {split: {id, text, labels, lengths}}.
  """

  VERSION = tfds.core.Version("1.0.0")
  # TFDS 4.9.10 finds it by itself only where importlib_resources is installed, which it does not require.
  code_path = Path(__file__)

  def __init__(self, source: FeatureFile, *, provenance: Mapping[str, str], data_dir: Path):
    self.source, self.provenance = source, provenance
    self.mistake: UserError | None = None
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    source = self.source
    features = tfds.features.FeaturesDict(
      {
        **{name: tfds.features.Text() for name in ("id", "raw_text")},
        "labels": {head: tfds.features.Scalar(np.float32) for head in source.heads},
        **{name: sequence(source.widths.get(name)) for name in source.streams},
      }
    )
    metadata = tfds.core.MetadataDict(
      **self.provenance,
      format=source.format,
      aligned=source.aligned,
      streams=source.streams,
      widths=source.widths,
      replaced={},
      examples={},
    )
    return tfds.core.DatasetInfo(builder=self, features=features, metadata=metadata, disable_shuffling=True)

  def _log_download_bytes(self) -> None:
    print(f"preparing records in {self.data_dir}", flush=True)

  def _log_download_done(self) -> None:
    pass

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    source, metadata = self.source, self.info.metadata
    replaced = metadata["replaced"][split] = dict.fromkeys(source.widths, 0)
    examples: dict[str, Any] = {
      "id": [],
      "text": [],
      "labels": {head: [] for head in source.heads},
      "lengths": {name: [] for name in source.streams},
    }
    metadata["examples"][split] = examples
    with Progress(f"preparing {split}", len(source.labels[split]["M"]), unit="examples") as progress:
      for row, record in enumerate(self._records(split)):
        progress.step()
        examples["id"].append(record.id)
        examples["text"].append(record.text)
        for head, label in record.labels.items():
          examples["labels"][head].append(label)
        for name, values in record.streams.items():
          examples["lengths"][name].append(len(values))
        for name, count in record.replaced.items():
          replaced[name] += count
        yield row, {"id": record.id, "raw_text": record.text, "labels": record.labels, **record.streams}

  def _records(self, split: str) -> Iterator[Record]:
    """Yields the examples; keeps the mistake of one that is not as expected."""
    try:
      yield from self.source.records(split)
    except UserError as error:
      self.mistake = error
      raise


def sequence(width: int | None) -> tfds.features.Tensor:
  """Returns the feature of a stream: float32 [T, width], or int32 [T] without a width."""
  shape, dtype = ((None,), np.int32) if width is None else ((None, width), np.float32)
  # As bytes: the default for a list of numbers takes longer to read and, for int32, up to ten bytes a number.
  return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)


class Records:
  """The records of a split by row, read from disk at each access until `load` is called."""

  def __init__(self, source: Any, ids: Sequence[str], nbytes: int):
    self.source, self.ids, self.nbytes = source, ids, nbytes
    self.held: list[Mapping[str, Any]] | None = None
    self.last: tuple[int, Mapping[str, Any]] = (-1, {})  # one example's streams are asked for one after the other

  def __getitem__(self, row: int) -> Mapping[str, Any]:
    if self.held is not None:
      return self.held[row]
    number, record = self.last
    if number != row:
      record = self.source[int(row)]
      assert record["id"].decode() == self.ids[row], "records are not in the order of their examples"
      self.last = row, record
    return record

  def load(self) -> None:
    """Reads all into memory."""
    rows = range(len(self.ids))
    self.held = [self[row] for row in track(rows, "reading records", total=len(rows), unit="examples")]


@dataclass(frozen=True)
class Column:
  """One stream of all records: `column[i]` is int32 [T] or float32 [T, D]."""

  records: Records
  name: str

  def __getitem__(self, row: int) -> np.ndarray:
    values: np.ndarray = self.records[row][self.name]
    return values


class Prepared:
  """The records of a feature pickle and what is known of them (see `FeaturePickle`)."""

  def __init__(self, builder: tfds.core.DatasetBuilder):
    self.builder = builder
    self.metadata: dict[str, Any] = dict(builder.info.metadata)

  def records(self, split: str) -> Records:
    """Returns the streams of a split by row."""
    examples, widths = self.metadata["examples"][split], self.metadata["widths"]
    nbytes = sum(4 * widths.get(name, 1) * sum(lengths) for name, lengths in examples["lengths"].items())
    return Records(self.builder.as_data_source(split=split), examples["id"], nbytes)


def prepare(
  path: Path, dataset: str, *, wanted: Sequence[str], heads: Sequence[str] | None, cache_dir: Path
) -> Prepared:
  """Returns the records of the file `path`, prepared unless they are there already.

  They lie in `cache_dir`/records/<name>, which carries a fingerprint of the file's SHA-1 and all options. TFDS writes
  them elsewhere and moves them there when whole, so that what was interrupted is never found.
  """
  sha1 = known_files.sha1(path)
  options = {"format": FORMAT, "sha1": sha1, "wanted": list(wanted), "heads": sorted(heads or ())}
  fingerprint = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
  place = cache_dir / "records" / f"{dataset.lower()}-{fingerprint}"
  folder = place / "feature_pickle" / "1.0.0"
  if not (folder / "dataset_info.json").is_file():
    source = FeatureFile(path, dataset, wanted=wanted, heads=heads)
    provenance = {"file": path.name, "sha1": sha1, "source": known_files.KNOWN.get(sha1, "unknown file")}
    write(FeaturePickle(source, provenance=provenance, data_dir=place), place, cache_dir)
  return Prepared(tfds.builder_from_directory(folder))


def write(builder: FeaturePickle, place: Path, cache_dir: Path) -> None:
  """Writes the records of `builder`; raises its `UserError` for an example that is not as expected."""
  tfds.disable_progress_bar()
  # TFDS takes the bare folder for whole records.
  shutil.rmtree(builder.data_dir, ignore_errors=True)
  try:
    builder.download_and_prepare()
  except Exception as error:
    remove_empty(place)
    if builder.mistake is not None:
      raise builder.mistake from None
    if not finished(builder):  # otherwise another process was quicker
      if isinstance(error, OSError):
        raise UserError(f"--cache_dir={cache_dir}: records cannot be written there: {error}") from error
      raise
