"""PredictRequest and PredictResponse of the tensorflow-serving-api package: tensors and names, both ways.

Requests that hold examples, which no signature here takes, are refused here too, for calls and for warm-up.
Checks, their order and their texts are those of servables/tensorflow/predict_util.cc in tensorflow/serving
r2.11, and of core/framework/tensor.cc in TensorFlow 2.11. Importing this loads no framework.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Any

import numpy as np

from serving import protocol
from serving.protocol import DEFAULT_SIGNATURE, MAX_RANK, RequestError, Signature, Tensor

MAX_TENSOR_BYTES = 64 * 2**20  # one value may stand for a whole tensor: a hundred bytes for any memory
TEXT_BYTES = 24  # of a text in TensorFlow's memory, beside its own bytes
PIECE = 2**16  # elements taken over in one go: in between other threads get their turn

# method_name of a signature: what it answers with
EXAMPLE_METHODS = {"tensorflow/serving/classify": "classify", "tensorflow/serving/regress": "regress"}

# DataType: the NumPy type of its elements, and TensorProto's field for them
_TYPES: dict[str, tuple[type, str]] = {
    "DT_FLOAT": (np.float32, "float_val"),
    "DT_DOUBLE": (np.float64, "double_val"),
    "DT_INT32": (np.int32, "int_val"),
    "DT_INT16": (np.int16, "int_val"),
    "DT_INT8": (np.int8, "int_val"),
    "DT_UINT8": (np.uint8, "int_val"),
    "DT_UINT16": (np.uint16, "int_val"),
    "DT_INT64": (np.int64, "int64_val"),
    "DT_UINT32": (np.uint32, "uint32_val"),
    "DT_UINT64": (np.uint64, "uint64_val"),
    "DT_BOOL": (np.bool_, "bool_val"),
    "DT_STRING": (np.object_, "string_val"),
}


class TensorError(ValueError):
    """A TensorProto that is no tensor; the real server says only whose it is."""


def find_signature(model_spec: Any, signatures: Mapping[str, Signature]) -> tuple[str, Signature]:
    """The signature a request names, `serving_default` where it names none.

    Raises:
        RequestError: there is none of that name.
    """
    name = model_spec.signature_name or DEFAULT_SIGNATURE
    if name not in signatures:
        raise RequestError("FAILED_PRECONDITION", f'Serving signature key "{name}" not found.')
    return name, signatures[name]


def refuse_examples(action: str, model_spec: Any, signatures: Mapping[str, Signature]) -> None:
    """Refuse `classify` or `regress`, by protocol.py's rule, which takes a request's JSON.

    Raises:
        RequestError: always, in the real server's words.
    """
    document = {"signature_name": model_spec.signature_name, "examples": [{}]}
    protocol.refuse_examples(action, document, signatures)


def refuse_task(task: Any, signatures: Mapping[str, Signature]) -> None:
    """Refuse a MultiInferenceRequest by its first task: no signature here serves one.

    Raises:
        RequestError: always; servables/tensorflow/multi_inference.cc says in which words.
    """
    name = task.model_spec.signature_name or DEFAULT_SIGNATURE
    if name not in signatures:
        raise RequestError("INVALID_ARGUMENT", f"Requested signature not found in model graph: {name}")
    if task.method_name not in EXAMPLE_METHODS:
        raise RequestError("UNIMPLEMENTED", f"Unsupported signature method_name: {task.method_name}")
    refuse_examples(EXAMPLE_METHODS[task.method_name], task.model_spec, signatures)


def read_request(
    request: Any, signature: Signature, max_tensor_bytes: int = MAX_TENSOR_BYTES
) -> tuple[dict[str, Tensor], list[str]]:
    """A PredictRequest's tensors by input name, and the outputs it wants, in its order.

    Raises:
        RequestError: the names are not the signature's, or a tensor cannot be read or has another type.
    """
    inputs = _inputs(request.inputs, signature, max_tensor_bytes)
    outputs = _outputs(request.output_filter, signature)
    if not inputs:
        raise _nothing_to_run(signature, outputs)
    _check_types(inputs, signature)
    return inputs, outputs


def read_tensor(proto: Any, max_bytes: int = MAX_TENSOR_BYTES) -> Tensor:
    """A TensorProto's elements, of `tensor_content` or of the field of its type.

    Too few values are filled up with the last one, none with zeros, and too many are cut, as there. The
    elements of a type that no signature here takes are not read.

    Raises:
        TensorError: it is not valid, or larger than `max_bytes`.
    """
    dtype, shape = _type_name(proto.dtype), _shape(proto.tensor_shape)
    n = prod(shape)
    if dtype not in _TYPES:
        return Tensor(dtype, shape, ())
    kind, field = _TYPES[dtype]
    size = n * (TEXT_BYTES if kind is np.object_ else np.dtype(kind).itemsize)
    if kind is np.object_ and not proto.tensor_content:
        size += _text_bytes(proto.string_val, n)
    if size > max_bytes:
        raise TensorError(f": {n} elements are more than {max_bytes} bytes")
    if n and proto.tensor_content:
        return Tensor(dtype, shape, _from_content(proto.tensor_content, n, kind))
    return Tensor(dtype, shape, _from_field(getattr(proto, field), n, kind))


def n_bytes(tensor: Tensor) -> int:
    """The memory that TensorFlow takes for it."""
    if tensor.dtype == "DT_STRING":
        return TEXT_BYTES * len(tensor.values) + sum(map(len, tensor.values))
    return int(np.asarray(tensor.values).nbytes)


def write_tensor(tensor: Tensor, proto: Any) -> None:
    """Fill an empty TensorProto: elements in the field of their type, the real server's default."""
    proto.dtype = type_number(tensor.dtype)
    for size in tensor.shape:
        proto.tensor_shape.dim.add(size=size)
    field, values = getattr(proto, _TYPES[tensor.dtype][1]), tensor.values
    for start in range(0, len(values), PIECE):
        piece = values[start : start + PIECE]
        field.extend(piece.tolist() if isinstance(piece, np.ndarray) else piece)


