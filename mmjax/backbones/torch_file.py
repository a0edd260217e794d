"""PyTorch `.bin`, `.pt` and `.pth` files read without PyTorch and without running anything that they name.

Both formats of `torch.save` are read: zip archives (torch 1.6 and later) and the older stream of pickles. The
pickles are interpreted with a table of a few names; every other name becomes an inert `Unread`, which is an
error only where a tensor is expected. Arrays are read-only views of the memory-mapped file.
"""

import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from mmjax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
  "ComplexFloatStorage": np.complex64,
  "ComplexDoubleStorage": np.complex128,
  "UntypedStorage": np.uint8,
  "_UntypedStorage": np.uint8,
}
WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_model")  # Lightning, tutorials, fairseq, FAb-Net
OVERLAP_LIMIT = 1 << 24  # elements of a tensor that repeats its storage, as an expanded one does

DAMAGE = (
  pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
  MemoryError, RecursionError, OSError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


class Unread:
  """Stands for an object that the file wants made by `asks_for`; nothing was imported or called."""

  asks_for = ""

  def __new__(cls, *args: Any, **kwargs: Any) -> "Unread":
    return super().__new__(cls)

  def __init__(self, *args: Any, **kwargs: Any):
    pass

  def ignore(self, *args: Any) -> None:
    """Takes what a pickle adds to a list, set or dict of this kind."""

  append = extend = add = __setitem__ = ignore

  def __repr__(self) -> str:
    return f"<{self.asks_for}, not made>"


class _Dtype(NamedTuple):
  """A storage class, which in these files only says the type of the elements."""

  dtype: np.dtype


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  numel: int  # of the whole storage in the file
  start: int  # this view of it, in elements
  length: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


def _name(x: Any) -> str:
  return x.asks_for if isinstance(x, Unread) or (isinstance(x, type) and issubclass(x, Unread)) else repr(x)[:60]


def _check_counts(*values: Any) -> None:
  if not all(type(v) is int and 0 <= v < 2**63 for v in values):
    raise ValueError(f"sizes {values} are not whole numbers")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
  if not isinstance(storage, _Storage):
    raise UserError(f"asks for {_name(storage)} where the storage of a tensor is expected")
  size, stride = tuple(size), tuple(stride)
  _check_counts(offset, *size, *stride)
  if len(size) != len(stride):
    raise ValueError(f"{len(size)} sizes but {len(stride)} strides")
  elements = math.prod(size)
  end = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if elements else 0
  if end > storage.length or elements > max(storage.length, OVERLAP_LIMIT):
    raise ValueError(f"a tensor of shape {size} does not fit its storage of {storage.length} elements")
  return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
  return data


def _size(values: Any = ()) -> tuple[Any, ...]:
  return tuple(values)


ALLOWED: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): dict,
  ("torch", "Size"): _size,
  ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
  ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Unpickler(pickle._Unpickler):  # the C one would allocate whatever memo index a file asks for
  stack: list[Any]
  dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

  def load_build(self) -> None:
    """Drops an object's state: no attribute is ever set on anything."""
    self.stack.pop()

  dispatch[pickle.BUILD[0]] = load_build

  def __init__(self, file: Any):
    super().__init__(file, encoding="latin1")
    self.widths: dict[str, int] = {}  # bytes per element of each storage met

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in ALLOWED:
      return ALLOWED[module, name]
    if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
      return _Dtype(np.dtype(STORAGES[name]))
    return type("Unread", (Unread,), {"asks_for": f"{module}.{name}"})

  def persistent_load(self, pid: Any) -> Any:
    if type(pid) is not tuple or not pid:
      raise ValueError(f"unknown reference {pid!r}")
    if pid[0] == "module":  # a whole pickled network: (module, class, source file, source)
      return pid[1]
    kind, dtype, key, _, numel = pid[:5]
    if kind != "storage" or not isinstance(dtype, _Dtype):
      raise UserError(f"asks for {_name(dtype)} where the type of a storage is expected")
    start, length = (pid[5][1], pid[5][2]) if len(pid) > 5 and pid[5] else (0, numel)
    _check_counts(numel, start, length)
    if start + length > numel:
      raise ValueError(f"a view of {start} + {length} elements in a storage of {numel}")
    self.widths.setdefault(str(key), dtype.dtype.itemsize)
    return _Storage(str(key), dtype.dtype, numel, start, length)


def _convert(x: Any, array: Callable[[_Tensor], np.ndarray], done: dict[int, Any]) -> Any:
  """Returns `x` with plain containers and arrays; an object met again (or a cycle) is not walked again."""
  if id(x) in done:
    return done[id(x)]
  if isinstance(x, _Tensor):
    done[id(x)] = array(x)
  elif type(x) is dict:
    done[id(x)] = result = {}
    for key, value in x.items():
      result[_convert(key, array, done)] = _convert(value, array, done)
  elif type(x) is list:
    done[id(x)] = items = list[Any]()
    items.extend(_convert(value, array, done) for value in x)
  elif type(x) is tuple:
    done[id(x)] = tuple(_convert(value, array, done) for value in x)
  elif isinstance(x, type) and issubclass(x, Unread):
    done[id(x)] = x()
  else:
    return x
  return done[id(x)]


