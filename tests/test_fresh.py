"""Fresh documents: what is acknowledged stays, the fresh text wins, and a published version takes over."""

import json
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.errors import ArtifactError, BusyError, InputError
from serving.errors import ServingError
from serving.fresh import FreshDocuments

ROOT = Path(__file__).parents[1]
EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def opened(folder: Path, **settings) -> FreshDocuments:
    return FreshDocuments.open(folder, 2, "encoder one", **settings)


@pytest.fixture
def fresh(tmp_path):
    with opened(tmp_path) as made:
        yield made


def document(document_id: str, text: str = "some words", **fields) -> dict:
    return {"document_id": document_id, "text": text, **fields}


def rows(*vectors) -> np.ndarray:
    return np.array(vectors, np.float32)


def found(fresh: FreshDocuments, query, k: int = 10, **settings) -> list[tuple[float, str]]:
    (answer,) = fresh.search(rows(query), k, **settings)
    return [(score, each["document_id"]) for score, each in answer]


def version(**texts: str | list[str]):
    """What a published version says of an id: the texts of its rows."""
    return lambda name: [texts[name]] if isinstance(texts.get(name), str) else texts.get(name, ())


# --- Searching -------------------------------------------------------------------------------------------


def test_what_was_added_is_found_at_once_with_its_fields(fresh):
    fresh.add([document("a", title="A", url="/a", pages=3), document("b")], rows(EAST, NORTH))
    assert fresh.search(rows([0.6, 0.8], EAST), 1) == [
        [(pytest.approx(0.8), document("b"))],
        [(1.0, document("a", title="A", url="/a", pages=3))],
    ]


def test_an_empty_index_finds_nothing_and_hides_nothing(fresh):
    assert fresh.search(rows(EAST, NORTH), 3) == [[], []]
    assert (fresh.n_documents, fresh.hides, fresh.stale()) == (0, frozenset(), [])


def test_an_id_added_again_replaces_the_document(fresh):
    fresh.add([document("a", "old", url="/old")], rows(EAST))
    fresh.add([document("a", "new")], rows(NORTH))
    assert fresh.search(rows(NORTH), 5) == [[(1.0, document("a", "new"))]]
    assert fresh.n_documents == 1


def test_the_index_s_answers_for_fresh_and_for_removed_ids_are_hidden(fresh):
    fresh.add([document("a"), document("b")], rows(EAST, EAST))
    fresh.remove(["b", "only published"])
    assert fresh.removed == {"b", "only published"}
    assert fresh.hides == {"a", "b", "only published"}
    assert found(fresh, EAST) == [(1.0, "a")]


def test_a_removed_document_can_come_back(fresh):
    fresh.remove(["a"])
    fresh.add([document("a")], rows(EAST))
    assert (fresh.removed, fresh.hides) == (frozenset(), {"a"})


def test_a_change_adds_and_removes_at_once_or_does_neither(tmp_path):
    with opened(tmp_path, max_documents=1) as fresh:
        fresh.add([document("a")], rows(EAST))
        with pytest.raises(ServingError, match="2 would be held and 1 may be"):
            fresh.change([document("b")], rows(EAST), ["c"])
        assert fresh.hides == {"a"}
        fresh.change([document("b")], rows(NORTH), ["a"])  # one makes room for the other
        assert (fresh.documents(), fresh.removed) == ([document("b")], {"a"})


def test_what_is_added_and_removed_in_one_request_is_refused(fresh):
    for refuse in (fresh.check, lambda documents, ids: fresh.change(documents, rows(EAST), ids)):
        with pytest.raises(InputError, match="removal 2 of 2: 'a' is to be added in the same request"):
            refuse([document("a")], ["b", "a"])
    assert fresh.hides == frozenset()


def test_a_check_changes_nothing(fresh):
    fresh.check([document("a")], ["b"])
    with pytest.raises(InputError, match="document 1 of 1"):
        fresh.check([document("a", "")])
    assert fresh.hides == frozenset()


def test_a_document_below_its_own_threshold_takes_nobody_s_place(fresh):
    fresh.add([document("a", threshold=0.99), document("b", threshold=None)], rows([0.96, 0.28], [0.6, 0.8]))
    assert [name for _, name in found(fresh, EAST, k=1)] == ["b"]
    assert [name for _, name in found(fresh, [0.96, 0.28], k=1)] == ["a"]


