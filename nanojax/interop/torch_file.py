"""PyTorch .pt files and nanochat's pickled tokenizer, read and written without torch and without running pickled code.

A .pt file is a zip: `<root>/data.pkl` lists the tensors, `<root>/data/<key>` holds their bytes. A pickle is a program, so
it runs here on an unpickler that knows only what a dictionary of tensors needs; any other name is refused before it is
looked up. Tensor bytes are memory-mapped, so reading a 7 GB file does not take 7 GB.
Format: torch/serialization.py and torch/_utils.py of PyTorch 1.6 and later (zip files; the older format is refused).
"""

import collections
import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from nanojax import files
from nanojax.cli import UserError

MAX_PICKLE = 64 << 20  # bytes of data.pkl; d32's has 20 kB
STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Tensor:
    """Stands where the pickle asks for torch._utils._rebuild_tensor_v2; no attributes, so BUILD cannot change it."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
        if not isinstance(storage, np.ndarray):
            raise pickle.UnpicklingError("tensor without a storage")
        sizes, strides = [int(n) for n in size], [int(n) for n in stride]
        if len(sizes) != len(strides) or int(offset) < 0 or min([0, *sizes, *strides]) < 0:
            raise pickle.UnpicklingError(f"impossible tensor size {size} and stride {stride}")
        last = int(offset) + sum((n - 1) * s for n, s in zip(sizes, strides))
        if 0 not in sizes and last >= storage.size:
            raise pickle.UnpicklingError(f"tensor of size {size} reaches past its storage of {storage.size} values")
        if 0 in sizes:
            return np.zeros(sizes, storage.dtype)
        itemsize = storage.dtype.itemsize
        return np.lib.stride_tricks.as_strided(
            storage[int(offset) :], sizes, [s * itemsize for s in strides], writeable=False
        )


class _Parameter:
    """Stands where the pickle asks for torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data: np.ndarray, *_: Any) -> np.ndarray:
        return data


class _Encoding:
    """Stands where the pickle asks for tiktoken's Encoding; keeps the state as plain data."""

    __slots__ = ("state",)

    def __setstate__(self, state: Any) -> None:
        self.state = state


_TENSOR_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    **{("torch", name): name for name in STORAGES},
}
_TOKENIZER_NAMES: dict[tuple[str, str], Any] = {("tiktoken.core", "Encoding"): _Encoding}


class _Restricted(pickle.Unpickler):
    """An unpickler that knows only the given names, and no memo index that the pickle cannot have.

    C's unpickler allocates 8 bytes for every index below the largest: one flipped bit of an index took 18 GB.
    """

    def __init__(self, data: bytes, names: Mapping[tuple[str, str], Any], load_storage: Any = None):
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise pickle.UnpicklingError(f"memo index {argument} in {len(data)} bytes")
        super().__init__(io.BytesIO(data))
        self._names, self._load_storage = names, load_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise _Refused(f"it asks to run {module}.{name}")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._load_storage is None or not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("unknown persistent id")
        return self._load_storage(*pid[1:])


class _Refused(pickle.UnpicklingError):
    pass


def _unpickle(path: Path, data: bytes, names: Mapping[tuple[str, str], Any], load_storage: Any = None) -> Any:
    try:
        return _Restricted(data, names, load_storage).load()
    except _Refused as error:
        raise UserError(
            f"{path}: refused: {error}, which no file of weights needs; nothing was run, do not open it elsewhere"
        ) from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: damaged, or of another kind ({type(error).__name__}: {error})") from None


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .pt file that holds a dictionary of tensors, or one tensor (then under the name "").

    Read-only memory maps in the stored dtype. UserError if the file is of another kind, damaged or asks to run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path}: a zip file, but not one that torch.save wrote")
            root = pickles[0].removesuffix("data.pkl")
            if archive.getinfo(pickles[0]).file_size > MAX_PICKLE:
                raise UserError(
                    f"{path}: data.pkl is larger than {MAX_PICKLE >> 20} MiB, too large for a list of tensors"
                )
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path}: written on a big-endian machine, which is not supported")
            found = _unpickle(path, archive.read(pickles[0]), _TENSOR_NAMES, _storages(path, archive, root))
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise UserError(f"{path}: not a zip file of torch.save (PyTorch 1.6 or later), or damaged") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # zipfile raises seven other types on damaged files
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    found = {"": found} if isinstance(found, np.ndarray) else found
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
    return dict(found)


