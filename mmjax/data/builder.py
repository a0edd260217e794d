"""The TFDS builder of raw folders: label.csv and wavs to records of text, labels and int16 sound.

Importing this takes seconds (TensorFlow), so the pipeline does it after everything else has been checked.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmjax.data import audio
from mmjax.data.raw_folder import LABELS, Clip
from mmjax.errors import UserError
from mmjax.progress import Progress

FORMAT = 1  # raise when records of the same source would come out different


class RawFolder(tfds.core.GeneratorBasedBuilder):
  """Records {id, video_id, clip_id, text, labels, wave} of each split, in the order of the clips given.

  Metadata: `samples` {split: [length of each wave]} and `skipped` {clip name: reason}.
  """

  VERSION = tfds.core.Version("1.0.0")
  # TFDS 4.9.10 finds it by itself only where importlib_resources is installed, which it does not require.
  code_path = Path(__file__)

  def __init__(self, *, splits: Mapping[str, Sequence[Clip]], paths: Mapping[str, Path], damaged: str, data_dir: Path):
    self.splits, self.paths, self.damaged = splits, paths, damaged
    self.mistake: UserError | None = None
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    heads = next(iter(self.splits.values()))[0].labels
    features = tfds.features.FeaturesDict(
      {
        **{name: tfds.features.Text() for name in ("id", "video_id", "clip_id", "text")},
        "labels": {head: tfds.features.Scalar(np.float32) for head in heads},
        # As bytes: a list of int64, the default, takes up to ten bytes a sample.
        "wave": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding=tfds.features.Encoding.BYTES),
      }
    )
    metadata = tfds.core.MetadataDict(samples={}, skipped={})
    return tfds.core.DatasetInfo(builder=self, features=features, metadata=metadata, disable_shuffling=True)

  def _log_download_bytes(self) -> None:
    print(f"preparing records in {self.data_dir}", flush=True)

  def _log_download_done(self) -> None:
    pass

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    return {split: self._generate_examples(split) for split in self.splits}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    samples = self.info.metadata["samples"][split] = []
    with Progress(f"preparing {split}", len(self.splits[split]), unit="clips") as progress:
      for clip in self.splits[split]:
        progress.step()
        try:
          wave = audio.read_wav(self.paths[clip.name])
        except UserError as error:
          if self.damaged == "fatal":
            self.mistake = error
            raise
          self.info.metadata["skipped"][clip.name] = str(error).splitlines()[0].partition(": found ")[2]
          continue
        samples.append(len(wave))
        names = {"id": clip.id, "video_id": clip.video_id, "clip_id": clip.clip_id, "text": clip.text}
        yield len(samples) - 1, {**names, "labels": clip.labels, "wave": wave}


class Prepared:
  """The records of a folder: which clips have sound, how long it is, and the sound itself."""

  def __init__(self, builder: RawFolder):
    metadata = builder.info.metadata
    self.skipped: dict[str, str] = dict(metadata["skipped"])
    self.samples = {split: np.asarray(metadata["samples"][split], np.int64) for split in builder.splits}
    self.builder = builder

  def waves(self, split: str) -> "Waves":
    """Returns the sound of a split by row."""
    ids = [clip.id for clip in self.builder.splits[split] if clip.name not in self.skipped]
    return Waves(self.builder.as_data_source(split=split), ids, self.samples[split])


class Waves:
  """Sound by row, `waves[i]` int16 [S], read from disk at each access until `load` is called."""

  def __init__(self, source: Any, ids: Sequence[str], samples: np.ndarray):
    self.source, self.ids, self.samples = source, ids, samples
    self.held: list[np.ndarray] | None = None

  def __len__(self) -> int:
    return len(self.samples)

  def __getitem__(self, row: int) -> np.ndarray:
    if self.held is not None:
      return self.held[row]
    record = self.source[int(row)]
    assert record["id"].decode() == self.ids[row], "records are not in the order of their clips"
    return record["wave"]

  @property
  def nbytes(self) -> int:
    """Bytes of memory that holding all takes."""
    return int(self.samples.sum()) * 2

  def load(self) -> None:
    """Reads all into memory."""
    self.held = [self[row] for row in range(len(self))]


def fingerprint(folder: Path, paths: Mapping[str, Path], options: Mapping[str, Any]) -> str:
  """Returns 16 hex digits for label.csv's bytes, the names and sizes of the clips and all options."""
  digest = hashlib.sha256((folder / LABELS).read_bytes())
  clips = {name: [path.relative_to(folder).as_posix(), path.stat().st_size] for name, path in paths.items()}
  digest.update(json.dumps({"format": FORMAT, "options": options, "clips": clips}, sort_keys=True).encode())
  return digest.hexdigest()[:16]


def prepare(
  folder: Path,
  dataset: str,
  splits: Mapping[str, Sequence[Clip]],
  paths: Mapping[str, Path],
  *,
  cache_dir: Path,
  damaged: str = "fatal",
) -> tuple[Prepared, str]:
  """Returns the records of `splits`, prepared unless they are there already, and their name.

  They lie in `cache_dir`/records/<name>, which carries a fingerprint of source and options. TFDS writes them
  elsewhere and moves them there when whole, so that what was interrupted is never found.
  """
  heads = sorted(next(iter(splits.values()))[0].labels)
  clips = [[split, clip.id] for split in splits for clip in splits[split]]
  options = {"damaged": damaged, "heads": heads, "clips": clips}
  name = f"{dataset.lower()}-{fingerprint(folder, paths, options)}"
  place = cache_dir / "records" / name

  def make() -> RawFolder:
    return RawFolder(splits=splits, paths=paths, damaged=damaged, data_dir=place)

  builder = make()
  if not finished(builder):
    tfds.disable_progress_bar()
    # TFDS takes the bare folder for whole records.
    shutil.rmtree(builder.data_dir, ignore_errors=True)
    try:
      builder.download_and_prepare()
    except Exception as error:
      remove_empty(place)
      if builder.mistake is not None:
        remedy = "leave such clips out and count them: --gin.pipeline.Pipeline.damaged='\"skip\"'"
        raise UserError(f"{builder.mistake}; or {remedy}") from None
      if not finished(make()):  # otherwise another process was quicker
        if isinstance(error, OSError):
          raise UserError(f"--cache_dir={cache_dir}: records cannot be written there: {error}") from error
        raise
    builder = make()
  return Prepared(builder), name


def finished(builder: tfds.core.DatasetBuilder) -> bool:
  """Returns whether the records are there and whole."""
  return (Path(builder.data_dir) / "dataset_info.json").is_file()


def remove_empty(folder: Path) -> None:
  """Removes `folder` and the folders in it as far as they hold no files."""
  for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
    if path.is_dir() and not any(path.iterdir()):
      path.rmdir()
