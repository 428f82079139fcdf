"""The text files that tensorflow_model_server's flags name: models, monitoring, batching parameters.

They are protocol buffers in text format, checked as tensorflow/serving r2.11 checks them
(model_servers/server.cc and server_core.cc), and refused with the file and the line.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from serving.batching import Batching
from serving.wanted import All, Latest, ModelConfig, Specific

PROMETHEUS_PATH = "/monitoring/prometheus/metrics"  # util/prometheus_exporter.h
PLATFORM = "tensorflow"

_URI = re.compile(r"[a-zA-Z][0-9a-zA-Z.]*://")  # TensorFlow's own idea of one: core/platform/path.cc
_TOKEN = re.compile(r"#[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|(?P<name>[A-Za-z_]\w*)|[{}<>\n]")

# Two messages that the tensorflow-serving-api package leaves out: field, number, type.
_INT64 = "google.protobuf.Int64Value"
_MESSAGES: dict[str, list[tuple[str, int, str]]] = {
    "PrometheusConfig": [("enable", 1, "bool"), ("path", 2, "string")],
    "MonitoringConfig": [("prometheus_config", 1, "serving.PrometheusConfig")],
    "BatchingParameters": [
        ("max_batch_size", 1, _INT64),
        ("batch_timeout_micros", 2, _INT64),
        ("max_enqueued_batches", 3, _INT64),
        ("num_batch_threads", 4, _INT64),
        ("thread_pool_name", 5, "google.protobuf.StringValue"),
        ("allowed_batch_sizes", 6, "repeated int64"),
        ("pad_variable_length_inputs", 7, "bool"),
        ("enable_large_batch_splitting", 8, "google.protobuf.BoolValue"),
        ("max_execution_batch_size", 9, _INT64),
    ],
}


@dataclass(frozen=True)
class _Text:
    """A file's text, and where in it each field stands."""

    path: Path
    text: str
    lines: Mapping[str, int]

    def refuse(self, field: str, why: str) -> ConfigError:
        """The error about a field; where it is missing, its message's line is named."""
        while field and field not in self.lines:
            field = field.rpartition(".")[0]
        return ConfigError(f"{self.path}:{self.lines.get(field, 1)}: {why}")


def read_models(path: Path, labels_for_unavailable_models: bool) -> tuple[ModelConfig, ...]:
    """The models of a `--model_config_file`, in its order; none where the file is empty, as there.

    Args:
        labels_for_unavailable_models: `--allow_version_labels_for_unavailable_models`; without it the real
            server refuses every label at start, because no version is available yet.

    Raises:
        ConfigError: no such file, no text proto, or a setting that is wrong or not known here.
    """
    from tensorflow_serving.config import model_server_config_pb2

    file = _read(path)
    config = _parse(file, model_server_config_pb2.ModelServerConfig())
    if config.HasField("custom_model_config"):
        raise file.refuse("custom_model_config", "custom_model_config is not supported, nor is it there")
    models: dict[str, ModelConfig] = {}
    for i, entry in enumerate(config.model_config_list.config):
        at = f"model_config_list[0].config[{i}]"
        if entry.name in models:
            raise file.refuse(
                f"{at}.name",
                f"Illegal to list model {entry.name} multiple times in config list; name each model once",
            )
        models[entry.name] = _model(file, at, entry, labels_for_unavailable_models)
    return tuple(models.values())


def read_monitoring(path: Path) -> str | None:
    """The path under which a `--monitoring_config_file` shows metrics; None: nowhere.

    Raises:
        ConfigError: no such file, no text proto, or a path that no request can have.
    """
    file = _read(path)
    config = _parse(file, _message("MonitoringConfig")).prometheus_config
    if not config.enable:
        return None
    if config.path and not config.path.startswith("/"):
        raise file.refuse(
            "prometheus_config[0].path", f"path is {config.path}, wanted a path that begins with /"
        )
    return config.path or PROMETHEUS_PATH


def read_batching(path: Path) -> Batching:
    """What of a `--batching_parameters_file` decides answers; the rest is checked and not used.

    Raises:
        ConfigError: no such file, no text proto, or values with which the real server does not start.
    """
    file = _read(path)
    parameters = _parse(file, _message("BatchingParameters"))
    for field in ("max_batch_size", "num_batch_threads", "max_enqueued_batches"):
        if parameters.HasField(field) and getattr(parameters, field).value < 1:
            raise file.refuse(
                f"{field}[0].value", f"{field} is {getattr(parameters, field).value}, wanted 1 or more"
            )
    limit = parameters.max_batch_size.value or Batching.max_batch_size
    sizes = tuple(parameters.allowed_batch_sizes)
    if sizes and not parameters.enable_large_batch_splitting.value and sizes[-1] != limit:
        raise file.refuse(
            "allowed_batch_sizes",
            "Last entry in allowed_batch_sizes must match max_batch_size; "
            f"last entry was {sizes[-1]}; expected {limit}",
        )
    return Batching(limit, sizes)


