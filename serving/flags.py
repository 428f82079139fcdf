"""The flags of `python -m serving`: tensorflow_model_server's names and defaults, and a few of its own.

What the real server does not understand is refused, or accepted with a warning that says what it would do.
"""

import logging
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from serving import __version__
from serving.batching import Batching
from serving.model_config import local_folder, read_batching, read_models, read_monitoring
from serving.wanted import ModelConfig

log = logging.getLogger("serving")

HELP = """
A local server that answers as TensorFlow Serving 2.11 does, over REST and gRPC.

commands beside serving:
  python -m serving ask "TEXT"     encode a text, ask a running server, show the documents found
  python -m serving probe          exit 0 when a version is served and a query is answered, else 1
  python -m serving tour           start a server, ask it all of the above once, stop it
  python -m serving gateway        search for people: text in, documents out, a page on /
  python -m serving encoder        text to vectors, for gateways and other programs
"""
EXAMPLES = """
examples:
  python -m serving --rest_api_port=9090 --model_name=index --model_base_path=$PWD/work/models/index
  python -m serving --rest_api_port=9090 --model_config_file=models.config \\
      --monitoring_config_file=monitoring.config
  curl http://localhost:9090/v1/models/index
  curl http://localhost:9090/v1/models/index/metadata
  curl -d '{"inputs": [0.5, ..., 0.5]}' -X POST http://localhost:9090/v1/models/index:predict

models.config:
  model_config_list {
    config { name: "index" base_path: "/models/index" model_platform: "tensorflow" }
  }
"""


@dataclass(frozen=True)
class Flags:
    """How to serve. Paths are absolute; a name that ends in a unit is in that unit.

    Attributes:
        models: what is served: of `--model_config_file`, else the one of `--model_name` and
            `--model_base_path`.
        batching: what `--batching_parameters_file` says; None without `--enable_batching`.
        monitoring: the REST path that shows metrics, None: none does.
        verify_manifest: check a version's files against its manifest before loading, where it has one.
    """

    port: int = 8500
    rest_api_port: int = 0
    model_name: str = "default"
    model_base_path: Path | None = None
    models: tuple[ModelConfig, ...] = ()
    allow_version_labels_for_unavailable_models: bool = False
    file_system_poll_wait_seconds: int = 1
    max_num_load_retries: int = 5
    load_retry_interval_micros: int = 60_000_000
    enable_model_warmup: bool = True
    num_request_iterations_for_warmup: int = 1
    rest_api_timeout_in_ms: int = 30_000
    rest_api_enable_cors_support: bool = False
    enable_batching: bool = False
    batching: Batching | None = None
    monitoring: str | None = None
    grpc_max_threads: int = 256  # there: four a core
    # this server's own
    host: str = "127.0.0.1"
    verify_manifest: bool = True
    coalesce: bool = True
    max_batch: int = 256
    max_queued: int = 1000
    shadow_exact_rate: float = 0.0
    max_body_bytes: int = 32 * 2**20  # 2,000 queries of 384 numbers are 16 MB of JSON
    max_connections: int = 4096


def parse(arguments: Sequence[str]) -> Flags:
    """The flags of a command line; `--help` and `--version` print and exit.

    Raises:
        ConfigError: a flag or value that is wrong, not known, or contradicts another.
    """
    if "--help" in arguments or "-h" in arguments:
        print(_help())
        sys.exit(0)
    given: dict[str, Any] = {}
    for name, text in _pairs(arguments):  # the last of several counts, as there
        given[name] = _FLAGS[name].read(name, text)
    if given.pop("version", False):
        print(_versions())
        sys.exit(0)
    _check_ports(given.get("port", Flags.port), given.get("rest_api_port", Flags.rest_api_port))
    parameters = given.pop("batching_parameters_file", None)
    given["batching"] = _batching(given.get("enable_batching", False), parameters)
    monitoring = given.pop("monitoring_config_file", None)
    given["monitoring"] = read_monitoring(monitoring) if monitoring else None
    given["model_base_path"], given["models"] = _models(given, given.pop("model_config_file", None))
    return Flags(**given)


def _models(given: Mapping[str, Any], file: Path | None) -> tuple[Path | None, tuple[ModelConfig, ...]]:
    """The base path where it counts, and what is served."""
    if file is None:
        folder = _base_path(given.get("model_base_path", ""))
        return folder, (ModelConfig(given.get("model_name", Flags.model_name), folder),)
    models = read_models(file, given.get("allow_version_labels_for_unavailable_models", False))
    if not models:
        log.warning("%s names no model: no request will find one", file)
    return None, models


def _check_ports(grpc: int, rest: int) -> None:
    if not grpc and not rest:
        raise ConfigError("--port and --rest_api_port are both 0, wanted at least one: give one a port")
    if grpc == rest:
        raise ConfigError(
            f"--port and --rest_api_port are both {grpc}, wanted two different ports: change one "
            f"(--port is {Flags.port} where it is not given)"
        )


