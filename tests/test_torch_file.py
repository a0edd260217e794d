"""Are .bin, .pt and .pth files read right, without torch and without running what they ask for?"""

import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mmjax.backbones import torch_file
from mmjax.errors import UserError

# Pickles are spelled opcode by opcode, because torch is not there to write them.


def plain(x) -> bytes:
  return pickle.dumps(x, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
  return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
  return function + b"(" + b"".join(arguments) + b"tR"


def mapping(items: dict[str, bytes]) -> bytes:
  made = call(name("collections", "OrderedDict")) + b"("
  return made + b"".join(plain(key) + value for key, value in items.items()) + b"u"


def storage(key: str, kind: str, numel, *rest: bytes) -> bytes:
  parts = plain("storage"), name("torch", kind), plain(key), plain("cpu"), plain(numel)
  return b"(" + b"".join(parts) + b"".join(rest) + b"tQ"


def tensor(key, kind, numel, size, stride, offset=0) -> bytes:
  where = storage(key, kind, numel), plain(offset), plain(size), plain(stride)
  return call(name("torch._utils", "_rebuild_tensor_v2"), *where, plain(False), mapping({}))


def write_zip(path: Path, tree: bytes, storages: dict[str, bytes], order: bytes = b"little", **options) -> Path:
  with zipfile.ZipFile(path, "w", **options) as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02" + tree + b".")
    archive.writestr("archive/byteorder", order)
    for key, data in storages.items():
      archive.writestr(f"archive/data/{key}", data)
  return path


def write_legacy(path: Path, tree: bytes, storages: dict[str, tuple[int, bytes]]) -> Path:
  head = [torch_file.MAGIC, torch_file.PROTOCOL, {"protocol_version": 1001, "little_endian": True}]
  body = b"".join(pickle.dumps(x, 2) for x in head) + b"\x80\x02" + tree + b"." + pickle.dumps(list(storages), 2)
  path.write_bytes(body + b"".join(struct.pack("<q", n) + data for n, data in storages.values()))
  return path


BASE = np.arange(30, dtype=np.float32).reshape(6, 5)
HALF = np.linspace(-2, 2, 12, dtype=np.float16)
BRAIN = np.linspace(-2, 2, 4).astype(ml_dtypes.bfloat16)
COUNTS = np.array([7, -1], np.int64)
TREE = mapping(
  {
    "whole": tensor("0", "FloatStorage", 30, (6, 5), (5, 1)),
    "transposed": tensor("0", "FloatStorage", 30, (5, 6), (1, 5)),
    "slice": tensor("0", "FloatStorage", 30, (2, 3), (5, 1), 6),
    "scalar": tensor("0", "FloatStorage", 30, (), (), 29),
    "expanded": tensor("0", "FloatStorage", 30, (4, 5), (0, 1)),
    "empty": tensor("0", "FloatStorage", 30, (0, 5), (5, 1), 30),
    "half": tensor("1", "HalfStorage", 12, (3, 4), (4, 1)),
    "brain": tensor("2", "BFloat16Storage", 4, (4,), (1,)),
    "counts": tensor("3", "LongStorage", 2, (2,), (1,)),
    "parameter": call(
      name("torch._utils", "_rebuild_parameter"),
      tensor("0", "FloatStorage", 30, (6, 5), (5, 1)),
      plain(True),
      mapping({}),
    ),
  }
)
EXPECTED = {
  "whole": BASE,
  "transposed": BASE.T,
  "slice": BASE[1:3, 1:4],
  "scalar": BASE[5, 4],
  "expanded": np.tile(BASE[0], (4, 1)),
  "empty": BASE[:0],
  "half": HALF.reshape(3, 4),
  "brain": BRAIN,
  "counts": COUNTS,
  "parameter": BASE,
}
ARRAYS = {"0": BASE, "1": HALF, "2": BRAIN, "3": COUNTS}
BYTES = {key: x.tobytes() for key, x in ARRAYS.items()}
COUNTED = {key: (x.size, x.tobytes()) for key, x in ARRAYS.items()}


def assert_expected(found: dict[str, np.ndarray]) -> None:
  assert list(found) == list(EXPECTED)
  for key, expected in EXPECTED.items():
    assert found[key].dtype == expected.dtype, key
    assert found[key].shape == expected.shape, key
    np.testing.assert_array_equal(found[key].astype(np.float64), expected.astype(np.float64), err_msg=key)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(tmp_path, compression):
  assert_expected(torch_file.tensors(write_zip(tmp_path / "a.pt", TREE, BYTES, compression=compression)))


def test_zip_of_a_big_endian_machine(tmp_path):
  swapped = {key: x.view(f"u{x.itemsize}").byteswap().tobytes() for key, x in ARRAYS.items()}
  assert_expected(torch_file.tensors(write_zip(tmp_path / "a.pt", TREE, swapped, b"big")))


def test_legacy(tmp_path):
  assert_expected(torch_file.tensors(write_legacy(tmp_path / "a.pt", TREE, COUNTED)))


def test_legacy_views_of_a_storage(tmp_path):
  view = storage("0", "FloatStorage", 30, plain(("v", 5, 10)))
  where = view, plain(1), plain((2, 2)), plain((5, 1))
  tree = mapping({"a": call(name("torch._utils", "_rebuild_tensor"), *where)})
  found = torch_file.tensors(write_legacy(tmp_path / "a.pt", tree, {"0": COUNTED["0"]}))["a"]
  np.testing.assert_array_equal(found, BASE[1:3, 1:3])


@pytest.mark.parametrize("wrapper", torch_file.WRAPPERS)
def test_wrapped_state_dict_beside_things_that_are_not_made(tmp_path, wrapper):
  arguments = call(name("argparse", "Namespace")) + plain({"lr": 1}) + b"b"
  tree = mapping({"args": arguments, wrapper: TREE, "dtype": name("torch", "float16"), "epoch": plain(3)})
  path = write_zip(tmp_path / "a.pt", tree, BYTES)
  assert_expected(torch_file.tensors(path))
  loaded = torch_file.load(path)
  assert loaded["epoch"] == 3
  assert loaded["args"].asks_for == "argparse.Namespace"
  assert repr(loaded["dtype"]) == "<torch.float16, not made>"


def evil(sentinel: Path, module: str = "os", attribute: str = "system") -> bytes:
  return call(name(module, attribute), plain(f"touch {sentinel}"))


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(("module", "attribute"), [("os", "system"), ("builtins", "exec"), ("posix", "system")])
def test_nothing_runs(tmp_path, write, module, attribute):
  sentinel = tmp_path / "ran"
  bad = evil(sentinel, module, attribute)
  path = write(tmp_path / "a.pt", mapping({"weight": bad}), {})
  with pytest.raises(UserError, match=rf"a\.pt .*\n  weight: {module}\.{attribute}"):
    torch_file.tensors(path)
  path = write(tmp_path / "b.pt", call(name("torch._utils", "_rebuild_tensor_v2"), bad, *[plain(())] * 5), {})
  with pytest.raises(UserError, match=rf"asks for {module}\.{attribute} where the storage"):
    torch_file.load(path)
  path = write(tmp_path / "c.pt", bad, {})
  with pytest.raises(UserError, match=rf"holds {module}\.{attribute}, not a state dict"):
    torch_file.tensors(path)
  assert not sentinel.exists()


def test_state_sets_no_attribute(tmp_path):
  function = name("torch._utils", "_rebuild_tensor_v2")
  write_zip(tmp_path / "a.pt", function + b"N" + plain({"__defaults__": (1,)}) + b"\x86b", {})
  with pytest.raises(UserError, match="not a state dict"):
    torch_file.tensors(tmp_path / "a.pt")
  assert torch_file._rebuild_tensor.__defaults__ is None


@pytest.mark.parametrize(
  "forged",
  [
    tensor("0", "FloatStorage", 30, (7, 5), (5, 1)),
    tensor("0", "FloatStorage", 30, (6, 5), (5, 1), 1),
    tensor("0", "FloatStorage", 30, (6, 5), (6, 1)),
    tensor("0", "FloatStorage", 30, (2,), (-1,), 5),
    tensor("0", "FloatStorage", 30, (-2, -2), (1, 1)),
    tensor("0", "FloatStorage", 30, (1 << 40, 1 << 20), (0, 0)),
    tensor("0", "FloatStorage", 30, (6, 5), (5,)),
    tensor("0", "FloatStorage", 1 << 50, (1 << 50,), (1,)),
    tensor("0", "FloatStorage", -1, (), ()),
    tensor("0", "FloatStorage", 30.0, (6, 5), (5, 1)),
    tensor("9", "FloatStorage", 30, (6, 5), (5, 1)),
    tensor("0", "DoubleStorage", 30, (6, 5), (5, 1)),
  ],
)
def test_forged_sizes_allocate_nothing(tmp_path, forged):
  with pytest.raises(UserError, match=r"a\.pt is damaged"):
    torch_file.load(write_zip(tmp_path / "a.pt", mapping({"a": forged}), BYTES))
  with pytest.raises(UserError, match=r"b\.pt is damaged"):
    torch_file.load(write_legacy(tmp_path / "b.pt", mapping({"a": forged}), {"0": COUNTED["0"]}))


def test_forged_count_in_a_legacy_file(tmp_path):
  for numel in (-1, 1 << 60):
    with pytest.raises(UserError, match="damaged"):
      torch_file.load(write_legacy(tmp_path / "a.pt", TREE, {**COUNTED, "0": (numel, BYTES["0"])}))


def test_memo_index_allocates_nothing(tmp_path):
  tree = torch_file.load(write_zip(tmp_path / "a.pt", b"}r\xff\xff\xff\xff", {}))  # LONG_BINPUT 2**32 - 1
  assert tree == {}


def test_repeated_references_are_walked_once(tmp_path):
  tree = b"]q\x00" + b"".join(b"](" + b"h%c" % i * 8 + b"eq%c" % (i + 1) for i in range(60))
  assert len(torch_file.load(write_zip(tmp_path / "a.pt", tree, {}))) == 8


@pytest.mark.parametrize("write", ["zip", "legacy"])
def test_any_truncation_is_one_error(tmp_path, write):
  path = tmp_path / "a.pt"
  whole = (write_zip(path, TREE, BYTES) if write == "zip" else write_legacy(path, TREE, COUNTED)).read_bytes()
  for size in (*range(0, len(whole) - 1, 37), len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"a\.pt"):
      torch_file.load(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "cannot be read"),
    (b"<!DOCTYPE html><html>", "not a PyTorch file: it begins with b'<!DOCTYPE"),
    (pickle.dumps({"a": 1}, 2) * 3, "not one written by torch.save"),
    (b"sys_info".ljust(257, b"\0") + b"ustar".ljust(500, b"\0"), "tar file of torch < 0.1.10"),
  ],
)
def test_other_files(tmp_path, content, message):
  (tmp_path / "a.bin").write_bytes(content)
  with pytest.raises(UserError, match=message):
    torch_file.load(tmp_path / "a.bin")


def test_other_archives(tmp_path):
  with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
    archive.writestr("readme.txt", "hello")
  with pytest.raises(UserError, match=r"no data\.pkl"):
    torch_file.load(tmp_path / "a.pt")
  with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
    archive.writestr("net/data.pkl", b"\x80\x02N.")
    archive.writestr("net/constants.pkl", b"\x80\x02N.")
  with pytest.raises(UserError, match="TorchScript"):
    torch_file.load(tmp_path / "b.pt")
  with pytest.raises(UserError, match="No such file"):
    torch_file.load(tmp_path / "c.pt")
