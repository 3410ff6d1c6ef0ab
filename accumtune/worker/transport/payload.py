"""Pickles the objects that a trial's process needs: functions by value, large arrays as memory maps.

`cloudpickle` sends what a script or a notebook defines. Arrays are written once, as `.npy` files that every trial of
the search maps into its memory, so neither the payload nor the trials hold a copy.

A payload has two parts. The header has plain types and is read before the framework runs anything: the settings of the
script's process, and the functions among the data as bytes. The rest may hold tensors; it is read after the device is
opened, so that they count towards its memory.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cloudpickle
import numpy as np

from accumtune.errors import UnsendableDataError
from accumtune.tracking.small_files import atomic_file, write_atomically
from accumtune.worker.transport.global_settings import global_settings
from accumtune.worker.transport.keras_objects import reduce_keras_object, register, registered_by_the_script
from accumtune.worker.transport.task_directory import clear_disk_errors, is_disk_full
from accumtune.worker.transport.tensors_as_arrays import as_arrays

# Smaller arrays are cheaper inside the pickle than in their own file.
_SMALLEST_MAPPED_BYTES = 64 * 2**10
_DATA = ("x", "y", "sample_weight", "validation_data")


@dataclass(frozen=True)
class DataFunction:
    """A function that returns data. It stays pickled until it is called, so the data in its closure are not loaded.

    Args:
        name: the argument of `fit` that it is.
        pickled: the function.
        arrays_folder: the folder of the arrays that it closes over.
        open_elsewhere: opens its pipeline in another process that has the function; returns None if it makes none.
    """

    name: str
    pickled: bytes
    arrays_folder: Path
    open_elsewhere: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        return _Unpickler(io.BytesIO(self.pickled), self.arrays_folder).load()()


@dataclass(frozen=True)
class Header:
    """The part of a payload that is read before any of the user's objects is unpickled.

    Args:
        settings: of the process that wrote it (`accumtune.worker.transport.global_settings`).
        functions: those among the data, by the name of their argument.
    """

    settings: Mapping[str, Any]
    functions: Mapping[str, DataFunction]


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, arrays_folder: Path) -> None:
        super().__init__(file)
        self._arrays_folder = arrays_folder

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, DataFunction):
            return "function", obj.name
        # Other subclasses of ndarray are pickled as they are, because they may have a meaning. So are types that NumPy
        # lacks, such as bfloat16: an `.npy` file would not name them.
        if type(obj) not in (np.ndarray, np.memmap) or obj.nbytes < _SMALLEST_MAPPED_BYTES:
            return None
        if obj.dtype.hasobject or obj.dtype.isbuiltin == 2:
            return None
        return _store_array(obj, self._arrays_folder).name

    def reducer_override(self, obj: Any) -> Any:
        reduced = reduce_keras_object(obj)
        return super().reducer_override(obj) if reduced is NotImplemented else reduced


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: BinaryIO, arrays_folder: Path, functions: Mapping[str, DataFunction] | None = None
    ) -> None:
        super().__init__(file)
        self._arrays_folder = arrays_folder
        self._functions = functions or {}

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple):
            return self._functions[pid[1]]
        return np.load(self._arrays_folder / pid, mmap_mode="r")


def dump_payload(payload: Mapping[str, Any], path: Path) -> None:
    """Writes named objects so that another process can load them.

    Args:
        payload: names and objects. The names are used in errors.
        path: the file to write. Arrays go to `arrays/` beside it.

    Raises:
        UnsendableDataError: one of the objects cannot be pickled, or is a live pipeline of this process.
        SearchDirectoryError: there is no space for them.
    """
    arrays_folder = path.parent / "arrays"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # private: trials run the code in it
    arrays_folder.mkdir(mode=0o700, exist_ok=True)
    arrays_folder = arrays_folder.resolve()
    for name, value in payload.items():
        _refuse_live_pipelines(name, value)
    data = {name: as_arrays(payload[name]) for name in ("fit_args", "fit_kwargs") if name in payload}
    buffer = io.BytesIO()
    with clear_disk_errors(path.parent):
        try:
            content, functions = _without_functions({**payload, **data}, arrays_folder)
            registered = {
                name: value for name, value in registered_by_the_script().items() if _can_pickle(value, arrays_folder)
            }
            pickle.dump({"settings": global_settings(), "functions": functions}, buffer)
            _Pickler(buffer, arrays_folder).dump((registered, content))
        except Exception as error:
            if is_disk_full(error):
                raise
            raise _unsendable(payload, arrays_folder, error) from error
        write_atomically(path, buffer.getvalue())


def read_header(path: Path) -> Header:
    """Reads a payload's header. No operation of a framework runs."""
    with open(path, "rb") as file:
        return _read_header(file, path)


