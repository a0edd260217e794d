"""Reads sentences aloud with eSpeak NG, as its own process.

    python tools/speak.py data/assets/espeak < jobs.jsonl

Each line of standard input is {"text", "path", "voice", "pitch", "rate"}: the wav file at `path` (absolute) is
mono 16-bit at 22,050 Hz; pitch is 0-100, rate words per minute. One line of standard output for each file
written: {"path", "samples"}. The library is GPL-3.0: it is loaded here and nowhere else.
"""

import ctypes
import json
import os
import sys
import wave
from pathlib import Path

RATE, PITCH = 1, 3  # espeak_PARAMETER
SYNCHRONOUS, DONT_EXIT = 2, 0x8000
UTF8 = 1
SHORTEST = 0.2  # seconds; a text without a sound, such as "...", is silence of this length

Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Speaker:
  """eSpeak NG from a folder that holds its library and `espeak-ng-data`."""

  def __init__(self, folder: Path):
    names = [path for path in sorted(folder.iterdir()) if path.name.startswith(("libespeak-ng.", "espeak-ng."))]
    if not names:
      raise FileNotFoundError(f"{folder}: no libespeak-ng library")
    # eSpeak keeps paths in buffers of 160 bytes, so it gets a short one.
    os.chdir(folder)
    self.library = ctypes.CDLL(str(names[0].resolve()))
    self.rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, b".", DONT_EXIT)
    if self.rate <= 0:
      raise OSError(f"{folder}: eSpeak NG does not start (code {self.rate})")
    self.pieces: list[bytes] = []
    self.callback = Callback(self._receive)
    self.library.espeak_SetSynthCallback(self.callback)

  def _receive(self, samples: ctypes.POINTER, count: int, _: int) -> int:
    if samples and count > 0:
      self.pieces.append(ctypes.string_at(samples, 2 * count))
    return 0

  def speak(self, text: str, *, voice: str, pitch: int, rate: int) -> bytes:
    """Returns 16-bit samples; silence where there is nothing to say."""
    if self.library.espeak_SetVoiceByName(voice.encode()):
      raise ValueError(f"eSpeak NG has no voice {voice!r}")
    self.library.espeak_SetParameter(PITCH, pitch, 0)
    self.library.espeak_SetParameter(RATE, rate, 0)
    # The seed is the clock's otherwise, and two runs would differ.
    self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    self.pieces.clear()
    data = " ".join(text.replace("\0", " ").split()).encode("utf-8", "replace")
    if data:
      self.library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, UTF8, None, None)
      self.library.espeak_Synchronize()
    return b"".join(self.pieces).ljust(2 * round(SHORTEST * self.rate), b"\0")


def main() -> None:
  """Speaks the jobs of standard input."""
  if len(sys.argv) != 2:
    sys.exit("usage: python tools/speak.py FOLDER_OF_ESPEAK < jobs.jsonl")
  speaker = Speaker(Path(sys.argv[1]).resolve())
  for line in sys.stdin:
    job = json.loads(line)
    samples = speaker.speak(job["text"], voice=job["voice"], pitch=job["pitch"], rate=job["rate"])
    with wave.open(job["path"], "wb") as file:
      file.setparams((1, 2, speaker.rate, 0, "NONE", ""))
      file.writeframes(samples)
    print(json.dumps({"path": job["path"], "samples": len(samples) // 2}), flush=True)


if __name__ == "__main__":
  main()
