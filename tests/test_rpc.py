"""gRPC: the official package's client against this server, codes and texts of the real one.

Most tests ask a stand-in whose answers can be seen; the slow ones ask `python -m serving` on a real index.
"""

import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from serving_parts import export_tuned, free_port, server_process, unit_rows
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from serving import predict_proto, rpc
from serving.coalescing import Searches
from serving.errors import ServingError
from serving.monitoring import Monitoring
from serving.predict_proto import TensorError, read_tensor, write_tensor
from serving.protocol import RequestError, Signature, Tensor, TensorInfo
from serving.rpc import RpcServer, make_rpc_server
from serving.versions import Models
from serving.wanted import All, ModelConfig

PREDICT = "tensorflow/serving/predict"
OK, INVALID = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT
ROOT = Path(__file__).parent.parent
NUMBERS = {  # type: its field, bytes of 1 and 2 as C writes them
    "DT_FLOAT": ("float_val", struct.pack("<2f", 1, 2)),
    "DT_DOUBLE": ("double_val", struct.pack("<2d", 1, 2)),
    "DT_INT32": ("int_val", struct.pack("<2i", 1, 2)),
    "DT_INT16": ("int_val", struct.pack("<2h", 1, 2)),
    "DT_INT8": ("int_val", struct.pack("<2b", 1, 2)),
    "DT_UINT8": ("int_val", struct.pack("<2B", 1, 2)),
    "DT_UINT16": ("int_val", struct.pack("<2H", 1, 2)),
    "DT_INT64": ("int64_val", struct.pack("<2q", 1, 2)),
    "DT_UINT32": ("uint32_val", struct.pack("<2I", 1, 2)),
    "DT_UINT64": ("uint64_val", struct.pack("<2Q", 1, 2)),
}


class Echo:
    """Stands in for a SavedModel: `serving_default` doubles, `add` adds, `same_DT_X` gives back.

    Attributes:
        gate: requests of `wait`, which doubles too, wait for it.
        entered: released by each of these.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.signatures = {
            "serving_default": _signature(
                {"input_1": "DT_FLOAT"}, {"output_1": "DT_FLOAT", "output_2": "DT_INT32"}
            ),
            "wait": _signature({"input_1": "DT_FLOAT"}, {"output_1": "DT_FLOAT", "output_2": "DT_INT32"}),
            "add": _signature({"a": "DT_FLOAT", "b": "DT_INT32"}, {"sum": "DT_FLOAT"}),
            "refuse": _signature({"text": "DT_STRING"}, {"text": "DT_STRING"}),
            "__saved_model_init_op": Signature(
                {}, {"__saved_model_init_op": TensorInfo("NoOp", "DT_INVALID", None)}, ""
            ),
        }
        for dtype in [*NUMBERS, "DT_BOOL", "DT_STRING"]:
            self.signatures[f"same_{dtype}"] = _signature({"x": dtype}, {"x": dtype})

    def run(self, signature_name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if signature_name == "wait":
            self.entered.release()
            self.gate.wait(30)
            end = time.thread_time() + 0.005  # too much work to be done on the event loop's own thread
            while time.thread_time() < end:
                pass
        if signature_name in ("serving_default", "wait"):
            query = inputs["input_1"]
            doubled = 2 * np.asarray(query.values, np.float32)
            ranks = np.arange(len(doubled), dtype=np.int32)
            return {
                "output_1": Tensor("DT_FLOAT", query.shape, doubled),
                "output_2": Tensor("DT_INT32", query.shape, ranks),
            }
        if signature_name == "add":
            total = inputs["a"].values[0] + inputs["b"].values[0]
            return {"sum": Tensor("DT_FLOAT", (), [float(total)])}
        if signature_name == "refuse":
            raise RequestError("INVALID_ARGUMENT", inputs["text"].values[0].decode())
        return {"x": inputs["x"]}

    def close(self) -> None: ...


def _signature(inputs: dict[str, str], outputs: dict[str, str]) -> Signature:
    given = {name: TensorInfo(f"{name}:0", dtype, (-1,)) for name, dtype in inputs.items()}
    made = {name: TensorInfo(f"call:{i}", dtype, None) for i, (name, dtype) in enumerate(outputs.items())}
    return Signature(given, made, PREDICT)


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="module")
def models(echo, tmp_path_factory) -> Iterator[Models]:
    """Versions 7 and 9 of `index`, all served, 7 labelled `stable`."""
    base = tmp_path_factory.mktemp("models") / "index"
    for version in (7, 9):
        (base / str(version)).mkdir(parents=True)
    config = ModelConfig("index", base, All(), {"stable": 7, "gone": 8})
    made = Models([config], lambda _: echo)
    made.poll()
    yield made
    made.close()


@pytest.fixture(scope="module")
def monitoring() -> Monitoring:
    return Monitoring()


@pytest.fixture(scope="module")
def searches(monitoring) -> Iterator[Searches]:
    made = Searches(monitoring, n_threads=4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def serve(models, searches, monitoring) -> Iterator[Callable[..., RpcServer]]:
    """Starts servers of these models, which the module stops at its end."""
    servers = []

    def start(**limits: int) -> RpcServer:
        servers.append(make_rpc_server(models, searches, monitoring, "127.0.0.1", 0, **limits))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop(0)


def stubs(port: int) -> SimpleNamespace:
    """A client as the package's users write it."""
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    prediction = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    return SimpleNamespace(
        channel=channel, model=model_service_pb2_grpc.ModelServiceStub(channel), **vars(prediction)
    )