def type_number(dtype: str) -> int:
    """DataType's number of a name; a signature's `DT_INVALID` is 0."""
    return _numbers().get(dtype, 0)


def _inputs(given: Mapping[str, Any], signature: Signature, max_bytes: int) -> dict[str, Tensor]:
    if len(given) != len(signature.inputs):
        extra, missing = set(given) - set(signature.inputs), set(signature.inputs) - set(given)
        raise RequestError(
            "INVALID_ARGUMENT",
            f"input size does not match signature: {len(given)}!={len(signature.inputs)} "
            f"len({_set(given)}) != len({_set(signature.inputs)}). Sent extra: {_set(extra)}. "
            f"Missing but required: {_set(missing)}.",
        )
    inputs = {}
    for name in sorted(given):
        if name not in signature.inputs:
            raise RequestError(
                "INVALID_ARGUMENT",
                f"input tensor alias not found in signature: {name}. Inputs expected to be in the set "
                f"{_set(signature.inputs)}.",
            )
        try:
            inputs[name] = read_tensor(given[name], max_bytes)
        except TensorError as error:
            raise RequestError("INVALID_ARGUMENT", f"tensor parsing error: {name}{error}") from None
    return inputs


def _outputs(names: Iterable[str], signature: Signature) -> list[str]:
    wanted: list[str] = []
    for name in names:
        if name not in signature.outputs:
            raise RequestError(
                "INVALID_ARGUMENT",
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{_set(signature.outputs)}.",
            )
        if name in wanted:
            raise RequestError("INVALID_ARGUMENT", f"duplicate output tensor alias: {name}")
        wanted.append(name)
    return wanted or sorted(signature.outputs)