def test_a_filter_takes_nobody_s_place_either(fresh):
    fresh.add([document("a", language="en"), document("b", language="ko")], rows(EAST, NORTH))
    assert found(fresh, EAST, k=1, keep=lambda each: each["language"] == "ko") == [(0.0, "b")]


def test_equal_scores_are_ordered_by_id_however_they_came(fresh):
    fresh.add([document("c"), document("a")], rows(EAST, EAST))
    fresh.add([document("b")], rows(EAST))
    assert [name for _, name in found(fresh, EAST, k=2)] == ["a", "b"]


def test_an_answer_can_be_changed_without_changing_the_index(fresh):
    fresh.add([document("a")], rows(EAST))
    fresh.search(rows(EAST), 1)[0][0][1]["text"] = "changed"
    assert fresh.document("a") == document("a")
    assert fresh.document("b") is None


@pytest.mark.parametrize("shape", [(2,), (1, 3)])
def test_queries_of_another_width_are_refused(fresh, shape):
    with pytest.raises(ValueError, match=r"wanted \(n, 2\)"):
        fresh.search(np.zeros(shape, np.float32), 1)


@settings(max_examples=25)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=2), st.tuples(*[st.integers(-3, 3)] * 2), max_size=8),
    st.tuples(*[st.integers(-3, 3)] * 2),
    st.integers(0, 9),
)
def test_search_is_the_definition(tmp_path_factory, vectors, query, k):
    # small whole numbers: every sum is exact in float32, and many scores are equal
    with opened(tmp_path_factory.mktemp("fresh")) as fresh:
        fresh.add([document(name) for name in vectors], rows(*vectors.values()).reshape(-1, 2))
        scores = {name: float(np.dot(vector, query)) for name, vector in vectors.items()}
        wanted = sorted((-score, name) for name, score in scores.items())[:k]
        assert found(fresh, query, k) == [(-score, name) for score, name in wanted]


def test_readers_see_whole_additions_while_a_writer_adds(fresh):
    # each addition replaces both documents: a reader that saw half of one would see two texts
    fresh.add([document("a", "0"), document("b", "0")], rows(EAST, EAST))
    seen, ended = [], threading.Event()

    def read() -> None:
        while not ended.is_set():
            (answer,) = fresh.search(rows(EAST), 2)
            seen.append({each["text"] for _, each in answer})

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 60):
        fresh.add([document("a", str(n)), document("b", str(n))], rows(EAST, EAST))
    ended.set()
    reader.join()
    assert {len(texts) for texts in seen} == {1}


# --- What may be added -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"text": "x"}, "document 2 of 2: its document_id is not there, wanted some letters"),
        ({"document_id": 7, "text": "x"}, "its document_id is a number"),
        ({"document_id": " \u200b", "text": "x"}, "its document_id is empty"),
        (
            {"document_id": "x" * 1001, "text": "x"},
            "its document_id has 1,001 characters, wanted at most 1,000",
        ),
        ({"document_id": "b"}, "document 2 of 2 ('b'): its text is not there, wanted words to be found by"),
        ({"document_id": "b", "text": " \n"}, "its text is empty"),
        ({"document_id": "b", "text": ["x"]}, "its text is a list"),
        ({"document_id": "b", "text": "x" * 21}, "its text has 21 characters, wanted at most 20"),
        ({"document_id": "b", "text": "x\ud800"}, r"its text has half a character at place 1 ('\ud800')"),
        ({"document_id": "\udc00b", "text": "x"}, "document 2 of 2: its document_id has half a character"),
        ({"document_id": "b", "text": "x", "tags": ["\ud800"]}, "('b') has half a character"),
        ({"document_id": "b", "text": "x", "pages": float("nan")}, "cannot be written as JSON"),
        ({"document_id": "b", "text": "x", "title": 3}, "its title is a number, wanted text or nothing"),
        ({"document_id": "b", "text": "x", "threshold": 1.5}, "its threshold is 1.5, wanted a score from -1"),
        ({"document_id": "b", "text": "x", "threshold": True}, "its threshold is true or false"),
        ({"document_id": "b", "text": "x", "note": "x" * 70_000}, "bytes as JSON, wanted at most 65,536"),
        ({"document_id": "a", "text": "x"}, "('a') has the id of an earlier one in the same request"),
        ("b", "document 2 of 2 is text, wanted an object"),
    ],
)
def test_a_document_that_cannot_be_used_is_named_and_none_is_added(tmp_path, bad, said):
    with opened(tmp_path, max_text_chars=20) as fresh:
        with pytest.raises(InputError) as raised:
            fresh.add([document("a"), bad], rows(EAST, EAST))
        assert said in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
        assert fresh.n_documents == 0


