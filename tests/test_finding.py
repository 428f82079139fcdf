"""From a text to documents: dense and lexical ranks fused, filters, thresholds, fresh ones, relations."""

import asyncio
import math
import threading

import numpy as np
import pytest
from gateway_parts import DIM, DOCUMENTS, ENCODER, WordsEncoding, publish, vector_of

from pipeline.bm25 import bm25_scores
from pipeline.errors import InputError
from serving.finding import MOST, Filter, Finder, _cut, _reciprocal_ranks
from serving.index_backends import RowsIndex
from serving.lexical import Counted, Lexical, counts_of
from serving.published import Catalogue

ROOT2, ROOT5 = 2**0.5, 5**0.5


class CountingRows(RowsIndex):
    """The rows, and how many documents each search asked for, and without which."""

    def __init__(self, *given):
        super().__init__(*given)
        self.asked: list[int] = []
        self.without: list[tuple[str, ...]] = []

    async def search(self, queries, k, **more):
        self.asked.append(k)
        self.without.append(more.get("excluded"))
        return await super().search(queries, k, **more)


def finder_of(folder, documents=DOCUMENTS, fresh=None, lexical=True, encoding=None, **more) -> Finder:
    catalogue = Catalogue.open(publish(folder, documents=documents, **more))
    rows = np.stack([vector_of(each["text"]) for each in documents])
    backend = CountingRows(rows, [each["document_id"] for each in documents])
    words = Lexical.of(catalogue.texts()) if lexical else None
    return Finder(7, catalogue, encoding or WordsEncoding(), backend, words, fresh)


def found(finder, query, k=10, wanted=None, **more):
    return asyncio.run(finder.search(query, k, wanted, **more))


def ids(hits):
    return [hit.document_id for hit in hits]


# --- Dense ----------------------------------------------------------------------------------------


def test_a_text_finds_documents_by_score_and_says_why(tmp_path):
    first, second = found(finder_of(tmp_path), "ship", k=2)
    assert (first.document_id, first.dense_rank, first.lexical, first.lexical_rank) == (
        "voyage",
        1,
        None,
        None,
    )
    assert first.score == first.dense == pytest.approx(2 / ROOT5)
    assert (second.document_id, second.dense) == ("harbour", pytest.approx(1 / ROOT2))
    assert second.document["url"] == "https://example.org/harbour"


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        (Filter(allowed=("harbour", "sky")), ["harbour", "sky"]),
        (Filter(allowed=()), []),
        (Filter(excluded=("voyage",)), ["harbour", "loaf", "sky"]),
        (Filter(minimum_score=0.7), ["voyage", "harbour"]),
        (Filter(minimum_score=0.8), ["voyage"]),
    ],
)
def test_a_filter_holds_for_both_kinds_of_search(tmp_path, wanted, shown):
    finder = finder_of(tmp_path)
    assert ids(found(finder, "ship", wanted=wanted)) == shown
    assert sorted(ids(found(finder, "ship", wanted=wanted, hybrid=True))) == sorted(shown)


def test_a_language_is_looked_for_also_where_it_is_too_large_for_a_list(tmp_path, monkeypatch):
    documents = [each | {"language": "ko" if n < 2 else "en"} for n, each in enumerate(DOCUMENTS)]
    finder = finder_of(tmp_path, documents)
    assert ids(found(finder, "ship", wanted=Filter(language="en"))) == ["loaf", "sky"]
    monkeypatch.setattr("serving.finding.MAX_FILTER_IDS", 1)
    assert ids(found(finder, "ship", k=1, wanted=Filter(language="en"))) == ["loaf"]
    assert ids(found(finder, "ship", wanted=Filter(("sky", "voyage"), language="en"), hybrid=True)) == ["sky"]


def test_a_language_that_the_version_has_not_is_refused_with_those_it_has(tmp_path):
    documents = [each | {"language": "ko"} for each in DOCUMENTS]
    with pytest.raises(InputError, match=r"filter\.language is 'de'; version 7 has ko$"):
        found(finder_of(tmp_path, documents), "ship", wanted=Filter(language="de"))
    with pytest.raises(InputError, match="its documents have no such column"):
        found(finder_of(tmp_path / "plain"), "ship", wanted=Filter(language="de"))


