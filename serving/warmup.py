"""A version's warm-up requests: read from its folder and answered before anybody else may ask it.

Follows tensorflow/serving r2.11, servables/tensorflow/saved_model_warmup_util.cc, texts of refusals included.
Importing this loads no framework: TensorFlow, which opened the version, reads them.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serving import predict_proto
from serving.handles import LoadError, Servable
from serving.protocol import RequestError, Signature
from serving.searcher import error_code

log = logging.getLogger("serving")

REQUESTS = Path("assets.extra", "tf_serving_warmup_requests")
MAX_RECORDS = 1000
SHOWN_BYTES = 1024  # of a record that cannot be read; the real server shows all of it


def warm_up(servable: Servable, folder: Path, *, num_request_iterations: int = 1) -> None:
    """Answer a version's warm-up requests; without any, or without the file, nothing happens.

    Args:
        num_request_iterations: how often each is answered; less than one is one, as there.

    Raises:
        LoadError: the file cannot be read, holds too many requests, or one is refused.
    """
    path = folder / REQUESTS
    if not path.exists():
        return
    started = time.monotonic()
    n_records = 0
    for record in read_records(path):
        request = parse(record, path)
        for _ in range(max(1, num_request_iterations)):
            answer(servable, request)
        n_records += 1
        if n_records > MAX_RECORDS:
            raise LoadError(
                "INVALID_ARGUMENT", f"Number of warmup records exceeds the maximum ({MAX_RECORDS}) at {path}"
            )
    log.info("%s: answered %d warm-up requests (%.1f s)", folder, n_records, time.monotonic() - started)


def read_records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file, one at a time.

    Raises:
        LoadError: it cannot be read, or is no TFRecord file.
    """
    import tensorflow as tf

    try:
        yield from tf.compat.v1.io.tf_record_iterator(str(path))
    except tf.errors.DataLossError as error:
        raise LoadError(
            "DATA_LOSS", f"{error.message}. Please verify your warmup data is in TFRecord format."
        ) from None
    except tf.errors.OpError as error:
        raise LoadError(error_code(error), error.message) from None


def parse(record: bytes, path: Path) -> Any:
    """A record's PredictionLog.

    Raises:
        LoadError: it is none.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_serving.apis import prediction_log_pb2

    try:
        return prediction_log_pb2.PredictionLog.FromString(record)
    except DecodeError:
        shown = record[:SHOWN_BYTES].decode("utf-8", "replace")
        raise LoadError("INVALID_ARGUMENT", f"Failed to parse warmup record: {shown} from {path}") from None


def answer(servable: Servable, request: Any) -> None:
    """Answer one PredictionLog; what it logs of an answer is not looked at, nor which model it names.

    Raises:
        LoadError: it is refused.
    """
    kind = request.WhichOneof("log_type")
    try:
        if kind == "predict_log":
            _predict(servable, request.predict_log.request)
        elif kind == "classify_log":
            spec = request.classify_log.request.model_spec
            predict_proto.refuse_examples("classify", spec, servable.signatures)
        elif kind == "regress_log":
            spec = request.regress_log.request.model_spec
            predict_proto.refuse_examples("regress", spec, servable.signatures)
        elif kind == "multi_inference_log":
            _refuse_tasks(request.multi_inference_log.request.tasks, servable.signatures)
        elif kind == "session_run_log":
            number = request.DESCRIPTOR.fields_by_name[kind].number
            raise LoadError("UNIMPLEMENTED", f"Unsupported log_type for warmup: {number}")
    except RequestError as error:
        raise LoadError(error.code, error.message) from error


def _predict(servable: Servable, request: Any) -> None:
    name, signature = predict_proto.find_signature(request.model_spec, servable.signatures)
    inputs, _ = predict_proto.read_request(request, signature)
    servable.run(name, inputs)


def _refuse_tasks(tasks: Any, signatures: Mapping[str, Signature]) -> None:
    if not tasks:
        raise RequestError("INVALID_ARGUMENT", "Input is empty.")
    if not tasks[0].model_spec.name:
        raise RequestError("INVALID_ARGUMENT", "Found ModelSpec with an empty model name.")
    predict_proto.refuse_task(tasks[0], signatures)