@pytest.mark.parametrize("name", ["", 7, "\ud800"])
def test_a_removal_that_is_no_id_is_named_and_none_is_removed(fresh, name):
    with pytest.raises(InputError, match="removal 2 of 2"):
        fresh.remove(["a", name])
    assert fresh.removed == frozenset()


@pytest.mark.parametrize("vectors", [rows(EAST), np.zeros((2, 3)), rows(EAST, [np.nan, 0])])
def test_vectors_that_are_not_the_documents_are_refused(fresh, vectors):
    with pytest.raises(ValueError, match=r"wanted finite ones of shape \(2, 2\)"):
        fresh.add([document("a"), document("b")], vectors)


def test_a_full_index_says_what_to_do_and_keeps_what_it_has(tmp_path):
    with opened(tmp_path, max_documents=2) as fresh:
        fresh.add([document("a"), document("b")], rows(EAST, EAST))
        with pytest.raises(ServingError, match=r"3 would be held and 2 may be; publish a version") as raised:
            fresh.add([document("a", "new"), document("c")], rows(NORTH, NORTH))
        assert raised.value.status == 507
        assert found(fresh, EAST) == [(1.0, "a"), (1.0, "b")]
        fresh.add([document("a", "new")], rows(NORTH))  # one for another
        fresh.remove(["a"])
        fresh.add([document("c")], rows(EAST))
        assert found(fresh, EAST) == [(1.0, "b"), (1.0, "c")]


def test_removals_are_bounded_too(tmp_path):
    with opened(tmp_path, max_documents=2) as fresh:
        fresh.remove(["a", "b"])
        fresh.remove(["b"])
        with pytest.raises(ServingError, match=r"fresh removals: 3 would be held"):
            fresh.remove(["c"])


def test_a_limit_lowered_later_loses_nothing(tmp_path):
    with opened(tmp_path) as fresh:
        fresh.add([document("a"), document("b")], rows(EAST, EAST))
    with opened(tmp_path, max_documents=1) as fresh:
        assert fresh.n_documents == 2
        fresh.add([document("b", "new")], rows(NORTH))
        with pytest.raises(ServingError):
            fresh.add([document("c")], rows(EAST))


# --- Versions and encoders -------------------------------------------------------------------------------


def test_a_version_that_holds_the_same_text_takes_over(fresh):
    fresh.add([document("same"), document("older"), document("unknown")], rows(EAST, EAST, EAST))
    assert fresh.published(version(same="some  words\n", older="other words")) == 1
    assert fresh.hides == {"older", "unknown"}


def test_texts_are_the_same_however_their_accents_are_composed(fresh):
    fresh.add([document("a", "cafe\u0301 한국")], rows(EAST))
    assert fresh.published(version(a="caf\u00e9 \u1112\u1161\u11ab\u1100\u116e\u11a8")) == 1


@pytest.mark.parametrize(
    ("text", "passages", "is_same"),
    [
        ("one two  three four five", ["one two three", "three four five"], True),
        ("one two three four five", ["one two", "three four", "five"], True),
        ("one two three four five", ["one two", "four five"], False),  # a word is left out
        ("one two three four five", ["one two three"], False),
        ("one two three four five", ["three four five"], False),
        ("one two three four five", ["three four five", "one two three"], False),
        ("one two three four five", [], False),
        ("one two one", ["one two", "one"], True),
        ("one two one three one", ["one two", "one"], False),  # it ends as the text does, but not there
        ("東京都の天気", ["東京都", "の天気"], True),
    ],
)
def test_a_document_in_passages_is_the_same_when_they_make_its_text(fresh, text, passages, is_same):
    fresh.add([document("a", text)], rows(EAST))
    assert fresh.published(version(a=passages)) == is_same


def test_a_removal_stays_until_a_version_lacks_the_id(fresh):
    fresh.remove(["still there", "gone"])
    assert fresh.published(version(**{"still there": "x"})) == 1
    assert fresh.removed == {"still there"}


def test_of_two_served_versions_both_must_hold_a_document_and_neither_a_removed_one(fresh):
    fresh.add([document("both"), document("one")], rows(EAST, EAST))
    fresh.remove(["x", "y"])
    one = version(both="some words", one="some words", x="x")
    assert fresh.published(one, version(both="some words")) == 2
    assert fresh.hides == {"one", "x"}


