"""The command line of the server: which flags there are, how values are read, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from serving.__main__ import main
from serving.batching import Batching
from serving.flags import _FLAGS, _MISSING, Flags, parse
from serving.wanted import Latest, ModelConfig

BASE = "--model_base_path=/models/index"
# The flags of tensorflow_model_server 2.11, in the order of its main.cc
NAMES = """
    port grpc_socket_path rest_api_port rest_api_num_threads rest_api_timeout_in_ms
    rest_api_enable_cors_support enable_batching allow_version_labels_for_unavailable_models
    batching_parameters_file enable_per_model_batching_parameters model_config_file
    model_config_file_poll_wait_seconds model_name model_base_path num_load_threads num_unload_threads
    max_num_load_retries load_retry_interval_micros file_system_poll_wait_seconds flush_filesystem_caches
    tensorflow_session_parallelism tensorflow_session_config_file tensorflow_intra_op_parallelism
    tensorflow_inter_op_parallelism use_alts_credentials ssl_config_file platform_config_file
    per_process_gpu_memory_fraction saved_model_tags grpc_channel_arguments grpc_max_threads
    enable_model_warmup num_request_iterations_for_warmup version monitoring_config_file
    remove_unused_fields_from_bundle_metagraph prefer_tflite_model num_tflite_pools
    num_tflite_interpreters_per_pool enable_signature_method_name_check xla_cpu_compilation_enabled
    enable_profiler thread_pool_factory_config_file
