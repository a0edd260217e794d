"""What a raw folder and the cache hold, as tables of text."""

import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmjax.data import known_files
from mmjax.data.raw_folder import SPLITS, Clip, known
from mmjax.metrics import SIMS_BOUNDS

Rows = Mapping[str, Sequence[Clip]]
QUANTILES = {"shortest": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
BAR = 40  # characters of the longest


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """Returns columns as wide as they need to be, the first to the left and the others to the right."""
  cells = [[str(cell) for cell in row] for row in (head, *rows)]
  widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
  return "\n".join(
    "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs)).rstrip()
    for pairs in (list(zip(row, widths, strict=True)) for row in cells)
  )


def counts(dataset: str, splits: Rows, *, damaged: Collection[str], there: Collection[str]) -> str:
  """Returns the table of rows per split, published counts, and wavs; `damaged` clips (MM12) need none."""
  published = known(dataset).counts
  rows: list[tuple[object, ...]] = []
  sums = np.zeros(5, int)
  for split in SPLITS:
    left = [clip.name for clip in splits[split] if clip.name not in damaged]
    found, total = sum(name in there for name in left), len(splits[split])
    numbers = total, published.get(split, 0), total - len(left), found, len(left) - found
    rows.append(counted(split, *numbers))
    sums += numbers
  rows.append(counted("all", *sums))
  return table(("examples", "in label.csv", "published", "difference", "damaged", "wav", "no wav"), rows)


def counted(name: str, total: int, expected: int, *others: int) -> tuple[object, ...]:
  """Returns a row of the table of counts; `expected` is 0 where nothing is published."""
  return name, total, expected or "-", f"{total - expected:+}" if expected else "-", *others


def bins(dataset: str, labels: np.ndarray) -> tuple[list[str], np.ndarray]:
  """Returns the names of the bins of labels [N], and the bin of each [N].

  SIMS has the five classes of its Mult_acc_5, other sets within -3..3 the seven of Mult_acc_7, any other seven
  of equal width.
  """
  if known(dataset).limit == 1:
    bounds = np.array(SIMS_BOUNDS["Mult_acc_5"])
    spans = itertools.pairwise([-1.0, *bounds, 1.0])
    names = [f"{'(' if number else '['}{low:g}, {high:g}]" for number, (low, high) in enumerate(spans)]
    return names, np.searchsorted(bounds.astype(np.float32), labels.astype(np.float32), side="left")
  if np.abs(labels).max() <= 3.5:
    return [f"{value:g}" for value in range(-3, 4)], np.clip(np.round(labels), -3, 3).astype(int) + 3
  edges = np.linspace(labels.min(), labels.max(), 8)
  names = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges)]
  return names, np.clip(np.searchsorted(edges, labels, side="right") - 1, 0, 6)


def histogram(dataset: str, splits: Rows) -> str:
  """Returns, for each head, how many examples of each split have which label."""
  blocks = []
  clips = [clip for split in SPLITS for clip in splits[split]]
  of = np.array([number for number, split in enumerate(SPLITS) for _ in splits[split]])
  for head in clips[0].labels:
    names, chosen = bins(dataset, np.array([clip.labels[head] for clip in clips]))
    every = np.bincount(chosen, minlength=len(names))
    rows = []
    for number, name in enumerate(names):
      shares = np.bincount(of[chosen == number], minlength=len(SPLITS))
      rows.append((name, *shares, every[number]))
    lines = table((f"label {head}", *SPLITS, "all"), rows).splitlines()
    bars = ["#" * -(-BAR * int(count) // int(every.max())) for count in every]
    blocks.append(
      "\n".join([lines[0], *(f"{line}  {bar}".rstrip() for line, bar in zip(lines[1:], bars, strict=True))])
    )
  return "\n\n".join(blocks)


def words(texts: Sequence[str]) -> tuple[str, list[int]]:
  """Returns the unit and how many each text has: words between spaces, or characters where texts are Chinese."""
  joined = "".join(texts)
  if 2 * len(re.findall(r"[\u3400-\u9fff]", joined)) > len(re.findall(r"\w", joined)):
    return "characters", [len(re.sub(r"\s", "", text)) for text in texts]
  return "words", [len(text.split()) for text in texts]


def quantiles(splits: Rows, seconds: Mapping[str, float]) -> str:
  """Returns quantiles of the clips' length in seconds, as far as known, and in words, for each split."""
  unit, numbers = words([clip.text for split in SPLITS for clip in splits[split]])
  rows: list[tuple[object, ...]] = []
  at = 0
  for split in SPLITS:
    size = len(splits[split])
    rows.append((f"{unit}, {split}", size, *(f"{q:.0f}" for q in shares(numbers[at : at + size]))))
    at += size
  for split in SPLITS:
    held = [seconds[clip.name] for clip in splits[split] if clip.name in seconds]
    if held:
      rows.append((f"seconds, {split}", len(held), *(f"{q:.2f}" for q in shares(held))))
  return table(("length", "clips", *QUANTILES), rows)


def shares(values: Sequence[float]) -> list[float]:
  """Returns the QUANTILES of some values."""
  return [float(value) for value in np.quantile(values, list(QUANTILES.values()))]


def pickles(folder: Path) -> list[str]:
  """Returns, for each pickle in the folder or one below it, whether it is one that MMSA distributes."""
  paths = sorted([*folder.glob("*.pkl"), *folder.glob("*/*.pkl")])
  return [f"{path}: {known_files.describe(path)}" for path in paths]


def records(cache_dir: Path, dataset: str) -> list[str]:
  """Returns a line on each set of records that training made of the data set, and on features extracted of it."""
  lines = []
  name = rf"{re.escape(dataset.lower())}-[0-9a-f]{{16}}"
  for folder in folders(cache_dir / "records", name):
    metadata = next(iter(sorted(folder.glob("*/*/metadata.json"))), None)
    if metadata is None or not metadata.with_name("dataset_info.json").is_file():
      lines.append(f"{folder}: not complete")
      continue
    held = json.loads(metadata.read_text())
    numbers = ", ".join(f"{split} {len(samples)}" for split, samples in held["samples"].items())
    lines.append(f"{folder}: records, {numbers}, {len(held['skipped'])} skipped")
  for folder in folders(cache_dir / "features", name + r"-.+"):
    made = json.loads((folder / "provenance.json").read_text())
    weights = ", ".join(made["weights"]) if "name" not in made["weights"] else made["weights"]["name"]
    index = np.load(folder / "index.npy")
    lines.append(
      f"{folder}: features of {made['clips']} clips, {int(index[:, 1].sum())} frames, by {made['encoder']['class']}"
      f" ({weights}), seconds={made['seconds']}, time_pool={made['time_pool']}"
    )
  return lines


def folders(parent: Path, name: str) -> list[Path]:
  """Returns the folders in `parent` whose whole name matches."""
  return sorted(path for path in parent.glob("*") if path.is_dir() and re.fullmatch(name, path.name))