@pytest.fixture(scope="module")
def client(serve) -> Iterator[SimpleNamespace]:
    made = stubs(serve().port)
    yield made
    made.channel.close()


def proto(dtype: str = "DT_FLOAT", shape: tuple[int, ...] = (), **values: Any) -> tensor_pb2.TensorProto:
    """A TensorProto; `values` go to its fields."""
    made = tensor_pb2.TensorProto(dtype=types_pb2.DataType.Value(dtype), **values)
    for size in shape:
        made.tensor_shape.dim.add(size=size)
    return made


def vector(*numbers: float) -> tensor_pb2.TensorProto:
    return proto("DT_FLOAT", (len(numbers),), float_val=numbers)


def predict(
    signature_name: str = "", output_filter: tuple[str, ...] = (), name: str = "index", **inputs: Any
):
    """A PredictRequest."""
    request = predict_pb2.PredictRequest(output_filter=output_filter)
    request.model_spec.name, request.model_spec.signature_name = "index", signature_name
    for input_name, tensor in inputs.items():
        request.inputs[input_name].CopyFrom(tensor)
    return request


def refused(method: Callable[..., Any], request: Any) -> tuple[grpc.StatusCode, str]:
    """Code and text of an error."""
    with pytest.raises(grpc.RpcError) as error:
        method(request, timeout=30)
    return error.value.code(), error.value.details()


# Predict


def test_predict_answers_in_typed_fields_and_says_what_answered(client):
    answer = client.Predict(predict(input_1=vector(1, 0.5)), timeout=30)
    assert (answer.model_spec.name, answer.model_spec.signature_name) == ("index", "serving_default")
    assert answer.model_spec.version.value == 9
    scores, ranks = answer.outputs["output_1"], answer.outputs["output_2"]
    assert (scores.dtype, [dim.size for dim in scores.tensor_shape.dim]) == (types_pb2.DT_FLOAT, [2])
    assert (list(scores.float_val), scores.tensor_content) == ([2, 1], b"")  # AsProtoField, the default
    assert (ranks.dtype, list(ranks.int_val)) == (types_pb2.DT_INT32, [0, 1])


def test_a_scalar_is_answered_without_dimensions(client):
    answer = client.Predict(predict("add", a=proto(float_val=[1.5]), b=proto("DT_INT32", int_val=[2])))
    assert list(answer.outputs["sum"].float_val) == [3.5]
    assert not answer.outputs["sum"].tensor_shape.dim
    assert answer.model_spec.signature_name == "add"


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_come_as_bytes_or_in_their_field_and_go_in_their_field(client, dtype):
    field, content = NUMBERS[dtype]
    for given in (proto(dtype, (2,), tensor_content=content), proto(dtype, (2,), **{field: [1, 2]})):
        answer = client.Predict(predict(f"same_{dtype}", x=given)).outputs["x"]
        assert answer.dtype == types_pb2.DataType.Value(dtype)
        assert list(getattr(answer, field)) == [1, 2]


def test_booleans_come_and_go(client):
    for given in ({"tensor_content": b"\0\1"}, {"bool_val": [False, True]}):
        answer = client.Predict(predict("same_DT_BOOL", x=proto("DT_BOOL", (2,), **given)))
        assert list(answer.outputs["x"].bool_val) == [False, True]


def test_texts_come_and_go_with_any_bytes(client):
    texts = [b"", b"a\0", "한국어".encode(), b"\xff"]
    for given in ({"tensor_content": b"\0\2\x09\1" + b"".join(texts)}, {"string_val": texts}):
        answer = client.Predict(predict("same_DT_STRING", x=proto("DT_STRING", (2, 2), **given)))
        assert list(answer.outputs["x"].string_val) == texts
        assert [dim.size for dim in answer.outputs["x"].tensor_shape.dim] == [2, 2]


def test_one_value_stands_for_all(client):
    answer = client.Predict(predict(input_1=proto("DT_FLOAT", (3,), float_val=[0.5])))
    assert list(answer.outputs["output_1"].float_val) == [1, 1, 1]


def test_an_output_filter_leaves_the_others_out(client):
    answer = client.Predict(predict(output_filter=("output_2",), input_1=vector(1)))
    assert list(answer.outputs) == ["output_2"]


