"""Are pickles of arrays read right, whatever wrote them, and is nothing else ever run?"""

import os
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest

from mmjax.data import safe_pickle
from mmjax.errors import UserError

RNG = np.random.default_rng(0)
RAGGED = np.empty(2, object)
RAGGED[:] = [np.ones((2, 3)), "text"]
ARRAYS = {
  "float32": RNG.normal(size=(3, 4)).astype(np.float32),
  "large": RNG.normal(size=(40, 30, 20)).astype(np.float32),
  "all bytes": np.arange(1 << 18).astype(np.uint8),
  "float64": np.array([0.1, np.inf, -np.inf, np.nan]),
  "float16": np.array([1.5, -2], np.float16),
  "fortran": np.asfortranarray(RNG.normal(size=(50, 300))),
  "transposed": RNG.normal(size=(5, 4, 3)).transpose(2, 0, 1),
  "every second": np.arange(12)[::2],
  "big endian": np.arange(5, dtype=">i4"),
  "int8": np.array([-128, 127], np.int8),
  "uint64": np.array([2**64 - 1], np.uint64),
  "bool": np.array([[True], [False]]),
  "complex": np.array([1 + 2j]),
  "str": np.array(["a", "Grüße, 世界", ""]),
  "bytes": np.array([b"video$_$1", b""]),
  "object": np.array(["one", None, 3, 2.5, ["nested"]], object),
  "ragged": RAGGED,
  "large objects": np.array([f"text {i}" for i in range(30_000)], object),
  "empty": np.zeros((0, 3)),
  "no dimension": np.array(3.5),
  "structured": np.array([(1, 2.5, [1, 2])], [("a", "i4"), ("b", "<f8"), ("c", "i2", (2,))]),
  "dates": np.array(["2020-01-01", "2021-05-06"], "M8[D]"),
  "scalar": np.float32(1.25),
  "str scalar": np.str_("text"),
}
PLAIN = {
  "text": ["but", "Grüße", "x" * 100_000, "ü世" * 50_000],
  "numbers": [1, -5, 2**70, 2.5, True, None],
  "nested": {"tuple": (1, (2, [])), 3: {}},
  "bytes": [b"short", b"\xff" * 100_000],
}
SHARED = ["memo"]
TREE = {"arrays": ARRAYS, **PLAIN, "shared": (SHARED, SHARED, ARRAYS["large"])}


def write(path: Path, data: bytes) -> Path:
  path.write_bytes(data)
  return path


def of_numpy_1(data: bytes) -> bytes:
  """The same pickle with numpy 1's module names; their lengths are part of binary ones."""
  if data[:1] != b"\x80" or data[1] < 4:
    return data.replace(b"numpy._core.", b"numpy.core.")
  made, end = bytearray(), 0
  for opcode, argument, position in pickletools.genops(data):
    if opcode.name == "SHORT_BINUNICODE" and str(argument).startswith("numpy._core"):
      name = argument.replace("numpy._core", "numpy.core").encode()
      made += data[end:position] + b"\x8c" + bytes([len(name)]) + name
      end = position + 2 + len(argument)
  # Frames would have other lengths now.
  return bytes(made + data[end:])


def assert_same(found, expected) -> None:
  if isinstance(expected, np.ndarray | np.generic) and expected.shape:
    assert (found.shape, found.dtype.newbyteorder("=")) == (expected.shape, expected.dtype.newbyteorder("="))
    if expected.dtype == object:
      for a, b in zip(found.ravel(), expected.ravel(), strict=True):
        assert_same(a, b)
    else:
      np.testing.assert_array_equal(found, expected)
  elif isinstance(expected, dict):
    assert list(found) == list(expected)
    for key, value in expected.items():
      assert_same(found[key], value)
  elif isinstance(expected, list | tuple):
    assert type(found) is type(expected)
    for a, b in zip(found, expected, strict=True):
      assert_same(a, b)
  else:
    assert found == expected
    assert isinstance(found, np.generic) or type(found) is type(expected)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("numpy", [1, 2])
def test_what_numpy_wrote(tmp_path, protocol, numpy):
  data = pickle.dumps(TREE, protocol)
  assert b"numpy._core" in data
  if numpy == 1:
    data = of_numpy_1(data)
    assert b"numpy._core" not in data
  found = safe_pickle.load(write(tmp_path / "a.pkl", data))
  assert_same(found, TREE)
  assert found["shared"][0] is found["shared"][1]
  assert found["shared"][2] is found["arrays"]["large"]