def _nothing_to_run(signature: Signature, outputs: list[str]) -> RequestError:
    """What TensorFlow's core/graph/subgraph.cc says of `__saved_model_init_op`, whose output is an op."""
    name = signature.outputs[outputs[0]].name if outputs else ""
    if ":" in name or not name:
        return RequestError("UNIMPLEMENTED", "A signature without inputs is not answered by this server")
    return RequestError(
        "INVALID_ARGUMENT",
        f"Tried to fetch data for '{name}', which produces no output.  To run to a node but not fetch any "
        f"data, pass '{name}' as an argument to the 'target_node_names' argument of the Session::Run API.",
    )


def _check_types(inputs: Mapping[str, Tensor], signature: Signature) -> None:
    """core/framework/function.cc, SetArgs; arguments are in the order of their tensors' names."""
    for i, name in enumerate(sorted(inputs, key=lambda name: signature.inputs[name].name)):
        wanted, got = signature.inputs[name].dtype, inputs[name].dtype
        if wanted != got:
            raise RequestError(
                "INVALID_ARGUMENT",
                f"Expects arg[{i}] to be {_shown(wanted)} but {_shown(got)} is provided",
            )


def _shape(proto: Any) -> tuple[int, ...]:
    """TensorShape::IsValid; an unknown rank is a scalar, as there."""
    shape = tuple(dim.size for dim in proto.dim)
    sizes = accumulate(shape, mul)  # along the way, so that a later 0 mends nothing
    if len(shape) > MAX_RANK or min(shape, default=0) < 0 or max(sizes, default=1) >= 2**63:
        raise TensorError
    return shape


def _from_content(content: bytes, n: int, kind: type) -> Any:
    if kind is np.object_:
        return _texts(content, n)
    if len(content) != n * np.dtype(kind).itemsize:
        raise TensorError
    return np.frombuffer(content, kind)


def _texts(content: bytes, n: int) -> list[bytes]:
    """core/platform/tensor_coding.cc, DecodeStringList: n lengths as varints of 32 bits, then the texts."""
    lengths, at = [], 0
    for _ in range(n):
        length, at = _varint(content, at)
        lengths.append(length)
    if at + sum(lengths) != len(content):
        raise TensorError
    ends = list(accumulate(lengths, initial=at))
    return [content[start:end] for start, end in pairwise(ends)]


def _text_bytes(texts: Any, n: int) -> int:
    """Of n texts whose last one stands for those that are missing: TensorFlow copies it for each."""
    given = sum(map(len, texts[:n]))
    return given + max(0, n - len(texts)) * len(texts[-1]) if len(texts) else 0


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a byte, and where it ends."""
    number = 0
    for shift in range(0, 35, 7):
        if at == len(content):
            break
        byte = content[at]
        number |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return number, at
    raise TensorError


def _from_field(values: Any, n: int, kind: type) -> Any:
    """FromProtoField; a number too large for its type is cut to the type's bits."""
    if kind is np.object_:
        given = list(values[:n])
        return given + [given[-1] if given else b""] * (n - len(given))
    if not len(values):
        return np.zeros(n, kind)
    is_narrow = np.issubdtype(kind, np.integer) and kind is not np.uint64
    array: np.ndarray = np.empty(min(n, len(values)), np.int64 if is_narrow else kind)
    for start in range(0, len(array), PIECE):
        end = min(start + PIECE, len(array))
        array[start:end] = values[start:end]
    array = array.astype(kind, copy=False)
    return array if len(array) == n else np.pad(array, (0, n - len(array)), "edge")


def _shown(dtype: str) -> str:
    return dtype.removeprefix("DT_").lower()  # DataTypeString


def _set(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"


@cache
def _numbers() -> dict[str, int]:
    """DataType's numbers by name; references and DT_INVALID are no type of a tensor."""
    from tensorflow.core.framework import types_pb2

    names = types_pb2.DataType.items()
    return {name: number for name, number in names if number and not name.endswith("_REF")}


@cache
def _type_name(number: int) -> str:
    name = {number: name for name, number in _numbers().items()}.get(number)
    if name is None:
        raise TensorError
    return name