def test_what_is_below_its_threshold_takes_nobodys_place(tmp_path):
    # Twelve documents nearer than "far", each with a threshold that it does not reach.
    near = [{"document_id": f"n{n}", "text": "ship ship sea", "threshold": 0.95} for n in range(12)]
    documents = [*near, {"document_id": "far", "text": "ship sea", "threshold": 0.7}]
    finder = finder_of(tmp_path, documents)
    assert ids(found(finder, "ship", k=1)) == ["far"]
    assert finder.backend.asked[:3] == [2, 8, 32]  # twice k for the thresholds, then four times as many
    assert ids(found(finder, "ship", k=1, hybrid=True)) == ["far"]


def test_an_index_is_never_asked_for_more_than_it_gives(tmp_path):
    near = [{"document_id": f"n{n}", "text": "ship ship sea", "threshold": 0.95} for n in range(12)]
    finder = finder_of(tmp_path, near)
    assert found(finder, "ship", k=10) == []
    assert max(finder.backend.asked) <= MOST


def test_a_document_in_passages_shows_the_one_that_the_query_is_nearest_to(tmp_path):
    documents = [
        {"document_id": "book", "title": "Book", "text": "bread oven", "passage": 0},
        {"document_id": "book", "title": "Book", "text": "sea ship", "passage": 1},
        {"document_id": "note", "title": "Note", "text": "star", "passage": 0},
    ]
    finder = finder_of(tmp_path, documents)
    for hybrid in (False, True):
        first, *others = found(finder, "ship", hybrid=hybrid)
        assert (first.document_id, first.document["passage"]) == ("book", 1)
        assert "book" not in ids(others)


# --- Lexical and hybrid ---------------------------------------------------------------------------