def python_2_array(x: np.ndarray) -> bytes:
  """An array as Python 2's numpy wrote it: module names of numpy 1, elements in a byte string."""
  raw = x.tobytes()
  shape = b"".join(b"J" + struct.pack("<i", n) for n in x.shape)
  kind = x.dtype.str[1:].encode()
  return (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n("
    + shape
    + b"tcnumpy\ndtype\n(U"
    + bytes([len(kind)])
    + kind
    + b"I0\nI1\ntR(I3\nU\x01<NNNI-1\nI-1\nI0\ntbI00\nT"
    + struct.pack("<i", len(raw))
    + raw
    + b"tb"
  )


@pytest.mark.parametrize("protocol", [b"", b"\x80\x02"])
def test_what_python_2_wrote(tmp_path, protocol):
  arrays = [ARRAYS["float32"], ARRAYS["large"]]
  data = (
    protocol
    + b"(U\x05audio(l"
    + b"".join(python_2_array(x) + b"a" for x in arrays)
    + b"U\x02id(lS'1$_$2'\naU\x01\xe9ad."
  )
  found = safe_pickle.load(write(tmp_path / "a.pkl", data))
  assert found["id"] == ["1$_$2", "é"]
  assert_same(found["audio"], arrays)


class Run:
  def __init__(self, function, *arguments):
    self.made = function, arguments

  def __reduce__(self):
    return self.made


@pytest.mark.parametrize("protocol", range(6))
def test_a_command_is_refused_by_name_and_not_run(tmp_path, protocol):
  flag = tmp_path / "ran"
  for bait in (Run(os.system, f"touch {flag}"), Run(eval, "1"), Run(np.fromfile, "/etc/passwd"), Run(exec, "1")):
    data = pickle.dumps({"train": {"audio": np.ones(3), "bait": bait}}, protocol)
    path = write(tmp_path / "bad.pkl", data)
    name = bait.made[0].__name__
    with pytest.raises(UserError, match=rf"(?s)bad\.pkl asks for [\w.]+\.{name}, .*nothing was run"):
      safe_pickle.load(path)
  assert not flag.exists()


@pytest.mark.parametrize(
  ("data", "named"),
  [
    (b"\x80\x02cos\nsystem\n.", "os.system"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    (b"(ios\nsystem\n.", "os.system"),
    (b"(cos\nsystem\no.", "os.system"),
    (b"\x80\x02cnumpy.core.multiarray\nfrombuffer\n.", "numpy.core.multiarray.frombuffer"),
    (b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93.", "numpy.dtype.__new__"),
    (b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.", "_codecs.encode"),
    (b"\x80\x02\x82\x01.", "extension 1"),
  ],
)
def test_other_ways_to_ask(tmp_path, data, named):
  with pytest.raises(UserError, match=named.replace(".", r"\.")):
    safe_pickle.load(write(tmp_path / "a.pkl", data))


def array_of(shape, code="f4", data: bytes = b"", flags: int = 0, fields: bytes = b"NNN") -> bytes:
  def plain(x) -> bytes:
    return pickle.dumps(x, 2)[2:-1]

  dtype = (
    b"cnumpy\ndtype\n" + plain((code,)) + b"R(" + plain(3) + plain("<") + fields + plain(-1) * 2 + plain(flags) + b"tb"
  )
  made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
  return b"\x80\x02" + made + b"(" + plain(1) + plain(shape) + dtype + b"\x89" + data + b"tb."


@pytest.mark.parametrize(
  "data",
  [
    array_of((1 << 40, 1 << 10), data=b"U\x04abcd"),  # petabytes
    array_of((1 << 62, 4), data=b"U\x00"),  # whose product would wrap round to 0
    array_of((2,), data=b"U\x04abcd"),
    array_of((-1,), data=b"U\x04abcd"),
    array_of((1,), "O8", b"U\x08abcdefgh"),  # addresses
    array_of((1,), "f4", b"U\x04abcd", fields=b"N]K\x01aN"),
    array_of((1 << 40,), "O8", b"]"),
    array_of((1,), "f4", b"]K\x01a", flags=63),
    array_of((1,), "V2000000000", b"U\x04abcd"),
    array_of((1,), "f4,O", b"U\x04abcd"),
    array_of((1,), "f4", b"K\x05"),
    b"\x80\x02" + b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02O8tRU\x08abcdefghtR.",
    b"\x80\x02cnumpy\nndarray\n.",
    b"\x80\x02cnumpy\nndarray\n)\x81.",
    b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
    b"\x80\x02cnumpy\ndtype\n.",
    b"\x80\x02}K\x01b.",
    b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",  # more bytes than there are
    b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00.",
    b"\x80\x02]r\xff\xff\xff\xffK\x05j\xfe\xff\xff\xff.",
    b"]" * 50_000 + b"a" * 49_999 + b".",
    b"\x80\x02Qx.",
    b"\x80\x05\x97.",
    b"hello world",
    b"\x80",
    b"\x80\x09.",
    b"\xff\xfe",
  ],
  ids=range(27),
)
def test_forged_or_foreign_files_give_one_message(tmp_path, data):
  with pytest.raises(UserError, match=r"(?s)a\.pkl .*expected a pickle"):
    print(safe_pickle.load(write(tmp_path / "a.pkl", data)))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_truncated_file_gives_one_message(tmp_path, protocol):
  data = pickle.dumps({"audio": ARRAYS["large"], "more": [ARRAYS["str"], ARRAYS["object"]]}, protocol)
  for end in (1, 20, 200, len(data) // 2, len(data) - 30, len(data) - 1):
    with pytest.raises(UserError, match=r"a\.pkl is damaged, cut short"):
      safe_pickle.load(write(tmp_path / "a.pkl", data[:end]))


def test_missing_and_empty_files(tmp_path):
  for path in (tmp_path / "none.pkl", write(tmp_path / "a.pkl", b""), tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
      safe_pickle.load(path)


def test_arrays_cannot_be_written_to(tmp_path):
  found = safe_pickle.load(write(tmp_path / "a.pkl", pickle.dumps(ARRAYS["large"], 4)))
  with pytest.raises(ValueError, match="read-only"):
    found[0] = 0


def test_large_arrays_stay_in_the_file(tmp_path):
  array = RNG.normal(size=(1 << 20,))
  for protocol in (3, 4, 5):
    found = safe_pickle.load(write(tmp_path / "a.pkl", pickle.dumps({"audio": array}, protocol)))["audio"]
    base = found
    while isinstance(base.base, np.ndarray):
      base = base.base
    assert isinstance(base.base, memoryview)
    assert not base.base.obj.closed
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_what_is_given_back_is_read_again(tmp_path, protocol):
  array = RNG.normal(size=(1 << 16,))
  found = safe_pickle.load(write(tmp_path / "a.pkl", pickle.dumps([array, array.astype(object)], protocol)))
  for each in found:
    safe_pickle.release(each)
    np.testing.assert_array_equal(each, array)