def test_without_a_version_nothing_is_dropped(fresh):
    fresh.add([document("a")], rows(EAST))
    fresh.remove(["b"])
    assert fresh.published() == 0
    assert fresh.hides == {"a", "b"}


def test_a_document_changed_while_a_version_is_compared_stays(fresh):
    fresh.add([document("a")], rows(EAST))

    def texts(name):  # the change comes between the look at the version and the dropping
        fresh.add([document("a", "newer words")], rows(NORTH))
        return ["some words"]

    fresh.published(texts)
    assert fresh.document("a") == document("a", "newer words")


def test_vectors_of_another_encoder_are_not_searched_until_encoded_again(tmp_path):
    with opened(tmp_path) as fresh:
        fresh.add([document("a"), document("b")], rows(EAST, NORTH))
    with FreshDocuments.open(tmp_path, 3, "encoder two") as fresh:
        assert found(fresh, [1, 0, 0]) == []
        assert fresh.stale() == [document("a"), document("b")]
        assert fresh.hides == {"a", "b"}
        fresh.add(fresh.stale()[:1], rows([0, 0, 1]))
        assert found(fresh, [0, 0, 1]) == [(1.0, "a")]
        assert fresh.stale() == [document("b")]


def test_two_encoders_see_the_same_documents_side_by_side(fresh):
    fresh.add([document("a"), document("b")], rows(EAST, EAST))
    after = fresh.under(3, "encoder two")
    after.encoded(after.stale(), rows([1, 0, 0], [0, 1, 0]))
    assert found(fresh, EAST) == [(1.0, "a"), (1.0, "b")]  # its vectors are still there
    after.add([document("a", "new")], rows([0, 0, 1]))
    assert found(fresh, EAST) == [(1.0, "b")]  # those of an old text are not
    assert fresh.stale() == [document("a", "new")]
    fresh.remove(["b"])
    assert found(after, [0, 1, 0]) == [(0.0, "a")]


def test_a_new_text_takes_every_encoder_s_vector_off_the_disk(tmp_path):
    with opened(tmp_path) as fresh:
        fresh.add([document("a")], rows(EAST))
        fresh.under(3, "encoder two").add([document("a", "new")], rows([0, 0, 1]))
    with opened(tmp_path) as fresh:
        assert found(fresh, EAST) == []
        assert fresh.stale() == [document("a", "new")]


def test_what_changes_while_it_is_encoded_keeps_the_change(fresh):
    fresh.add([document("a"), document("b"), document("c")], rows(EAST, EAST, EAST))
    after = fresh.under(2, "encoder two")
    stale = after.stale()
    fresh.add([document("a", "newer words")], rows(EAST))
    fresh.remove(["b"])
    after.encoded(stale, rows(NORTH, NORTH, NORTH))
    assert after.documents() == [document("a", "newer words"), document("c")]
    assert after.stale() == [document("a", "newer words")]
    assert found(after, NORTH) == [(1.0, "c")]


def test_going_back_to_the_encoder_before_encodes_nothing_again(tmp_path):
    with opened(tmp_path) as fresh:
        fresh.add([document("a")], rows(EAST))
    for encoder in ("encoder two", "encoder three"):
        FreshDocuments.open(tmp_path, 2, encoder).close()
    with opened(tmp_path) as fresh:
        assert fresh.stale() == []
        assert fresh.vector("a").tolist() == EAST


def test_vectors_that_no_recent_encoder_made_are_forgotten(tmp_path):
    with opened(tmp_path) as fresh:
        fresh.add([document("a")], rows(EAST))
    for number in range(3):  # KEPT_ENCODERS
        FreshDocuments.open(tmp_path, 2, f"later {number}").close()
    with opened(tmp_path) as fresh:
        assert fresh.stale() == [document("a")]
        assert fresh.vector("a") is None


def test_an_encoder_in_use_is_not_forgotten_however_many_come_after(fresh):
    fresh.add([document("a")], rows(EAST))
    for number in range(5):
        fresh.under(2, f"later {number}")
    assert found(fresh.under(2, "encoder one"), EAST) == [(1.0, "a")]


# --- By words and by titles ------------------------------------------------------------------------------


def test_a_fresh_title_is_found_by_its_beginning_until_it_is_removed(fresh):
    assert fresh.titled("har", 5) == []
    fresh.add([document("a", title="Harbour"), document("b", "harp\nand words")], rows(EAST, NORTH))
    assert [each["document_id"] for _, each in fresh.titled("har", 5)] == ["b", "a"]  # the shorter one first
    assert [each["document_id"] for _, each in fresh.titled("harb", 1)] == ["a"]
    fresh.remove(["a"])
    assert fresh.titled("harbo", 5) == []