@pytest.mark.parametrize(("choice", "version"), [({"version": 7}, 7), ({"label": "stable"}, 7), ({}, 9)])
def test_a_version_is_chosen_by_number_by_label_or_as_the_newest(client, choice, version):
    request = predict(input_1=vector(1))
    if "version" in choice:
        request.model_spec.version.value = choice["version"]
    if "label" in choice:
        request.model_spec.version_label = choice["label"]
    assert client.Predict(request).model_spec.version.value == version


@pytest.mark.parametrize(
    ("spec", "code", "text"),
    [
        ({"name": ""}, "INVALID_ARGUMENT", "ModelSpec has no name specified."),
        ({"name": "nope"}, "NOT_FOUND", "Servable not found for request: Latest(nope)"),
        ({"version": 8}, "NOT_FOUND", "Servable not found for request: Specific(index, 8)"),
        ({"version": -1}, "NOT_FOUND", "Servable not found for request: Specific(index, -1)"),
        ({"version_label": "x"}, "INVALID_ARGUMENT", "Unrecognized servable version label: x"),
        ({"version_label": ""}, "INVALID_ARGUMENT", "Unrecognized servable version label: "),
        ({"version_label": "gone"}, "NOT_FOUND", "Servable not found for request: Specific(index, 8)"),
        ({"signature_name": "x"}, "FAILED_PRECONDITION", 'Serving signature key "x" not found.'),
    ],
)
def test_a_model_spec_that_means_nothing_here_is_refused_as_there(client, spec, code, text):
    request = predict(input_1=vector(1))
    for name, value in spec.items():
        if name == "version":
            request.model_spec.version.value = value
        else:
            setattr(request.model_spec, name, value)
    assert refused(client.Predict, request) == (grpc.StatusCode[code], text)


def test_a_request_without_a_model_spec_is_refused(client):
    for method, request in (
        (client.Predict, predict_pb2.PredictRequest()),
        (client.Classify, classification_pb2.ClassificationRequest()),
        (client.Regress, regression_pb2.RegressionRequest()),
        (client.GetModelMetadata, get_model_metadata_pb2.GetModelMetadataRequest()),
        (client.model.GetModelStatus, get_model_status_pb2.GetModelStatusRequest()),
    ):
        assert refused(method, request) == (INVALID, "Missing ModelSpec")


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            predict(),
            "input size does not match signature: 0!=1 len({}) != len({input_1}). Sent extra: {}. "
            "Missing but required: {input_1}.",
        ),
        (
            predict("add", b=vector(1), c=vector(1), d=vector(1)),
            "input size does not match signature: 3!=2 len({b,c,d}) != len({a,b}). Sent extra: {c,d}. "
            "Missing but required: {a}.",
        ),
        (
            predict(input_2=vector(1)),
            "input tensor alias not found in signature: input_2. Inputs expected to be in the set {input_1}.",
        ),
        (
            predict(input_1=proto("DT_FLOAT", (2,), tensor_content=b"1234567")),
            "tensor parsing error: input_1",
        ),
        (predict(input_1=tensor_pb2.TensorProto()), "tensor parsing error: input_1"),
        (
            predict(output_filter=("output_1", "x"), input_1=vector(1)),
            "output tensor alias not found in signature: x Outputs expected to be in the set "
            "{output_1,output_2}.",
        ),
        (
            predict(output_filter=("output_1", "output_1"), input_1=vector(1)),
            "duplicate output tensor alias: output_1",
        ),
        (
            predict(input_1=proto("DT_DOUBLE", (1,), double_val=[1])),
            "Expects arg[0] to be float but double is provided",
        ),
        (
            predict("add", a=vector(1), b=proto("DT_INT64", (1,), int64_val=[1])),
            "Expects arg[1] to be int32 but int64 is provided",
        ),
        (
            predict(input_1=proto("DT_HALF", (1,), half_val=[0])),
            "Expects arg[0] to be float but half is provided",
        ),
        (
            predict("__saved_model_init_op"),
            "Tried to fetch data for 'NoOp', which produces no output.  To run to a node but not fetch any "
            "data, pass 'NoOp' as an argument to the 'target_node_names' argument of the Session::Run API.",
        ),
        (
            predict(input_1=proto("DT_FLOAT", (10**9,), float_val=[1])),  # 4 GB out of 30 bytes
            "tensor parsing error: input_1: 1000000000 elements are more than 67108864 bytes",
        ),
    ],
)
def test_inputs_and_outputs_that_are_not_the_signature_s_are_refused_as_there(client, request_, text):
    assert refused(client.Predict, request_) == (INVALID, text)


