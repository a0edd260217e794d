"""Pickles of numpy arrays read without running anything that they name.

A pickle is a program. This one is interpreted with a table of the few names that arrays need, whose entries are
functions of this file: nothing is imported, and neither numpy's nor any object's own state is ever restored. Any
other name is refused before it is used. Large arrays are read-only views of the memory-mapped file, so that a file
of gigabytes needs hardly more memory than it has bytes, most of which the system can take back.
"""

import codecs
import math
import mmap
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mmjax.errors import UserError

LARGE = 1 << 16  # bytes from which a string stays in the file until it is known what it is
CHUNK = 1 << 20
KINDS = re.compile(r"[biufcSUVOMm]\d*")

DAMAGE = (
  pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
  MemoryError, RecursionError, RuntimeError, struct.error, NotImplementedError,
)  # fmt: skip


class _Piece(NamedTuple):
  """A long string left in the file; `codec` says how its characters are written, None that it is bytes."""

  start: int
  length: int
  codec: str | None


class _Bytes(NamedTuple):
  """Bytes that the file holds as characters, one for each, as protocols 0 to 2 must."""

  text: _Piece | str


class _Dtype:
  """Element type under construction: its code, then what BUILD adds."""

  def __init__(self, code: str):
    self.code = code
    self.state: tuple[Any, ...] = (3, "|", None, None, None, -1, -1, 0)

  def numpy(self) -> np.dtype:
    """Returns the type of the elements; raises `ValueError` or the like if it makes no sense."""
    _, order, base, names, fields, size = self.state[:6]
    if base is not None:
      return np.dtype((base[0].numpy(), base[1]))
    if names is not None:
      formats, offsets = ([fields[name][i] for name in names] for i in (0, 1))
      parts: Any = {"names": names, "formats": [f.numpy() for f in formats], "offsets": offsets, "itemsize": size}
      return np.dtype(parts)
    code = self.code
    if code[0] in "Mm" and len(self.state) > 8:  # what the numbers of a date count: (unit, how many of it, ...)
      unit, count = self.state[8][1][:2]
      unit = getattr(unit, "text", unit)
      code += f"[{count}{unit if isinstance(unit, str) else unit.decode()}]"
    return np.dtype(code).newbyteorder("<" if order in ("|", "=") else order)


class _Array:
  """An array under construction: shape, element type, order of the axes and the elements."""

  def __init__(self, *parts: Any):
    self.parts = parts  # (shape, dtype, order, data[, axes])


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
  if kind is not NDARRAY:
    raise ValueError("an array of another class than numpy.ndarray")
  return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
  return _Array(shape, dtype, order, data, axes)


def _scalar(dtype: Any, data: Any = b"") -> _Array:
  return _Array((), dtype, "C", data)


def _dtype(code: Any, align: Any = False, copy: Any = True) -> _Dtype:
  if not isinstance(code, str) or not KINDS.fullmatch(code):
    raise ValueError(f"elements of type {code!r:.40}" if isinstance(code, str) else "elements of no type")
  return _Dtype(code)


def _encode(text: Any, codec: Any = None) -> Any:
  if codec != "latin1" or not isinstance(text, str | _Piece):
    raise UserError("asks for _codecs.encode with another code than latin1, which arrays do not need")
  return _Bytes(text)


def _bytes() -> bytes:
  return b""


NDARRAY = object()  # stands for the class, which is only ever an argument
_CORE = ("numpy.core", "numpy._core")  # of numpy 1 and 2
ALLOWED: dict[tuple[str, str], Any] = {
  **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in _CORE},
  **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORE},
  **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in _CORE},
  ("numpy", "ndarray"): NDARRAY,
  ("numpy", "dtype"): _dtype,
  ("_codecs", "encode"): _encode,
  **{(module, "bytes"): _bytes for module in ("builtins", "__builtin__")},
}