def local_folder(text: str) -> Path | None:
    """A base path as a local folder; None for a URI, which only the real server can read."""
    return None if _URI.match(text) else Path(text)


def _model(file: _Text, at: str, entry: Any, labels_for_unavailable_models: bool) -> ModelConfig:
    """One `config { ... }` of the list, which stands at the field `at`."""
    if not entry.name:
        raise file.refuse(f"{at}.name", "a model has no name; write name, as in requests")
    folder = local_folder(entry.base_path)
    if folder is None:
        raise file.refuse(
            f"{at}.base_path",
            f"base_path of model {entry.name} is {entry.base_path}, wanted a local folder: "
            "this server reads no remote file system",
        )
    if not entry.base_path.startswith("/"):
        raise file.refuse(
            f"{at}.base_path",
            f"Expected model {entry.name} to have an absolute path or URI; got "
            f"base_path()={entry.base_path}; write the whole path",
        )
    _check_platform(file, at, entry)
    if entry.HasField("logging_config"):
        raise file.refuse(
            f"{at}.logging_config[0]",
            f"logging_config of model {entry.name}: this server logs no requests; remove it",
        )
    labels = dict(sorted(entry.version_labels.items()))
    if labels and not labels_for_unavailable_models:
        version = next(iter(labels.values()))
        raise file.refuse(
            f"{at}.version_labels[0]",
            f"Request to assign label to version {version} of model {entry.name}, which is not currently "
            "available for inference; add --allow_version_labels_for_unavailable_models",
        )
    return ModelConfig(entry.name, folder, _policy(file, at, entry), labels)


def _check_platform(file: _Text, at: str, entry: Any) -> None:
    remedy = f'write model_platform: "{PLATFORM}"'
    if entry.model_type:
        raise file.refuse(
            f"{at}.model_type", f"model_type of model {entry.name} is deprecated and not read here; {remedy}"
        )
    if not entry.model_platform:
        raise file.refuse(
            f"{at}.model_platform",
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            f"ModelServerConfig::model_platform.; {remedy}",
        )
    if entry.model_platform != PLATFORM:
        raise file.refuse(
            f"{at}.model_platform",
            f"Model {entry.name} requests unsupported platform {entry.model_platform}; {remedy}",
        )


def _policy(file: _Text, at: str, entry: Any) -> Latest | All | Specific:
    policy = entry.model_version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return All()
    if choice == "specific":
        if not policy.specific.versions:
            raise file.refuse(
                f"{at}.model_version_policy[0].specific[0]",
                f"specific of model {entry.name} has no versions; write versions: N, or it waits for ever",
            )
        return Specific(tuple(dict.fromkeys(policy.specific.versions)))
    return Latest(max(1, policy.latest.num_versions))  # 0 means 1, as there


def _read(path: Path) -> _Text:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text at byte {error.start}; wanted a text proto") from None
    return _Text(path, text, _lines(text))


def _parse(file: _Text, message: Any) -> Any:
    """`message`, filled from the file."""
    from google.protobuf import text_format

    try:
        return text_format.Parse(file.text, message)
    except text_format.ParseError as error:
        said = str(error).partition(" : ")[2] or str(error)
        raise ConfigError(
            f"{file.path}:{error.GetLine() or 1}: {' '.join(said.split())}; wanted a text proto of "
            f"{message.DESCRIPTOR.name}"
        ) from None


def _lines(text: str) -> dict[str, int]:
    """The line of each field by its path, messages counted: `model_config_list[0].config[1].name`."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    stack: list[str] = []
    line, name = 1, ""
    for token in _TOKEN.finditer(text):
        if token["name"]:
            name = token[0]
            lines.setdefault(".".join([*stack, name]), line)
        elif token[0] in ("{", "<"):
            path = ".".join([*stack, name])
            stack.append(f"{name}[{counts.get(path, 0)}]")
            counts[path] = counts.get(path, 0) + 1
            lines[".".join(stack)] = line
        elif token[0] in ("}", ">") and stack:
            name = stack.pop().partition("[")[0]  # the next of a list, [{...}, {...}], has no name of its own
        line += token[0].count("\n")
    return lines


def _message(name: str) -> Any:
    """An empty message of `_MESSAGES`."""
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"serving.{name}"))()


@cache
def _pool() -> Any:
    """A descriptor pool of our own: a later tensorflow-serving-api may bring these messages."""
    from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="serving.proto",
        package="serving",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    scalars = {"bool": 8, "string": 9, "int64": 3}  # descriptor.proto's numbers of these types
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, declared in fields:
            label = 3 if declared.startswith("repeated ") else 1
            kind = declared.removeprefix("repeated ")
            added = message.field.add(name=field, number=number, label=label, type=scalars.get(kind, 11))
            if kind not in scalars:
                added.type_name = f".{kind}"
    pool.AddSerializedFile(file.SerializeToString())
    return pool
