"""TensorFlow Serving 2.11's REST API both ways: paths, requests, answers and errors, as pure functions.

Texts, numbers and layout are those of tensorflow/serving r2.11, util/json_tensor.cc and
model_servers/http_rest_api_util.cc, so that a client cannot tell this server from that one.
"""

import base64
import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from serving import rapidjson
from serving.rapidjson import JsonError, JsonValue

if TYPE_CHECKING:
    import numpy as np

DEFAULT_SIGNATURE = "serving_default"
MAX_RANK = 254  # TensorFlow's TensorShape::MaxDimensions
MAX_PATHS = 1024  # whose meaning is kept: a server is asked for the same few again and again
JSON_TYPE = "application/json"

# model_servers/http_server.cc, ToHTTPStatusCode
HTTP_STATUS = {
    "OK": 200, "CANCELLED": 499, "UNKNOWN": 500, "INVALID_ARGUMENT": 400, "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404, "ALREADY_EXISTS": 409, "PERMISSION_DENIED": 403, "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400, "ABORTED": 409, "OUT_OF_RANGE": 400, "UNIMPLEMENTED": 501, "INTERNAL": 500,
    "UNAVAILABLE": 503, "DATA_LOSS": 500, "UNAUTHENTICATED": 401,
}  # fmt: skip

_FLAGS = re.IGNORECASE | re.ASCII
_API = re.compile(r"/v1/.*", _FLAGS)
_POST = re.compile(
    r"/v1/models/([^/:]+)(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?:(classify|regress|predict)", _FLAGS
)
_GET = re.compile(
    r"/v1/models(?:/([^/:]+))?(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?(?:/(metadata))?", _FLAGS
)
# libevent 2.1.8, evhttp_uri_parse: RFC 3986, and what it calls legal in each part
_LEGAL = rb"(?:[A-Za-z0-9._~!$&'()*+,;=:@/%s-]|%%[0-9A-Fa-f]{2})*"
_TARGET = re.compile(
    rb"(?:[A-Za-z][A-Za-z0-9+.-]*:)?(?://[^/?#]*)?(%s(?:\?%s)?(?:#%s)?)"
    % (_LEGAL % b"", _LEGAL % b"?", _LEGAL % b"?")
)
# google/protobuf/util/internal/json_escaping.cc escapes these too: the first two for the sake of HTML
_PROTO_ESCAPES = {
    code: f"\\u{code:04x}"
    for code in (0x3C, 0x3E, *range(0x7F, 0xA0), 0xAD, *range(0x200B, 0x2010), *range(0x2028, 0x202F), 0xFEFF)
}
_INTEGERS = {  # dtype: what RapidJSON's IsInt, IsUint, IsInt64 and IsUint64 accept
    "DT_INT32": (-(2**31), 2**31), "DT_INT16": (-(2**31), 2**31), "DT_INT8": (-(2**31), 2**31),
    "DT_UINT8": (-(2**31), 2**31), "DT_INT64": (-(2**63), 2**63), "DT_UINT32": (0, 2**32),
    "DT_UINT64": (0, 2**64),
}  # fmt: skip
_FLOATS = {"DT_FLOAT": "f", "DT_DOUBLE": "d"}
_NO_SPACE = dict.fromkeys(b" \t\n\v\f\r")