"""
THERE = NAMES.split()


def test_defaults_are_those_of_the_real_server():
    flags = parse([BASE])
    assert (flags.port, flags.rest_api_port, flags.model_name) == (8500, 0, "default")
    assert flags.models == (ModelConfig("default", Path("/models/index"), Latest(1)),)
    assert (flags.file_system_poll_wait_seconds, flags.rest_api_timeout_in_ms) == (1, 30_000)
    assert (flags.max_num_load_retries, flags.load_retry_interval_micros) == (5, 60_000_000)
    assert flags.enable_model_warmup
    assert not flags.enable_batching
    assert not flags.allow_version_labels_for_unavailable_models
    assert flags.monitoring is None


def test_the_server_listens_on_this_machine_alone_unless_told_otherwise():
    assert parse([BASE]).host == "127.0.0.1"
    assert parse([BASE, "--host=0.0.0.0"]).host == "0.0.0.0"


@pytest.mark.parametrize("name", THERE)
def test_every_flag_of_the_real_server_is_taken_or_refused_with_a_reason(name):
    assert (name in _FLAGS) != (name in _MISSING)


@pytest.mark.parametrize("name", sorted(_MISSING))
def test_a_flag_that_only_the_real_server_has_is_refused_by_name(name):
    assert name in THERE
    with pytest.raises(ConfigError, match=f"--{name} is not supported here: .+; leave it out"):
        parse([BASE, f"--{name}=1"])


def test_every_setting_has_a_flag():
    made_of_files = {"models", "monitoring", "batching"}
    assert {field.name for field in dataclasses.fields(Flags)} - made_of_files <= set(_FLAGS)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--rest_api_port=8501"], 8501),
        (["--rest_api_port=1", "--rest_api_port=8501"], 8501),  # the last counts, as there
        (["--rest_api_port= +8501"], 8501),  # sscanf's %d
    ],
)
def test_a_number_is_read_as_there(arguments, value):
    assert parse([BASE, *arguments]).rest_api_port == value


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(["--enable_batching"], True), (["--enable_batching=true"], True), (["--enable_batching=false"], False)],
)
def test_a_boolean_is_read_as_there(arguments, value):
    assert parse([BASE, *arguments]).enable_batching is value


def test_a_boolean_takes_no_following_word():
    # There `--enable_batching false` switches batching on, and `false` is an unknown argument
    with pytest.raises(ConfigError, match=r"^false is no flag, wanted --name=value"):
        parse([BASE, "--enable_batching", "false"])


def test_batching_that_makes_requests_fail_is_warned_of(caplog):
    parse([BASE, "--enable_batching"])
    assert "as in tensorflow_model_server, requests for such signatures fail" in caplog.text


def test_flags_that_the_real_server_understands_are_not_commented(caplog):
    parse([BASE, "--port=8600", "--rest_api_port=8601", "--coalesce", "--host=localhost"])
    assert not caplog.records


def test_a_relative_base_path_is_refused_as_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        parse(["--model_base_path=models/index"])
    assert str(refused.value) == (
        "--model_base_path is models/index, wanted an absolute path, as tensorflow_model_server does: write "
        f"--model_base_path={tmp_path}/models/index"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port=x"], "--port is x, wanted a port of 0 to 65535: write --port=8500"),
        (["--port=65536"], "--port is 65536, wanted a port of 0 to 65535"),
        (["--port=1_000"], "--port is 1_000, wanted a port"),
        (["--port="], "--port is empty, wanted a port"),
        (["--port"], "--port has no value: write --port=8500"),
        (["--port", "8600"], "--port has no value: write --port=8600"),
        (
            ["--file_system_poll_wait_seconds=0.5"],
            "--file_system_poll_wait_seconds is 0.5, wanted whole seconds",
        ),
        (["--port", "--rest_api_port=8501"], "--port has no value: write --port=8500"),
        (["--rest_api_port=8500"], "--port and --rest_api_port are both 8500, wanted two different ports"),
        (["--port=0"], "--port and --rest_api_port are both 0, wanted at least one"),
        (["--enable_batching=1"], "--enable_batching is 1, wanted true or false"),
        (["--enable_batching=True"], "--enable_batching is True, wanted true or false"),
        (
            ["--file_system_poll_wait_seconds=soon"],
            "--file_system_poll_wait_seconds is soon, wanted whole",
        ),
        (["--file_system_poll_wait_seconds=inf"], "--file_system_poll_wait_seconds is inf, wanted whole"),
        (["--max_num_load_retries=-1"], "--max_num_load_retries is -1, wanted a whole number of 0 or more"),
        (["--rest_api_timeout_in_ms=2147483648"], "wanted a whole number of 32 bits"),
        (["--shadow_exact_rate=2"], "--shadow_exact_rate is 2, wanted a share of 0 to 1"),
        (["--shadow_exact_rate=nan"], "--shadow_exact_rate is nan, wanted a share of 0 to 1"),
        (
            ["--max_queued=0"],
            "--max_queued is 0, wanted a whole number of 1 or more: write --max_queued=",
        ),
        (["--model_name="], "--model_name is empty, wanted a name"),
        (
            ["--no_such_flag=1"],
            "--no_such_flag is not a flag, wanted one of those in python -m serving",
        ),
        (["--por=8500"], "--por is not a flag"),  # no short forms, as there
        (["-port=8500"], "-port=8500 is no flag, wanted --name=value"),
        (["--"], "-- is not a flag"),
        (["--model_base_path=s3://bucket/index"], "wanted a local folder: this server reads no remote file"),
        (["--model_base_path="], "--model_base_path and --model_config_file are both missing"),
        (
            ["--batching_parameters_file=b.config"],
            "--batching_parameters_file is b.config, but --enable_batching is not set: add it, or leave the",
        ),
    ],
)
def test_a_wrong_value_is_one_line_naming_flag_value_want_and_remedy(arguments, message, capsys):
    assert main([BASE, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_server_of_nothing_is_refused(capsys):
    assert main([]) == 2
    assert "--model_base_path and --model_config_file are both missing" in capsys.readouterr().err


def test_the_config_file_counts_before_name_and_base_path(tmp_path):
    file = tmp_path / "models.config"
    file.write_text('model_config_list{config{name:"a" base_path:"/a" model_platform:"tensorflow"}}')
    flags = parse([BASE, "--model_name=index", f"--model_config_file={file}"])
    assert flags.models == (ModelConfig("a", Path("/a")),)
    assert flags.model_base_path is None


def test_an_empty_config_file_serves_nothing_and_says_so(tmp_path, caplog):
    file = tmp_path / "models.config"
    file.write_text("")
    assert parse([f"--model_config_file={file}"]).models == ()
    assert "names no model" in caplog.text


def test_labels_want_the_flag_that_allows_them(tmp_path):
    file = tmp_path / "models.config"
    file.write_text(
        'model_config_list{config{name:"a" base_path:"/a" model_platform:"tensorflow" '
        'version_labels{key:"stable" value:1}}}'
    )
    allowed = ["--allow_version_labels_for_unavailable_models", f"--model_config_file={file}"]
    assert parse(allowed).models[0].labels == {"stable": 1}
    with pytest.raises(ConfigError, match="Request to assign label to version 1 of model a, which is not"):
        parse(allowed[1:])


def test_the_monitoring_file_says_where_metrics_are(tmp_path):
    file = tmp_path / "monitoring.config"
    file.write_text('prometheus_config { enable: true path: "/metrics" }')
    assert parse([BASE, f"--monitoring_config_file={file}"]).monitoring == "/metrics"


def test_batching_is_set_up_by_its_file_or_by_defaults(tmp_path):
    file = tmp_path / "batching.config"
    file.write_text("max_batch_size { value: 32 } allowed_batch_sizes: [8, 32]")
    assert parse([BASE]).batching is None
    assert parse([BASE, "--enable_batching"]).batching == Batching()
    given = parse([BASE, "--enable_batching", f"--batching_parameters_file={file}"])
    assert given.batching == Batching(32, (8, 32))


@pytest.mark.parametrize("given", ["--num_request_iterations_for_warmup=0", "--rest_api_timeout_in_ms=-1"])
def test_numbers_that_mean_off_there_are_taken(given):
    name, _, value = given.removeprefix("--").partition("=")
    assert getattr(parse([BASE, given]), name) == int(value)


@pytest.mark.parametrize("name", sorted(_FLAGS))
def test_help_names_every_flag(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    assert f"\n  --{name}=" in capsys.readouterr().out


def test_help_has_examples_and_tells_own_flags_apart(capsys):
    with pytest.raises(SystemExit):
        parse(["-h"])
    shown = capsys.readouterr().out
    theirs, _, own = shown.partition("flags of this server alone:")
    assert "--rest_api_port=0\n" in theirs
    assert "--coalesce=true\n" in own
    assert "python -m serving --rest_api_port=9090 --model_name=index --model_base_path=" in own


def test_version_says_what_it_answers_as(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--version"])
    assert end.value.code == 0
    assert "answers as TensorFlow ModelServer 2.11\nTensorFlow Library: " in capsys.readouterr().out