def _storages(path: Path, archive: zipfile.ZipFile, root: str) -> Any:
    """A function that memory-maps one storage of the archive."""

    def load(kind: str, key: str, location: str, count: int) -> np.ndarray:
        dtype = STORAGES[kind]
        info = archive.getinfo(f"{root}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize or count < 0:
            raise pickle.UnpicklingError(f"storage {key} is compressed or shorter than {count} values")
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
            if header[:4] != b"PK\x03\x04":
                raise pickle.UnpicklingError(f"storage {key} has no zip header")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + count * dtype.itemsize > os.path.getsize(path):
            raise pickle.UnpicklingError(f"storage {key} reaches past the end of the file")
        return np.memmap(path, dtype, "r", start, (count,)) if count else np.zeros(0, dtype)

    return load


_NAMES = {STORAGES[name]: name for name in reversed(STORAGES)}


def write(path: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], arrays: Iterable[np.ndarray]) -> None:
    """Writes a .pt file that `torch.load(weights_only=True)` reads as an OrderedDict of contiguous tensors.

    `shapes` gives name -> (shape, dtype); `arrays` yields the arrays in that order and is consumed one at a time, so
    that a model need not be in memory twice. The file appears only when it is complete.
    """

    def checked() -> Iterator[np.ndarray]:
        for (name, (shape, dtype)), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name}: {array.dtype}{array.shape}, announced {dtype}{shape}")
            yield array

    _write(path, _pickle(shapes), checked())


def write_one(path: Path, array: np.ndarray) -> None:
    """Writes a .pt file that holds one tensor by itself, such as nanochat's token_bytes.pt."""
    _write(path, b"\x80\x02" + b"".join(_tensor(0, array.shape, array.dtype)) + b".", [array])


def _write(path: Path, pickled: bytes, storages: Iterable[np.ndarray]) -> None:
    root = path.stem
    with files.write_atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/byteorder", "little")
        for key, array in enumerate(storages):
            with archive.open(f"{root}/data/{key}", "w", force_zip64=True) as entry:
                entry.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        archive.writestr(f"{root}/version", "3\n")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little")


def _tensor(key: int, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[bytes]:
    """Pickle opcodes (protocol 2) of _rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    count = int(np.prod(shape, dtype=np.int64))
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    yield b"ctorch._utils\n_rebuild_tensor_v2\n("
    yield b"(" + _text("storage") + b"ctorch\n" + _NAMES[np.dtype(dtype)].encode() + b"\n"
    yield _text(str(key)) + _text("cpu") + _integer(count) + b"tQ"
    yield _integer(0)
    yield b"(" + b"".join(map(_integer, shape)) + b"t"
    yield b"(" + b"".join(map(_integer, strides)) + b"t"
    yield b"\x89ccollections\nOrderedDict\n)RtR"


def _pickle(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """Pickle (protocol 2) of the OrderedDict whose tensors have storages 0, 1, 2 ..."""
    parts = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for key, (name, (shape, dtype)) in enumerate(shapes.items()):
        parts += [_text(name), *_tensor(key, shape, dtype)]
    return b"".join([*parts, b"u."])


def read_tokenizer_pickle(path: Path) -> dict[str, Any]:
    """nanochat's tokenizer.pkl, a pickled tiktoken Encoding, as data: pat_str, mergeable_ranks, special_tokens."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    found = _unpickle(path, data, _TOKENIZER_NAMES)
    state = getattr(found, "state", None) if isinstance(found, _Encoding) else None
    if not isinstance(state, dict) or not {"pat_str", "mergeable_ranks", "special_tokens"} <= set(state):
        _not_a_tokenizer(path)
    ranks, special, pattern = state["mergeable_ranks"], state["special_tokens"], state["pat_str"]
    if not (isinstance(ranks, dict) and isinstance(special, dict) and isinstance(pattern, str)):
        _not_a_tokenizer(path)
    if not all(isinstance(t, bytes) and isinstance(r, int) for t, r in ranks.items()):
        _not_a_tokenizer(path)
    return state


def _not_a_tokenizer(path: Path) -> NoReturn:
    raise UserError(f"{path}: not a pickled tiktoken Encoding as nanochat saves it")


def write_tokenizer_pickle(path: Path, tokens: Iterable[bytes], pattern: str, special: Mapping[str, int]) -> None:
    """Writes tokenizer.pkl as nanochat's tokenizer loads it: a tiktoken Encoding named rustbpe."""
    import tiktoken

    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens=dict(special),
    )
    with files.write_atomic(path) as file:
        file.write(pickle.dumps(encoding))
