"""The quickstart's yardstick: ridge regression on frozen sentence embeddings, and the constant predictor.

    python tools/ridge.py --out=runs/quickstart/ridge.json

Embeddings are the means over MiniLM's last hidden states of a sentence alone (special tokens included, no
context), as sentence-transformers pools them. The penalty is chosen by the validation MAE; fitted on train,
reported on test.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

BOXES = (16, 32, 64, 128, 256)  # tokens a batch is padded to, each compiled once
ALPHAS = np.logspace(-2, 4, 25)


def embed(texts: list[str], folder: Path, *, batch_size: int = 64) -> np.ndarray:
  """Returns float32 [N, D], the mean of each text's last hidden states."""
  import jax
  from flax import linen as nn
  from tokenizers import Tokenizer

  from mmjax import layers
  from mmjax.backbones import pretrained
  from mmjax.progress import Progress

  class Pooled(nn.Module):
    encoder: nn.Module

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
      encoded = self.encoder({"ids": ids, "mask": mask}, train=False)
      return layers.masked_mean(encoded.hidden, encoded.mask)

  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  tokenizer.no_padding()
  tokenizer.enable_truncation(BOXES[-1])
  ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
  network = Pooled(pretrained.encoder(str(folder)))
  example = np.zeros((1, BOXES[0]), np.int32), np.ones((1, BOXES[0]), bool)
  params = jax.jit(network.init)(jax.random.key(0), *example)["params"]
  params = pretrained.restore(network, params)
  run = jax.jit(lambda *x: network.apply({"params": x[0]}, *x[1:]))

  order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
  result: list[Any] = [None] * len(ids)
  with Progress("MiniLM embeddings", len(ids), unit="sentences") as progress:
    for start in range(0, len(order), batch_size):
      rows = order[start : start + batch_size]
      longest = max(len(ids[i]) for i in rows)
      tokens = np.zeros((batch_size, next(box for box in BOXES if box >= longest)), np.int32)
      mask = np.zeros(tokens.shape, bool)
      for row, i in enumerate(rows):
        tokens[row, : len(ids[i])] = ids[i]
        mask[row, : len(ids[i])] = True
      for i, vector in zip(rows, np.asarray(run(params, tokens, mask)), strict=False):
        result[i] = vector
        progress.step()
  return np.stack(result)


def fit(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
  """Returns predictions [N] for test and the penalty with the lowest MAE on valid."""
  from sklearn.linear_model import Ridge

  models = [Ridge(alpha=alpha).fit(x["train"], y["train"]) for alpha in ALPHAS]
  errors = [np.mean(np.abs(model.predict(x["valid"]) - y["valid"])) for model in models]
  best = int(np.argmin(errors))
  return models[best].predict(x["test"]), float(ALPHAS[best])


def main() -> None:
  """Prints test metrics and writes them as JSON for `python -m mmjax.report --baseline`."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--data", type=Path, default=Path("data/reviews"))
  parser.add_argument("--encoder", type=Path, default=Path("data/assets/minilm"))
  parser.add_argument("--out", type=Path, default=Path("runs/quickstart/ridge.json"))
  args = parser.parse_args()
  label_file = args.data / "label.csv"
  if not label_file.is_file() or not (args.encoder / "tokenizer.json").is_file():
    print(f"ridge: {label_file} or {args.encoder} is missing. To make them: bash tools/quickstart.sh", file=sys.stderr)
    sys.exit(2)

  from mmjax import metrics

  with open(label_file, newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  vectors = embed([row["text"] for row in rows], args.encoder)
  labels = np.array([float(row["label"]) for row in rows], np.float32)
  modes = np.array([row["mode"] for row in rows])
  splits = ("train", "valid", "test")
  x, y = ({split: values[modes == split] for split in splits} for values in (vectors, labels))
  metric = metrics.for_dataset(args.data.name)
  predictions, alpha = fit(x, y)
  result = {
    "name": "ridge on frozen MiniLM",
    "test": metric(predictions, y["test"]),
    "constant": metrics.constant_predictor(y["train"], y["test"], metric=metric),
    "note": f"Ridge regression on frozen mean-pooled MiniLM, one sentence at a time, penalty {alpha:.3g} by valid MAE.",
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(result, indent=2) + "\n")
  for name in ("test", "constant"):
    print(f"{'ridge' if name == 'test' else name}: test MAE {result[name]['MAE']:.3f}, Corr {result[name]['Corr']:.3f}")


if __name__ == "__main__":
  main()
