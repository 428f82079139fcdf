"""Warm-up requests: written for an index, answered inside the load, refused as tensorflow/serving does."""

import re
from pathlib import Path

import numpy as np
import pytest
from scann_parts import DIM, built, tf, unit_rows
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from pipeline import warmup as writer
from pipeline.scann_layer import Limits
from pipeline.tuning import Search
from serving import warmup
from serving.handles import LoadError
from serving.protocol import RequestError, Signature, Tensor, TensorInfo
from serving.searcher import Searcher
from serving.versions import Models
from serving.wanted import ModelConfig

pytestmark = pytest.mark.slow

SEARCH = Search(num_leaves_to_search=3, num_reordering_candidates=20)
ROWS = unit_rows(200)


class Recorded:
    """Stands in for a SavedModel of one signature: keeps what it is asked, refuses another width."""

    def __init__(self, width: int = 2) -> None:
        inputs = {"input_1": TensorInfo("serving_default_input_1:0", "DT_FLOAT", (-1,))}
        outputs = {name: TensorInfo(f"Call:{i}", "DT_FLOAT", None) for i, name in enumerate(("best", "rows"))}
        signature = Signature(inputs, outputs, "tensorflow/serving/predict", "a proto")
        self.signatures = {"serving_default": signature}
        self.width = width
        self.asked: list[list[float]] = []
        self.is_closed = False

    def run(self, signature_name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        vector = inputs["input_1"]
        if vector.shape != (self.width,):
            raise RequestError("INVALID_ARGUMENT", "Query doesn't match dataset dimsensionality")
        self.asked.append(list(vector.values))
        return {}

    def close(self) -> None:
        self.is_closed = True


def predict(*vector: float, signature_name: str = "", **inputs) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = "another model"  # which is not looked at
    request.model_spec.signature_name = signature_name
    named = {"input_1": np.array(vector, np.float32)} if vector else {}
    for name, value in (named | inputs).items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return log


def write(folder: Path, *records) -> Path:
    """A version folder with these records, protos or bytes."""
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as out:
        for record in records:
            out.write(record if isinstance(record, bytes) else record.SerializeToString())
    return path


def refusal(folder: Path, servable=None) -> LoadError:
    with pytest.raises(LoadError) as error:
        warmup.warm_up(servable or Recorded(), folder)
    return error.value


# Answering


def test_every_request_is_answered_in_order(tmp_path):
    write(tmp_path, predict(1, 2), predict(3, 4, signature_name="serving_default"))
    servable = Recorded()
    warmup.warm_up(servable, tmp_path)
    assert servable.asked == [[1, 2], [3, 4]]


@pytest.mark.parametrize(("given", "times"), [(0, 1), (1, 1), (3, 3)])
def test_each_request_is_answered_as_often_as_asked(tmp_path, given, times):
    write(tmp_path, predict(1, 2), predict(3, 4))
    servable = Recorded()
    warmup.warm_up(servable, tmp_path, num_request_iterations=given)
    assert servable.asked == [[1, 2]] * times + [[3, 4]] * times


def test_a_version_without_requests_is_no_error(tmp_path):
    warmup.warm_up(Recorded(), tmp_path)
    write(tmp_path)
    warmup.warm_up(Recorded(), tmp_path)


def test_a_record_that_logs_nothing_is_passed_over(tmp_path):
    write(tmp_path, prediction_log_pb2.PredictionLog(), b"", predict(1, 2))
    servable = Recorded()
    warmup.warm_up(servable, tmp_path)
    assert servable.asked == [[1, 2]]


def test_a_thousand_records_are_taken_and_one_more_is_not(tmp_path):
    path = write(tmp_path, *[predict(1, 2)] * 1000)
    warmup.warm_up(Recorded(), tmp_path)
    write(tmp_path, *[predict(1, 2)] * 1001)
    error = refusal(tmp_path)
    assert error.code == "INVALID_ARGUMENT"
    assert error.message == f"Number of warmup records exceeds the maximum (1000) at {path}"


# Refusals; servables/tensorflow/predict_util.cc, classifier.cc, regressor.cc, multi_inference.cc


def classify(**model_spec) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    log.classify_log.request.model_spec.name = "index"
    for name, value in model_spec.items():
        setattr(log.classify_log.request.model_spec, name, value)
    return log


def regress() -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    log.regress_log.request.model_spec.name = "index"
    return log


def several(method_name: str, **model_spec) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    task = log.multi_inference_log.request.tasks.add(method_name=method_name)
    for name, value in model_spec.items():
        setattr(task.model_spec, name, value)
    return log


def session_run() -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    log.session_run_log.request.target.append("x")
    return log


@pytest.mark.parametrize(
    ("record", "code", "message"),
    [
        (predict(1, 2, 3), "INVALID_ARGUMENT", "Query doesn't match dataset dimsensionality"),
        (
            predict(1, 2, signature_name="nope"),
            "FAILED_PRECONDITION",
            'Serving signature key "nope" not found.',
        ),
        (
            predict(1, 2, k=np.int32(3)),
            "INVALID_ARGUMENT",
            "input size does not match signature: 2!=1 len({input_1,k}) != len({input_1}). "
            "Sent extra: {k}. Missing but required: {}.",
        ),
        (
            predict(vector=np.ones(2, np.float32)),
            "INVALID_ARGUMENT",
            "input tensor alias not found in signature: vector. Inputs expected to be in the set {input_1}.",
        ),
        (classify(), "INVALID_ARGUMENT", "No classification inputs found in SignatureDef: a proto"),
        (
            classify(signature_name="nope"),
            "INVALID_ARGUMENT",
            "No signature was found with the name: nope",
        ),
        (regress(), "INVALID_ARGUMENT", "Expected one output Tensor."),
        (
            several("tensorflow/serving/regress", name="index"),
            "INVALID_ARGUMENT",
            "Expected one output Tensor.",
        ),
        (
            several("tensorflow/serving/predict", name="index"),
            "UNIMPLEMENTED",
            "Unsupported signature method_name: tensorflow/serving/predict",
        ),
        (
            several("tensorflow/serving/classify", name="index", signature_name="nope"),
            "INVALID_ARGUMENT",
            "Requested signature not found in model graph: nope",
        ),
        (
            several("tensorflow/serving/classify"),
            "INVALID_ARGUMENT",
            "Found ModelSpec with an empty model name.",
        ),
        # prediction_log.proto: session_run_log = 5
        (session_run(), "UNIMPLEMENTED", "Unsupported log_type for warmup: 5"),
    ],
)
def test_a_request_that_is_refused_fails_the_load_in_the_real_servers_words(tmp_path, record, code, message):
    write(tmp_path, predict(1, 2), record)
    error = refusal(tmp_path)
    assert (error.code, error.message) == (code, message)


def test_a_record_that_is_no_proto_fails_the_load(tmp_path):
    path = write(tmp_path, b"\xff\xff no proto")
    error = refusal(tmp_path)
    assert error.code == "INVALID_ARGUMENT"
    assert error.message == f"Failed to parse warmup record: \ufffd\ufffd no proto from {path}"


@pytest.mark.parametrize("damage", ["text", "cut", "changed"])
def test_a_file_that_is_no_tfrecord_fails_the_load(tmp_path, damage):
    path = write(tmp_path, predict(1, 2))
    whole = path.read_bytes()
    # a length of 8 bytes, its checksum of 4, the record, its checksum of 4
    content = {"text": b"these are no records", "cut": whole[:-6], "changed": whole[:14] + b"?" + whole[15:]}
    path.write_bytes(content[damage])
    error = refusal(tmp_path)
    assert error.code == "DATA_LOSS"
    assert re.match(r"(corrupted|truncated) record at (0|12)\b", error.message)
    assert error.message.endswith(". Please verify your warmup data is in TFRecord format.")


def test_a_folder_in_the_files_place_fails_the_load(tmp_path):
    (tmp_path / "assets.extra" / "tf_serving_warmup_requests").mkdir(parents=True)
    assert refusal(tmp_path).message


def test_a_version_that_is_refused_its_warm_up_is_closed_and_the_old_one_goes_on(tmp_path):
    opened = []

    def open_recorded(folder: Path) -> Recorded:
        opened.append(Recorded())
        return opened[-1]

    write(tmp_path / "7", predict(1, 2))
    config = ModelConfig("index", tmp_path)
    models = Models([config], open_recorded, warm_up=warmup.warm_up, max_num_load_retries=0)
    models.poll()
    write(tmp_path / "8", predict(1, 2), predict(1, 2, 3))
    models.poll()
    assert [one.is_closed for one in opened] == [False, True]
    newest, old = models.states()["index"]
    assert (newest.version, newest.state, newest.error_code) == (8, "END", "INVALID_ARGUMENT")
    assert newest.error_message == "Query doesn't match dataset dimsensionality"
    assert (old.version, old.state) == (7, "AVAILABLE")


# Writing


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """Real exports with their requests, by name."""
    folder = tmp_path_factory.mktemp("exports")
    limits = Limits(queries=8, k=5, num_reordering_candidates=20)
    made = {
        "tree": built(ROWS, k=5, limits=limits),
        "without ids": built(ROWS, ids=False, k=5, limits=limits),
        "exact": built(ROWS, k=5, num_leaves=None, limits=limits),
    }
    for name, layer in made.items():
        layer.save(folder / name)
        layer.release()
        writer.write_requests(folder / name, ROWS, k=5, search=SEARCH, max_queries=8)
    return {name: folder / name for name in made}


def requests_of(folder: Path) -> list[tuple[str, dict[str, np.ndarray]]]:
    """(signature, inputs) of each record, read by another reader than the server's."""
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    read = []
    for record in tf.data.TFRecordDataset([str(path)]).as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        read.append((request.model_spec.signature_name, inputs))
    return read


def test_an_index_is_asked_through_every_signature_with_what_it_ships(exported):
    read = requests_of(exported["tree"])
    names = [name for name, _ in read]
    signatures = set(Searcher.open(exported["tree"]).signatures) - {"__saved_model_init_op"}
    assert set(names) == signatures
    assert names.count("serving_default") == 8
    assert [inputs["queries"].shape for name, inputs in read if name == "search"] == [(1, DIM), (8, DIM)]
    for name, inputs in read:
        if name == "search":
            del inputs["queries"]
            assert inputs == {"k": 5, "num_leaves_to_search": 3, "num_reordering_candidates": 20}


@pytest.mark.parametrize("name", ["tree", "without ids", "exact"])
def test_the_index_answers_its_own_requests(exported, name):
    searcher = Searcher.open(exported[name])
    warmup.warm_up(searcher, exported[name])
    searcher.close()


def test_the_queries_are_rows_of_the_index_from_first_to_last(exported):
    asked = [inputs["input_1"] for name, inputs in requests_of(exported["tree"]) if name == "serving_default"]
    # 64 rows spread over 200 are 199 / 63 = 3.16 apart
    np.testing.assert_array_equal(asked, ROWS[[0, 3, 6, 9, 13, 16, 19, 22]])


def test_the_same_index_gives_the_same_bytes(exported, tmp_path):
    first = (exported["tree"] / writer.REQUESTS).read_bytes()
    (tmp_path / "saved_model.pb").write_bytes((exported["tree"] / "saved_model.pb").read_bytes())
    writer.write_requests(tmp_path, ROWS, k=5, search=SEARCH, max_queries=8)
    assert (tmp_path / writer.REQUESTS).read_bytes() == first


def test_an_export_of_serving_default_alone_gets_single_queries_alone(tmp_path):
    saved = saved_model_pb2.SavedModel()
    saved.meta_graphs.add().signature_def["serving_default"].method_name = "tensorflow/serving/predict"
    (tmp_path / "saved_model.pb").write_bytes(saved.SerializeToString())
    assert writer.write_requests(tmp_path, ROWS[:1], k=5, search=SEARCH, max_queries=8) == 8
    assert [name for name, _ in requests_of(tmp_path)] == ["serving_default"] * 8