def test_words_score_as_in_the_report(tmp_path):
    texts = ["sea ship", "ship ship sea", "bread oven", "star and more stars of the sky", "한국어 문법"]
    queries = ["ship", "sea star", "bread bread ship", "한국", "nothing"]
    wanted = bm25_scores(queries, texts)(np.arange(len(queries)))
    for line, query in zip(wanted, queries, strict=True):
        rows = [row for row in np.lexsort((np.arange(len(line)), -line)) if line[row] > 0]
        best = Lexical.of(texts).best(query, 10)
        assert [row for row, _ in best] == rows
        np.testing.assert_allclose([score for _, score in best], line[rows], rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_few_postings_and_many_are_summed_alike(share, monkeypatch):
    monkeypatch.setattr("serving.lexical.SPARSE_BELOW", share)
    texts = [f"word{n % 3} common" for n in range(50)]
    best = Lexical.of(texts).best("word1 common", 5)
    assert [row for row, _ in best] == [1, 4, 7, 10, 13]  # of equal scores the earlier rows
    kept = Lexical.of(texts).best("word1 common", 2, lambda rows: rows > 4)
    assert [row for row, _ in kept] == [7, 10]


def test_a_document_beside_the_index_scores_as_though_it_were_a_row_of_it():
    texts = ["sea ship", "ship ship sea", "bread oven", "star and more stars of the sky", "한국어 문법", ""]
    beside = Counted.of([counts_of(text) for text in texts])
    queries = ["ship", "sea star star", "한국", "nothing"]
    wanted = bm25_scores(queries, texts)(np.arange(len(queries)))
    for line, query in zip(wanted, queries, strict=True):
        np.testing.assert_allclose(Lexical.of(texts).scores_of(query, beside), line, rtol=1e-5)


def test_a_word_that_no_row_has_counts_as_one_that_a_single_row_has():
    index = Lexical.of(["sea ship", "sea bread", "sea oven"])
    known, unknown = index.scores_of("ship comet", Counted.of([counts_of("a ship"), counts_of("a comet")]))
    # 1 of 3 rows: ln(1 + 2.5 / 1.5); one of two words, as many as the mean row has: 1 / (1 + 1.5)
    assert known == unknown == pytest.approx(math.log(1 + 2.5 / 1.5) / 2.5)


def test_an_index_of_nothing_scores_documents_beside_it():
    assert Lexical.of([]).scores_of("ship", Counted.of([counts_of("ship")]))[0] > 0
    assert len(Lexical.of(["ship"]).scores_of("ship", Counted.of([]))) == 0


def test_both_ranks_are_fused_as_the_report_fuses_them():
    # a: first and second; b: second and none; c: none and first. Divided by twice 1 / 61.
    scores = _reciprocal_ranks({"a": 0.9, "b": 0.8}, {"c": 5.0, "a": 4.0})
    wanted = {"a": (1 / 61 + 1 / 62), "b": 1 / 62, "c": 1 / 61}
    assert scores == pytest.approx({name: value * 61 / 2 for name, value in wanted.items()})
    assert _reciprocal_ranks({"a": 0.9}, {"a": 1.0})["a"] == pytest.approx(1.0)


def test_a_word_that_the_vector_misses_is_found_and_has_its_dense_score(tmp_path):
    # "Voyage" stands in the title alone; the stand-in encoder maps it to the axis of all other words.
    first, *_ = found(finder_of(tmp_path), "voyage ship", k=2, hybrid=True)
    assert first.document_id == "voyage"
    assert first.lexical_rank == 1
    assert first.dense == pytest.approx(float(vector_of("voyage ship") @ vector_of("ship ship sea")))


def test_what_words_alone_found_keeps_to_thresholds_and_the_least_score(tmp_path):
    documents = [*DOCUMENTS, {"document_id": "wordy", "title": "Voyage", "text": "moon", "threshold": 0.5}]
    finder = finder_of(tmp_path, documents)
    assert "wordy" not in ids(found(finder, "voyage", hybrid=True))
    plain = finder_of(
        tmp_path / "plain", [*DOCUMENTS, {"document_id": "wordy", "title": "Voyage", "text": "moon"}]
    )
    assert "wordy" in ids(found(plain, "voyage", hybrid=True))
    assert "wordy" not in ids(found(plain, "voyage", hybrid=True, wanted=Filter(minimum_score=0.1)))


def test_without_words_hybrid_is_dense(tmp_path):
    first, *_ = found(finder_of(tmp_path, lexical=False), "ship", hybrid=True)
    assert (first.document_id, first.lexical_rank) == ("voyage", None)


# --- Fresh ----------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path):
    from serving.fresh import FreshDocuments

    with FreshDocuments.open(tmp_path / "fresh", DIM, ENCODER) as opened:
        yield opened


def add(fresh, *documents):
    fresh.add(documents, np.stack([vector_of(each["text"]) for each in documents]))


@pytest.mark.parametrize("hybrid", [False, True])
def test_fresh_documents_are_merged_by_score_and_removed_ones_hidden(tmp_path, fresh, hybrid):
    finder = finder_of(tmp_path, fresh=fresh)
    add(fresh, {"document_id": "ferry", "text": "ship", "title": "Ferry"})
    fresh.remove(["harbour"])
    hits = found(finder, "ship", k=2, hybrid=hybrid)
    assert set(ids(hits)) == {"ferry", "voyage"}
    ferry = next(hit for hit in hits if hit.document_id == "ferry")
    assert (ferry.row, ferry.dense, ferry.dense_rank) == (None, pytest.approx(1.0), 1)


def test_a_fresh_document_has_its_rank_by_words_too(tmp_path, fresh):
    finder = finder_of(tmp_path, fresh=fresh)
    add(fresh, {"document_id": "ferry", "text": "ship"})
    first, second, *_ = found(finder, "ship", hybrid=True)
    assert (first.document_id, first.dense_rank, first.lexical_rank) == ("ferry", 1, 1)
    assert first.score == pytest.approx(1.0)
    # "ship" is in 2 of 4 rows, which have 3 words on average: 1 / (1 + 1.5 x (0.25 + 0.75 x 1/3)) of ln 2
    assert first.lexical == pytest.approx(math.log(2) / 1.75)
    assert (second.document_id, second.lexical_rank) == ("voyage", 2)


def test_a_new_name_is_found_by_words_where_the_vector_misses_it(tmp_path, fresh, monkeypatch):
    monkeypatch.setattr("serving.finding.WINDOW", 1)
    finder = finder_of(tmp_path, fresh=fresh)
    add(
        fresh,
        {"document_id": "named", "text": "bread comet"},
        {"document_id": "high", "text": "comet", "threshold": 0.9},
        {"document_id": "near", "text": "ship ship ship sea"},
    )
    hits = {hit.document_id: hit for hit in found(finder, "ship ship sea comet", k=1, hybrid=True)}
    assert list(hits) == ["near"]  # sea and ship by words too
    hits = {hit.document_id: hit for hit in found(finder, "ship comet comet bread", k=1, hybrid=True)}
    [named] = hits.values()
    assert (named.document_id, named.row, named.lexical_rank) == ("named", None, 1)
    assert named.dense == pytest.approx(float(vector_of("ship comet comet bread") @ vector_of("bread comet")))


def test_what_words_alone_found_among_the_fresh_keeps_to_thresholds_and_filters(tmp_path, fresh, monkeypatch):
    monkeypatch.setattr("serving.finding.WINDOW", 1)
    finder = finder_of(tmp_path, fresh=fresh)
    add(fresh, {"document_id": "high", "text": "comet bread", "threshold": 0.9})
    assert "high" not in ids(found(finder, "ship ship comet", hybrid=True))
    add(fresh, {"document_id": "high", "text": "comet bread", "threshold": 0.1})
    assert "high" in ids(found(finder, "ship ship comet", hybrid=True))
    for wanted in (Filter(excluded=("high",)), Filter(minimum_score=0.9)):
        assert "high" not in ids(found(finder, "ship ship comet", wanted=wanted, hybrid=True))


def test_a_fresh_text_takes_the_place_of_the_published_one(tmp_path, fresh):
    finder = finder_of(tmp_path, fresh=fresh)
    add(fresh, {"document_id": "voyage", "text": "bread", "title": "Voyage by bread"})
    [hit] = [hit for hit in found(finder, "ship", hybrid=True) if hit.document_id == "voyage"]
    assert (hit.document["text"], hit.dense) == ("bread", 0.0)


def test_when_many_are_hidden_the_index_leaves_them_out_itself(tmp_path, fresh, monkeypatch):
    monkeypatch.setattr("serving.finding.MAX_HIDDEN", 1)
    finder = finder_of(tmp_path, fresh=fresh)
    fresh.remove(["harbour", "voyage"])
    assert ids(found(finder, "ship", k=2)) == ["loaf", "sky"]
    assert finder.backend.asked == [2]


def test_only_what_the_version_holds_is_kept_from_the_index_and_sorted_once(tmp_path, fresh, monkeypatch):
    monkeypatch.setattr("serving.finding.MAX_HIDDEN", 1)
    finder = finder_of(tmp_path, fresh=fresh)
    fresh.remove(["voyage", "gone long since", "harbour"])
    add(fresh, *({"document_id": f"new {n}", "text": "moon"} for n in range(3)))
    assert ids(found(finder, "bread", k=1)) == ids(found(finder, "oven", k=1)) == ["loaf"]
    first, second = finder.backend.without
    assert first == ("harbour", "voyage")
    assert first is second
    fresh.remove(["sky"])
    found(finder, "ship")
    assert finder.backend.without[-1] == ("harbour", "sky", "voyage")


def test_fresh_documents_are_searched_beside_the_event_loop(tmp_path, fresh):
    class NeverScanned(tuple):
        def __contains__(self, name):
            raise AssertionError(f"{name!r} was looked for in thousands of ids, one after the other")

    finder, search, seen = finder_of(tmp_path, fresh=fresh), fresh.search, []

    def searched(queries, k, keep):
        seen.append((threading.current_thread() is threading.main_thread(), keep is None))
        return search(queries, k, keep)

    fresh.search = searched
    found(finder, "ship")
    assert seen == []  # there is nothing to search
    add(fresh, {"document_id": "ferry", "text": "ship"})
    found(finder, "ship")
    many = NeverScanned(["ferry", "sky"])
    assert ids(found(finder, "ship", wanted=Filter(allowed=many))) == ["ferry", "sky"]
    assert "ferry" not in ids(found(finder, "ship", wanted=Filter(excluded=many)))
    assert seen == [(False, True), (False, False), (False, False)]  # no filter: none is asked of each


def test_a_document_added_while_the_index_is_asked_comes_once(tmp_path, fresh):
    finder = finder_of(tmp_path, fresh=fresh)
    finder._fresh.add([{"document_id": "sky", "text": "star"}], vector_of("star")[np.newaxis])
    good = finder._good

    def meanwhile(answer, scope):
        lines = good(answer, scope)
        add(fresh, {"document_id": "harbour", "text": "ship"})
        return lines

    finder._good = meanwhile
    hits = found(finder, "ship")
    assert [(hit.document_id, hit.row) for hit in hits].count(("harbour", None)) == 1
    assert ids(hits).count("harbour") == 1


def test_a_filter_holds_for_fresh_documents_too(tmp_path, fresh):
    documents = [each | {"language": "en"} for each in DOCUMENTS]
    finder = finder_of(tmp_path, documents, fresh=fresh)
    add(fresh, {"document_id": "f1", "text": "ship", "language": "ko"}, {"document_id": "f2", "text": "ship"})
    assert "f1" not in ids(found(finder, "ship", wanted=Filter(language="en")))
    assert ids(found(finder, "ship", wanted=Filter(allowed=("f2", "sky")))) == ["f2", "sky"]
    assert ids(found(finder, "ship", k=1, wanted=Filter(excluded=("f1", "f2")))) == ["voyage"]


# --- Related --------------------------------------------------------------------------------------


def related(finder, *document_ids, k=10):
    return asyncio.run(finder.related(list(document_ids), k))


def test_related_documents_are_those_near_and_not_the_document_itself(tmp_path):
    first, *rest = related(finder_of(tmp_path), "harbour")
    assert first.document_id == "voyage"
    assert first.score == pytest.approx(3 / (ROOT2 * ROOT5))
    assert "harbour" not in ids(rest)


def test_the_latest_document_counts_most_and_scores_are_summed(tmp_path):
    documents = [*DOCUMENTS, {"document_id": "ship", "text": "ship"}, {"document_id": "oven", "text": "oven"}]
    finder = finder_of(tmp_path, documents)
    after_ship = related(finder, "ship", "oven")
    assert ids(after_ship)[:2] == ["voyage", "harbour"]
    # voyage: 1 x 2/sqrt 5 of ship's and 0.7 x 0 of oven's, as a share of 1.7
    assert after_ship[0].score == pytest.approx(2 / ROOT5 / 1.7, rel=1e-5)
    assert ids(related(finder, "oven", "ship"))[0] == "loaf"


def test_without_stored_rows_the_texts_are_encoded(tmp_path):
    with_rows = related(finder_of(tmp_path / "a"), "harbour")
    without = related(finder_of(tmp_path / "b", has_rows=False), "harbour")
    assert [(hit.document_id, round(hit.score, 5)) for hit in with_rows] == [
        (hit.document_id, round(hit.score, 5)) for hit in without
    ]


def test_what_readers_had_in_the_same_session_is_fused_and_said(tmp_path):
    finder = finder_of(tmp_path, co_read=[("harbour", "sky", 5, 6), ("sky", "harbour", 5, 6)])
    hits = {hit.document_id: hit for hit in related(finder, "harbour")}
    assert list(hits)[:2] == ["sky", "voyage"] or list(hits)[:2] == ["voyage", "sky"]
    # sky is third by meaning (voyage, loaf and sky: the last two tie at 0) and first by sessions
    assert hits["sky"].score > hits["loaf"].score
    [told] = hits["sky"].sessions
    assert told == {"document_id": "harbour", "title": "Harbour", "n_readers": 5, "n_sessions": 6}


def test_a_search_says_which_results_were_read_together(tmp_path):
    finder = finder_of(tmp_path, co_read=[("harbour", "voyage", 4, 4), ("harbour", "sky", 9, 9)])
    by_id = {hit.document_id: hit for hit in found(finder, "ship", k=2)}
    assert [each["document_id"] for each in by_id["harbour"].sessions] == ["voyage"]  # sky is not shown
    assert by_id["voyage"].sessions == []


def test_a_fresh_document_can_be_what_others_are_related_to(tmp_path, fresh):
    finder = finder_of(tmp_path, fresh=fresh)
    add(fresh, {"document_id": "ferry", "text": "ship"})
    assert ids(related(finder, "ferry"))[0] == "voyage"


def test_a_fresh_document_s_vector_is_not_made_again(tmp_path, fresh):
    class Encoded(WordsEncoding):
        async def documents(self, texts):
            raise AssertionError(f"{texts} were encoded when they were added")

    finder = finder_of(tmp_path, fresh=fresh, encoding=Encoded())
    add(fresh, {"document_id": "ferry", "text": "ship"})
    assert ids(related(finder, "ferry"))[0] == "voyage"


def test_a_fresh_document_that_waits_for_the_version_s_encoder_is_encoded_for_its_neighbours(tmp_path, fresh):
    fresh.under(DIM, "another encoder").add(
        [{"document_id": "ferry", "text": "ship"}], vector_of("bread")[None]
    )
    assert ids(related(finder_of(tmp_path, fresh=fresh), "ferry"))[0] == "voyage"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("harbour", "nobody"), "document_ids: version 7 has no document 'nobody'"),
        ((), "document_ids has 0 documents; wanted 1 to 50"),
    ],
)
def test_what_nothing_is_related_to_is_refused_by_name(tmp_path, asked, said):
    with pytest.raises(InputError, match=said):
        related(finder_of(tmp_path), *asked)


