"""The feature pickles that MMSA distributes, by SHA-1."""

import hashlib
from pathlib import Path

KNOWN = {
  "5da0b8440fc5a7c3a457859af27458beb993e088": "MOSI unaligned",
  "5c62b896619a334a7104c8bef05d82b05272c71c": "MOSI aligned",
  "db3e2cff4d706a88ee156981c2100975513d4610": "MOSEI unaligned",
  "ef49589349bc1c2bc252ccc0d4657a755c92a056": "MOSEI aligned",
  "a00c73e92f66896403c09dbad63e242d5af756f8": "SIMS unaligned",
}


def sha1(path: Path) -> str:
  """Returns the SHA-1 of a file in hex, reading it a megabyte at a time; MOSEI's file has gigabytes."""
  digest = hashlib.sha1(usedforsecurity=False)
  with Path(path).open("rb") as file:
    while block := file.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()


def describe(path: Path) -> str:
  """Returns what the file is: "known file: MOSI unaligned", or "unknown file" with its SHA-1."""
  found = sha1(path)
  return f"known file: {KNOWN[found]}" if found in KNOWN else f"unknown file (SHA-1 {found})"