def _resolve(tree: Any, storage: Callable[[_Storage], np.ndarray], *, big: bool) -> Any:
  def array(tensor: _Tensor) -> np.ndarray:
    store = tensor.storage
    width = store.dtype.itemsize
    data = storage(store)
    if data.size < store.numel * width:
      raise ValueError(f"storage {store.key} has {data.size} bytes for {store.numel} {store.dtype}")
    data = data[store.start * width : (store.start + store.length) * width]
    if big and width > 1:
      part = width // 2 if store.dtype.kind == "c" else width
      data = data.view(f"u{part}").byteswap().view(np.uint8)
    if not math.prod(tensor.size):
      return np.empty(tensor.size, store.dtype)
    strides = [s * width for s in tensor.stride]
    flat = data.view(store.dtype)[tensor.offset :]
    return np.lib.stride_tricks.as_strided(flat, tensor.size, strides, writeable=False)

  return _convert(tree, array, {})


def _member(raw: mmap.mmap, archive: zipfile.ZipFile, name: str) -> np.ndarray:
  info = archive.getinfo(name)
  if info.compress_type != zipfile.ZIP_STORED:
    return np.frombuffer(archive.read(info), np.uint8)
  names, extra = struct.unpack_from("<26x2H", raw, info.header_offset)
  return np.frombuffer(raw, np.uint8, info.file_size, info.header_offset + 30 + names + extra)


def _load_zip(raw: mmap.mmap, path: Path) -> Any:
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    root = next((n.removesuffix("data.pkl") for n in names if n.split("/", 1)[-1] == "data.pkl"), None)
    if root is None or root + "constants.pkl" in names:
      what = "no data.pkl inside" if root is None else "a TorchScript program"
      raise UserError(f"is a zip archive with {what}, not a state dict written by torch.save")
    big = root + "byteorder" in names and archive.read(root + "byteorder").strip() == b"big"

    def storage(store: _Storage) -> np.ndarray:
      return _member(raw, archive, f"{root}data/{store.key}")

    with archive.open(root + "data.pkl") as file:
      return _resolve(_Unpickler(file).load(), storage, big=big)


def _load_legacy(raw: mmap.mmap) -> Any:
  magic, protocol, _ = (_Unpickler(raw).load() for _ in range(3))
  if magic != MAGIC or protocol != PROTOCOL:
    raise UserError("is a pickle, but not one written by torch.save")
  unpickler = _Unpickler(raw)
  tree, keys, first = unpickler.load(), _Unpickler(raw).load(), raw.tell()
  places: dict[str, np.ndarray] = {}
  for key in keys:
    # Sizes and elements are little-endian in this format whatever machine wrote it.
    numel = struct.unpack_from("<q", raw, first)[0]
    _check_counts(numel)
    places[str(key)] = np.frombuffer(raw, np.uint8, numel * unpickler.widths[str(key)], first + 8)
    first += 8 + places[str(key)].size
  return _resolve(tree, lambda store: places[store.key], big=False)


def load(path: str | Path) -> Any:
  """Returns what `torch.save` wrote: nested dicts, lists and tuples with arrays, plain values and `Unread`.

  Parameters come as their tensors. Raises one `UserError` naming the file for anything that cannot be read.
  """
  path = Path(path)
  try:
    with path.open("rb") as file:
      raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}. Expected a file written by torch.save.") from None
  head = raw[:512]
  try:
    if head[257:262] == b"ustar":
      raise UserError(
        "is a tar file of torch < 0.1.10, which is not read here. Open it with a PyTorch that can"
        " and write it again: torch.save(torch.load(FILE), NEW_FILE)"
      )
    if head[:2] == b"PK":
      return _load_zip(raw, path)
    if head[:1] == b"\x80":
      return _load_legacy(raw)
    raise UserError(f"is not a PyTorch file: it begins with {head[:24]!r}. Get the file again.")
  except UserError as error:
    raise UserError(f"{path} {error}") from None
  except DAMAGE as error:
    raise UserError(
      f"{path} is damaged or cut short ({type(error).__name__}: {error}). Expected a file written by"
      " torch.save. Get the file again."
    ) from None


def tensors(path: str | Path) -> dict[str, np.ndarray]:
  """Returns the state dict in the file: name -> read-only array. A dict that wraps it is looked into.

  Raises one `UserError` that lists each value that is not a tensor, by the name of what it asks for.
  """
  tree = load(path)
  for wrapper in WRAPPERS:
    if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
      tree = tree[wrapper]
  if not isinstance(tree, dict):
    found = _name(tree) if isinstance(tree, Unread) else type(tree).__name__
    raise UserError(f"{path} holds {found}, not a state dict. Write one with torch.save(model.state_dict(), FILE).")
  wrong = [f"  {key}: {_name(value)}" for key, value in tree.items() if not isinstance(value, np.ndarray)]
  if wrong:
    raise UserError(
      f"{path} has values that are not tensors (a name is what the file asks to run; nothing was run):\n"
      + "\n".join(wrong)
      + "\nExpected a state dict: torch.save(model.state_dict(), FILE)."
    )
  return tree
