"""The input pipeline as gin configures it: what of a data set becomes which stream of a batch."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from mmjax.data import plan, raw_folder, text
from mmjax.data.audio import SAMPLE_RATE, cut
from mmjax.data.batches import Data, Split, Stream, batch_shapes
from mmjax.data.plan import Box
from mmjax.errors import UserError

# Cost of one unit of each stream, in tokens of a base text encoder (85M multiply-adds). A second of waveform is
# 50 frames of 85M and 2.4G in the convolutions before them: 80 tokens. A frame of extracted features meets only
# the fusion: 5 layers of 16 D^2 (47M), which a token meets after its encoder; 0.36 with a base text encoder,
# 0.53 with one of 6 layers.
TEXT_COST = 1.0
WAVE_COST = 80 / SAMPLE_RATE
FRAME_COST = 0.4
FRAMES_PER_SECOND = 50


def _choose(owner: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
  if value not in allowed:
    raise UserError(f"{owner}.{name}: found {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _at_least(owner: str, name: str, value: Any, least: float) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
    raise UserError(f"{owner}.{name}: found {value!r}, expected a number of at least {least}")


def boxes_of(
  train: Split,
  costs: Mapping[str, float],
  *,
  full: Box,
  count: int | None,
  batch_size: int,
  stored: Sequence[Mapping[str, int]] | None,
) -> list[Box]:
  """Returns the training boxes: those `stored` by an earlier start, or at most `count`; None for the full one alone."""
  if stored is not None:
    boxes = [{name: int(cap) for name, cap in box.items()} for box in stored]
    if any(set(box) != set(full) for box in boxes):
      raise UserError(f"boxes: found {boxes[0]}, expected the fields {', '.join(full)}; choose another --workdir")
    return boxes
  if count is None:
    return [full]
  return plan.choose_boxes(train.lengths, costs, full=full, count=count, batch_size=batch_size)


class Joined:
  """The sound before each clip: that of its context, one after the other."""

  def __init__(self, sound: Any, previous: Sequence[Sequence[int]]):
    self.sound, self.previous = sound, previous

  def __getitem__(self, row: int) -> np.ndarray:
    parts = [self.sound[other] for other in self.previous[row]]
    none: np.ndarray = self.sound[row][:0]
    return np.concatenate(parts) if parts else none


@dataclass(frozen=True, kw_only=True)
class Text:
  """The text stream.

  Attributes:
    tokenizer: a folder or a name on the Hugging Face hub.
    max_tokens: longest sequence, special tokens included; also of the context.
    context: how many earlier utterances of the video make up `text_context`; 0 for no such stream.
    case: "first_upper" (lower case but for the first character), "as_is"; None: what fits the data set (MM13).
    context_truncate: "left" drops the oldest tokens of a long context, "right" the newest (MM10).
    gap_aware: only utterances without a gap between them are context; the authors ignore gaps (MM10).
  """

  tokenizer: str
  max_tokens: int = 96
  context: int = 0
  case: str | None = None
  context_truncate: str = "left"
  gap_aware: bool = False

  def __post_init__(self) -> None:
    _choose("Text", "case", self.case, (None, "first_upper", "as_is"))
    _choose("Text", "context_truncate", self.context_truncate, ("left", "right"))
    _at_least("Text", "max_tokens", self.max_tokens, 3)
    _at_least("Text", "context", self.context, 0)


@dataclass(frozen=True, kw_only=True)
class Audio:
  """The audio stream.

  Attributes:
    seconds: longest clip; also of the context.
    side: which end of a longer clip is kept, "first" or "last".
    context: how many earlier clips of the video make up `audio_context`; 0 for no such stream.
    context_side: the same for the context; the authors keep its first seconds (MM11).
    normalize: zero mean and unit variance for each clip, after cutting; None: as the audio encoder wants it.
    encoder: a frozen encoder whose features, extracted once, replace the waveform.
    time_pool: how many consecutive frames of features are averaged into one.
    gap_aware: as for the text.
  """

  seconds: float = 6.0
  side: str = "first"
  context: int = 0
  context_side: str = "last"
  normalize: bool | None = None
  encoder: nn.Module | None = None
  time_pool: int = 1
  gap_aware: bool = False

  def __post_init__(self) -> None:
    _choose("Audio", "side", self.side, ("first", "last"))
    _choose("Audio", "context_side", self.context_side, ("first", "last"))
    _at_least("Audio", "seconds", self.seconds, 0.1)
    _at_least("Audio", "context", self.context, 0)
    _at_least("Audio", "time_pool", self.time_pool, 1)

  @property
  def samples(self) -> int:
    """The longest clip in samples."""
    return round(self.seconds * SAMPLE_RATE)

  @property
  def cap(self) -> int:
    """The longest clip in samples, or in frames where features are extracted."""
    if self.encoder is None:
      return self.samples
    rate = getattr(self.encoder, "frames_per_second", FRAMES_PER_SECOND)
    return math.ceil(math.ceil(self.seconds * rate) / self.time_pool)

  @property
  def feature_width(self) -> int | None:
    """Size of a frame of features; None for waveforms."""
    if self.encoder is None:
      return None
    names = ("features_width", "hidden_size", "width", "d_model")
    return int(next(getattr(self.encoder, name) for name in names if hasattr(self.encoder, name)))


@dataclass(frozen=True, kw_only=True)
class Pipeline:
  """From official files to padded batches.

  Attributes:
    dataset: "mosi", "mosei", "sims", or the name of a folder of your own in the same format.
    batch_size: examples of a training batch, over all devices.
    eval_batch_size: of an evaluation batch; None: the same.
    text, audio: the streams; None for none.
    boxes: the most training programs, each for one shape of padded batch; None pads everything to the
      paper's fixed lengths.
    costs: {"text": of a token, "audio": of a sample or frame}, for choosing boxes; None: see the constants.
    heads: labels to read, of M, T, A, V; None: those the data set is known for, or else all in label.csv.
    drop_invalid: leaves out the clips that the authors did (MM12).
    damaged: "fatal" stops at a clip whose sound is missing or damaged, "skip" leaves it out and counts it.
    in_memory_gb: splits whose sound needs less memory are held; others are read from disk at each access.
    prefetch: batches made ahead of time.
  """

  dataset: str
  batch_size: int = 8
  eval_batch_size: int | None = None
  text: Text | None = None
  audio: Audio | None = None
  boxes: int | None = 8
  costs: Mapping[str, float] | None = None
  heads: tuple[str, ...] | None = None
  drop_invalid: bool = True
  damaged: str = "fatal"
  in_memory_gb: float = 2.0
  prefetch: int = 2

  def __post_init__(self) -> None:
    _choose("Pipeline", "damaged", self.damaged, ("fatal", "skip"))
    _at_least("Pipeline", "batch_size", self.batch_size, 1)
    for name in ("eval_batch_size", "boxes"):
      if getattr(self, name) is not None:
        _at_least("Pipeline", name, getattr(self, name), 1)
    for head in self.heads or ():
      _choose("Pipeline", "heads", head, tuple(raw_folder.COLUMNS))
    if self.heads is not None and "M" not in self.heads:
      raise UserError(f"Pipeline.heads: found {self.heads!r}, expected M among them: it is the column `label`")

  def streams(self, wanted: Collection[str] | None) -> dict[str, Any]:
    """Returns {modality: its description} of the streams a network wants; None wants all there are."""
    there = {"text": self.text, "audio": self.audio}
    if wanted is None:
      wanted = [name for name, stream in there.items() if stream is not None]
    lacking = sorted(name for name in wanted if there.get(name) is None)
    if lacking:
      name = lacking[0]
      raise UserError(
        f"the network reads {' and '.join(lacking)}, which the pipeline does not give: "
        f"bind pipeline.Pipeline.{name} = @pipeline.{name.capitalize()}()"
      )
    if not wanted:
      raise UserError("the pipeline gives neither text nor audio: bind pipeline.Pipeline.text or .audio")
    return {name: stream for name, stream in there.items() if name in wanted}

  def full_box(self, wanted: Collection[str] | None) -> Box:
    """Returns the configured maxima of the streams that are wanted."""
    box = {}
    for name, stream in self.streams(wanted).items():
      cap = stream.max_tokens if name == "text" else stream.cap
      box.update({name: cap, f"{name}_context": cap} if stream.context else {name: cap})
    return box

  def field_costs(self, box: Box) -> dict[str, float]:
    """Returns the cost of one unit of each field of `box`."""
    features = self.audio is not None and self.audio.encoder is not None
    costs = {"text": TEXT_COST, "audio": FRAME_COST if features else WAVE_COST, **(self.costs or {})}
    return {name: float(costs[name.removesuffix("_context")]) for name in box}

  def abstract_batch(self, *, streams: Collection[str] | None = None) -> dict[str, Any]:
    """Returns the shapes of a batch at full lengths; needs neither data nor tokenizer."""
    width = self.audio.feature_width if self.audio else None
    sound = ("wave" if width is None else "features", width)
    heads = self.heads or raw_folder.known(self.dataset).heads or ("M",)
    box = self.full_box(streams)
    kinds = {name: ("ids", None) if name.startswith("text") else sound for name in box}
    return batch_shapes(box, self.batch_size, heads=heads, kinds=kinds)

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

    `streams` are those the network reads (None: all configured; without "audio" no wav is looked at),
    `normalize_wave` whether its audio encoder wants normalised clips, `boxes` those of an earlier start.
    """
    wanted, full = self.streams(streams), self.full_box(streams)
    folder = raw_folder.find(Path(data_dir), self.dataset)
    clips, dropped = raw_folder.read_labels(folder, self.dataset, heads=self.heads, drop_invalid=self.drop_invalid)
    tokenizer = text.load_tokenizer(self.text.tokenizer) if "text" in wanted and self.text else None
    if "audio" in wanted:
      splits, skipped = self._with_sound(folder, clips, Path(cache_dir), normalize_wave=normalize_wave)
      dropped |= skipped
    else:
      splits = {name: Split(name, rows) for name, rows in clips.items()}
    if tokenizer is not None:
      for split in splits.values():
        self._tokenize(split, tokenizer)
    costs = self.field_costs(full)
    count = self.boxes
    chosen = boxes_of(splits["train"], costs, full=full, count=count, batch_size=self.batch_size, stored=boxes)
    return Data(
      name=self.dataset,
      splits=splits,
      boxes=chosen,
      full=full,
      costs=costs,
      batch_size=self.batch_size,
      eval_batch_size=self.eval_batch_size or self.batch_size,
      published=raw_folder.known(self.dataset).counts,
      dropped=dropped,
      pad_id=getattr(tokenizer, "pad_token_id", None) or 0,
      prefetch=self.prefetch,
    )

  def _tokenize(self, split: Split, tokenizer: Any) -> None:
    """Adds tokens and their numbers to `split`."""
    assert self.text is not None
    case = self.text.case or raw_folder.known(self.dataset).case
    texts = [text.apply_case(clip.text, case) for clip in split.clips]
    tokens = {"text": text.tokenize(tokenizer, texts, max_tokens=self.text.max_tokens)}
    if self.text.context:
      rows = text.previous_rows(split.clips, self.text.context, gap_aware=self.text.gap_aware)
      joined = text.join_context(texts, rows, tokenizer.sep_token or tokenizer.eos_token or " ")
      tokens["text_context"] = text.tokenize(
        tokenizer, joined, max_tokens=self.text.max_tokens, truncate=self.text.context_truncate
      )
    for name, ids in tokens.items():
      lengths = np.array([len(row) for row in ids])
      split.streams[name] = Stream(kind="ids", rows=ids, lengths=lengths, cap=self.text.max_tokens)

  def _with_sound(
    self, folder: Path, clips: Mapping[str, Sequence[raw_folder.Clip]], cache_dir: Path, *, normalize_wave: bool
  ) -> tuple[dict[str, Split], dict[str, str]]:
    """Returns the splits with sound or features, and {clip name: why it was left out}."""
    assert self.audio is not None
    everything = [clip for rows in clips.values() for clip in rows]
    paths, skipped = raw_folder.find_wavs(folder, self.dataset, everything, damaged=self.damaged)
    clips = {split: [clip for clip in rows if clip.name in paths] for split, rows in clips.items()}
    from mmjax.data import builder

    records, key = builder.prepare(folder, self.dataset, clips, paths, cache_dir=cache_dir, damaged=self.damaged)
    skipped |= records.skipped
    splits = {}
    for name, rows in clips.items():
      split = Split(name, [clip for clip in rows if clip.name not in records.skipped])
      if not split.clips:
        raise UserError(f"{folder}: no clip of {name} has usable sound; correct the files named by damaged='fatal'")
      waves = records.waves(name)
      options: dict[str, Any] = {"kind": "wave", "cap": self.audio.cap}
      if self.audio.encoder is None:
        sound: Any = waves
        lengths = waves.samples
        options["normalize"] = normalize_wave if self.audio.normalize is None else self.audio.normalize
        if waves.nbytes <= self.in_memory_gb * 1e9:
          waves.load()
      else:
        sound = self._features(waves, cache_dir, f"{key}-{name}-{self.audio.side}")
        lengths = np.asarray(sound.lengths)
        options |= {"kind": "features", "width": sound.width}
      split.streams["audio"] = Stream(rows=sound, lengths=lengths, side=self.audio.side, **options)
      if self.audio.context:
        previous = text.previous_rows(split.clips, self.audio.context, gap_aware=self.audio.gap_aware)
        before = np.array([int(lengths[row].sum()) for row in previous])
        joined = Joined(sound, previous)
        split.streams["audio_context"] = Stream(rows=joined, lengths=before, side=self.audio.context_side, **options)
      splits[name] = split
    return splits, skipped

  def _features(self, waves: Any, cache_dir: Path, key: str) -> Any:
    """Returns the features of a split's clips, extracted in an earlier run or now."""
    from mmjax.data import features

    assert self.audio is not None
    assert self.audio.encoder is not None
    samples, side = self.audio.samples, self.audio.side

    class Cut:
      def __len__(self) -> int:
        return len(waves)

      def __getitem__(self, row: int) -> np.ndarray:
        return cut(waves[row], samples, side)

    return features.cached(
      Cut(),
      encoder=self.audio.encoder,
      cache_dir=cache_dir,
      key=key,
      lengths=np.minimum(waves.samples, samples),
      seconds=self.audio.seconds,
      time_pool=self.audio.time_pool,
      normalize=self.audio.normalize,
    )
