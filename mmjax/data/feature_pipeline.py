"""The input pipeline of feature pickles, as gin configures it: the same batches from another kind of file."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data import raw_folder, text
from mmjax.data.batches import Data, Split, Stream, batch_shapes
from mmjax.data.feature_file import FEATURES, Record
from mmjax.data.pipeline import _at_least, _choose, boxes_of
from mmjax.data.plan import Box
from mmjax.data.raw_folder import SPLITS
from mmjax.errors import UserError

# A step of features costs a recurrent layer next to nothing beside a token of a base text encoder.
STEP_COST = 0.001
LONGEST_TEXT = 512  # what a tokenizer may give where `max_text` is not set


@dataclass(frozen=True)
class Known:
  """A distributed feature file: where it lies below the data set's folder, and its shapes."""

  files: tuple[str, ...]
  widths: Mapping[str, int]
  lengths: Mapping[str, int]


def _known(files: Sequence[str], *, widths: Sequence[int], lengths: Sequence[int]) -> Known:
  return Known(tuple(files), *(dict(zip(FEATURES, values, strict=True)) for values in (widths, lengths)))


KNOWN = {
  "mosi": _known(["unaligned_50.pkl"], widths=(768, 5, 20), lengths=(50, 375, 500)),
  "mosei": _known(["unaligned_50.pkl"], widths=(768, 74, 35), lengths=(50, 500, 375)),
  "sims": _known(["unaligned_39.pkl"], widths=(768, 33, 709), lengths=(39, 400, 55)),
  "simsv2": _known(["unaligned.pkl", "sims_unaligned.pkl"], widths=(768, 25, 177), lengths=(50, 925, 232)),
}


def find(data_dir: Path, dataset: str, file: str | None) -> Path:
  """Returns the feature file: `file` as a path or by its name, or the usual one; letter case does not matter.

  A name is looked for in `data_dir`, in its folder `dataset` and in the folder Processed of that, as MMSA lays them.
  """
  data_dir, name = Path(data_dir), dataset.lower()
  files = (file,) if file is not None else KNOWN[name].files if name in KNOWN else ()
  folders = [data_dir, *_inside(data_dir, name)]
  folders += [path for folder in folders for path in _inside(folder, "processed")]
  if file is None:
    folders = [folder for folder in folders if _owner(folder) not in KNOWN.keys() - {name}]
  for wanted in files:
    found = [path for folder in folders for path in (folder / wanted, *_inside(folder, wanted))]
    for path in [*found, Path(wanted).expanduser()] if file else found:
      if path.is_file():
        return path
  place = data_dir / {"simsv2": "SIMSv2"}.get(name, dataset.upper() if name in KNOWN else dataset)
  wanted = files[0] if files else "<name>.pkl"
  there = sorted({path for depth in ("*", "*/*", "*/*/*") for path in data_dir.glob(f"{depth}.pkl")})
  holds = ", ".join(str(path.relative_to(data_dir)) for path in there[:8]) or "no .pkl file"
  state = f"holds {holds}" if data_dir.is_dir() else "does not exist"
  raise UserError(
    f"no feature file of {dataset}: found that {data_dir} {state}\n"
    f"expected {place / wanted} or {place / 'Processed' / wanted}, a pickle as MMSA, MulT or MultiBench give out\n"
    f"where they come from: {raw_folder.known(dataset).source}\n"
    "type --data_dir=<folder that holds it>, or name the file: "
    "--gin.feature_pipeline.Features.file='\"/path/to/file.pkl\"'\n"
    "to see mmjax work without any data: bash tools/quickstart.sh"
  )


def _owner(folder: Path) -> str:
  """Returns the name that may say whose files a folder holds: all sets call theirs alike."""
  folder = folder.resolve()
  return (folder.parent if folder.name.lower() == "processed" else folder).name.lower()


def _inside(folder: Path, name: str) -> list[Path]:
  """Returns what is called `name` in `folder`, whatever its letter case."""
  return [path for path in sorted(folder.iterdir()) if path.name.lower() == name.lower()] if folder.is_dir() else []