def test_words_are_counted_in_title_and_text_and_a_filter_takes_nobody_s_place(fresh):
    fresh.add(
        [document("a", "sea sea", title="Ship"), document("b", "sea"), document("c", "sun")], np.eye(3, 2)
    )

    def scores_of(words):  # how often a document has "sea"
        assert words.lengths.tolist() == [3, 1, 1]
        is_sea = words.hashes == hash("sea")
        return np.bincount(words.owners[is_sea], words.counts[is_sea], 3)

    def ids(**more):
        return [(score, each["document_id"]) for score, each in fresh.by_words(scores_of, 1, **more)]

    assert ids() == [(2.0, "a")]
    assert ids(keep=lambda each: each["document_id"] != "a") == [(1.0, "b")]


# --- On the disk -----------------------------------------------------------------------------------------


def test_another_process_s_folder_is_refused(fresh, tmp_path):
    with pytest.raises(BusyError, match="another process keeps its fresh documents there; stop it, or give"):
        opened(tmp_path)


def test_an_unknown_format_is_refused_by_number(tmp_path):
    opened(tmp_path).close()
    with sqlite3.connect(tmp_path / "fresh.sqlite") as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    for _ in range(2):  # and the folder is given back
        with pytest.raises(ArtifactError, match="has format 7, and format 1 is known here"):
            opened(tmp_path)


def test_another_program_s_database_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "fresh.sqlite") as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    before = (tmp_path / "fresh.sqlite").read_bytes()
    with pytest.raises(ArtifactError, match="another program's database"):
        opened(tmp_path)
    assert (tmp_path / "fresh.sqlite").read_bytes() == before


def test_a_damaged_database_is_one_line(tmp_path):
    (tmp_path / "fresh.sqlite").write_bytes(b"no database, but long enough to be read as one" * 100)
    with pytest.raises(
        ArtifactError, match=r"fresh\.sqlite cannot be read: file is not a database; put a copy"
    ):
        opened(tmp_path)


def test_a_database_that_was_made_but_never_filled_is_filled(tmp_path):
    (tmp_path / "fresh.sqlite").touch()  # a kill between the two
    with opened(tmp_path) as fresh:
        assert fresh.n_documents == 0