class _Unpickler(pickle._Unpickler):  # the C one would allocate whatever memo index a file asks for
  stack: list[Any]
  append: Callable[[Any], None]
  dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

  def __init__(self, file: mmap.mmap):
    super().__init__(file, encoding="latin1")  # as Python 2 wrote its strings
    self.file = file
    self._file_read, self._file_readline = self._read, self._line

  def _read(self, length: int) -> bytes:
    if length > len(self.file) - self.file.tell():
      raise EOFError("it ends too early")
    return self.file.read(length)

  def _line(self) -> bytes:
    line = self.file.readline()
    if line[-1:] != b"\n":
      raise EOFError("it ends too early")
    return line

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in ALLOWED:
      raise UserError(f"asks for {module}.{name}, which arrays do not need")
    return ALLOWED[module, name]

  def get_extension(self, code: int) -> None:
    raise UserError(f"asks for extension {code}, which arrays do not need")

  def load_frame(self) -> None:
    """Passes over the head of a frame: everything is in memory's reach already."""
    self._read(8)

  def load_build(self) -> None:
    """Keeps the state of an array or type for `_Reader`; nothing else has one."""
    state, made = self.stack.pop(), self.stack[-1]
    if isinstance(made, _Dtype) and isinstance(state, tuple) and len(state) >= 8:
      made.state = state
    elif isinstance(made, _Array) and not made.parts and isinstance(state, tuple) and len(state) in (4, 5):
      shape, dtype, fortran, data = state[-4:]
      made.parts = (shape, dtype, "F" if fortran else "C", data)
    else:
      raise ValueError("a state for something that has none")

  def _leave(self, length: int, codec: str | None) -> bool:
    """Puts what follows on the stack as a piece if it is long."""
    start = self.file.tell()
    if not LARGE <= length <= len(self.file) - start:
      return False
    self.append(_Piece(start, length, codec))
    self.file.seek(start + length)
    return True

  @staticmethod
  def _lazy(opcode: bytes, head: str, codec: str | None) -> Callable[["_Unpickler"], None]:
    usual: Any = pickle._Unpickler.dispatch[opcode[0]]
    width = struct.calcsize(head)

    def load(self: "_Unpickler") -> None:
      start = self.file.tell()
      (length,) = struct.unpack(head, self._read(width))
      if not self._leave(length, codec):
        self.file.seek(start)
        usual(self)

    return load

  def load_unicode(self) -> None:
    start = self.file.tell()
    end = self.file.find(b"\n", start)
    if end >= 0 and self._leave(end - start, "raw-unicode-escape"):
      self.file.seek(end + 1)
    else:
      usual: Any = pickle._Unpickler.dispatch[pickle.UNICODE[0]]
      usual(self)

  dispatch[pickle.FRAME[0]] = load_frame
  dispatch[pickle.BUILD[0]] = load_build
  dispatch[pickle.UNICODE[0]] = load_unicode
  dispatch[pickle.BINBYTES[0]] = _lazy(pickle.BINBYTES, "<I", None)
  dispatch[pickle.BINBYTES8[0]] = _lazy(pickle.BINBYTES8, "<Q", None)
  dispatch[pickle.BYTEARRAY8[0]] = _lazy(pickle.BYTEARRAY8, "<Q", None)
  dispatch[pickle.BINSTRING[0]] = _lazy(pickle.BINSTRING, "<i", "latin1")
  dispatch[pickle.BINUNICODE[0]] = _lazy(pickle.BINUNICODE, "<I", "utf-8")
  dispatch[pickle.BINUNICODE8[0]] = _lazy(pickle.BINUNICODE8, "<Q", "utf-8")


