"""Videos of a raw folder to the wav files that training reads."""

import os
import struct
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmjax.data import video
from mmjax.data.audio import SAMPLE_RATE
from mmjax.data.raw_folder import Clip, Wavs, known
from mmjax.errors import UserError
from mmjax.progress import Progress

# Preferred first where a clip has several.
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".mpeg", ".wmv", ".3gp", ".ts")
EDITED = "-edited"  # MMML's extract_audio.py leaves 12-edited.mp4, a shortened copy, beside a damaged 12.mp4
CUT = "damaged tail cut"  # opens the comment in the wav of such a clip, so that it is known later


class Videos(Wavs):
  """Finds the video of each clip by the rules by which `Wavs` finds its wav."""

  def __init__(self, folder: Path, dataset: str, videos: Collection[str]):
    # Not the initialiser of Wavs, which asks for wavs.
    self.digits = known(dataset).clip_digits
    self.videos = frozenset(videos)
    self.root = next((folder / name for name in ("raw", "Raw", "RAW") if (folder / name).is_dir()), folder / "raw")
    if not self.root.is_dir():
      self.folders = {}
    self.files = {path: listing(path) for paths in self.folders.values() for path in paths}


def listing(folder: Path) -> dict[str, Path]:
  """Returns the videos in a folder by lower-case name without extension."""
  paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []
  paths.sort(key=lambda path: (EDITED in path.stem, SUFFIXES.index(path.suffix.lower()), path.name))
  found: dict[str, Path] = {}
  for path in paths:
    found.setdefault(path.stem.lower().removesuffix(EDITED), path)
  return found


def wav_root(folder: Path) -> Path:
  """Returns the folder of wavs in any case, or the one to make."""
  return next((folder / name for name in ("wav", "WAV", "Wav") if (folder / name).is_dir()), folder / "wav")


def present(folder: Path, dataset: str, clips: Collection[Clip]) -> dict[str, Path]:
  """Returns {clip name: wav} of the clips that have one."""
  if not wav_root(folder).is_dir():
    return {}
  wavs = Wavs(folder, dataset, {clip.video_id for clip in clips})
  found = {clip.name: wavs.path(clip) for clip in clips}
  return {name: path for name, path in found.items() if path is not None}


@dataclass
class Outcome:
  """What `prepare` did, by clip name."""

  kept: dict[str, Path]  # wavs that were there
  written: dict[str, Path] = field(default_factory=dict)
  unusable: dict[str, str] = field(default_factory=dict)  # and why


def prepare(folder: Path, dataset: str, clips: Collection[Clip], *, jobs: int) -> Outcome:
  """Writes the wav of each clip that has none; returns what came of it.

  What is wrong with one clip keeps no other from being prepared. Raises `UserError` where there is not one video
  or wav, and if no wav can be written.
  """
  outcome = Outcome(present(folder, dataset, clips))
  missing = [clip for clip in clips if clip.name not in outcome.kept]
  if not missing:
    return outcome
  videos, root = Videos(folder, dataset, {clip.video_id for clip in clips}), wav_root(folder)
  if not outcome.kept and not videos.root.is_dir():
    raise UserError(
      f"found neither {videos.root} nor a wav\n"
      f"expected {videos.root}/<video_id>/<clip_id>.mp4 (or another kind of video)\n"
      f"where they come from: {known(dataset).source}"
    )
  # Where a video's folder is spelt otherwise and holds wavs, a second one would hide those.
  homes = {clip.video_id: outcome.kept[clip.name].parent for clip in clips if clip.name in outcome.kept}
  # Threads, not processes: PyAV and soxr work without the interpreter's lock.
  pool = ThreadPoolExecutor(jobs, thread_name_prefix="prepare")
  try:
    futures: dict[Future[None], tuple[Clip, Path]] = {}
    for clip in missing:
      source, name = videos.path(clip), clip.clip_id.zfill(videos.digits)
      if source is None:
        outcome.unusable[clip.name] = f"no video {videos.root}/{clip.video_id}/{name}.mp4"
        continue
      target = homes.get(clip.video_id, root / clip.video_id) / f"{name}.wav"
      futures[pool.submit(extract, source, target)] = clip, target
    with Progress(f"sound of {dataset}", len(futures), unit="clips") as progress:
      for future in as_completed(futures):
        clip, target = futures[future]
        try:
          future.result()
          outcome.written[clip.name] = target
        except UserError as error:
          outcome.unusable[clip.name] = str(error).splitlines()[0].replace(": found ", ": ", 1)
        progress.step()
  except OSError as error:
    raise UserError(
      f"no wav can be written: {error}\nexpected room and the right to write in {root}\n"
      "then run the same command again: what is done is kept"
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)
  return outcome


def extract(source: Path, target: Path) -> None:
  """Writes the sound of a video as wav, whole or not at all; a comment in the file tells of a tail that was cut."""
  sound = video.read_sound(source)
  lost = f"{CUT}: {sound.seconds_lost:.2f} s lost, {sound.seconds:.2f} s kept: {sound.reason}"
  target.parent.mkdir(parents=True, exist_ok=True)
  # The name must not end in .wav, nor be one that another process writes.
  partial = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
  try:
    with partial.open("wb") as file:
      file.write(header(len(sound.wave), lost if sound.reason else ""))
      file.write(sound.wave.astype("<i2", copy=False).data)
    partial.replace(target)
  finally:
    with suppress(FileNotFoundError):
      partial.unlink()


def header(samples: int, comment: str = "") -> bytes:
  """Returns what precedes the samples in a wav of 16-bit mono sound at 16 kHz."""
  chunks = [(b"fmt ", struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16))]
  if comment:
    text = comment.encode() + b"\0"
    text += b"\0" * (len(text) % 2)
    chunks.append((b"LIST", b"INFOICMT" + struct.pack("<I", len(text)) + text))
  body = b"WAVE" + b"".join(name + struct.pack("<I", len(data)) + data for name, data in chunks)
  body += b"data" + struct.pack("<I", 2 * samples)
  return b"RIFF" + struct.pack("<I", len(body) + 2 * samples) + body


@dataclass(frozen=True)
class Lengths:
  """What the headers of wavs say, by clip name."""

  seconds: dict[str, float]
  cut: dict[str, str]  # clips whose damaged tail was cut, and what was lost
  unreadable: dict[str, str]  # and why


def lengths(paths: dict[str, Path]) -> Lengths:
  """Returns the lengths of wavs without reading their sound."""
  import soundfile

  found = Lengths({}, {}, {})
  for name, path in paths.items():
    try:
      with soundfile.SoundFile(path) as file:
        found.seconds[name] = file.frames / file.samplerate
        if file.comment.startswith(CUT):
          found.cut[name] = file.comment.removeprefix(f"{CUT}: ")
    except (soundfile.SoundFileError, OSError) as error:
      found.unreadable[name] = f"{path}: {str(error).strip()}"
  return found