def test_every_change_is_synced_to_a_write_ahead_log(fresh):
    # a kill between two writes of a commit, or a power cut, cannot be timed; SQLite's settings can be asked
    ask = fresh._store._connection.execute
    assert ask("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ask("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_full_disk_changes_nothing_and_says_so(fresh, tmp_path):
    fresh.add([document("a")], rows(EAST))
    pages = fresh._store._connection.execute("PRAGMA page_count").fetchone()[0]
    fresh._store._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own full disk
    with pytest.raises(ServingError, match=r"nothing was changed: .*full; make room on the disk") as raised:
        fresh.add([document(f"b{n}", "x" * 5000) for n in range(20)], np.zeros((20, 2)))
    assert raised.value.status == 507
    assert fresh.documents() == [document("a")]
    fresh.close()
    with opened(tmp_path) as again:
        assert again.documents() == [document("a")]


class AnyOrder(RuleBasedStateMachine):
    """Any additions, removals, publications and restarts, against a dict and a set."""

    folders: object = None  # set by the test below
    ids = st.sampled_from("abcd")
    texts = st.sampled_from(["one", "two"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = AnyOrder.folders.mktemp("any_order")
        self.fresh = opened(self.folder, max_documents=3)
        self.held: dict[str, str] = {}
        self.removed: set[str] = set()

    @rule(texts=st.dictionaries(ids, texts, max_size=3))
    def add(self, texts):
        documents = [document(name, text) for name, text in texts.items()]
        # the direction tells the text: a vector of a replaced text would be seen
        vectors = rows(*[EAST if text == "one" else NORTH for text in texts.values()]).reshape(-1, 2)
        if len(self.held.keys() | texts.keys()) > 3:
            with pytest.raises(ServingError):
                self.fresh.add(documents, vectors)
            return
        self.fresh.add(documents, vectors)
        self.held.update(texts)
        self.removed -= texts.keys()

    @rule(names=st.lists(ids, max_size=3))
    def remove(self, names):
        if len(self.removed.union(names)) > 3:
            with pytest.raises(ServingError):
                self.fresh.remove(names)
            return
        self.fresh.remove(names)
        self.held = {name: text for name, text in self.held.items() if name not in names}
        self.removed.update(names)

    @rule(texts=st.dictionaries(ids, texts, max_size=4))
    def publish(self, texts):
        self.fresh.published(version(**texts))
        self.held = {name: text for name, text in self.held.items() if texts.get(name) != text}
        self.removed &= texts.keys()

    @rule()
    def restart(self):
        self.fresh.close()
        self.fresh = opened(self.folder, max_documents=3)

    @invariant()
    def as_expected(self):
        assert {each["document_id"]: each["text"] for each in self.fresh.documents()} == self.held
        assert self.fresh.removed == self.removed
        assert self.fresh.hides == self.removed | self.held.keys()
        ones = {name for score, name in found(self.fresh, EAST) if score == 1}
        assert ones == {name for name, text in self.held.items() if text == "one"}
        assert self.fresh.stale() == []

    def teardown(self):
        self.fresh.close()


def test_any_order_of_changes_and_restarts_keeps_what_was_acknowledged(tmp_path_factory):
    from hypothesis.stateful import run_state_machine_as_test

    AnyOrder.folders = tmp_path_factory
    run_state_machine_as_test(
        AnyOrder, settings=settings(max_examples=15, stateful_step_count=15, deadline=None)
    )


# One process starts a writer again and again, lets it acknowledge a few changes, and kills it. Each change is
# of four documents, or of two removals; what add() and remove() returned from is written to a file at once.
KILLED_WRITERS = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from serving.fresh import FreshDocuments

folder, acknowledged, n_writers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
random.seed(7)

def write(writer):
    log = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    fresh = FreshDocuments.open(folder, 4, "encoder one", max_documents=1_000_000)
    os.write(log, f"{json.dumps(['opened', writer])}\\n".encode())
    for n in range(1_000_000):
        text = f"{writer} {n} " + "long " * 1900
        documents = [{"document_id": f"{writer}.{n}.{part}", "text": text} for part in range(3)]
        documents.append({"document_id": "replaced", "text": text})
        fresh.add(documents, np.full((4, 4), writer * 10_000 + n, np.float32))
        os.write(log, f"{json.dumps(['added', writer, n])}\\n".encode())
        fresh.remove([f"{writer}.{n}.0", f"published {writer}.{n}"])
        os.write(log, f"{json.dumps(['removed', writer, n])}\\n".encode())

def n_acknowledged():
    return os.path.getsize(acknowledged) if os.path.exists(acknowledged) else 0

for writer in range(n_writers):
    before = n_acknowledged()
    child = os.fork()
    if not child:
        write(writer)
    while n_acknowledged() == before:  # until it has opened the folder
        time.sleep(0.0005)
    time.sleep(random.random() * 0.04)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
N_WRITERS = 25


@pytest.mark.slow
def test_what_was_acknowledged_survives_every_kill_and_nothing_is_half_there(tmp_path):
    log = tmp_path / "acknowledged.jsonl"
    command = [sys.executable, "-c", KILLED_WRITERS, str(tmp_path / "fresh"), str(log), str(N_WRITERS)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    added = {(writer, n) for what, writer, *rest in said for n in rest if what == "added"}
    removed = {(writer, n) for what, writer, *rest in said for n in rest if what == "removed"}
    assert len({writer for what, writer, *_ in said if what == "opened"}) == N_WRITERS
    assert len(added) > N_WRITERS  # the writers did write

    with FreshDocuments.open(tmp_path / "fresh", 4, "encoder one", max_documents=1_000_000) as fresh:
        parts: dict[tuple[int, int], set[int]] = {}
        for each in fresh.documents():
            if each["document_id"] != "replaced":
                writer, n, part = map(int, each["document_id"].split("."))
                parts.setdefault((writer, n), set()).add(part)
                assert each["text"] == f"{writer} {n} " + "long " * 1900
                assert set(fresh.vector(each["document_id"]).tolist()) == {writer * 10_000 + n}
        assert added <= parts.keys()
        unacknowledged = parts.keys() - added
        assert len({writer for writer, _ in unacknowledged}) == len(unacknowledged)  # at most its last
        hidden = {(w, n) for w, n in parts if f"published {w}.{n}" in fresh.removed}
        assert removed <= hidden
        for change, held in parts.items():
            assert held == ({1, 2} if change in hidden else {0, 1, 2})
        last = max(parts)
        assert fresh.document("replaced")["text"].startswith(f"{last[0]} {last[1]} ")
        assert fresh.stale() == []