class _Reader:
  """Turns what the unpickler left into plain containers, strings and arrays; each object once."""

  def __init__(self, file: mmap.mmap):
    self.file = file
    self.done: dict[int, Any] = {}

  def __call__(self, x: Any) -> Any:
    kind = type(x)
    if kind in (str, bytes, int, float, bool, type(None)):
      return x
    if id(x) in self.done:
      return self.done[id(x)]
    if kind is dict:
      self.done[id(x)] = result = dict[Any, Any]()
      result.update((self(key), self(value)) for key, value in x.items())
    elif kind is list:
      self.done[id(x)] = items = list[Any]()
      items.extend(map(self, x))
    elif kind is tuple:
      self.done[id(x)] = tuple(map(self, x))
    elif kind is _Array:
      self.done[id(x)] = self.array(*x.parts)
    elif kind in (_Piece, _Bytes):
      data = bytes(self.buffer(x))
      self.done[id(x)] = data if kind is _Bytes or x.codec is None else data.decode(x.codec)
    else:
      raise ValueError(f"a {kind.__name__.strip('_').lower()} where a value is expected")
    return self.done[id(x)]

  def array(self, shape: Any = None, dtype: Any = None, order: Any = "C", data: Any = None, axes: Any = None) -> Any:
    """Returns an array, or a scalar for an empty shape."""
    if not isinstance(dtype, _Dtype) or type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
      raise ValueError("an array without a shape or without a type")
    kind, count = dtype.numpy(), math.prod(shape)
    if kind.hasobject:
      if type(data) is not list or len(data) != count or kind != np.dtype(object):
        raise ValueError(f"an array of shape {shape} of objects that are not there")
      flat = np.empty(count, object)
      for i, value in enumerate(data):
        flat[i] = self(value)
    else:
      raw = self.buffer(data)
      if len(raw) != count * kind.itemsize:
        raise ValueError(f"{len(raw)} bytes for an array of shape {shape} of {kind}")
      flat = np.frombuffer(raw, kind) if count and kind.itemsize else np.empty(min(count, len(raw)), kind)
    if order == "K":
      return flat.reshape(shape).transpose(axes)
    made = flat.reshape(shape, order=order)
    return made if shape else made[()]

  def buffer(self, data: Any) -> Any:
    """Returns the bytes that `data` stands for, without copying them where the file holds them as such."""
    if isinstance(data, _Bytes):
      data = data.text
      if isinstance(data, _Piece) and data.codec != "latin1":
        return self.decode(data)
    if isinstance(data, str):
      return data.encode("latin1")
    if isinstance(data, _Piece):
      return memoryview(self.file)[data.start : data.start + data.length]
    if not isinstance(data, bytes | bytearray):
      raise ValueError(f"{type(data).__name__} where bytes are expected")
    return data

  def decode(self, piece: _Piece) -> bytearray:
    """Returns the bytes that the characters of `piece` stand for, a megabyte at a time."""
    assert piece.codec is not None
    decoder = codecs.getincrementaldecoder(piece.codec)()
    result, end = bytearray(), piece.start + piece.length
    for start in range(piece.start, end, CHUNK):
      stop = min(start + CHUNK, end)
      result += decoder.decode(self.file[start:stop], stop == end).encode("latin1")
      if hasattr(mmap.mmap, "madvise"):  # what has been copied need not stay in memory too
        self.file.madvise(mmap.MADV_DONTNEED)
    return result


def load(path: str | Path) -> Any:
  """Returns what the pickle holds: dicts, lists, tuples, strings, numbers and read-only numpy arrays.

  Reads protocols 0 to 5 of Python 2 (whose strings are taken as latin1) and 3, numpy 1 and 2. Raises one `UserError`
  naming the file for anything else, and the name of what it asks for.
  """
  path = Path(path)
  try:
    with path.open("rb") as stream:
      file = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}\nexpected a pickle of numpy arrays; get the file again") from None
  try:
    return _Reader(file)(_Unpickler(file).load())
  except UserError as error:
    raise UserError(
      f"{path} {error}; it was refused and nothing was run\n"
      "expected a pickle of dicts, lists, strings, numbers and numpy arrays, as MMSA and MulT distribute them\n"
      "get the file from its authors again; if you made it, convert everything to numpy arrays and pickle it anew"
    ) from None
  except DAMAGE as error:
    raise UserError(
      f"{path} is damaged, cut short or no pickle ({type(error).__name__}: {error})\n"
      "expected a pickle of dicts, lists, strings, numbers and numpy arrays; get the file again"
    ) from None


def release(array: np.ndarray) -> None:
  """Gives back the memory of the file that `array` is a view of; what is needed of it again is read again."""
  base: Any = array
  while isinstance(base, np.ndarray):
    base = base.base
  if isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap) and hasattr(mmap.mmap, "madvise"):
    base.obj.madvise(mmap.MADV_DONTNEED)
