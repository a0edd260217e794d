"""The sound of video files, decoded with PyAV: no ffmpeg program is needed."""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soxr

from mmjax.data.audio import SAMPLE_RATE
from mmjax.errors import UserError

# Only containers of pictures and sound: FFmpeg also takes playlists and scripts, which name other files to open.
FORMATS = "mov,matroska,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,wav,mp3,aac,flac,rm"
# A sound may end this much before the file says, as codecs work in frames and containers count pictures.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Sound:
  """The sound of a file up to the first place that cannot be decoded."""

  wave: np.ndarray  # int16 [S] at 16 kHz
  seconds_lost: float = 0.0  # against the length that the file states
  reason: str = ""  # why; empty for a whole sound

  @property
  def seconds(self) -> float:
    """Length of what there is."""
    return len(self.wave) / SAMPLE_RATE


def read_sound(path: Path, *, max_seconds: float | None = None) -> Sound:
  """Returns the first sound track of a file, up to `max_seconds`.

  Packets are decoded one by one, so that only the result is held. The first packet that is damaged ends it: what a
  decoder makes of later ones has no certain place in time, and MMML's extract_audio.py cuts such tails too (there
  where the pictures end, since it reads those).

  Raises `UserError`, naming the file, if it is missing, empty, no media file, or nothing of it is sound.
  """
  path = Path(path).absolute()  # so that FFmpeg never takes a name with a colon for an address

  def unusable(found: str) -> UserError:
    return UserError(f"{path}: found {found}\nexpected a video with a sound track; get it again")

  try:
    if path.is_file() and path.stat().st_size == 0:
      raise unusable("an empty file")
    container = av.open(str(path), options={"format_whitelist": FORMATS}, metadata_errors="replace")
  except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
    raise unusable(f"no readable file ({error.strerror})") from None
  except (av.error.FFmpegError, OSError) as error:
    raise unusable(f"no media file, or one that lost its header ({error.strerror})") from None
  with container:
    stream = container.streams.best("audio")
    if stream is None:
      raise unusable("no sound track")
    if stream.codec_context is None:
      raise unusable("sound in a coding that PyAV cannot read")
    limit = None if max_seconds is None else round(max_seconds * SAMPLE_RATE)
    converter, trouble, begin = Converter(limit), "", None
    try:
      for packet in container.demux(stream):
        if packet.is_corrupt:
          trouble = "the file ends within a packet"
          break
        for frame in packet.decode():
          assert isinstance(frame, av.AudioFrame)
          begin = frame.time if begin is None else begin
          converter.add(frame)
        if converter.full:
          break
    except av.error.FFmpegError as error:
      trouble = error.strerror or type(error).__name__
    if stream.duration is not None and stream.time_base is not None:
      begin, stated = 0.0, float(stream.duration * stream.time_base)
    else:  # of the whole file, in which the sound may begin later
      begin = (begin or 0.0) - (container.start_time or 0) / av.time_base
      stated = (container.duration or 0) / av.time_base
  wave = converter.finish()
  if not len(wave):
    raise unusable(f"a sound track of which nothing can be decoded ({trouble or 'no samples'})")
  end = begin + converter.seconds
  if not trouble and 0 < end - stated < TOLERANCE:  # silence that fills the codec's last frame
    wave = wave[: round((stated - begin) * SAMPLE_RATE)]
  lost = 0.0 if converter.full else max(stated - end, 0.0)
  if trouble:
    return Sound(wave, lost, f"undecodable from {end:.2f} s on ({trouble})")
  if lost > TOLERANCE:
    return Sound(wave, lost, f"ends at {end:.2f} of {stated:.2f} s")
  return Sound(wave)


class Converter:
  """Frames of any rate, format and number of channels to int16 at 16 kHz.

  The arithmetic is that of `audio.read_wav` (channels averaged, soxr), so that a sound gives the same samples
  from a video and from a wav. libswresample does not promise that: it adds the channels of float formats without
  scaling them down, leaves out the low-frequency channel, and its default filter is shorter.
  """

  def __init__(self, limit: int | None = None):
    self.limit = limit
    self.seconds = 0.0  # of what came in
    self.rate = 0
    self.resampler: soxr.ResampleStream | None = None
    self.data = bytearray()  # grows in place, where a list of pieces would be held twice when they are joined

  @property
  def full(self) -> bool:
    """Whether `limit` samples are there."""
    return self.limit is not None and len(self.data) >= 2 * self.limit

  def add(self, frame: av.AudioFrame) -> None:
    """Adds the samples of a decoded frame."""
    if frame.sample_rate != self.rate:  # as it may where a decoder finds out about a second layer late
      self._flush()
      self.rate = frame.sample_rate
      if self.rate != SAMPLE_RATE:
        self.resampler = soxr.ResampleStream(self.rate, SAMPLE_RATE, 1, dtype="float64", quality="HQ")
    self.seconds += frame.samples / frame.sample_rate
    wave = mono(frame)
    self._append(self.resampler.resample_chunk(wave) if self.resampler else wave)

  def finish(self) -> np.ndarray:
    """Returns int16 [S]."""
    self._flush()
    return np.frombuffer(self.data, np.int16)[: self.limit]

  def _flush(self) -> None:
    if self.resampler:
      self._append(self.resampler.resample_chunk(np.zeros(0), last=True))
    self.resampler = None

  def _append(self, wave: np.ndarray) -> None:
    self.data += np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16).tobytes()


def mono(frame: av.AudioFrame) -> np.ndarray:
  """Returns the mean of the channels as float64 [S] in -1..1."""
  samples = frame.to_ndarray()  # planar [channels, S], packed [1, S * channels]
  if not frame.format.is_planar:
    samples = samples.reshape(-1, len(frame.layout.channels)).T
  wave = samples.mean(axis=0, dtype=np.float64)
  if samples.dtype == np.uint8:
    return (wave - 128) / 128
  if samples.dtype.kind == "i":
    return wave / 2 ** (8 * samples.dtype.itemsize - 1)
  return np.nan_to_num(wave)
