"""The text files that flags name: read as the real server reads them, refused with file and line."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from serving.batching import Batching
from serving.model_config import PROMETHEUS_PATH, read_batching, read_models, read_monitoring
from serving.wanted import All, Latest, ModelConfig, Specific

K8S = Path(__file__).parents[1] / "k8s"


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "written.config"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def models(*entries: str) -> str:
    """A config file with an entry a line, from line 2 on."""
    lines = "\n".join(f"  config {{ {entry} }}" for entry in entries)
    return f"model_config_list {{\n{lines}\n}}\n"


A = 'name: "a" base_path: "/models/a" model_platform: "tensorflow"'
B = 'name: "b" base_path: "/models/b" model_platform: "tensorflow"'


def test_models_are_read_in_order(written):
    assert read_models(written(models(A, B)), False) == (
        ModelConfig("a", Path("/models/a")),
        ModelConfig("b", Path("/models/b")),
    )


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("", Latest(1)),
        ("model_version_policy { latest {} }", Latest(1)),
        ("model_version_policy { latest { num_versions: 0 } }", Latest(1)),  # std::max(_, 1), there
        ("model_version_policy { latest { num_versions: 3 } }", Latest(3)),
        ("model_version_policy: { all: {} }", All()),
        ("model_version_policy { specific { versions: 42 } }", Specific((42,))),
        ("model_version_policy { specific { versions: [42, 7, 42] } }", Specific((42, 7))),
        ("model_version_policy < specific < versions: 42 versions: 7 > >", Specific((42, 7))),
    ],
)
def test_a_version_policy_is_read(written, policy, wanted):
    [model] = read_models(written(models(f"{A} {policy}")), False)
    assert model.policy == wanted


def test_labels_are_read_where_they_are_allowed(written):
    labels = 'version_labels { key: "canary" value: 8 } version_labels { key: "stable" value: 7 }'
    [model] = read_models(written(models(f"{A} {labels}")), True)
    assert model.labels == {"canary": 8, "stable": 7}


@pytest.mark.parametrize("text", ["", "model_config_list {}", "# nothing yet\n"])
def test_a_file_without_models_is_taken(written, text):
    assert read_models(written(text), False) == ()


@pytest.mark.parametrize(
    ("entries", "line", "message"),
    [
        ([A, A], 3, "Illegal to list model a multiple times in config list; name each model once"),
        (
            [B, 'name: "a" base_path: "models/a" model_platform: "tensorflow"'],
            3,
            "Expected model a to have an absolute path or URI; got base_path()=models/a; write the whole",
        ),
        (
            ['name: "a" model_platform: "tensorflow"'],
            2,
            "Expected model a to have an absolute path or URI; got base_path()=; write the whole path",
        ),
        (
            ['name: "a" base_path: "gs://bucket/a" model_platform: "tensorflow"'],
            2,
            "base_path of model a is gs://bucket/a, wanted a local folder: this server reads no remote file",
        ),
        (['base_path: "/a" model_platform: "tensorflow"'], 2, "a model has no name; write name"),
        (
            ['name: "a" base_path: "/a"'],
            2,
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            'ModelServerConfig::model_platform.; write model_platform: "tensorflow"',
        ),
        (
            ['name: "a" base_path: "/a" model_platform: "torch"'],
            2,
            'Model a requests unsupported platform torch; write model_platform: "tensorflow"',
        ),
        (['name: "a" base_path: "/a" model_type: TENSORFLOW'], 2, "model_type of model a is deprecated"),
        (
            [f"{A} logging_config {{}}"],
            2,
            "logging_config of model a: this server logs no requests; remove it",
        ),
        ([f"{A} model_version_policy {{ specific {{}} }}"], 2, "specific of model a has no versions"),
        (
            [B, f'{A} version_labels {{ key: "stable" value: 7 }}'],
            3,
            "Request to assign label to version 7 of model a, which is not currently available for "
            "inference; add --allow_version_labels_for_unavailable_models",
        ),
        ([f"{A} versions: 3"], 2, 'has no field named "versions".; wanted a text proto of ModelServerConfig'),
        ([B, f'{A} name: "c"'], 3, 'should not have multiple "name" fields.'),
        ([f"{A} model_version_policy {{ latest {{}} all {{}} }}"], 2, 'Field "all" is specified along with'),
        ([f"{A} model_version_policy {{ latest {{ num_versions: -1 }} }}"], 2, "Value out of range: -1"),
    ],
)
def test_what_the_real_server_would_not_start_with_is_refused_with_its_line(written, entries, line, message):
    path = written(models(*entries))
    with pytest.raises(ConfigError) as refused:
        read_models(path, False)
    assert str(refused.value).startswith(f"{path}:{line}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_line_is_that_of_the_field_and_not_of_its_model(written):
    path = written(
        'model_config_list: {  # "config {" in a comment, or "name" in a text, is none\n'
        '  config: [{ name: "config {" base_path: "/a" model_platform: "tensorflow" }, {\n'
        '    name: "b"\n'
        '    base_path: "b"\n'
        "  }]\n"
        "}\n"
    )
    with pytest.raises(ConfigError, match=r":4: Expected model b to have an absolute path"):
        read_models(path, False)


def test_a_custom_config_is_refused(written):
    with pytest.raises(ConfigError, match=r":1: custom_model_config is not supported, nor is it there"):
        read_models(written("custom_model_config {}"), False)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.config: cannot be read: No such file or directory; check"):
        read_models(tmp_path / "none.config", False)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory; check the path"):
        read_monitoring(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "binary.config"
    path.write_bytes(b"model\xff")
    with pytest.raises(ConfigError, match=r"binary\.config: is no UTF-8 text at byte 5; wanted a text proto"):
        read_models(path, False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", None),
        ("prometheus_config {}", None),
        ('prometheus_config { path: "/metrics" }', None),
        ("prometheus_config { enable: true }", "/monitoring/prometheus/metrics"),
        ('prometheus_config { enable: true, path: "/metrics" }', "/metrics"),
    ],
)
def test_metrics_are_shown_only_where_they_are_enabled(written, text, path):
    assert read_monitoring(written(text)) == path


def test_the_cluster_s_own_monitoring_file_is_understood():
    [path] = K8S.rglob("monitoring.config")
    assert read_monitoring(path) == PROMETHEUS_PATH


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prometheus { enable: true }", ':1: Message type "serving.MonitoringConfig" has no field named'),
        ("prometheus_config {\n  enable: 7 }", ":2: "),
        (
            'prometheus_config {\n  enable: true\n  path: "metrics" }',
            ":3: path is metrics, wanted a path that",
        ),
    ],
)
def test_a_wrong_monitoring_file_is_refused_with_its_line(written, text, message):
    with pytest.raises(ConfigError) as refused:
        read_monitoring(written(text))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "batching"),
    [
        ("", Batching(1000, ())),  # the scheduler's own limit
        ("max_batch_size { value: 32 }", Batching(32, ())),
        (
            "max_batch_size { value: 32 } allowed_batch_sizes: 8 allowed_batch_sizes: 32",
            Batching(32, (8, 32)),
        ),
        (
            "batch_timeout_micros { value: 0 } max_enqueued_batches { value: 10 } "
            'num_batch_threads { value: 2 } thread_pool_name { value: "pool" } '
            "pad_variable_length_inputs: true",
            Batching(1000, ()),
        ),
        # with splitting the sizes are those of a part
        (
            "enable_large_batch_splitting { value: true } max_execution_batch_size { value: 8 } "
            "max_batch_size { value: 32 } allowed_batch_sizes: 8",
            Batching(32, (8,)),
        ),
    ],
)
def test_batching_parameters_are_read(written, text, batching):
    assert read_batching(written(text)) == batching


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max_batch_size { value: 32 }\nallowed_batch_sizes: 8",
            ":2: Last entry in allowed_batch_sizes must match max_batch_size; last entry was 8; expected 32",
        ),
        ("\nnum_batch_threads { value: 0 }", ":2: num_batch_threads is 0, wanted 1 or more"),
        ("max_batch_size: 32", ":1: "),  # a number where a message is wanted: a common slip
        (
            "max_size { value: 32 }",
            ':1: Message type "serving.BatchingParameters" has no field named "max_size"',
        ),
    ],
)
def test_wrong_batching_parameters_are_refused_with_their_line(written, text, message):
    with pytest.raises(ConfigError) as refused:
        read_batching(written(text))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
