"""Text to tokens: case, context of earlier utterances, truncation. Text is stored raw and tokenised here."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.raw_folder import Clip
from mmjax.errors import UserError


def load_tokenizer(name: str) -> Any:
  """Returns the Hugging Face tokenizer of a local folder, of the hub's cache or of the hub, in this order.

  Raises `UserError` within seconds where there is none and no network.
  """
  import os

  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  from transformers import AutoTokenizer

  from mmjax.backbones import pretrained, published, tf_checkpoint

  def load(source: str, *, local: bool) -> Any:
    if tf_checkpoint.alone(Path(source)):
      return _of_vocabulary(Path(source, tf_checkpoint.VOCABULARY))
    return AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)

  folder = Path(name).is_dir()
  reasons = []
  for source in dict.fromkeys((name, published.ALIASES.get(name, name))):
    try:
      return load(source, local=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
      reasons.append(str(error).strip().splitlines()[0] if str(error) else type(error).__name__)
  if folder:
    raise UserError(
      f"tokenizer {name!r}: found a folder from which none can be loaded ({reasons[0]})\n"
      "expected tokenizer.json and tokenizer_config.json (or vocab.txt) of a published model"
    )
  if not pretrained._online():
    raise UserError(
      f"tokenizer {name!r}: found no such folder, nothing in the Hugging Face cache, and no network\n"
      "expected a folder with tokenizer.json or a name on the hub; on a machine with a network type\n"
      f"  hf download {name} --include '*.json' '*.txt' --local-dir {name.rpartition('/')[2]}\n"
      "and give that folder: --gin.pipeline.Text.tokenizer='\"/path/to/folder\"'"
    )
  try:
    return load(name, local=False)
  except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
    raise UserError(
      f"tokenizer {name!r}: found neither such a folder nor a tokenizer of that name on the hub\n{error}\n"
      "expected a name such as 'roberta-base' or a folder with tokenizer.json"
    ) from None


def _of_vocabulary(path: Path) -> Any:
  """Returns BERT's tokenizer of a vocabulary that comes without a configuration.

  Only its words tell whether it knows upper case: where none has it, as in the Chinese one, texts are lowered.
  """
  from transformers import BertTokenizer

  words = path.read_text(encoding="utf-8").splitlines()
  cased = any(re.search("[A-Z]", word) for word in words if not word.startswith("["))
  return BertTokenizer.from_pretrained(path.parent, do_lower_case=not cased, local_files_only=True)


def apply_case(text: str, case: str) -> str:
  """Returns `text` as it is, or with "first_upper" in lower case but for its first character (MM13)."""
  return text[:1] + text[1:].lower() if case == "first_upper" else text


def previous_rows(clips: Sequence[Clip], count: int, *, gap_aware: bool = False) -> list[list[int]]:
  """Returns for each clip the rows of up to `count` clips of its video before it, oldest first.

  `clips` are one split in order (MM10). The authors ignore gaps: clips that the split lacks are passed over;
  `gap_aware` stops at the first gap in the clip numbers.
  """
  rows: list[list[int]] = []
  for i, clip in enumerate(clips):
    found: list[int] = []
    for j in range(i - 1, max(i - 1 - count, -1), -1):
      if clips[j].video_id != clip.video_id:
        break
      if gap_aware and clips[j].order[1] != clips[j + 1].order[1] - 1:
        break
      found.insert(0, j)
    rows.append(found)
  return rows


def tokenize(tokenizer: Any, texts: Sequence[str], *, max_tokens: int, truncate: str = "right") -> list[np.ndarray]:
  """Returns int32 ids of each text with special tokens, at most `max_tokens`.

  `truncate="left"` drops the oldest tokens instead, but keeps a leading special token.
  """
  if truncate == "right":
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    return [np.asarray(row, np.int32) for row in ids]
  # A limit of its own would make the tokenizer warn about every longer text.
  ids = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
  special = set(tokenizer.all_special_ids)
  result = []
  for row in ids:
    if len(row) > max_tokens:
      start = row[:1] if row[0] in special else []
      row = start + row[len(row) - max_tokens + len(start) :]
    result.append(np.asarray(row, np.int32))
  return result


def join_context(texts: Sequence[str], rows: Sequence[Sequence[int]], separator: str) -> list[str]:
  """Returns for each row of `rows` its texts joined as the authors do: "A</s>B", or "" without any (MM10)."""
  return [separator.join(texts[j] for j in row) for row in rows]
