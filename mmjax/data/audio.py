"""Waveforms: any wav to int16 at 16 kHz, mono; cutting and normalising."""

import struct
from pathlib import Path

import numpy as np

from mmjax.errors import UserError

SAMPLE_RATE = 16_000
# Sizes that programs write when they cannot go back to fill in the true one.
UNKNOWN_SIZES = (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000)


def read_wav(path: Path) -> np.ndarray:
  """Returns the sound as int16 [S] at 16 kHz: channels averaged, resampled with a proper filter.

  Raises `UserError`, naming the file, if it is missing, empty, cut short, without samples or not a sound file.
  """
  import soundfile
  import soxr

  path = Path(path)

  def damaged(reason: str) -> UserError:
    return UserError(f"{path}: found {reason}\nexpected a wav file with sound; get or extract it again")

  try:
    if path.stat().st_size == 0:
      raise damaged("an empty file")
    promised, present = data_sizes(path)
    if promised > present:
      raise damaged(f"a file cut short: its header promises {promised} bytes of sound, {present} are there")
    with soundfile.SoundFile(path) as file:
      rate, frames = file.samplerate, file.frames
      sound = file.read(dtype="float64", always_2d=True)  # [S, channels]
  except soundfile.SoundFileError as error:
    raise damaged(f"no readable sound ({str(error).strip()})") from None
  except OSError as error:
    raise damaged(f"no readable file ({error.strerror})") from None
  if 0 < len(sound) < frames:
    raise damaged(f"a file cut short: {frames} samples promised, {len(sound)} readable")
  if not np.isfinite(sound).all():
    raise damaged("samples that are not finite numbers")
  wave = sound.mean(axis=1)
  if rate != SAMPLE_RATE and len(wave):
    wave = soxr.resample(wave, rate, SAMPLE_RATE, quality="HQ")
  if not len(wave):
    raise damaged("0 samples")
  return np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16)


def data_sizes(path: Path) -> tuple[int, int]:
  """Returns the bytes of sound that a RIFF header promises, and how many are there; (0, 0) for other files.

  libsndfile reads a file that was cut short without a word, as if it ended there.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RIFX") or head[8:12] != b"WAVE":
      return 0, 0
    order = "<" if head[:4] == b"RIFF" else ">"
    while len(chunk := file.read(8)) == 8:
      name, length = struct.unpack(f"{order}4sI", chunk)
      if name == b"data":
        return (0, 0) if length in UNKNOWN_SIZES else (length, size - file.tell())
      file.seek(length + length % 2, 1)
  return 0, 0


def cut(wave: np.ndarray, samples: int, side: str) -> np.ndarray:
  """Returns the first or last `samples` of a wave (or frames of features), as `side` says (MM11)."""
  return wave[:samples] if side == "first" else wave[max(len(wave) - samples, 0) :]


def as_float(wave: np.ndarray, *, normalize: bool) -> np.ndarray:
  """Returns float32 [S] in -1..1 from int16, or with zero mean and unit variance if `normalize`.

  The latter is Wav2Vec2FeatureExtractor's do_normalize, over the samples that are given.
  """
  scaled = wave.astype(np.float32) / 32768
  if not normalize or not len(scaled):
    return scaled
  mean, variance = scaled.mean(dtype=np.float64), scaled.var(dtype=np.float64)
  return ((scaled - mean) / np.sqrt(variance + 1e-7)).astype(np.float32)
