"""A version's folder as the gateway reads it: documents by row and by id, titles, texts, rows, co-reading."""

import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gateway_parts import DIM, DOCUMENTS, publish, rows_of

from pipeline.errors import ArtifactError
from serving.published import Catalogue, PublishedVersion, newest_version

PASSAGES = [
    {"document_id": "book", "title": "Book", "text": "sea ship", "passage": 0},
    {"document_id": "book", "title": "Book", "text": "bread", "passage": 1},
    {"document_id": "song", "title": "", "text": "star\nmoon", "passage": 0},
]


def test_the_newest_version_is_the_largest_number_and_not_the_last_name(tmp_path):
    for name in ("9", "10", "staging-11", "12.old", "013", "١٤"):
        (tmp_path / name).mkdir()
    (tmp_path / "99").write_text("a file is no version")
    assert newest_version(tmp_path) == 10


def test_a_folder_without_versions_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no version: publish one first"):
        newest_version(tmp_path / "nowhere")


def test_rows_become_documents_with_every_column(tmp_path):
    catalogue = Catalogue.open(publish(tmp_path))
    assert catalogue.n_rows == 4
    assert catalogue.documents([3, 0]) == [DOCUMENTS[3], DOCUMENTS[0]]


def test_ids_lead_back_to_rows_and_strangers_nowhere(tmp_path):
    catalogue = Catalogue.open(publish(tmp_path))
    assert [catalogue.row_of(each["document_id"]) for each in DOCUMENTS] == [0, 1, 2, 3]
    assert catalogue.row_of("nobody") is None
    assert catalogue.rows_in(["sky", "nobody", "harbour", "sky"]).tolist() == [0, 3]


def test_ids_that_share_a_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.published.hash", lambda text: 1, raising=False)
    catalogue = Catalogue.open(publish(tmp_path))
    assert [catalogue.row_of(each["document_id"]) for each in DOCUMENTS] == [0, 1, 2, 3]
    assert catalogue.row_of("nobody") is None


def test_a_document_in_passages_has_several_rows(tmp_path):
    catalogue = Catalogue.open(publish(tmp_path, documents=PASSAGES))
    assert catalogue.has_passages
    assert catalogue.rows_of("book") == [0, 1]
    assert catalogue.row_of("song") == 2
    assert not Catalogue.open(publish(tmp_path / "plain")).has_passages


def test_a_document_without_a_title_has_its_first_line_for_one(tmp_path):
    assert Catalogue.open(publish(tmp_path, documents=PASSAGES)).titles().to_pylist() == [
        "Book",
        "Book",
        "star",
    ]


def test_words_are_looked_for_in_title_and_text_and_a_title_is_not_said_twice(tmp_path):
    documents = [
        {"document_id": "a", "title": "Harbour", "text": "sea"},
        {"document_id": "b", "title": "Sea", "text": "Sea and ship"},
        {"document_id": "c", "title": None, "text": "star"},
    ]
    catalogue = Catalogue.open(publish(tmp_path, documents=documents))
    assert list(catalogue.texts()) == ["Harbour\nsea", "Sea and ship", "star"]


def test_a_row_beyond_the_table_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="has 4 rows, the index found row 4"):
        Catalogue.open(publish(tmp_path)).documents([4])


def test_stored_rows_are_read_and_those_of_another_index_refused(tmp_path):
    version = publish(tmp_path)
    np.testing.assert_array_equal(Catalogue.open(version).rows, rows_of(DOCUMENTS))
    np.save(version.folder / "assets.extra" / "rows.npy", np.zeros((3, DIM), np.float32))
    with pytest.raises(ArtifactError, match=r"is float32 \(3, 8\), wanted float32 \(4, 8\)"):
        Catalogue.open(version)
    assert Catalogue.open(publish(tmp_path / "older", has_rows=False)).rows is None


def test_languages_are_counted_and_their_rows_found(tmp_path):
    spoken = ["ko", "en", "en", None]
    documents = [each | {"language": one} for each, one in zip(DOCUMENTS, spoken, strict=True)]
    catalogue = Catalogue.open(publish(tmp_path, documents=documents))
    assert catalogue.languages == ["en", "ko"]
    assert catalogue.rows_in_language("en").tolist() == [1, 2]
    assert Catalogue.open(publish(tmp_path / "without")).languages == []