@pytest.mark.parametrize(("length", "mark"), [(1024, ""), (1025, "...TRUNCATED")])
def test_a_long_error_is_cut(client, length, mark):
    text = proto("DT_STRING", string_val=[b"x" * length])
    assert refused(client.Predict, predict("refuse", text=text)) == (INVALID, "x" * 1024 + mark)


def test_a_fault_of_ours_is_one_line_and_the_server_lives(client, monkeypatch, echo):
    monkeypatch.setattr(echo, "run", lambda *_: {}["missing"])
    code, text = refused(client.Predict, predict("add", a=proto(float_val=[1]), b=proto("DT_INT32")))
    assert (code, text) == (grpc.StatusCode.INTERNAL, "Internal error: KeyError")
    monkeypatch.undo()
    assert client.Predict(predict(input_1=vector(1)))


# TensorProto, as TensorFlow's Tensor::FromProto reads it


@pytest.mark.parametrize(
    ("given", "shape", "values"),
    [
        (proto("DT_INT32", (3,), int_val=[5, 6]), (3,), [5, 6, 6]),  # the last one fills up
        (proto("DT_INT32", (2,), int_val=[5, 6, 7]), (2,), [5, 6]),  # what is too much is cut
        (proto("DT_FLOAT", (2,)), (2,), [0, 0]),
        (proto("DT_STRING", (2,)), (2,), [b"", b""]),
        (proto("DT_STRING", (3,), string_val=[b"a", b"b\0"]), (3,), [b"a", b"b\0", b"b\0"]),
        (proto("DT_FLOAT", (0, 5)), (0, 5), []),
        (proto("DT_INT8", (1,), int_val=[300]), (1,), [44]),  # 300 - 256
        (proto("DT_UINT8", (1,), int_val=[-1]), (1,), [255]),
        (proto("DT_FLOAT", float_val=[0.25]), (), [0.25]),
        (proto("DT_STRING", (1,), tensor_content=b"\x80\1" + b"x" * 128), (1,), [b"x" * 128]),  # a varint
    ],
)
def test_values_are_filled_up_and_cut(given, shape, values):
    tensor = read_tensor(given)
    assert (tensor.shape, list(tensor.values)) == (shape, values)


@pytest.mark.parametrize(
    "given",
    [
        proto("DT_INVALID", (1,), float_val=[1]),
        proto("DT_FLOAT_REF", (1,), float_val=[1]),
        tensor_pb2.TensorProto(dtype=77),
        proto("DT_FLOAT", (-1,), float_val=[1]),
        proto("DT_FLOAT", (2**40, 2**40), float_val=[1]),
        proto("DT_FLOAT", (2**40, 2**40, 0)),  # the product passes int64 before the 0
        proto("DT_FLOAT", (1,) * 255, float_val=[1]),  # 254 dimensions are TensorFlow's most
        proto("DT_FLOAT", (1,), tensor_content=b"12345"),
        proto("DT_STRING", (1,), tensor_content=b"\2a"),
        proto("DT_STRING", (1,), tensor_content=b"\1ab"),
        proto("DT_STRING", (2,), tensor_content=b"\1"),
        proto("DT_STRING", (1,), tensor_content=b"\xff" * 6),
    ],
)
def test_what_is_no_tensor_is_refused(given):
    with pytest.raises(TensorError):
        read_tensor(given)


def test_more_values_than_one_piece_keep_their_order_and_are_filled_up():
    n = 2 * predict_proto.PIECE + 3
    numbers = np.arange(n, dtype=np.int32)
    written = tensor_pb2.TensorProto()
    write_tensor(Tensor("DT_INT32", (n,), numbers), written)
    assert list(written.int_val) == list(range(n))
    written.tensor_shape.dim[0].size = n + 2
    assert list(read_tensor(written).values) == [*range(n), n - 1, n - 1]


def test_a_tensor_is_written_and_read_back():
    written = tensor_pb2.TensorProto()
    write_tensor(Tensor("DT_FLOAT", (2, 1), np.array([0.1, np.inf], np.float32)), written)
    read = read_tensor(written)
    assert read.shape == (2, 1)
    assert np.asarray(read.values).tobytes() == np.array([0.1, np.inf], np.float32).tobytes()


# GetModelMetadata


def metadata(name: str = "index", *fields: str) -> get_model_metadata_pb2.GetModelMetadataRequest:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    request.model_spec.name = name
    return request