class RequestError(Exception):
    """A request that is answered by an error, with TensorFlow's name of the code.

    Attributes:
        model_name: whose error it is, where no Route says so.
    """

    def __init__(self, code: str, message: str, empty_body: bool = False, model_name: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.empty_body = empty_body
        self.model_name = model_name

    @property
    def http_status(self) -> int:
        return HTTP_STATUS.get(self.code, 500)

    def body(self) -> bytes:
        """{"error": ...} as RapidJSON prints it; empty for the one error that the real server leaves so."""
        return b"" if self.empty_body else error_body(self.message)


@dataclass(frozen=True)
class Route:
    """What a path asks for: `action` is status, metadata, predict, classify or regress."""

    action: str
    model_name: str
    version: int | None = None
    label: str | None = None

    @property
    def servable(self) -> str:
        """The servable as the real server's errors name it."""
        if self.version is None:
            return f"Latest({self.model_name})"
        return f"Specific({self.model_name}, {self.version})"


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a signature; `shape` is None where the rank is unknown, -1 any size."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Signature:
    """`inputs` and `outputs` by name; `debug` is the proto's text, shown in two error messages."""

    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    method_name: str
    debug: str = ""


@dataclass(frozen=True)
class Tensor:
    """`values` are the elements in row-major order: numbers, bools, or bytes for DT_STRING.

    They may be a flat NumPy array.
    """

    dtype: str
    shape: tuple[int, ...]
    values: "Sequence[Any] | np.ndarray"


@dataclass(frozen=True)
class VersionStatus:
    """One row of a model's status; `state` is START, LOADING, AVAILABLE, UNLOADING or END."""

    version: int
    state: str
    error_code: str = "OK"
    error_message: str = ""


@lru_cache(MAX_PATHS)
def path_of(target: bytes) -> str | None:
    """The path, query and fragment that a request line names; None where libevent would refuse it."""
    match = _TARGET.fullmatch(target)
    return match[1].decode() if match else None


def is_api(path: str) -> bool:
    """Whether the REST API answers this path at all; everything else is an HTML 404."""
    return _API.fullmatch(path) is not None


@lru_cache(MAX_PATHS)
def route(http_method: str, path: str) -> Route:
    """What a request asks for.

    Args:
        path: as in the request line, still encoded, with the query string: `path_of`.

    Raises:
        RequestError: the path or method is none of the API's.
    """
    pattern = {"POST": _POST, "GET": _GET}.get(http_method)
    match = pattern.fullmatch(path) if pattern else None
    if not match:
        raise RequestError("INVALID_ARGUMENT", f"Malformed request: {http_method} {path}")
    name, version, label, action = match.groups(default="")
    number = version.lstrip("0") or version[:1]  # Python reads no thousands of digits
    if len(number) > 19 or (number and int(number) >= 2**63):
        # http_rest_api_handler.cc returns before it writes the JSON
        said = f"Failed to convert version: {version} to numeric."
        raise RequestError("INVALID_ARGUMENT", said, empty_body=True, model_name=_decode(name))
    if http_method == "GET":
        # The pattern ignores case, the comparison after it does not: /METADATA is a status request.
        action = "metadata" if action == "metadata" else "status"
        if not name:
            raise RequestError("INVALID_ARGUMENT", "Missing model name in request.")
    elif action not in ("classify", "regress", "predict"):
        raise RequestError("INVALID_ARGUMENT", f"Malformed request: {http_method} {path}")
    return Route(action, _decode(name), int(number) if number else None, _decode(label) or None)


def read_json(body: bytes) -> dict[str, JsonValue]:
    """A request's document.

    Raises:
        RequestError: not JSON, or no object.
    """
    try:
        document = rapidjson.parse(body)
    except JsonError as error:
        raise RequestError("INVALID_ARGUMENT", str(error)) from None
    if not isinstance(document, dict):
        raise _refuse(document, "Is not object")
    return document


def signature_name(document: dict[str, JsonValue]) -> str:
    """The signature a request names, `serving_default` where it names none.

    Raises:
        RequestError: the name is not a string.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise _refuse(document, "not formatted correctly. 'signature_name' key must be a string value.")
    return name or DEFAULT_SIGNATURE


def find_signature(signatures: Mapping[str, Signature], document: dict[str, JsonValue]) -> Signature:
    """The signature a predict request means.

    Raises:
        RequestError: there is none of that name, or it takes no inputs.
    """
    name = signature_name(document)
    if name not in signatures:
        raise RequestError("INVALID_ARGUMENT", f'Serving signature name: "{name}" not found in signature def')
    if not signatures[name].inputs:
        given = document.get("signature_name") or "DEFAULT"
        raise RequestError("INVALID_ARGUMENT", f"Failed to get input map for signature: {given}")
    return signatures[name]


def read_inputs(document: dict[str, JsonValue], inputs: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """A predict request's tensors by input name, from the columnar or the row form.

    In the row form each element of `instances` is one row of every input: a plain list of n numbers
    becomes one tensor of shape [n].

    Raises:
        RequestError: neither or both forms are there, or a value does not fit.
    """
    columnar, row = "inputs" in document, "instances" in document
    if columnar and row:
        raise _refuse(
            document, "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
        )
    if columnar:
        return _from_inputs(document["inputs"], inputs)
    if not row:
        raise RequestError("INVALID_ARGUMENT", "Missing 'inputs' or 'instances' key")
    if not isinstance(document["instances"], list):
        raise _refuse(document, "Expecting 'instances' to be an list/array")
    if not document["instances"]:
        raise _refuse(document, "No values in 'instances' array")
    return _from_instances(document["instances"], inputs)


def predict_body(outputs: Mapping[str, Tensor], document: dict[str, JsonValue]) -> bytes:
    """The answer, in the form of the request: columnar `outputs` or row `predictions`.

    Raises:
        RequestError: there are no outputs, or they have no common first dimension, so there are no rows.
    """
    if not outputs:
        raise RequestError("INVALID_ARGUMENT", "Cannot convert empty tensor map to JSON")
    tensors = sorted(outputs.items())
    return _encode(_row_answer(tensors) if "instances" in document else _columnar_answer(tensors))


def status_body(rows: Iterable[VersionStatus]) -> bytes:
    """A model's status; newest version first."""
    listed = [
        {
            "version": str(row.version),
            "state": row.state,
            "status": {"error_code": row.error_code, "error_message": row.error_message},
        }
        for row in rows
    ]
    return _encode(_proto_json({"model_version_status": listed}))


def metadata_body(model_name: str, version: int, signatures: Mapping[str, Signature]) -> bytes:
    """A version's signatures, in the very layout of ToJsonString in http_rest_api_util.cc."""
    spec = _proto_json({"name": model_name, "signature_name": "", "version": str(version)})
    shown = _proto_json({"signature_def": {n: _show_signature(s) for n, s in sorted(signatures.items())}})
    return _encode(f'{{\n"model_spec":{spec},\n"metadata": {{"signature_def": {shown}}}\n}}\n')


def error_body(message: str) -> bytes:
    return _encode(f'{{\n    "error": {rapidjson.string(message)}\n}}')


def check_examples(document: dict[str, JsonValue]) -> None:
    """Whether a `:classify` or `:regress` request is one; there this comes before the model is looked for.

    Raises:
        RequestError: the examples are missing, or are none.
    """
    if "context" in document:
        _check_example(document["context"])
    if "examples" not in document:
        raise _refuse(document, "When method is classify, key 'examples' is expected and was not found")
    examples = document["examples"]
    if not isinstance(examples, list):
        raise _refuse(document, "Expecting 'examples' value to be an list/array")
    if not examples:
        raise _refuse(document, "'examples' value is an empty array")
    for example in examples:
        _check_example(example)


def refuse_examples(action: str, document: dict[str, JsonValue], signatures: Mapping[str, Signature]) -> None:
    """The real server's refusal of `:classify` and `:regress`, which no signature here serves.

    Raises:
        RequestError: always.
    """
    name = signature_name(document)
    check_examples(document)
    if name not in signatures:
        raise RequestError("INVALID_ARGUMENT", f"No signature was found with the name: {name}")
    raise RequestError("INVALID_ARGUMENT", _why_no_examples(action, signatures[name]))


def _check_example(example: JsonValue) -> None:
    """MakeExampleFromJsonObject: each feature is a value or a list of values of one kind."""
    if not isinstance(example, dict):
        kind = rapidjson.kind(example)
        raise RequestError("INVALID_ARGUMENT", f"Example must be JSON object but got JSON {kind}")
    for name, content in example.items():
        wanted = ""
        for value in content if isinstance(content, list) else [content]:
            kind = _feature_kind(name, value)
            if wanted not in ("", kind):
                raise RequestError(
                    "INVALID_ARGUMENT",
                    f"Unexpected element type in feature: {name} expecting type: {wanted}",
                )
            if kind == "int64" and value >= 2**63:
                raise RequestError(
                    "INVALID_ARGUMENT",
                    f"Feature: {name} has uint64_t element. Only int64_t is supported.",
                )
            wanted = kind


def _feature_kind(name: str, value: JsonValue) -> str:
    """Which of a feature's lists a value goes to: bytes, float or int64."""
    if isinstance(value, str) or _is_base64(value):
        _bytes(value)  # what is no base64 is refused
        return "bytes"
    if isinstance(value, float):
        return "float"
    if isinstance(value, int):  # a bool too
        return "int64"
    kind = rapidjson.kind(value)
    raise RequestError("INVALID_ARGUMENT", f"Feature: {name} has element with unexpected JSON type: {kind}")


def _why_no_examples(action: str, signature: Signature) -> str:
    """servables/tensorflow/classifier.cc and regressor.cc, PreProcess..."""
    n_outputs = len(signature.outputs)
    if len(signature.inputs) != 1:
        return "Expected one input Tensor."
    if action == "regress":
        if n_outputs != 1:
            return "Expected one output Tensor."
        return f"No regression inputs found in SignatureDef: {signature.debug}"
    if n_outputs not in (1, 2):
        return f"Expected one or two output Tensors, found {n_outputs}"
    return f"No classification inputs found in SignatureDef: {signature.debug}"


def _decode(name: str) -> str:
    return unquote_to_bytes(name.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _refuse(value: JsonValue, why: str) -> RequestError:
    return RequestError("INVALID_ARGUMENT", f"JSON Value: {rapidjson.text(value)} {why}")


def _from_inputs(value: JsonValue, inputs: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """The columnar form; names beyond the signature's are ignored."""
    if not isinstance(value, dict) or _is_base64(value):
        if len(inputs) > 1:
            raise RequestError(
                "INVALID_ARGUMENT",
                "inputs is a plain value/list, but expecting an object as multiple "
                "input tensors required as per tensorinfo_map",
            )
        [(name, info)] = inputs.items()
        return {name: _tensor(value, info.dtype)}
    tensors = {}
    for name, info in sorted(inputs.items()):
        if name not in value:
            raise RequestError("INVALID_ARGUMENT", f"Missing named input: {name} in 'inputs' object.")
        tensors[name] = _tensor(value[name], info.dtype)
    return tensors


def _from_instances(rows: list[JsonValue], inputs: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """The row form; every row must have the same shape, and every input's name where it is an object."""
    if not isinstance(rows[0], dict) and len(inputs) > 1:
        raise RequestError(
            "INVALID_ARGUMENT",
            "instances is a plain list, but expecting list of objects as multiple "
            "input tensors required as per tensorinfo_map",
        )
    named = _is_named(rows[0])
    for i, row in enumerate(rows):
        if _is_named(row) != named:
            wanted, got = ("object", "list") if named else ("value/list", "object")
            _check_rows(rows[:i], named, inputs)  # an earlier row's fault is found first
            raise RequestError(
                "INVALID_ARGUMENT", f"Expecting {wanted} but got {got} at item {i} of input list"
            )
    try:
        if not named:
            return {name: _tensor(rows, info.dtype) for name, info in inputs.items()}
        if all(row.keys() == inputs.keys() for row in rows):
            return {n: _tensor([row[n] for row in rows], info.dtype) for n, info in inputs.items()}
    except RequestError:
        pass  # said below, in terms of the row that is wrong
    _check_rows(rows, named, inputs)
    raise AssertionError("rows that fit one by one fit together")


def _check_rows(rows: list[JsonValue], named: bool, inputs: Mapping[str, TensorInfo]) -> None:
    """Go through the rows as AddInstanceItem does, and raise what it says of the first wrong one."""
    first: dict[str, tuple[int, ...]] = {}
    for i, row in enumerate(rows):
        items = row if named else {next(iter(inputs)): row}
        for name, item in items.items():
            try:
                _check_item(name, item, inputs, first)
            except RequestError as error:
                key = f" key: {name}" if named else ""
                raise RequestError(
                    "INVALID_ARGUMENT",
                    f"Failed to process element: {i}{key} of 'instances' list. "
                    f"Error: {error.code}: {error.message}",
                ) from None
        if items.keys() != inputs.keys():
            raise RequestError(
                "INVALID_ARGUMENT",
                f"Failed to process element: {i} of 'instances' list. JSON object: {rapidjson.text(row)}"
                f" keys must be equal to: {','.join(sorted(inputs))}",
            )


def _check_item(
    name: str, item: JsonValue, inputs: Mapping[str, TensorInfo], first: dict[str, tuple[int, ...]]
) -> None:
    if name not in inputs:
        raise RequestError("INVALID_ARGUMENT", f"JSON object: does not have named input: {name}")
    tensor = _tensor(item, inputs[name].dtype)
    wanted = first.setdefault(name, tensor.shape)
    if _size(wanted) != _size(tensor.shape):
        raise RequestError(
            "INVALID_ARGUMENT", f"Expecting tensor size: {_size(wanted)} but got: {_size(tensor.shape)}"
        )
    if wanted != tensor.shape:
        shapes = [f"[{','.join(map(str, shape))}]" for shape in (wanted, tensor.shape)]
        raise RequestError("INVALID_ARGUMENT", f"Expecting shape {shapes[0]} but got: {shapes[1]}")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


def _is_base64(value: JsonValue) -> bool:
    return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def _is_named(row: JsonValue) -> bool:
    return isinstance(row, dict) and not _is_base64(row)


def _tensor(value: JsonValue, dtype: str) -> Tensor:
    """A JSON value as a tensor; the shape is read along the first elements.

    Raises:
        RequestError: the lists are ragged, or an element has another type.
    """
    if dtype in _FLOATS and isinstance(value, list) and not set(map(type, value)) - {int, float}:
        return Tensor(dtype, (len(value),), array(_FLOATS[dtype], value))  # a vector, as nearly always
    shape = _shape(value)
    if len(shape) > MAX_RANK:
        raise RequestError("INVALID_ARGUMENT", f"tensor of rank {len(shape)}, wanted at most {MAX_RANK}")
    flat = [value]
    for size in shape:  # level by level in C, as an embedding has hundreds of elements
        if set(map(type, flat)) - {list} or set(map(len, flat)) - {size}:
            _complain(value, 0, shape, dtype)
        flat = list(chain.from_iterable(flat))
    try:
        return Tensor(dtype, shape, _convert(flat, dtype))
    except TypeError:
        _complain(value, 0, shape, dtype)
        raise


def _shape(value: JsonValue) -> tuple[int, ...]:
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def _convert(flat: list[JsonValue], dtype: str) -> Sequence[Any]:
    """The elements as TensorFlow gets them.

    Raises:
        TypeError: an element does not fit the type.
    """
    types = set(map(type, flat))
    if dtype in _FLOATS:
        if types - {int, float}:
            raise TypeError
        return array(_FLOATS[dtype], flat)
    if dtype in _INTEGERS:
        low, high = _INTEGERS[dtype]
        if types - {int} or (flat and not low <= min(flat) <= max(flat) < high):
            raise TypeError
        return flat
    if dtype == "DT_BOOL" and not types - {bool}:
        return flat
    if dtype == "DT_STRING" and not types - {str, dict}:
        return [_bytes(value) for value in flat]
    raise TypeError


def _bytes(value: JsonValue) -> bytes:
    if isinstance(value, str):
        return _encode(value)
    if not _is_base64(value):
        raise _refuse(value, "not formatted correctly for base64 data")
    try:
        return _from_base64(value["b64"])
    except ValueError:
        raise RequestError("INVALID_ARGUMENT", "Unable to base64 decode") from None


def _from_base64(text: str) -> bytes:
    """As absl's Base64Unescape: white space anywhere, padding by `=` or `.`, all of it or none.

    Raises:
        ValueError: it is something else.
    """
    text = text.translate(_NO_SPACE)
    digits = text.rstrip("=.")
    n_pads = -len(digits) % 4
    if len(text) - len(digits) not in (0, n_pads):
        raise ValueError
    return base64.b64decode(digits + "=" * n_pads, validate=True)


def _complain(value: JsonValue, level: int, shape: tuple[int, ...], dtype: str) -> None:
    """Walk a value that does not fit as FillTensorProto does, and raise what it says first."""
    rank = len(shape)
    if not isinstance(value, list):
        if level != rank:
            raise _refuse(
                value,
                f"found at incorrect level: {level + 1} in the JSON DOM. Expected at level: {rank}",
            )
        try:
            _convert([value], dtype)
        except TypeError:
            raise _type_error(value, dtype) from None
        return
    if level >= rank:
        raise RequestError(
            "INVALID_ARGUMENT", f"Encountered list at unexpected level: {level} expected < {rank}"
        )
    if len(value) != shape[level]:
        raise RequestError(
            "INVALID_ARGUMENT",
            f"Encountered list at unexpected size: {len(value)} at level: {level} "
            f"expected size: {shape[level]}",
        )
    for item in value:
        _complain(item, level + 1, shape, dtype)


def _type_error(value: JsonValue, dtype: str) -> RequestError:
    name = dtype.removeprefix("DT_").lower()  # DataTypeString
    if dtype not in _FLOATS and dtype not in _INTEGERS and dtype not in ("DT_BOOL", "DT_STRING"):
        shown = rapidjson.text(value)
        return RequestError("UNIMPLEMENTED", f"Conversion of JSON Value: {shown} to type: {name}")
    return _refuse(value, f"Type: {rapidjson.kind(value)} is not of expected type: {name}")


def _columnar_answer(tensors: list[tuple[str, Tensor]]) -> str:
    if len(tensors) == 1:  # without its name
        [(name, tensor)] = tensors
        return f'{{\n    "outputs": {_nested(_spell(name, tensor), tensor.shape, 1)}\n}}'
    members = [
        f"\n        {rapidjson.string(name)}: {_nested(_spell(name, tensor), tensor.shape, 2)}"
        for name, tensor in tensors
    ]
    return f'{{\n    "outputs": {{{",".join(members)}\n    }}\n}}'


def _row_answer(tensors: list[tuple[str, Tensor]]) -> str:
    n_rows = _common_rows(tensors)
    columns = [
        (rapidjson.string(name), _rows_of(_spell(name, tensor), tensor.shape)) for name, tensor in tensors
    ]
    if len(columns) == 1:  # single-line arrays inside, and one last line break: RapidJSON's way
        rows = ", ".join(columns[0][1])
        return f'{{\n    "predictions": [{rows}\n    ]\n}}' if n_rows else '{\n    "predictions": []\n}'
    rows_text = [
        "\n        {"
        + ",".join(f"\n            {name}: {values[i]}" for name, values in columns)
        + "\n        }"
        for i in range(n_rows)
    ]
    end = "\n    ]" if n_rows else "]"
    return f'{{\n    "predictions": [{",".join(rows_text)}{end}\n}}'


def _common_rows(tensors: list[tuple[str, Tensor]]) -> int:
    n_rows = -1
    for name, tensor in tensors:
        if not tensor.shape:
            raise RequestError("INVALID_ARGUMENT", f"Tensor name: {name} has no shape information ")
        if n_rows not in (-1, tensor.shape[0]):
            raise RequestError(
                "INVALID_ARGUMENT",
                f"Tensor name: {name} has inconsistent batch size: {tensor.shape[0]} expecting: {n_rows}",
            )
        n_rows = tensor.shape[0]
    return n_rows


def _spell(name: str, tensor: Tensor) -> list[str]:
    """Each element as JSON."""
    values: Any = getattr(tensor.values, "tolist", lambda: tensor.values)()
    if tensor.dtype in _FLOATS:
        return rapidjson.numbers(values, single=tensor.dtype == "DT_FLOAT")
    if tensor.dtype == "DT_BOOL":
        return ["true" if value else "false" for value in values]
    if tensor.dtype in _INTEGERS:
        return list(map(str, values))
    if tensor.dtype != "DT_STRING":
        kind = tensor.dtype.removeprefix("DT_").lower()
        raise RequestError("INVALID_ARGUMENT", f"Failed to write JSON value for tensor type: {kind}")
    if name.endswith("_bytes"):
        return [f'{{"b64": "{base64.b64encode(value).decode()}"}}' for value in values]
    return [rapidjson.string(value.decode("utf-8", "surrogateescape")) for value in values]


def _nested(spelled: list[str], shape: tuple[int, ...], level: int) -> str:
    """A tensor's elements as nested arrays, one element a line, `level` deep in the document."""
    if not shape:
        return spelled[0]
    if not shape[0]:
        return "[]"
    size, items = len(spelled) // shape[0], spelled
    if len(shape) > 1:
        items = [_nested(spelled[i * size : (i + 1) * size], shape[1:], level + 1) for i in range(shape[0])]
    indent = "\n" + "    " * (level + 1)
    return "[" + indent + f",{indent}".join(items) + "\n" + "    " * level + "]"


def _rows_of(spelled: list[str], shape: tuple[int, ...]) -> list[str]:
    """Each row of a tensor on one line."""
    if len(shape) == 1:
        return spelled
    size = len(spelled) // shape[0] if shape[0] else 0
    return [_line(spelled[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def _line(spelled: list[str], shape: tuple[int, ...]) -> str:
    return f"[{', '.join(_rows_of(spelled, shape))}]" if shape else spelled[0]


def _show_signature(signature: Signature) -> dict[str, Any]:
    return {
        "inputs": {name: _show_tensor(info) for name, info in sorted(signature.inputs.items())},
        "outputs": {name: _show_tensor(info) for name, info in sorted(signature.outputs.items())},
        "method_name": signature.method_name,
    }


def _show_tensor(info: TensorInfo) -> dict[str, Any]:
    dims = [{"size": str(size), "name": ""} for size in info.shape or ()]
    shape = {"dim": dims, "unknown_rank": info.shape is None}
    return {"dtype": info.dtype, "tensor_shape": shape, "name": info.name}


def _proto_json(message: dict[str, Any]) -> str:
    """protobuf's JSON: one space a level, and a last line break; integers of 64 bits are strings."""
    # What is escaped besides stands inside strings alone, so the whole text can be translated.
    return json.dumps(message, indent=1, ensure_ascii=False).translate(_PROTO_ESCAPES) + "\n"
