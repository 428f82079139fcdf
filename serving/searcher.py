"""One index version, opened and ready to answer its signatures; the only TensorFlow user of the request path.

Loads by TensorFlow's session loader, as TensorFlow Serving does, so that what fails there fails here,
and in the same words.
"""

import contextlib
import ctypes
import gc
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serving.handles import LoadError
from serving.protocol import RequestError, Signature, Tensor, TensorInfo

_NUMPY: dict[str, type] = {
    "DT_FLOAT": np.float32,
    "DT_DOUBLE": np.float64,
    "DT_INT32": np.int32,
    "DT_INT64": np.int64,
}
_NUMPY |= {"DT_UINT32": np.uint32, "DT_UINT64": np.uint64, "DT_STRING": np.object_, "DT_BOOL": np.bool_}
_SMALL = {"DT_INT16": np.int16, "DT_INT8": np.int8, "DT_UINT16": np.uint16, "DT_UINT8": np.uint8}
_NUMPY |= _SMALL
_PYTHON_PREFIX = "Graph execution error:\n\n"  # Python adds it; the C++ server's texts begin after it


class _Call(NamedTuple):
    """A signature, prepared: names sorted, outputs with their types."""

    run: Callable[..., list[np.ndarray]]
    inputs: list[str]
    outputs: list[tuple[str, str]]


