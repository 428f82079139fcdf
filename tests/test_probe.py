"""Ready or not, judged by the rows of the status and by an answer, never by a status code."""

import json

import numpy as np
import pytest
from serving_parts import K, publish_rows, rows_server, unit_rows

from pipeline.errors import InputError
from serving.__main__ import main
from serving.client import Client
from serving.errors import ServingError
from serving.probe import probe, read_query, unit_vector

DIM = 8
ROWS = unit_rows(20, DIM)


@pytest.fixture
def server(tmp_path):
    publish_rows(tmp_path, 7, ROWS)
    with rows_server(tmp_path) as (url, versions):
        yield url, versions, tmp_path


def test_a_served_version_that_answers_is_ready(server, capsys):
    url, _, _ = server
    assert main(["probe", "--url", url, "--dim", str(DIM)]) == 0
    assert capsys.readouterr().out == f"ready: version 7 answered a query with {K} documents\n"


def test_a_query_of_another_width_names_the_flags(server, capsys):
    url, _, _ = server
    assert main(["probe", "--url", url, "--dim", "9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith("the query has 9 numbers: set --dim or --query\n")


def test_a_known_query_is_read_from_a_request_body(server, tmp_path, capsys):
    url, _, _ = server
    (tmp_path / "query.json").write_text(json.dumps({"inputs": ROWS[4].tolist()}))
    assert main(["probe", "--url", url, "--query", str(tmp_path / "query.json")]) == 0


def test_another_version_than_the_wanted_one_is_not_ready(server):
    url, _, _ = server
    with Client(url) as client:
        assert "version 7" in probe(client, unit_vector(DIM), version=7)
        with pytest.raises(ServingError, match="version 7 is served, wanted 8"):
            probe(client, unit_vector(DIM), version=8)


def test_a_broken_newer_version_is_reported_but_the_old_one_is_ready(server):
    url, versions, base = server
    (base / "8").mkdir()
    versions.poll()
    with Client(url) as client:
        said = probe(client, unit_vector(DIM))
    assert said.startswith("ready: version 7 ")
    assert "but version 8 could not be loaded: Could not find rows.npy" in said


def test_an_older_failure_is_no_news(server):
    url, versions, base = server
    (base / "8").mkdir()
    versions.poll()
    publish_rows(base, 9, ROWS)
    versions.poll()
    with Client(url) as client:
        assert probe(client, unit_vector(DIM)).endswith(f"version 9 answered a query with {K} documents")


def test_a_status_of_200_without_an_available_version_is_not_ready(server, capsys):
    url, versions, base = server
    (base / "7").rename(base / "not-a-version")
    versions.poll()
    assert main(["probe", "--url", url, "--dim", str(DIM)]) == 1
    assert "no version is AVAILABLE (7 is END)" in capsys.readouterr().err


def test_scores_that_are_no_numbers_are_not_ready(tmp_path):
    publish_rows(tmp_path, 7, np.full((5, DIM), np.nan, np.float32))
    with (
        rows_server(tmp_path) as (url, _),
        Client(url) as client,
        pytest.raises(ServingError, match="scores that are no numbers"),
    ):
        probe(client, unit_vector(DIM))


def test_an_answer_without_documents_is_not_ready(tmp_path):
    publish_rows(tmp_path, 7, np.zeros((0, DIM), np.float32))
    with (
        rows_server(tmp_path) as (url, _),
        Client(url) as client,
        pytest.raises(ServingError, match="answered with no document"),
    ):
        probe(client, unit_vector(DIM))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"inputs": []}', '{"inputs": ["a"]}', '{"inputs": 1}'])
def test_a_file_that_is_no_query_is_named(tmp_path, content):
    (tmp_path / "query.json").write_text(content)
    with pytest.raises(InputError, match=r'query\.json: wanted \{"inputs": \[numbers\]\}'):
        read_query(tmp_path / "query.json")


def test_the_unit_vector_has_length_one():
    assert np.linalg.norm(unit_vector(384)) == pytest.approx(1)