# --- Context --------------------------------------------------------------------------------------


def context(finder, query, max_tokens):
    return asyncio.run(finder.context(query, max_tokens))


def test_passages_fill_the_budget_best_first_and_none_is_cut(tmp_path):
    passages, counted_by = context(finder_of(tmp_path), "ship", 5)
    assert counted_by == "the encoder's tokenizer"
    assert [(each.document_id, each.n_tokens) for each in passages] == [("voyage", 3), ("harbour", 2)]
    # with 4 tokens harbour (2) does not fit behind voyage (3), and the one word of sky does
    assert [each.document_id for each in context(finder_of(tmp_path / "b"), "ship", 4)[0]] == [
        "voyage",
        "sky",
    ]


def test_only_where_nothing_fits_a_passage_is_cut(tmp_path):
    documents = [{"document_id": "long", "title": "Long", "text": "ship sea ship sea ship"}]
    [passage], _ = context(finder_of(tmp_path, documents), "ship", 3)
    assert (passage.text, passage.n_tokens, passage.is_cut) == ("ship sea ship", 3, True)


def test_a_passage_s_tokens_are_its_own_and_counted_beside_the_event_loop(tmp_path):
    threads = set()

    class Prompted(WordsEncoding):
        def tokens(self, text):
            threads.add(threading.current_thread())
            return 4 + len(text.split())  # the prompt "query :" between two marks

    passages, _ = context(finder_of(tmp_path, encoding=Prompted()), "ship", 5)
    assert [(each.document_id, each.n_tokens) for each in passages] == [("voyage", 3), ("harbour", 2)]
    assert threading.main_thread() not in threads


def test_tokens_are_estimated_where_nobody_counts_them(tmp_path):
    finder = finder_of(tmp_path, encoding=WordsEncoding(counts_tokens=False))
    [passage, *_], counted_by = context(finder, "ship", 100)
    assert (passage.text, passage.n_tokens) == ("ship ship sea", 4)  # three words, four thirds each
    assert counted_by.startswith("words x 4/3")


def test_a_text_is_cut_at_a_space_or_anywhere_where_it_has_none():
    assert _cut("one two three", 2, lambda text: len(text.split())) == "one two"
    assert _cut("가나다라", 2, len) == "가나"
    assert _cut("", 2, len) == ""
    assert not math.isnan(len(_cut("a b", 0, len)))
