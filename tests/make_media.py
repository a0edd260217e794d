"""Clips as the data sets have them, made with PyAV: a tone and moving pictures, and what can be wrong with a file."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

TONE = 440.0


def tone(seconds: float, rate: int, channels: int = 1, frequency: float = TONE) -> np.ndarray:
  """Sound as float32 [channels, S]; the second channel is half as loud."""
  wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
  return np.stack([wave * 0.5**channel for channel in range(channels)]).astype(np.float32)


def picture(number: int) -> np.ndarray:
  """One frame [48, 64, 3] with a square that moves."""
  image = np.full((48, 64, 3), 40, np.uint8)
  at = (3 * number) % 48
  image[16:32, at : at + 16] = 200
  return image


def clip(
  path: Path,
  *,
  seconds: float = 1.0,
  rate: int = 44100,
  channels: int = 2,
  codec: str | None = "aac",
  pictures: bool = True,
  variable: bool = False,
  options: dict[str, str] | None = None,
  picture_seconds: float | None = None,
) -> Path:
  """Writes a clip; `codec=None` leaves out the sound, `variable` makes every third picture last three times as long.

  mp4 gets its header in front unless `options` say otherwise. Returns `path`.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  if options is None:
    options = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
  with av.open(str(path), "w", options=options) as container:
    video: Any = container.add_stream("mpeg4", rate=24) if pictures else None
    sound: Any = container.add_stream(codec, rate=rate, layout={1: "mono", 2: "stereo"}[channels]) if codec else None
    if video:
      video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
      video.codec_context.time_base = Fraction(1, 24)
    moments, at = [], 0
    while at < 24 * (picture_seconds or seconds):
      moments.append(at)
      at += 3 if variable and len(moments) % 3 == 0 else 1
    samples = tone(seconds, rate, channels)
    size = rate // 24
    for number in range(max(len(moments) if video else 0, -(-samples.shape[1] // size))):
      if video and number < len(moments):
        frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
        frame.pts, frame.time_base = moments[number], Fraction(1, 24)
        container.mux(video.encode(frame))
      part = samples[:, number * size : (number + 1) * size]
      if sound and part.size:
        container.mux(sound.encode(audio_frame(part, rate, number * size)))
    for stream in (video, sound):
      if stream:
        container.mux(stream.encode(None))
  return path


def audio_frame(part: np.ndarray, rate: int, at: int) -> av.AudioFrame:
  """Sound [channels, S] as a frame that starts at sample `at`."""
  frame = av.AudioFrame.from_ndarray(
    np.ascontiguousarray(part), format="fltp", layout=("mono", "stereo")[len(part) - 1]
  )
  frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
  return frame