def test_metadata_are_the_signatures(client):
    answer = client.GetModelMetadata(metadata("index", "signature_def"))
    assert (answer.model_spec.name, answer.model_spec.version.value) == ("index", 9)
    assert answer.model_spec.signature_name == ""
    shown = get_model_metadata_pb2.SignatureDefMap()
    assert answer.metadata["signature_def"].Unpack(shown)
    default = shown.signature_def["serving_default"]
    assert default.method_name == PREDICT
    given, made = default.inputs["input_1"], default.outputs["output_2"]
    assert (given.name, given.dtype) == ("input_1:0", types_pb2.DT_FLOAT)
    assert [dim.size for dim in given.tensor_shape.dim] == [-1]
    assert (made.dtype, made.tensor_shape.unknown_rank) == (types_pb2.DT_INT32, True)
    assert shown.signature_def["__saved_model_init_op"].outputs["__saved_model_init_op"].name == "NoOp"


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (
            metadata("nope"),  # the fields are looked at first
            "INVALID_ARGUMENT",
            "GetModelMetadataRequest must specify at least one metadata_field",
        ),
        (metadata("index", "x"), "INVALID_ARGUMENT", "Metadata field x is not supported"),
        (metadata("index", "signature_def", "x"), "INVALID_ARGUMENT", "Metadata field x is not supported"),
        (metadata("nope", "signature_def"), "NOT_FOUND", "Servable not found for request: Latest(nope)"),
        (metadata("", "signature_def"), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
    ],
)
def test_metadata_that_are_not_there_are_refused_as_there(client, request_, code, text):
    assert refused(client.GetModelMetadata, request_) == (grpc.StatusCode[code], text)


# GetModelStatus


def status(name: str = "index", version: int | None = None, label: str | None = None):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    if label is not None:
        request.model_spec.version_label = label
    return request


@pytest.mark.parametrize(
    ("request_", "versions"),
    [(status(), [9, 7]), (status(version=7), [7]), (status(label="anything"), [9, 7])],  # labels are ignored
)
def test_status_rows_come_newest_first(client, request_, versions):
    rows = client.model.GetModelStatus(request_).model_version_status
    assert [row.version for row in rows] == versions
    assert {row.state for row in rows} == {get_model_status_pb2.ModelVersionStatus.AVAILABLE}
    assert {(row.status.error_code, row.status.error_message) for row in rows} == {(0, "")}


def test_a_version_that_failed_shows_its_error(searches, monitoring, tmp_path):
    from serving.handles import LoadError

    def fail(_: Path) -> Echo:
        raise LoadError("NOT_FOUND", "Could not find SavedModel")

    (tmp_path / "3").mkdir()
    models = Models([ModelConfig("broken", tmp_path)], fail, max_num_load_retries=0)
    models.poll()
    server = make_rpc_server(models, searches, monitoring, "127.0.0.1", 0)
    server.start()
    try:
        [row] = stubs(server.port).model.GetModelStatus(status("broken")).model_version_status
    finally:
        server.stop(0)
    assert row.state == get_model_status_pb2.ModelVersionStatus.END
    assert row.status.error_code == 5  # NOT_FOUND in error_codes.proto
    assert row.status.error_message == "Could not find SavedModel"


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (status("nope"), "Could not find any versions of model nope"),
        (status(""), "Could not find any versions of model "),
        (status(version=8), "Could not find version 8 of model index"),
    ],
)
def test_status_of_what_was_never_there_is_refused_as_there(client, request_, text):
    assert refused(client.model.GetModelStatus, request_) == (grpc.StatusCode.NOT_FOUND, text)


# What no signature here serves


def test_examples_are_refused_as_there(client):
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name = "index"
    code, text = refused(client.Classify, request)
    assert code == INVALID
    assert text.startswith("No classification inputs found in SignatureDef: ")
    request.model_spec.signature_name = "x"
    assert refused(client.Classify, request) == (INVALID, "No signature was found with the name: x")
    regression = regression_pb2.RegressionRequest()
    regression.model_spec.name = "index"
    assert refused(client.Regress, regression) == (INVALID, "Expected one output Tensor.")
    regression.model_spec.name = "nope"
    assert refused(client.Regress, regression)[0] == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("task", "code", "text"),
    [
        (None, "INVALID_ARGUMENT", "ModelSpec has no name specified."),
        (("", "", "tensorflow/serving/regress"), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
        (("nope", "", ""), "NOT_FOUND", "Servable not found for request: Latest(nope)"),
        (("index", "x", ""), "INVALID_ARGUMENT", "Requested signature not found in model graph: x"),
        (("index", "", PREDICT), "UNIMPLEMENTED", f"Unsupported signature method_name: {PREDICT}"),
        (("index", "", "tensorflow/serving/regress"), "INVALID_ARGUMENT", "Expected one output Tensor."),
    ],
)
def test_several_inferences_are_refused_as_there(client, task, code, text):
    request = inference_pb2.MultiInferenceRequest()
    if task:
        spec = {"name": task[0], "signature_name": task[1]}
        request.tasks.add(model_spec=spec, method_name=task[2])
    assert refused(client.MultiInference, request) == (grpc.StatusCode[code], text)