@dataclass(frozen=True, kw_only=True)
class Features:
  """From a feature pickle to padded batches.

  Attributes:
    dataset: "mosi", "mosei", "sims", "simsv2", or any name for a file of your own.
    file: path of the pickle, or its name in the data set's folder; None: as MMSA calls it.
    batch_size: examples of a training batch, over all devices.
    eval_batch_size: of an evaluation batch; None: the same.
    text: "ids" for the file's token ids (or, where it has none, as "raw"), "features" for its text features, "raw" for
      its transcripts, tokenised when a run starts; None for no text.
    tokenizer: for transcripts: a folder or a name on the Hugging Face hub.
    audio, vision: whether there are such streams.
    max_text, max_audio, max_vision: longest sequence; None: the longest of the file.
    side: which end of a longer audio or vision sequence is kept, "first" or "last".
    widths: {"audio": D, ...} where batches are described before the file is opened; None: as the set's usual file.
    boxes: the most training programs, each for one shape of padded batch; None pads everything to the longest.
    costs: {"text": of a token or step, "audio": of a step, ...}, for choosing boxes; None: see `field_costs`.
    heads: labels to read, of M, T, A, V; None: those the file has.
    in_memory_gb: splits that need less memory are held; others are read from disk at each access.
    prefetch: batches made ahead of time.
  """

  dataset: str
  file: str | None = None
  batch_size: int = 32
  eval_batch_size: int | None = None
  text: str | None = "ids"
  tokenizer: str | None = None
  audio: bool = True
  vision: bool = True
  max_text: int | None = None
  max_audio: int | None = None
  max_vision: int | None = None
  side: str = "first"
  widths: Mapping[str, int] | None = None
  boxes: int | None = 8
  costs: Mapping[str, float] | None = None
  heads: tuple[str, ...] | None = None
  in_memory_gb: float = 4.0
  prefetch: int = 2

  def __post_init__(self) -> None:
    _choose("Features", "text", self.text, ("ids", "features", "raw", None))
    _choose("Features", "side", self.side, ("first", "last"))
    _at_least("Features", "batch_size", self.batch_size, 1)
    for name in ("eval_batch_size", "boxes", *(f"max_{stream}" for stream in FEATURES)):
      if getattr(self, name) is not None:
        _at_least("Features", name, getattr(self, name), 1)
    for head in self.heads or ():
      _choose("Features", "heads", head, tuple(raw_folder.COLUMNS))
    if self.heads is not None and "M" not in self.heads:
      raise UserError(f"Features.heads: found {self.heads!r}, expected M among them: it is the file's main label")
    if self.text == "raw" and self.tokenizer is None:
      raise UserError(
        "Features.text: found 'raw' without a tokenizer: "
        'bind feature_pipeline.Features.tokenizer = "bert-base-uncased"'
      )

  def streams(self, wanted: Collection[str] | None) -> dict[str, str]:
    """Returns {modality: "ids" or "features"} of the streams a network wants; None wants all there are."""
    kind = "features" if self.text == "features" else "ids"
    there = {"text": kind} if self.text else {}
    there |= {name: "features" for name in ("audio", "vision") if getattr(self, name)}
    lacking = sorted(set(wanted or ()) - set(there))
    if lacking:
      value = '"ids"' if lacking[0] == "text" else "True"
      raise UserError(
        f"the network reads {' and '.join(lacking)}, which the pipeline does not give: "
        f"bind feature_pipeline.Features.{lacking[0]} = {value}"
      )
    if not there or (wanted is not None and not wanted):
      raise UserError("the pipeline gives no stream: bind feature_pipeline.Features.text, .audio or .vision")
    return {name: there[name] for name in FEATURES if name in there and (wanted is None or name in wanted)}

  def field_costs(self, kinds: Mapping[str, str]) -> dict[str, float]:
    """Returns the cost of one unit of each stream: steps are cheap beside tokens, and alike among themselves."""
    step = STEP_COST if kinds.get("text") == "ids" else 1.0
    costs = {name: 1.0 if kind == "ids" else step for name, kind in kinds.items()}
    return {name: float((self.costs or {}).get(name, cost)) for name, cost in costs.items()}

  def abstract_batch(self, *, streams: Collection[str] | None = None) -> dict[str, Any]:
    """Returns the shapes of a batch at full lengths; needs neither data nor tokenizer."""
    kinds = self.streams(streams)
    known = KNOWN.get(self.dataset.lower(), Known((), {}, {}))
    widths = {**known.widths, **(self.widths or {})}
    full: Box = {}
    for name, kind in kinds.items():
      full[name] = getattr(self, f"max_{name}") or known.lengths.get(name, 0)
      lacking = f"max_{name}" if not full[name] else "widths" if kind == "features" and name not in widths else ""
      if lacking:
        value = f'{{"{name}": 74}}' if lacking == "widths" else "50"
        raise UserError(
          f"the {name} stream of {self.dataset!r} has no known shape before its file is opened: "
          f"bind feature_pipeline.Features.{lacking}, such as {value}"
        )
    heads = self.heads or raw_folder.known(self.dataset).heads or ("M",)
    shapes = {name: (kind, None if kind == "ids" else widths[name]) for name, kind in kinds.items()}
    return batch_shapes(full, self.batch_size, heads=heads, kinds=shapes)

  def open(
    self,
    data_dir: Path,
    cache_dir: Path,
    *,
    streams: Collection[str] | None = None,
    normalize_wave: bool = False,
    boxes: Sequence[Mapping[str, int]] | None = None,
  ) -> Data:
    """Returns the data, after preparing in `cache_dir` what is not there yet.

    `streams` are those the network reads (None: all configured), `boxes` those of an earlier start;
    `normalize_wave` is for waveforms, of which feature files have none.
    """
    kinds = self.streams(streams)
    path = find(data_dir, self.dataset, self.file)
    wanted = ["ids" if kind == "ids" else name for name, kind in kinds.items() if (name, self.text) != ("text", "raw")]
    from mmjax.data import feature_builder

    prepared = feature_builder.prepare(path, self.dataset, wanted=wanted, heads=self.heads, cache_dir=Path(cache_dir))
    found = prepared.metadata
    tokenize = kinds.get("text") == "ids" and "ids" not in found["streams"]
    tokenizer = self._load_tokenizer(path, found) if tokenize else None
    splits = {name: self._split(name, prepared, kinds, tokenizer) for name in SPLITS}
    full = {stream: max(split.streams[stream].cap for split in splits.values()) for stream in kinds}
    costs = self.field_costs(kinds)
    options: dict[str, Any] = {"count": self.boxes, "batch_size": self.batch_size, "stored": boxes}
    return Data(
      name=self.dataset,
      splits=splits,
      boxes=boxes_of(splits["train"], costs, full=full, **options),
      full=full,
      costs=costs,
      batch_size=self.batch_size,
      eval_batch_size=self.eval_batch_size or self.batch_size,
      published=raw_folder.known(self.dataset).counts,
      dropped={},
      pad_id=getattr(tokenizer, "pad_token_id", None) or 0,
      notes=notes(found),
      prefetch=self.prefetch,
    )

  def _load_tokenizer(self, path: Path, found: Mapping[str, Any]) -> Any:
    """Returns the tokenizer of the transcripts; raises where there are none, or no tokenizer is named."""
    if not any(any(examples["text"]) for examples in found["examples"].values()):
      raise UserError(
        f"{path}: found neither the key 'text_bert' nor 'raw_text' in split 'train'\n"
        "expected token ids or transcripts to make them from\n"
        "train on the file's text features: --gin.feature_pipeline.Features.text='\"features\"'"
      )
    if self.tokenizer is None:
      raise UserError(
        f"{path}: found no key 'text_bert' in split 'train'\nexpected it, or a tokenizer for the transcripts\n"
        "name one: --gin.feature_pipeline.Features.tokenizer='\"bert-base-uncased\"'"
      )
    return text.load_tokenizer(self.tokenizer)

  def _split(self, name: str, prepared: Any, kinds: Mapping[str, str], tokenizer: Any) -> Split:
    """Returns a split with its streams; its records are in memory if they are small enough."""
    from mmjax.data.feature_builder import Column

    examples, records = prepared.metadata["examples"][name], prepared.records(name)
    if records.nbytes <= self.in_memory_gb * 1e9:
      records.load()
    labels = [
      dict(zip(examples["labels"], values, strict=True)) for values in zip(*examples["labels"].values(), strict=True)
    ]
    split = Split(name, [Record(*row) for row in zip(examples["id"], examples["text"], labels, strict=True)])
    for stream, kind in kinds.items():
      cap = getattr(self, f"max_{stream}")
      if kind == "ids" and tokenizer is not None:
        case = raw_folder.known(self.dataset).case
        texts = [text.apply_case(each, case) for each in split.texts]
        rows: Any = text.tokenize(tokenizer, texts, max_tokens=cap or LONGEST_TEXT)
        lengths = np.array([len(ids) for ids in rows])
      else:
        column = "ids" if kind == "ids" else stream
        rows, lengths = Column(records, column), np.array(examples["lengths"][column])
      split.streams[stream] = Stream(
        kind=kind,
        rows=rows,
        lengths=lengths,
        cap=cap or max(int(lengths.max()), 1),
        side="first" if stream == "text" else self.side,
        width=None if kind == "ids" else prepared.metadata["widths"][stream],
      )
    return split


def notes(found: Mapping[str, Any]) -> list[str]:
  """Returns what a run says of its file: which one it is, and what is unusual in it."""
  known = found["source"] if found["source"] != "unknown file" else f"unknown file (SHA-1 {found['sha1']})"
  lines = [f"{found['file']}: {known}, {found['format']} format, {'aligned' if found['aligned'] else 'not aligned'}"]
  for stream in found["streams"]:
    for split, examples in found["examples"].items():
      replaced = found["replaced"][split].get(stream, 0)
      empty = sum(length == 0 for length in examples["lengths"][stream])
      if replaced:
        lines.append(f"{split} {stream}: {replaced} values that were infinite or no number are 0")
      if empty:
        lines.append(f"{split} {stream}: {empty} examples of length 0")
  return lines
