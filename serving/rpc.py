"""TensorFlow Serving's gRPC: PredictionService and ModelService, over the official package's protos.

Codes and texts are those of tensorflow/serving r2.11: prediction_service_impl.cc, model_service_impl.cc and
get_model_status_impl.cc in model_servers/, get_model_metadata_impl.cc and multi_inference.cc in
servables/tensorflow/. As there, there is no health service and no reflection.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from serving import predict_proto
from serving.listening import bind, not_listening
from serving.protocol import RequestError, Route, Signature, Tensor, TensorInfo
from serving.versions import Models

if TYPE_CHECKING:
    from serving.coalescing import Searches
    from serving.monitoring import Monitoring

log = logging.getLogger("serving")

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 * 2**20  # the real server takes two gigabytes
MAX_THREADS = 256  # calls at once; the real server has four threads a core
MAX_HELD_BYTES = 256 * 2**20  # of requests being answered and their tensors, or four of the largest
MAX_RECEIVING = 1024  # calls at once, with those whose request has not wholly come yet: slow clients
MAX_STREAMS = 256  # calls at once of one connection; a client keeps further ones until one has ended
IDLE_SECONDS = 600.0  # after which a connection without a call is closed; clients open it again
SMALL_MESSAGE = 2**16  # bytes that are read between two other calls: a vector of 384 numbers is 1,600
SMALL_ANSWER = 10_000  # values that are written between two other calls
LARGE_THREADS = 2  # that read and write what is larger
REFUSING_SECONDS = 0.25  # of a stop's grace
MESSAGE_LIMIT = 1024  # bytes of an error's text; model_servers/grpc_status_util.cc

COUNTED = ("Predict", "Classify", "Regress")  # in the metrics, as there


@dataclass(frozen=True)
class Call:
    """What is known of a call beside its request.

    Attributes:
        is_large: its request, as it came.
        hold: counts so many bytes more until the call ends; raises RequestError where they are too many.
        deadline: of time.monotonic(); None: it may take for ever.
    """

    is_large: bool
    hold: Callable[[int], None]
    deadline: float | None


# A request -> its answer's bytes; raises RequestError. The same of a request that is not parsed yet.
_Answer = Callable[[Any, Call], Awaitable[bytes]]
_Method = Callable[[bytes, Call], Awaitable[bytes]]


def make_rpc_server(
    models: Models,
    searches: "Searches",
    monitoring: "Monitoring",
    host: str,
    port: int,
    *,
    max_threads: int = MAX_THREADS,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_held_bytes: int | None = None,
) -> "RpcServer":
    """The gRPC server of these models, its port taken but not open yet.

    Args:
        port: 0 takes a free one.
        max_threads: calls answered at once; what comes beyond is refused, as there.
        max_held_bytes: of the requests being answered and their tensors; what comes beyond is refused. None:
            MAX_HELD_BYTES, or four of the largest.

    Raises:
        ServingError: the port cannot be taken.
    """
    services = Services(models, searches, monitoring, max_message_bytes)
    held = max(MAX_HELD_BYTES, 4 * max_message_bytes) if max_held_bytes is None else max_held_bytes
    return RpcServer(services, host, port, max_threads, max_message_bytes, held)


class RpcServer:
    """Answers gRPC, beside the caller's thread, from `start` to `stop`.

    Attributes:
        port: the port that was taken.
    """

    def __init__(
        self,
        services: "Services",
        host: str,
        port: int,
        max_threads: int,
        max_message_bytes: int,
        max_held_bytes: int,
    ) -> None:
        self._services, self._host = services, host
        self._max_threads, self._max_message_bytes = max_threads, max_message_bytes
        self._max_held_bytes, self._held_bytes = max_held_bytes, 0
        self._reserved = bind(host, port, "--port")
        self.port: int = self._reserved.getsockname()[1]
        self._n_running = 0
        self._is_stopping = False
        self._server: Any = None

    def start(self) -> None:
        """Open the port. TensorFlow, whose protos a request holds, is imported here at the latest.

        Raises:
            ServingError: somebody else took it in the moment between reserving and opening.
        """
        opening = self._open(self._services.methods())
        asyncio.run_coroutine_threadsafe(opening, _loop()).result()

    def stop(self, grace: float) -> None:
        """Close the port, and answer what was asked before, for `grace` seconds at most."""
        self._reserved.close()
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._close(grace), _loop()).result()
        self._services.close()

    async def _open(self, methods: Mapping[str, _Method]) -> None:
        import grpc

        options = [
            ("grpc.so_reuseport", 0),  # else two servers would share a port unnoticed
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.max_connection_idle_ms", round(IDLE_SECONDS * 1000)),
        ]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=MAX_RECEIVING)
        server.add_generic_rpc_handlers((_handlers(methods, self._call),))
        self._reserved.close()
        try:
            server.add_insecure_port(_address(self._host, self.port))
        except RuntimeError as error:
            raise not_listening(self._host, self.port, "--port", error) from None
        await server.start()
        self._server = server

    async def _close(self, grace: float) -> None:
        """First refuse, so that clients turn away: gRPC cancels calls that come while it closes the port."""
        self._is_stopping = True
        await asyncio.sleep(min(grace, REFUSING_SECONDS))
        await self._server.stop(max(0.0, grace - REFUSING_SECONDS))

    async def _call(self, method: _Method, raw: bytes, context: Any) -> bytes:
        """Answer one call; a request comes as bytes, so that one that is no proto is answered, not logged."""
        import grpc
        from google.protobuf.message import DecodeError

        if self._is_stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "The server is shutting down")
        if self._n_running >= self._max_threads:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")
        held = 0

        def hold(n_bytes: int) -> None:
            nonlocal held
            self._hold(n_bytes)
            held += n_bytes

        self._n_running += 1
        try:
            hold(len(raw))
            left = context.time_remaining()
            deadline = None if left is None else time.monotonic() + left
            return await method(raw, Call(len(raw) > SMALL_MESSAGE, hold, deadline))
        except RequestError as error:
            await context.abort(grpc.StatusCode[error.code], _cut(error.message))
        except DecodeError:
            await context.abort(grpc.StatusCode.INTERNAL, "")  # as gRPC for C++ does
        except Exception as error:  # ours, never the client's: the traceback goes to the log
            log.exception("a gRPC call failed")
            await context.abort(grpc.StatusCode.INTERNAL, f"Internal error: {type(error).__name__}")
        finally:
            self._n_running -= 1
            self._held_bytes -= held
        raise AssertionError("abort raises")

    def _hold(self, n_bytes: int) -> None:
        if self._held_bytes + n_bytes > self._max_held_bytes:
            raise RequestError(
                "RESOURCE_EXHAUSTED",
                f"The requests being answered hold {self._held_bytes} bytes and this one wants {n_bytes}, of "
                f"{self._max_held_bytes} in all: ask again later",
            )
        self._held_bytes += n_bytes


class Services:
    """What each method answers.

    What is large is read and written by threads of its own, a piece at a time, so that other calls get their
    turn. Bytes to proto and proto to bytes are one piece each: protobuf keeps the interpreter to itself
    meanwhile, about as long as copying them takes where they are numbers.
    """

    def __init__(
        self, models: Models, searches: "Searches", monitoring: "Monitoring", max_tensor_bytes: int
    ) -> None:
        self._models, self._searches, self._monitoring = models, searches, monitoring
        self._max_tensor_bytes = max_tensor_bytes
        self._large = ThreadPoolExecutor(LARGE_THREADS, thread_name_prefix="grpc-large")
        self._turns = asyncio.Semaphore(LARGE_THREADS)  # who waits holds nothing that a thread would keep

    def close(self) -> None:
        """Take no more calls."""
        self._large.shutdown(wait=False, cancel_futures=True)

    def methods(self) -> dict[str, _Method]:
        """By the path of a call.

        The package's own `*_service_pb2` declare them too, but today's protobuf cannot import these.
        """
        from tensorflow_serving.apis import (
            classification_pb2,
            get_model_metadata_pb2,
            get_model_status_pb2,
            inference_pb2,
            model_management_pb2,
            predict_pb2,
            regression_pb2,
        )

        answers: dict[str, tuple[Any, _Answer]] = {
            "PredictionService/Predict": (predict_pb2.PredictRequest, self.predict),
            "PredictionService/Classify": (classification_pb2.ClassificationRequest, self.classify),
            "PredictionService/Regress": (regression_pb2.RegressionRequest, self.regress),
            "PredictionService/MultiInference": (inference_pb2.MultiInferenceRequest, self.multi_inference),
            "PredictionService/GetModelMetadata": (
                get_model_metadata_pb2.GetModelMetadataRequest,
                self.get_model_metadata,
            ),
            "ModelService/GetModelStatus": (
                get_model_status_pb2.GetModelStatusRequest,
                self.get_model_status,
            ),
            "ModelService/HandleReloadConfigRequest": (
                model_management_pb2.ReloadConfigRequest,
                self.handle_reload_config,
            ),
        }
        methods = {}
        for path, (kind, answer) in answers.items():
            api = path.partition("/")[2]
            method = self._counted(api, kind, answer) if api in COUNTED else self._uncounted(kind, answer)
            methods[f"/tensorflow.serving.{path}"] = method
        return methods

    async def predict(self, request: Any, call: Call) -> bytes:
        with self._models.use(_route("predict", request)) as loaded:
            name, signature = predict_proto.find_signature(request.model_spec, loaded.servable.signatures)
            inputs, wanted, n_bytes = await self._run(call.is_large, self._read, request, signature)
            call.hold(n_bytes)  # of a request of a hundred bytes too: one value may stand for a whole tensor
            found = await self._searches.ask(loaded, name, inputs, deadline=call.deadline)
        outputs = {output: found[output] for output in wanted}
        is_large = sum(len(tensor.values) for tensor in outputs.values()) > SMALL_ANSWER
        return await self._run(
            is_large, _predict_answer, request.model_spec.name, name, loaded.version, outputs
        )

    def _read(self, request: Any, signature: Signature) -> tuple[dict[str, Tensor], list[str], int]:
        """Its tensors, the outputs it wants, and how many bytes the tensors have."""
        inputs, wanted = predict_proto.read_request(request, signature, self._max_tensor_bytes)
        return inputs, wanted, sum(map(predict_proto.n_bytes, inputs.values()))

    async def classify(self, request: Any, _: Call) -> bytes:
        return self._refuse_examples("classify", request)

    async def regress(self, request: Any, _: Call) -> bytes:
        return self._refuse_examples("regress", request)

    async def multi_inference(self, request: Any, _: Call) -> bytes:
        """The first task decides: no signature here serves one."""
        task = request.tasks[0] if request.tasks else None
        if task is None:
            raise RequestError("INVALID_ARGUMENT", "ModelSpec has no name specified.")
        with self._models.use(_spec_route("predict", task.model_spec)) as loaded:
            signatures = loaded.servable.signatures
        predict_proto.refuse_task(task, signatures)
        raise AssertionError("refuse_task raises")

    async def get_model_metadata(self, request: Any, _: Call) -> bytes:
        from tensorflow_serving.apis import get_model_metadata_pb2

        route = _route("metadata", request, check_name=False)
        if not request.metadata_field:
            raise RequestError(
                "INVALID_ARGUMENT", "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in request.metadata_field:
            if field != "signature_def":
                raise RequestError("INVALID_ARGUMENT", f"Metadata field {field} is not supported")
        with self._models.use(_named(route)) as loaded:
            signatures = loaded.servable.signatures
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = loaded.model_name
        response.model_spec.version.value = loaded.version
        shown = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in signatures.items():
            _show_signature(signature, shown.signature_def[name])
        response.metadata["signature_def"].Pack(shown)
        return response.SerializeToString()

    async def get_model_status(self, request: Any, _: Call) -> bytes:
        from tensorflow_serving.apis import get_model_status_pb2

        response = get_model_status_pb2.GetModelStatusResponse()
        for row in self._models.status(_route("status", request, check_name=False)):
            shown = response.model_version_status.add(version=row.version)
            shown.state = get_model_status_pb2.ModelVersionStatus.State.Value(row.state)
            shown.status.error_code = _error_codes()[row.error_code]
            shown.status.error_message = row.error_message
        return response.SerializeToString()

    async def handle_reload_config(self, request: Any, _: Call) -> bytes:
        if not request.config.HasField("model_config_list"):
            raise RequestError(
                "INVALID_ARGUMENT",
                "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is "
                "currently supported",
            )
        raise RequestError(
            "UNIMPLEMENTED",
            "This server reads its models once, at the start: change --model_config_file and start it again",
        )

    def _refuse_examples(self, action: str, request: Any) -> bytes:
        with self._models.use(_route(action, request)) as loaded:
            signatures = loaded.servable.signatures
        predict_proto.refuse_examples(action, request.model_spec, signatures)
        raise AssertionError("refuse_examples raises")

    def _counted(self, api: str, kind: Any, answer: _Answer) -> _Method:
        """A method whose calls are in the metrics."""

        async def method(raw: bytes, call: Call) -> bytes:
            started = time.perf_counter()
            request, status = await self._run(call.is_large, kind.FromString, raw), "OK"
            try:
                return await answer(request, call)
            except RequestError as error:
                status = error.code
                raise
            except asyncio.CancelledError:
                status = "CANCELLED"  # the client went away, or its deadline passed
                raise
            except Exception:
                status = "INTERNAL"
                raise
            finally:
                seconds = time.perf_counter() - started
                self._monitoring.request(request.model_spec.name, status, api, "GRPC", seconds)

        return method

    def _uncounted(self, kind: Any, answer: _Answer) -> _Method:

        async def method(raw: bytes, call: Call) -> bytes:
            return await answer(await self._run(call.is_large, kind.FromString, raw), call)

        return method

    async def _run(self, is_large: bool, work: Callable[..., T], *arguments: Any) -> T:
        """Do it here, or on a thread where it is large.

        A thread cannot be stopped: a call whose client has left waits for it, so that its bytes are counted
        as long as they are held.
        """
        if not is_large:
            return work(*arguments)
        async with self._turns:
            job = asyncio.get_running_loop().run_in_executor(self._large, work, *arguments)
            try:
                return await asyncio.shield(job)
            except asyncio.CancelledError:
                await asyncio.gather(job, return_exceptions=True)
                raise


def _predict_answer(
    model_name: str, signature_name: str, version: int, outputs: Mapping[str, Tensor]
) -> bytes:
    from tensorflow_serving.apis import predict_pb2

    response = predict_pb2.PredictResponse()
    response.model_spec.name = model_name
    response.model_spec.signature_name = signature_name
    response.model_spec.version.value = version
    for output, tensor in outputs.items():
        predict_proto.write_tensor(tensor, response.outputs[output])
    return response.SerializeToString()


def _route(action: str, request: Any, check_name: bool = True) -> Route:
    """What a request's model_spec means.

    Raises:
        RequestError: it has none, or with `check_name`, one without a name.
    """
    if not request.HasField("model_spec"):
        raise RequestError("INVALID_ARGUMENT", "Missing ModelSpec")
    return _spec_route(action, request.model_spec, check_name)


def _spec_route(action: str, spec: Any, check_name: bool = True) -> Route:
    choice = spec.WhichOneof("version_choice")
    version = spec.version.value if choice == "version" else None
    label = spec.version_label if choice == "version_label" else None
    route = Route(action, spec.name, version, label)
    return _named(route) if check_name else route


def _named(route: Route) -> Route:
    if not route.model_name:
        raise RequestError("INVALID_ARGUMENT", "ModelSpec has no name specified.")
    return route


def _show_signature(signature: Signature, proto: Any) -> None:
    proto.method_name = signature.method_name
    for name, info in signature.inputs.items():
        _show_tensor(info, proto.inputs[name])
    for name, info in signature.outputs.items():
        _show_tensor(info, proto.outputs[name])


def _show_tensor(info: TensorInfo, proto: Any) -> None:
    proto.name, proto.dtype = info.name, predict_proto.type_number(info.dtype)
    proto.tensor_shape.unknown_rank = info.shape is None
    for size in info.shape or ():
        proto.tensor_shape.dim.add(size=size)


def _error_codes() -> dict[str, int]:
    """TensorFlow's names of errors: their numbers, which are gRPC's."""
    import grpc

    return {code.name: code.value[0] for code in grpc.StatusCode}


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The one event loop of every gRPC server here, which runs until the process ends.

    grpc.aio loses calls where several loops share a process, or one of them is closed.
    """
    import uvloop

    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, name="grpc", daemon=True).start()
    return loop


def _handlers(methods: Mapping[str, _Method], call: Callable[..., Awaitable[bytes]]) -> Any:
    """A handler for every path; one that is not known is UNIMPLEMENTED without a text, as in gRPC for C++."""
    import grpc

    def handler(method: _Method) -> Any:
        async def answer(raw: bytes, context: Any) -> bytes:
            return await call(method, raw, context)

        return grpc.unary_unary_rpc_method_handler(answer)

    known = {path: handler(method) for path, method in methods.items()}

    class Handlers(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            return known.get(handler_call_details.method, unknown)

    async def refuse(_: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")

    unknown = grpc.stream_stream_rpc_method_handler(refuse)
    return Handlers()


def _cut(message: str) -> str:
    """An error's text as the real server sends it: 1,024 bytes at most, then a mark."""
    data = message.encode("utf-8", "surrogateescape")
    if len(data) > MESSAGE_LIMIT:
        data = data[:MESSAGE_LIMIT] + b"...TRUNCATED"
    return data.decode("utf-8", "replace")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
