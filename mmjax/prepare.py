"""`python -m mmjax.prepare`: the sound of a raw folder's videos as wav files, and what the folder holds."""

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmjax import config
from mmjax.errors import UserError

LISTED = 100  # of the clips that have no video at all; damaged ones are always named


def run(argv: Sequence[str]) -> int:
  """Prepares as the flags say; returns the exit status."""
  parser = config.parser(
    "prepare",
    "Extract the sound of each clip in label.csv to <data_dir>/<dataset>/wav (16 kHz, mono), the one folder that is "
    "written there, and describe the data set. Wavs that are there are kept, so that an interrupted run continues.",
  )
  parser.add_argument("--dataset", required=True, help="mosi, mosei, sims or a folder of your own in that format")
  parser.add_argument("--describe", action="store_true", help="describe what is there, write nothing")
  parser.add_argument(
    "--damaged",
    default="fatal",
    choices=("fatal", "skip"),
    help="exit status 2 (default) or 0 where clips have no usable sound; all others are prepared either way",
  )
  parser.add_argument("--jobs", type=positive, default=processors(), help="clips at a time (default: processors)")
  flags = parser.parse_args(argv)

  from mmjax.data import raw_folder

  folder = raw_folder.find(flags.data_dir or Path("data"), flags.dataset)
  splits, _ = raw_folder.read_labels(folder, flags.dataset, drop_invalid=False)
  print(f"{flags.dataset} in {folder}", flush=True)
  unusable: Mapping[str, str] = {}
  if not flags.describe:
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
      unusable = make(folder, flags.dataset, splits, jobs=flags.jobs)
    except KeyboardInterrupt:
      print("\ninterrupted; what is done is kept: run the same command to continue")
      return 143
    finally:
      signal.signal(signal.SIGTERM, previous)
  describe(folder, flags.dataset, splits, cache_dir=flags.cache_dir or config.default_cache_dir())
  if unusable and flags.damaged == "fatal":
    sys.stdout.flush()  # the names before the error, also where both go to one file
    raise UserError(
      f"clips without usable sound, named above: {len(unusable)}; all others are prepared\n"
      "get those files again and run the same command, or accept it: --damaged=skip here, and in training\n"
      "--gin.pipeline.Pipeline.damaged='\"skip\"', which leaves those clips out and counts them"
    )
  return 0


def positive(text: str) -> int:
  """Returns a whole number of at least 1."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
  return value


def processors() -> int:
  """Returns how many processors this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make(folder: Path, dataset: str, splits: Mapping[str, Sequence], *, jobs: int) -> Mapping[str, str]:
  """Writes the wavs that are not there and says so; returns {clip name: why it has none}."""
  from mmjax.data import raw_folder, wav_files

  invalid = raw_folder.known(dataset).invalid
  clips = [clip for rows in splits.values() for clip in rows if clip.name not in invalid]
  outcome = wav_files.prepare(folder, dataset, clips, jobs=jobs)
  written, kept, unusable = (len(part) for part in (outcome.written, outcome.kept, outcome.unusable))
  print(f"wavs: {written} written, {kept} were there already, {unusable} cannot be made")
  missing = {name: reason for name, reason in outcome.unusable.items() if reason.startswith("no video ")}
  broken = {name: reason for name, reason in outcome.unusable.items() if name not in missing}
  listed("clips without usable sound", broken)
  listed("clips with neither a video nor a wav", missing, limit=LISTED)
  return outcome.unusable


def describe(folder: Path, dataset: str, splits: Mapping[str, Sequence], *, cache_dir: Path) -> None:
  """Prints what the folder holds: examples, labels, lengths, feature pickles, and what was made of it."""
  from mmjax.data import inventory, raw_folder, wav_files

  clips = [clip for rows in splits.values() for clip in rows]
  invalid = [clip.name for clip in clips if clip.name in raw_folder.known(dataset).invalid]
  usable = [clip for clip in clips if clip.name not in invalid]
  found = wav_files.lengths(wav_files.present(folder, dataset, usable))
  if invalid:
    print(f"known to be damaged in the official release, never used (MM12): {', '.join(sorted(invalid))}")
  print("\n" + inventory.counts(dataset, splits, damaged=invalid, there=found.seconds))
  listed("wavs that end where the video is damaged", found.cut)
  listed("wavs that cannot be read; remove them to have them made again", found.unreadable)
  print("\n" + inventory.histogram(dataset, splits))
  print("\n" + inventory.quantiles(splits, found.seconds))
  for title, lines in (
    ("feature pickles", inventory.pickles(folder)),
    ("made by training, of this data set in this or an earlier state", inventory.records(cache_dir, dataset)),
  ):
    if lines:
      print("\n" + "\n  ".join([f"{title}:", *lines]))


def listed(title: str, reasons: Mapping[str, str], *, limit: int | None = None) -> None:
  """Prints clips with what is said of each; nothing where there are none."""
  if not reasons:
    return
  lines = [f"  {name}: {reason}" for name, reason in sorted(reasons.items())][:limit]
  if limit is not None and len(reasons) > limit:
    lines.append(f"  and {len(reasons) - limit} more")
  print("\n".join([f"{title} ({len(reasons)}):", *lines]))


if __name__ == "__main__":
  config.main(run)