def load_payload(path: Path) -> dict[str, Any]:
    """Reads what `dump_payload` wrote; large arrays come as read-only memory maps.

    If the process's memory is measured or limited, open the device first (`accumtune.memory.device.open_device`).
    """
    with open(path, "rb") as file:
        header = _read_header(file, path)
        registered, content = _Unpickler(file, _arrays_folder(path), header.functions).load()
    register(registered)
    return dict(content)


def _read_header(file: BinaryIO, path: Path) -> Header:
    header = pickle.load(file)
    arrays_folder = _arrays_folder(path)
    functions = {name: DataFunction(name, pickled, arrays_folder) for name, pickled in header["functions"].items()}
    return Header(header["settings"], functions)


def _arrays_folder(path: Path) -> Path:
    # Relative to the payload, which may have come from another machine.
    return path.parent / "arrays"


def _without_functions(content: Mapping[str, Any], arrays_folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the content with a `DataFunction` for each function among its data, and these functions pickled."""
    pickled: dict[str, bytes] = {}

    def replaced(name: str, value: Any) -> Any:
        if name not in _DATA or not is_data_function(value):
            return value
        buffer = io.BytesIO()
        _Pickler(buffer, arrays_folder).dump(value)
        pickled[name] = buffer.getvalue()
        return DataFunction(name, pickled[name], arrays_folder)

    if "fit_kwargs" not in content:
        return dict(content), pickled
    names = itertools.chain(_DATA[:2], itertools.repeat(""))
    positional = tuple(replaced(name, value) for name, value in zip(names, content["fit_args"], strict=False))
    named = {name: replaced(name, value) for name, value in content["fit_kwargs"].items()}
    return {**content, "fit_args": positional, "fit_kwargs": named}, pickled


def is_data_function(value: Any) -> bool:
    """Returns whether data are a function, to be called in the process of the trial."""
    return inspect.isroutine(value) or isinstance(value, (functools.partial, DataFunction))


def _store_array(array: np.ndarray, folder: Path) -> Path:
    # Named by content: a resumed search finds its arrays, and the same array given twice is written once.
    contiguous = np.ascontiguousarray(array)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((array.dtype.str, array.shape)).encode())
    digest.update(contiguous.reshape(-1).view(np.uint8).data)
    path = folder / f"{digest.hexdigest()}.npy"
    if not path.exists():
        with atomic_file(path, outlives_a_power_cut=False) as file:  # the data can be written again
            # Not np.save, whose error for a full disk only has the number of written elements.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(contiguous))
            file.write(contiguous.reshape(-1).view(np.uint8).data)
    return path


def _refuse_live_pipelines(name: str, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            _refuse_live_pipelines(f"{name}[{index}]", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_live_pipelines(f"{name}[{key!r}]", item)
    elif _is_live_pipeline(value):
        raise UnsendableDataError(
            f"Received {name} of type {type(value).__module__}.{type(value).__qualname__}, which lives in this "
            "process and cannot be sent to the process of a trial.",
            "arrays (also dicts and tuples of arrays), a keras.utils.PyDataset, or a function without arguments "
            "that returns a tf.data.Dataset, a PyDataset or arrays.",
            "move the lines that make it into a function and pass the function: "
            "`def train_data(): return tf.data.Dataset...`, then `tuner.search(train_data, ...)`.",
        )


def _is_live_pipeline(value: Any) -> bool:
    if hasattr(value, "__next__"):  # generators and iterators can be read only once
        return True
    module = type(value).__module__
    return module.startswith("tensorflow.") and hasattr(value, "element_spec") and hasattr(value, "__iter__")


def _unsendable(payload: Mapping[str, Any], arrays_folder: Path, error: Exception) -> UnsendableDataError:
    culprit = ", ".join(name for name, value in payload.items() if not _can_pickle(value, arrays_folder))
    return UnsendableDataError(
        f"Received {culprit or 'an object'} that cannot be sent to the process of a trial: "
        f"{type(error).__name__}: {error}",
        "functions, classes and data that cloudpickle can send (no open files, locks, sessions or live pipelines).",
        "create such objects inside the build function, or pass a function without arguments that returns them.",
    )


def _can_pickle(value: Any, arrays_folder: Path) -> bool:
    try:
        _Pickler(io.BytesIO(), arrays_folder).dump(value)
    except Exception:  # whatever the object's own pickling raises
        return False
    return True