def test_a_reload_is_refused_in_one_line(client):
    request = model_management_pb2.ReloadConfigRequest()
    code, text = refused(client.model.HandleReloadConfigRequest, request)
    assert (code, text.partition(".")[0]) == (
        INVALID,
        "ServerModelConfig type not supported by HandleReloadConfigRequest",
    )
    request.config.model_config_list.config.add(name="index")
    code, text = refused(client.model.HandleReloadConfigRequest, request)
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert "change --model_config_file and start it again" in text


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/tensorflow.serving.PredictionService/predict",
    ],
)
def test_there_is_no_other_method(client, path):
    assert refused(client.channel.unary_unary(path), b"") == (grpc.StatusCode.UNIMPLEMENTED, "")


def test_bytes_that_are_no_request_are_refused(client, caplog):
    method = client.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    assert refused(method, b"\xff\xff") == (grpc.StatusCode.INTERNAL, "")
    assert not caplog.records


# Metrics


def test_calls_are_counted_as_there(client, monitoring):
    def counted(line: str) -> int:
        found = [row for row in monitoring.exposition().decode().splitlines() if row.startswith(line)]
        return int(found[0].rpartition(" ")[2]) if found else 0

    ok = ':tensorflow:serving:request_count{model_name="index",status="OK"}'
    wrong = ':tensorflow:serving:request_count{model_name="index",status="FAILED_PRECONDITION"}'
    seconds = ':tensorflow:serving:request_latency_count{model_name="index",API="Predict",entrypoint="GRPC"}'
    before = counted(ok), counted(wrong), counted(seconds)
    client.Predict(predict(input_1=vector(1)))
    refused(client.Predict, predict("nope", input_1=vector(1)))
    client.GetModelMetadata(metadata("index", "signature_def"))  # not counted there either
    assert (counted(ok), counted(wrong), counted(seconds)) == (before[0] + 1, before[1] + 1, before[2] + 1)


# The server


def test_concurrent_calls_each_get_their_own_answer(client):
    def ask(i: int) -> float:
        return client.Predict(predict(input_1=vector(i)), timeout=30).outputs["output_1"].float_val[0]

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(ask, range(300))) == [2 * i for i in range(300)]


def test_a_port_that_is_taken_is_one_clear_error(models, searches, monitoring):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = (
            rf"^--port {port}: cannot listen on 127\.0\.0\.1:{port}: Address already in use; choose another$"
        )
        with pytest.raises(ServingError, match=wanted):
            make_rpc_server(models, searches, monitoring, "127.0.0.1", port)


def test_two_servers_never_share_a_port(client, models, searches, monitoring, serve):
    with pytest.raises(ServingError, match="Address already in use"):
        make_rpc_server(models, searches, monitoring, "127.0.0.1", serve().port)


def test_connections_are_refused_until_the_server_starts(models, searches, monitoring):
    server = make_rpc_server(models, searches, monitoring, "127.0.0.1", 0)
    with socket.socket() as early, pytest.raises(ConnectionRefusedError):
        early.connect(("127.0.0.1", server.port))
    server.start()
    socket.create_connection(("127.0.0.1", server.port)).close()
    server.stop(0)


def test_a_server_that_never_started_gives_its_port_back(models, searches, monitoring):
    server = make_rpc_server(models, searches, monitoring, "127.0.0.1", 0)
    server.stop(1)
    socket.create_server(("127.0.0.1", server.port)).close()


@pytest.fixture
def held(echo) -> Iterator[Echo]:
    """Requests of `wait` wait until the gate is set."""
    while echo.entered.acquire(blocking=False):
        pass
    echo.gate.clear()
    yield echo
    echo.gate.set()


def waiting(client: SimpleNamespace, number: float) -> grpc.Future:
    """A call of `wait` that has begun to be searched, or will be."""
    return client.Predict.future(predict("wait", input_1=vector(number)), timeout=30)