def _batching(enabled: bool, file: Path | None) -> Batching | None:
    if not enabled:
        if file:
            raise ConfigError(
                f"--batching_parameters_file is {file}, but --enable_batching is not set: add it, or leave "
                "the file out"
            )
        return None
    log.warning(
        "--enable_batching joins requests along dimension 0, which is a query's own vector: as in "
        "tensorflow_model_server, requests for such signatures fail"
    )
    return read_batching(file) if file else Batching()


def _base_path(text: str) -> Path:
    if not text:
        raise ConfigError(
            "--model_base_path and --model_config_file are both missing, wanted one of them: give the folder "
            "that holds the numbered versions, --model_base_path=/models/index"
        )
    folder = local_folder(text)
    if folder is None:
        raise ConfigError(
            f"--model_base_path is {text}, wanted a local folder: this server reads no remote file system"
        )
    if not folder.is_absolute():
        raise ConfigError(
            f"--model_base_path is {text}, wanted an absolute path, as tensorflow_model_server does: write "
            f"--model_base_path={folder.absolute()}"
        )
    return folder


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each flag's name and value, of `--name=value`.

    Of `--name value` tensorflow_model_server (core/util/command_line_flags.cc) logs an unknown argument and
    goes on with the default: who writes so is told.

    Raises:
        ConfigError: an argument that is no flag of this server, or has no value.
    """
    for argument, following in zip_longest(arguments, arguments[1:]):
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in _FLAGS:
            raise _unknown(argument, name)
        flag = _FLAGS[name]
        if not equals and flag.read is _boolean:
            value = "true"
        elif not equals:
            is_value = following is not None and not following.startswith("--")
            raise ConfigError(
                f"--{name} has no value: write --{name}={following if is_value else flag.example}"
            )
        yield name, value


def _unknown(argument: str, name: str) -> ConfigError:
    if not argument.startswith("--"):
        return ConfigError(f"{argument} is no flag, wanted --name=value: see python -m serving --help")
    if name in _MISSING:
        return ConfigError(f"--{name} is not supported here: {_MISSING[name]}; leave it out")
    return ConfigError(f"--{name} is not a flag, wanted one of those in python -m serving --help")


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise _wrong(name, text, "true or false")
    return text == "true"


def _text(name: str, text: str) -> str:
    if not text:
        raise _wrong(name, text, "a name")
    return text


def _file(name: str, text: str) -> Path | None:
    return Path(text) if text else None  # empty is not given, as there


def _base(name: str, text: str) -> str:
    return text  # read when it is known whether it counts


def _rate(name: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 <= rate <= 1:
        raise _wrong(name, text, "a share of 0 to 1")
    return rate


def _whole(low: int, high: int, wanted: str) -> Callable[[str, str], int]:
    """A reader of whole numbers in a range, written as C reads them."""

    def read(name: str, text: str) -> int:
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise _wrong(name, text, wanted)
        return int(text)

    return read


def _wrong(name: str, text: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"--{name} is {text or 'empty'}, wanted {wanted}: write --{name}={_FLAGS[name].example}"
    )


@dataclass(frozen=True)
class _Flag:
    """How a flag is read, an example of its value, and what it is for."""

    read: Callable[[str, str], Any]
    example: str
    help: str


_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,19}", re.ASCII)
_INT32, _INT64 = 2**31, 2**63
_port = _whole(0, 65535, "a port of 0 to 65535")
_any_int32 = _whole(-_INT32, _INT32 - 1, "a whole number of 32 bits")
_any_int64 = _whole(-_INT64, _INT64 - 1, "a whole number of 64 bits")
_zero_or_more = _whole(0, _INT32 - 1, "a whole number of 0 or more")
_one_or_more = _whole(1, _INT64 - 1, "a whole number of 1 or more")

_SERVERS: Mapping[str, _Flag] = {
    "port": _Flag(_port, "8500", "gRPC port; 0: no gRPC, where REST is on"),
    "rest_api_port": _Flag(_port, "8501", "REST port; 0: no REST"),
    "model_name": _Flag(_text, "index", "the model's name in requests"),
    "model_base_path": _Flag(_base, "/models/index", "the folder that holds the numbered versions"),
    "model_config_file": _Flag(
        _file,
        "models.config",
        "text proto ModelServerConfig: several models, version policies, labels; then --model_name and "
        "--model_base_path do not count",
    ),
    "allow_version_labels_for_unavailable_models": _Flag(
        _boolean, "true", "labels in the config file; without it a file with labels is refused, as there"
    ),
    "file_system_poll_wait_seconds": _Flag(
        _whole(-(2**31), 2**31 - 1, "whole seconds; 0: look once, negative: never look"),
        "1",
        "how often to look for a newer version; 0: once, at the start; negative: never",
    ),
    "max_num_load_retries": _Flag(
        _zero_or_more, "5", "how often a version that failed to load is tried again"
    ),
    "load_retry_interval_micros": _Flag(_any_int64, "60000000", "wait between two tries; negative: none"),
    "enable_model_warmup": _Flag(
        _boolean, "true", "answer a version's assets.extra/tf_serving_warmup_requests before it is served"
    ),
    "num_request_iterations_for_warmup": _Flag(_any_int32, "1", "how often each of them is answered"),
    "rest_api_timeout_in_ms": _Flag(
        _any_int32, "30000", "a REST request that takes longer is answered 504; 0 or less: never"
    ),
    "rest_api_enable_cors_support": _Flag(_boolean, "false", "CORS headers in REST answers"),
    "enable_batching": _Flag(
        _boolean, "false", "as there, requests for a signature whose dimension 0 is no batch fail"
    ),
    "batching_parameters_file": _Flag(
        _file,
        "batching.config",
        "text proto BatchingParameters; wants --enable_batching; decides which of them fail",
    ),
    "monitoring_config_file": _Flag(
        _file, "monitoring.config", "text proto MonitoringConfig: metrics for Prometheus on the REST port"
    ),
    "grpc_max_threads": _Flag(
        _one_or_more, "8", "gRPC requests at once; more are refused (there: four a core)"
    ),
    "version": _Flag(_boolean, "true", "print the versions and exit"),
}
_OWN: Mapping[str, _Flag] = {
    "host": _Flag(_text, "0.0.0.0", "address to listen on"),
    "verify_manifest": _Flag(
        _boolean, "false", "check a version's files against its manifest before loading, where it has one"
    ),
    "coalesce": _Flag(_boolean, "false", "search concurrent requests together; the answers stay the same"),
    "max_batch": _Flag(_one_or_more, "256", "queries searched together at most"),
    "max_queued": _Flag(_one_or_more, "1000", "requests that may wait for a search; more are refused"),
    "shadow_exact_rate": _Flag(
        _rate, "0.001", "share of requests that is answered again by `exact`, for live recall in the metrics"
    ),
    "max_body_bytes": _Flag(_one_or_more, "67108864", "largest request, unpacked"),
    "max_connections": _Flag(_one_or_more, "4096", "REST connections at once"),
}
_FLAGS: Mapping[str, _Flag] = {**_SERVERS, **_OWN}

_THREADS = "TensorFlow chooses its threads by the cores"
_NO_ENCRYPTION = "this server does not encrypt; put a proxy in front of it"
_NO_TFLITE = "it serves no TensorFlow Lite models"
_MISSING: Mapping[str, str] = {  # main.cc of r2.11 has these too
    "grpc_socket_path": "gRPC answers on --port alone",
    "grpc_channel_arguments": "gRPC's own defaults hold",
    "rest_api_num_threads": "one event loop reads the requests, and a thread a core searches",
    "enable_per_model_batching_parameters": "batching never answers with an index's signatures",
    "model_config_file_poll_wait_seconds": "the file is read once, at the start",
    "num_load_threads": "versions are loaded one after the other",
    "num_unload_threads": "versions are unloaded one after the other",
    "flush_filesystem_caches": "the operating system's cache is left alone",
    "tensorflow_session_parallelism": _THREADS,
    "tensorflow_session_config_file": _THREADS,
    "tensorflow_intra_op_parallelism": _THREADS,
    "tensorflow_inter_op_parallelism": _THREADS,
    "use_alts_credentials": _NO_ENCRYPTION,
    "ssl_config_file": _NO_ENCRYPTION,
    "platform_config_file": "it serves TensorFlow's SavedModels alone",
    "per_process_gpu_memory_fraction": "ScaNN searches on the CPU",
    "saved_model_tags": "it loads the graph tagged `serve`, the default",
    "remove_unused_fields_from_bundle_metagraph": "it keeps signatures alone",
    "prefer_tflite_model": _NO_TFLITE,
    "num_tflite_pools": _NO_TFLITE,
    "num_tflite_interpreters_per_pool": _NO_TFLITE,
    "enable_signature_method_name_check": "it serves :predict alone",
    "xla_cpu_compilation_enabled": "it does not compile",
    "enable_profiler": "it has no profiler service",
    "thread_pool_factory_config_file": _THREADS,
}


def _help() -> str:
    lines = ["usage: python -m serving --name=value ...", HELP]
    groups = {
        "flags of tensorflow_model_server 2.11": _SERVERS,
        "flags of this server alone": _OWN,
    }
    for title, flags in groups.items():
        lines.append(f"{title}:")
        for name, flag in flags.items():
            lines.append(f"  --{name}={_default(name)}")
            lines += textwrap.wrap(flag.help, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join([*lines, EXAMPLES.strip()])


def _default(name: str) -> str:
    default = getattr(Flags, name, None)
    if isinstance(default, bool) or name == "version":
        return str(bool(default)).lower()
    return "" if default is None else str(default)


def _versions() -> str:
    return (
        f"highlights-to-scann {__version__}, "
        "answers as TensorFlow ModelServer 2.11\n"
        f"TensorFlow Library: {metadata.version('tensorflow')}"
    )