def test_what_was_read_together_comes_by_readers_then_sessions_then_row(tmp_path):
    together = [
        ("harbour", "sky", 3, 4),
        ("harbour", "voyage", 5, 5),
        ("harbour", "loaf", 3, 9),
        ("sky", "loaf", 4, 4),
    ]
    catalogue = Catalogue.open(publish(tmp_path, co_read=[*together, ("harbour", "gone", 9, 9)]))
    found = [(each["row"], each["n_readers"], each["n_sessions"]) for each in catalogue.co_read(0)]
    assert found == [(1, 5, 5), (2, 3, 9), (3, 3, 4)]
    assert catalogue.co_read(1) == []


def test_a_version_that_was_made_without_them_has_no_co_reading(tmp_path):
    assert Catalogue.open(publish(tmp_path)).co_read(0) == []


def test_a_manifest_that_is_no_object_is_refused_in_a_line(tmp_path):
    version = publish(tmp_path)
    (version.folder / "assets.extra" / "manifest.json").write_text("[]")
    with pytest.raises(ArtifactError, match="holds no JSON object"):
        PublishedVersion(tmp_path / "models" / "index", 7)


def test_ids_of_many_that_the_version_holds_are_found_together(tmp_path):
    catalogue = Catalogue.open(publish(tmp_path))
    assert sorted(catalogue.among(["sky", "nobody", "harbour"])) == ["harbour", "sky"]
    assert catalogue.among(frozenset()) == []


def test_where_the_copy_of_the_documents_cannot_be_written_the_folder_s_variable_is_named(
    tmp_path, monkeypatch
):
    version = publish(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    with pytest.raises(ArtifactError, match=r"documents.parquet: its copy cannot be written .* as TMPDIR$"):
        Catalogue.open(version)


def test_a_full_temporary_folder_is_named_alike_and_left_empty(tmp_path, monkeypatch):
    version = publish(tmp_path)
    (tmp_path / "full").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes of a file
    try:
        with pytest.raises(ArtifactError, match="another folder as TMPDIR"):
            Catalogue.open(version)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "full").iterdir())


def test_documents_that_cannot_be_read_are_no_fault_of_the_temporary_folder(tmp_path):
    version = publish(tmp_path)
    path = version.folder / "assets.extra" / "documents.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)  # of the first page; the footer stays
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"documents.parquet: .*; publish the version again$"):
        Catalogue.open(version)


def test_stored_rows_stay_as_they_were_read_whatever_becomes_of_the_file(tmp_path):
    version = publish(tmp_path)
    catalogue = Catalogue.open(version)
    with (version.folder / "assets.extra" / "rows.npy").open("r+b") as file:
        file.truncate(0)  # of a mapped file, each look would end the process
    np.testing.assert_array_equal(catalogue.rows, rows_of(DOCUMENTS))
    with pytest.raises(ArtifactError, match=r"rows.npy cannot be read: .*; publish the version again"):
        Catalogue.open(version)


@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan"), (0.0, "0"), (3.0, "[35]")])
def test_stored_rows_that_are_no_unit_vectors_are_refused(tmp_path, value, said):
    version = publish(tmp_path)
    rows = rows_of(DOCUMENTS)
    rows[2] = value * np.eye(DIM)[0]
    np.save(version.folder / "assets.extra" / "rows.npy", rows)
    with pytest.raises(ArtifactError, match=rf"rows.npy: row 2 has length {said}.*, wanted 1"):
        Catalogue.open(version)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("document_id", [1, 2], "document_id is int64, wanted text"),
        ("document_id", ["a", None], "a document_id is missing"),
        ("text", [1.5, 2.5], "text is double, wanted text"),
        ("title", [["a"], ["b"]], "title is list.*, wanted text"),
        ("language", [1, 2], "language is int64, wanted text"),
        ("threshold", ["high", "low"], "threshold is string, wanted numbers"),
    ],
)
def test_a_table_of_wrong_values_is_refused_with_its_column(tmp_path, column, values, said):
    documents = [{"document_id": name, "text": name} for name in "ab"]
    version = publish(tmp_path, documents=documents)
    table = [each | {column: value} for each, value in zip(documents, values, strict=True)]
    pq.write_table(pa.Table.from_pylist(table), version.folder / "assets.extra" / "documents.parquet")
    with pytest.raises(ArtifactError, match=rf"documents.parquet: {said}"):
        Catalogue.open(version)


def test_a_table_without_texts_is_refused_and_columns_of_nothing_are_taken(tmp_path):
    documents = [{"document_id": "a", "text": "b", "title": None, "language": None, "threshold": None}]
    version = publish(tmp_path, documents=documents)
    assert Catalogue.open(version).documents([0]) == documents
    pq.write_table(pa.table({"document_id": ["a"]}), version.folder / "assets.extra" / "documents.parquet")
    with pytest.raises(ArtifactError, match="has no column text"):
        Catalogue.open(version)