def test_more_calls_than_threads_are_refused_as_there(serve, held):
    client = stubs(serve(max_threads=1).port)
    first = waiting(client, 1)
    assert held.entered.acquire(timeout=10)
    code, text = refused(client.Predict, predict(input_1=vector(2)))
    assert (code, text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")
    held.gate.set()
    assert list(first.result().outputs["output_1"].float_val) == [2]


def test_a_client_s_deadline_ends_its_call_and_the_server_lives(client, held):
    with pytest.raises(grpc.RpcError) as late:
        client.Predict(predict("wait", input_1=vector(1)), timeout=0.2)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    held.gate.set()
    assert client.Predict(predict(input_1=vector(1)), timeout=30)


def test_a_message_that_is_too_large_is_refused_and_the_server_lives(serve):
    client = stubs(serve(max_message_bytes=1000).port)
    code, text = refused(client.Predict, predict(input_1=vector(*range(1000))))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text
    assert client.Predict(predict(input_1=vector(1)))


def test_requests_beyond_the_bytes_held_at_once_are_refused_until_one_is_answered(serve, held):
    client = stubs(serve(max_held_bytes=2500).port)
    # 1,000 bytes and a few as it came, and the 1,000 of its tensor
    first = client.Predict.future(predict("wait", input_1=vector(*range(250))), timeout=30)
    assert held.entered.acquire(timeout=10)
    code, text = refused(client.Predict, predict(input_1=vector(*range(250))))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert text.endswith("of 2500 in all: ask again later")
    held.gate.set()
    first.result()
    assert client.Predict(predict(input_1=vector(*range(250))), timeout=30)


def test_a_small_request_for_a_large_tensor_counts_as_the_tensor(serve):
    client = stubs(serve(max_held_bytes=1000).port)
    assert client.Predict(predict(input_1=proto(shape=(200,), float_val=[1])), timeout=30)  # 800 bytes
    code, text = refused(client.Predict, predict(input_1=proto(shape=(300,), float_val=[1])))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "this one wants 1200, of 1000 in all" in text


def test_a_text_that_stands_for_many_counts_once_for_each():
    """Each of 10 takes 24 bytes and its own 100; the first alone has none."""
    many = proto("DT_STRING", (11,), string_val=[b"", b"x" * 100])
    assert len(read_tensor(many, 11 * 24 + 1000).values) == 11
    with pytest.raises(TensorError, match="11 elements are more than 1263 bytes"):
        read_tensor(many, 11 * 24 + 999)


def test_a_large_request_is_read_and_answered_beside_the_event_loop(client, monkeypatch):
    """20,000 numbers of four bytes are more than 2**16 bytes, and more than 10,000 values of an answer."""
    threads = []

    def noting(work):
        def noted(*arguments):
            threads.append(threading.current_thread().name)
            return work(*arguments)

        return noted

    for name in ("read_request", "write_tensor"):
        monkeypatch.setattr(predict_proto, name, noting(getattr(predict_proto, name)))
    client.Predict(predict(input_1=vector(1)), timeout=30)
    assert threads == ["grpc"] * 3  # one request, two outputs
    answer = client.Predict(predict(input_1=vector(*range(20_000))), timeout=30)
    assert all(name.startswith("grpc-large") for name in threads[3:])
    assert list(answer.outputs["output_1"].float_val) == list(range(0, 40_000, 2))


def test_a_request_that_a_thread_still_reads_counts_after_its_client_has_left(serve, monkeypatch):
    client = stubs(serve(max_held_bytes=200_000).port)
    large = predict(input_1=vector(*range(35_000)))  # 140,000 bytes; its tensor, as many, is not made yet
    small = predict(input_1=vector(*range(16_000)))  # 64,000 bytes, and as many of its tensor
    read, is_reading, gate = predict_proto.read_request, threading.Event(), threading.Event()

    def slow(*arguments):
        is_reading.set()
        gate.wait(30)
        return read(*arguments)

    monkeypatch.setattr(predict_proto, "read_request", slow)
    with pytest.raises(grpc.RpcError) as late:
        client.Predict(large, timeout=1)
    assert (late.value.code(), is_reading.is_set()) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
    assert refused(client.Predict, small)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    gate.set()
    end = time.monotonic() + 10
    while client.Predict.future(small, timeout=30).code() != OK:
        assert time.monotonic() < end, "its bytes were never given back"


def test_a_connection_has_so_many_calls_and_is_closed_after_idle_seconds(serve, monkeypatch):
    """HTTP/2's first frame of a server are its settings: 6 bytes each, number 3 is the calls at once."""
    monkeypatch.setattr(rpc, "IDLE_SECONDS", 1.0)
    with half_open(serve().port) as connection:
        length = int.from_bytes(receive(connection, 9)[:3], "big")
        settings = dict(struct.iter_unpack(">HI", receive(connection, length)))
        assert settings[3] == 256
        connection.settimeout(15)
        while connection.recv(1000):
            pass  # it says that it goes away, then ends


def receive(connection: socket.socket, n: int) -> bytes:
    got = b""
    while len(got) < n:
        got += connection.recv(n - len(got))
    return got


def half_open(port: int) -> socket.socket:
    """A connection that has greeted and asks nothing."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    return connection


def test_stopping_answers_what_was_asked_before_and_nothing_after(serve, held):
    server = serve()
    client = stubs(server.port)
    asked = waiting(client, 4)
    assert held.entered.acquire(timeout=10)
    stopping = threading.Thread(target=server.stop, args=(20,))
    stopping.start()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", server.port)).close()
        except ConnectionRefusedError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the port is still open")
    held.gate.set()
    assert list(asked.result().outputs["output_1"].float_val) == [8]
    stopping.join(10)
    assert not stopping.is_alive()
    server.stop(1)  # a second time does nothing


def test_half_sent_requests_keep_nobody_waiting(serve):
    """HTTP/2 by hand: a call's headers, and of its message only the first bytes."""
    server = serve(max_threads=2)
    connections = [half_sent(server.port) for _ in range(20)]
    try:
        assert stubs(server.port).Predict(predict(input_1=vector(1)), timeout=10)
    finally:
        for connection in connections:
            connection.close()


def half_sent(port: int) -> socket.socket:
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/tensorflow.serving.PredictionService/Predict",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    # HPACK, RFC 7541 6.2.2: literal fields without indexing, names and values as they are
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    end_headers = 4
    connection = half_open(port)
    connection.sendall(
        frame(1, end_headers, 1, block) + frame(0, 0, 1, b"\0" + struct.pack(">I", 100) + b"only ten b")
    )
    return connection


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


# `python -m serving` on a real index, asked by a program of its own

CLIENT = """
import json, sys
import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, predict_pb2
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

address, queries = sys.argv[1], np.load(sys.argv[2])
channel = grpc.insecure_channel(address)
grpc.channel_ready_future(channel).result(timeout=200)
stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

status = get_model_status_pb2.GetModelStatusRequest()
status.model_spec.name = "index"
rows = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(status, 10).model_version_status

metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
metadata.model_spec.name = "index"
signatures = get_model_metadata_pb2.SignatureDefMap()
stub.GetModelMetadata(metadata, 10).metadata["signature_def"].Unpack(signatures)

one = predict_pb2.PredictRequest()
one.model_spec.name = "index"
one.inputs["input_1"].CopyFrom(tf.make_tensor_proto(queries[0]))
found = stub.Predict(one, 30)

several = predict_pb2.PredictRequest()
several.model_spec.name = "index"
several.model_spec.signature_name = "exact"
several.inputs["queries"].CopyFrom(tf.make_tensor_proto(queries))
several.inputs["k"].CopyFrom(tf.make_tensor_proto(2, dtype=tf.int32))
exact = stub.Predict(several, 30)

one.inputs["input_1"].CopyFrom(tf.make_tensor_proto(queries[0][:3]))
try:
    stub.Predict(one, 30)
except grpc.RpcError as error:
    refused = error.code().name, error.details()

print(json.dumps({
    "states": [[row.version, row.state] for row in rows],
    "method": signatures.signature_def["serving_default"].method_name,
    "version": found.model_spec.version.value,
    "rows": tf.make_ndarray(found.outputs["output_2"]).tolist(),
    "scores": tf.make_ndarray(found.outputs["output_1"]).tolist(),
    "ids": [[i.decode() for i in row] for row in tf.make_ndarray(exact.outputs["document_ids"]).tolist()],
    "refused": refused,
}))
"""
DIM, N = 8, 60
ROWS, QUERIES = unit_rows(N, DIM), unit_rows(4, DIM, seed=9)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[tuple[int, subprocess.Popen]]:
    """The gRPC port of a server of one real version, 7."""
    folder = tmp_path_factory.mktemp("real")
    export_tuned(folder, k=3, exact=(ROWS, [f"d{row}" for row in range(N)]))
    shutil.move(folder / "exact", folder / "index" / "7")
    port = free_port()
    with server_process(folder / "index", "--model_name=index", f"--port={port}") as (_, process):
        yield port, process


@pytest.mark.slow
def test_a_client_of_the_official_package_works_unchanged(real, tmp_path):
    np.save(tmp_path / "queries.npy", QUERIES)
    command = [sys.executable, "-c", CLIENT, f"localhost:{real[0]}", str(tmp_path / "queries.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    best = np.argsort(-(QUERIES @ ROWS.T), axis=1, kind="stable")
    assert told["states"] == [[7, get_model_status_pb2.ModelVersionStatus.AVAILABLE]]
    assert (told["method"], told["version"]) == (PREDICT, 7)
    assert told["rows"] == best[0, :3].tolist()
    assert told["scores"] == pytest.approx((ROWS @ QUERIES[0])[best[0, :3]].tolist(), abs=1e-6)
    assert told["ids"] == [[f"d{row}" for row in rows] for rows in best[:, :2].tolist()]
    assert told["refused"][0] == "INVALID_ARGUMENT"


@pytest.mark.slow
def test_sigterm_answers_what_was_asked_and_ends_the_process(real):
    port, process = real
    client = stubs(port)
    grpc.channel_ready_future(client.channel).result(timeout=200)
    codes: list[grpc.StatusCode] = []

    def ask() -> None:
        while not codes or codes[-1] == OK:
            call = client.Predict.future(predict(input_1=vector(*QUERIES[0].tolist())), timeout=30)
            codes.append(call.code())

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    end = time.monotonic() + 60
    while len(codes) < 20 and time.monotonic() < end:
        time.sleep(0.01)
    assert codes[:20] == [OK] * 20
    process.send_signal(signal.SIGTERM)
    for asker in askers:
        asker.join(60)
    assert process.wait(60) == 0
    assert set(codes) <= {OK, grpc.StatusCode.UNAVAILABLE}  # refused once it is going, never half answered
