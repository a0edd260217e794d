"""Tiny data in the official formats: a raw folder (label.csv and wavs) and a word-level tokenizer folder."""

import csv
import json
from pathlib import Path

import numpy as np

RATE = 16000
SENTENCE = "i you it the a movie plot actor was is not very really good bad great awful fine dull fun"
WORDS = SENTENCE.split()


def write_wav(path: Path, wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> None:
  import soundfile

  path.parent.mkdir(parents=True, exist_ok=True)
  soundfile.write(path, wave, rate, subtype=subtype, format="WAV")


def rows(dataset: str, videos: dict[str, tuple[str, int]], seed: int) -> list[dict[str, str]]:
  """Rows of label.csv; the label is the number of good words less the bad ones, so that it can be learnt."""
  random = np.random.RandomState(seed)
  scores = {"good": 1, "great": 2, "fun": 1, "fine": 0.5, "bad": -1, "awful": -2, "dull": -1}
  limit, table = (1 if dataset == "sims" else 3), []
  for video, (mode, count) in videos.items():
    for clip in range(1, count + 1):
      words = [WORDS[i] for i in random.randint(len(WORDS), size=random.randint(1, 12))]
      label = np.clip(sum(scores.get(w, 0) for w in words), -3, 3) / 3 * limit
      row = {"video_id": video, "clip_id": str(clip), "text": " ".join(words).upper(), "label": f"{label:.3f}"}
      if dataset == "sims":
        row |= {f"label_{head}": f"{label * scale:.3f}" for head, scale in zip("TAV", (1, 0.5, 0), strict=True)}
      table.append(row | {"annotation": "Positive" if label > 0 else "Negative", "mode": mode})
  return table


def write_labels(path: Path, table: list[dict[str, str]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(table[0]))
    writer.writeheader()
    writer.writerows(table)


def raw_folder(
  path: Path,
  dataset: str = "mosi",
  *,
  videos: dict[str, tuple[str, int]] | None = None,
  seed: int = 0,
  wavs: bool = True,
  seconds: tuple[float, float] = (0.2, 1.5),
) -> Path:
  """Writes `path`/`dataset`/label.csv and wavs; `videos` maps a video to (split, clips). Returns `path`."""
  videos = videos or {"v1": ("train", 9), "v2": ("train", 7), "v3": ("valid", 5), "v4": ("test", 6)}
  table = rows(dataset, videos, seed)
  folder = Path(path) / dataset
  write_labels(folder / "label.csv", table)
  random = np.random.RandomState(seed + 1)
  for row in table if wavs else ():
    time = np.arange(int(RATE * random.uniform(*seconds))) / RATE
    tone = 0.3 * np.sin(2 * np.pi * (300 + 100 * float(row["label"])) * time)
    clip = row["clip_id"].zfill(4 if dataset == "sims" else 1)
    write_wav(folder / "wav" / row["video_id"] / f"{clip}.wav", tone + 0.01 * random.randn(len(time)))
  return Path(path)


def tokenizer(path: Path, words: list[str] | None = None) -> Path:
  """Writes a word-level tokenizer with BERT's special tokens as a Hugging Face folder. Returns `path`."""
  from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  vocabulary = {word: i for i, word in enumerate([*special, *(words or WORDS)])}
  built = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
  built.normalizer = normalizers.Lowercase()
  built.pre_tokenizer = pre_tokenizers.Whitespace()
  built.add_special_tokens(special)
  ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
  built.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
  path = Path(path)
  path.mkdir(parents=True, exist_ok=True)
  built.save(str(path / "tokenizer.json"))
  names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
  (path / "tokenizer_config.json").write_text(json.dumps(settings))
  return path