class Searcher:
    """A loaded SavedModel. Safe to call from several threads at once.

    Attributes:
        signatures: by name, as the export wrote them, `__saved_model_init_op` included.
    """

    def __init__(self, session: Any, signature_defs: Mapping[str, Any]) -> None:
        self.signatures = {name: _signature(proto) for name, proto in signature_defs.items()}
        self._session = session
        self._calls = {n: _call(session, s) for n, s in signature_defs.items() if s.inputs}
        self._idle = threading.Condition(threading.Lock())
        self._n_running = 0
        self._is_closed = False

    @classmethod
    def open(cls, folder: Path) -> "Searcher":
        """Load a version folder: saved_model.pb and variables/.

        Raises:
            LoadError: it is no SavedModel, is incomplete, or holds ops that are not known here.
        """
        if not any((folder / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
            raise LoadError(
                "NOT_FOUND",
                f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {folder}. "
                "Check that the directory exists and that you have the right permissions for accessing it.",
            )
        tf = _tensorflow()
        with tf.Graph().as_default() as graph:
            session = tf.compat.v1.Session(graph=graph)
            try:
                loaded = tf.compat.v1.saved_model.load(session, [tf.saved_model.SERVING], str(folder))
                return cls(session, loaded.signature_def)
            except Exception as error:  # the loader raises every kind: op errors, ValueError, DecodeError
                session.close()
                raise LoadError(error_code(error), _text(error) or type(error).__name__) from error

    def run(self, signature_name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer one request; the values of its tensors are NumPy arrays.

        Args:
            inputs: every input of the signature, by name. Values that are an array already, of the right
                type, are not copied.

        Raises:
            RequestError: an op refused the input; the text is the op's own. Or the version is closed.
        """
        from tensorflow import errors

        self._enter()
        try:
            call = self._calls[signature_name]
            values = call.run(*[_array(inputs[name]) for name in call.inputs])
        except errors.OpError as error:  # anything else is a fault of this server, and its log wants it whole
            raise RequestError(error_code(error), _text(error)) from error
        finally:
            self._leave()
        return {name: _tensor(v, dtype) for (name, dtype), v in zip(call.outputs, values, strict=True)}

    def close(self) -> None:
        """Wait for the searches that run, then give the memory back; later searches are refused."""
        with self._idle:
            self._is_closed = True
            self._idle.wait_for(lambda: not self._n_running)
            session, self._session = self._session, None
            self._calls = {}
        if session is not None:
            session.close()
            del session
            gc.collect()  # a TensorFlow graph refers to itself
            _trim()

    def _enter(self) -> None:
        with self._idle:
            if self._is_closed:
                raise RequestError("CANCELLED", "Session has been closed.")
            self._n_running += 1

    def _leave(self) -> None:
        with self._idle:
            self._n_running -= 1
            if self._is_closed:
                self._idle.notify_all()


def _tensorflow() -> Any:
    """TensorFlow with ScaNN's ops, which must be registered before a graph that names them is read."""
    is_new = "tensorflow" not in sys.modules
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # ScaNN searches on the CPU
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # the tfrs layer that wrote the graph needs it
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else every refused request is a line
    import tensorflow as tf

    tf.get_logger().setLevel(logging.ERROR)
    try:
        from scann.scann_ops.py import scann_ops  # noqa: F401
    except ImportError as error:
        raise LoadError("UNIMPLEMENTED", f"ScaNN's TensorFlow ops cannot be loaded: {error}") from error
    if is_new:
        # The import makes 300,000 objects that stay. Each time Python looks through them for garbage all
        # threads stand still for 0.2 s. A version is loaded later, so what it makes can still be given back.
        gc.collect()
        gc.freeze()
    return tf


def _call(session: Any, signature: Any) -> _Call:
    """A prepared call: inputs and outputs in the order of their names.

    `Session.make_callable` would compare shapes first and refuse in Python's words, not the op's.
    """
    from tensorflow.core.framework import types_pb2
    from tensorflow.core.protobuf import config_pb2

    inputs, outputs = sorted(signature.inputs), sorted(signature.outputs)
    options = config_pb2.CallableOptions()
    options.feed.extend(signature.inputs[name].name for name in inputs)
    options.fetch.extend(signature.outputs[name].name for name in outputs)
    options.run_options.inter_op_thread_pool = -1  # on the caller's thread: no change of thread for each op
    types = [types_pb2.DataType.Name(signature.outputs[name].dtype) for name in outputs]
    run = session._make_callable_from_options(options)
    return _Call(run, inputs, list(zip(outputs, types, strict=True)))


def _signature(proto: Any) -> Signature:
    inputs = {name: _info(info) for name, info in proto.inputs.items()}
    outputs = {name: _info(info) for name, info in proto.outputs.items()}
    return Signature(inputs, outputs, proto.method_name, debug=str(proto))


def _info(proto: Any) -> TensorInfo:
    from tensorflow.core.framework import types_pb2

    shape = None if proto.tensor_shape.unknown_rank else tuple(dim.size for dim in proto.tensor_shape.dim)
    return TensorInfo(proto.name, types_pb2.DataType.Name(proto.dtype), shape)


def _array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype in _SMALL:  # a number too large for its type is cut to the type's bits, as there
        whole = np.asarray(tensor.values, np.int64)
        return whole.astype(_SMALL[tensor.dtype]).reshape(tensor.shape)
    return np.asarray(tensor.values, dtype=_NUMPY[tensor.dtype]).reshape(tensor.shape)


def _tensor(value: Any, dtype: str) -> Tensor:
    value = np.asarray(value, dtype=_NUMPY.get(dtype))  # a scalar comes as no array; text stays bytes
    return Tensor(dtype, value.shape, value.ravel())


def _trim() -> None:
    """Give what is free to the system: under load the memory of a version that is gone stays otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def error_code(error: Exception) -> str:
    """TensorFlow's name of an error's code."""
    from tensorflow import errors

    number = getattr(error, "error_code", errors.UNKNOWN)
    names = {v: k for k, v in vars(errors).items() if k.isupper() and isinstance(v, int)}
    return names.get(number, "UNKNOWN")


def _text(error: Exception) -> str:
    """An error's text without what only Python adds around it."""
    text = str(getattr(error, "message", None) or error).removeprefix(_PYTHON_PREFIX)
    return re.split(r"\n\nOriginal stack trace for ", text)[0].rstrip("\n")
