"""The page drawn from figures alone: what it says, and that it needs nothing from outside."""

import copy
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.report import interval, plots, render, summary, verdict

KEYS = {f"at_{k}": f"accuracy_at_{k}" for k in (1, 5, 20, 100)} | {
    measure: measure for measure in ("mrr_at_10", "ndcg_at_10")
}
SYSTEMS = {
    "tuned": dict(zip(KEYS.values(), [0.06, 0.17, 0.321, 0.51, 0.11, 0.15], strict=True)),
    "untuned": dict(zip(KEYS.values(), [0.04, 0.12, 0.233, 0.43, 0.08, 0.1], strict=True)),
    "bm25": dict(zip(KEYS.values(), [0.02, 0.06, 0.128, 0.27, 0.03, 0.05], strict=True)),
}
RETRIEVAL: dict[str, Any] = {
    "reason": None,
    "n_pairs": 4000,
    "n_readers": 300,
    "n_sessions": 500,
    "n_queries": 2000,
    "n_pool": 4061,
    "n_pairs_left_out": 3,
    **SYSTEMS,
    "intervals": {
        f"{name}_{k}": {"mean": shares[key], "low": shares[key] - 0.01, "high": shares[key] + 0.01}
        for name, shares in SYSTEMS.items()
        for k, key in KEYS.items()
    },
    "tuned_minus_untuned_at_20": {"mean": 0.088, "low": 0.071, "high": 0.104},
    "tuned_minus_bm25_at_20": {"mean": 0.193, "low": 0.17, "high": 0.21},
}
REPORT: dict[str, Any] = {
    "description": "simulated readers",
    "index": {
        "recall_at_10": 0.971,
        "interval": {"low": 0.968, "high": 0.974},
        "n_queries": 2000,
        "recall_at_10_typed": 0.964,
        "interval_typed": {"low": 0.96, "high": 0.968},
        "n_queries_typed": 2000,
        "target_recall": 0.95,
        "layer": "scann",
        "settings": {"k": 10, "num_leaves": 64, "num_leaves_to_search": 8, "num_reordering_candidates": 100},
        "n_documents": 4061,
        "max_score_error": 0.0,
        "sweep": [
            {
                "num_leaves_to_search": n,
                "recall_at_10": r,
                "interval": {"low": r - 0.01, "high": r},
                "n_queries": 9,
            }
            for n, r in ((1, 0.6), (8, 0.97), (64, 1.0))
        ],
    },
    "retrieval": RETRIEVAL
    | {
        "unseen": RETRIEVAL | {"n_pairs": 1234},
        "typed": RETRIEVAL | {"n_pairs": 777},
        "by_popularity": {"head": RETRIEVAL | {"n_pairs": 555}, "middle": None, "tail": None, "never": None},
    },
    "latency_ms": {"p50": 0.4, "p95": 0.6, "p99": 0.9},
    "examples": [
        {
            "anchor": "Foxes <b>& hens",
            "positive": "Owls",
            "seen": True,
            "rank": {"tuned": 1, "untuned": 3100, "bm25": None},
            "found": {
                "tuned": [{"title": "Owls", "positive": True}, {"title": "Hens", "positive": False}],
                "untuned": [{"title": "Hens", "positive": False}],
                "bm25": [],
            },
        }
    ],
    "map": {
        "groups": ["Birds", "동물", "other"],
        "explained": {"before": 0.15, "after": 0.2},
        "lines": [[0, 1], [1, 2]],
        "points": [
            {"title": t, "group": g, "before": [g, 1.0], "after": [1.0, g]}
            for t, g in (("Owls", 0), ("Hens", 1), ("Foxes", 2))
        ],
    },
    "model": {
        "base_model": "package:given",
        "trained": True,
        "dim": 384,
        "main_similarity": "dot_product",
        "similarity_before": 0.5,
        "similarity_after": 0.6,
        "training": [
            {"step": 10, "epoch": 0.1, "loss": 2.0},
            {"step": 20, "epoch": 0.2, "loss": 1.5, "accuracy_at_20": 0.3, "spearman_dot": 0.6},
        ],
    },
    "session_lengths": {"1": 40, "2": 30, "3": 20, "57": 2},
    "counts": {
        "events": {"read": 129307, "duplicates": 31},
        "rejects": {"bad_timestamp": 9},
        "rows": {"sessions": 92, "pairs": 50},
        "negatives": {"cross_user": {"given": 4321, "refused": 17}},
        "gap_duration": 1800,
        "test_start": "2026-02-01T00:00:00Z",
    },
    "lineage": {"digests": {"pairs": "ab" * 32}, "libraries": {"numpy": "2.0"}},
}
ABSENT: dict[str, Any] = {
    "n_pairs": 0,
    "reason": "there is no event log, so there are no sessions to hold out",
    **dict.fromkeys(["tuned", "untuned", "bm25", "tuned_minus_untuned_at_20", "tuned_minus_bm25_at_20"]),
}
ALONE: dict[str, Any] = REPORT | {
    "description": "",
    "retrieval": ABSENT,
    "examples": [],
    "map": None,
    "session_lengths": {},
}


class Page(HTMLParser):
    """Ids, links and words of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.stack = ["outside"]
        self.words = ""
        self.feed(html)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag, attributes):
        self.stack.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)

    def handle_data(self, data):
        if self.stack[-1] not in ("style", "script"):
            self.words += data
        if self.stack[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def html():
    return render(REPORT)


def test_the_page_needs_nothing_from_outside(html):
    page = Page(html)
    assert page.links  # the markers of the plots
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.stack
    assert not re.search(r"@import|url\((?!#)", html)


def test_every_id_is_there_once_and_every_link_has_its_target(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)


def test_the_summary_table_comes_first_with_all_systems_and_intervals(html):
    words = Page(html).words
    assert words.index("Tuned model") < words.index("What the index loses")
    assert "32.1 %" in words
    assert "31.1–33.1" in words
    assert "12.8 %" in words


def test_unseen_pairs_and_typed_queries_have_tables_of_their_own(html):
    words = Page(html).words
    assert "never seen in training (1,234)" in words
    assert "half of the words, as if typed (777 pairs)" in words


def test_without_unseen_pairs_and_typed_queries_the_page_says_so():
    report = copy.deepcopy(REPORT)
    report["retrieval"] |= {"unseen": None, "typed": None}
    words = Page(render(report)).words
    assert "Every held-out pair also occurs in the training sessions" in words
    assert "as if typed (" not in words


def test_whose_figures_they_are_stands_at_the_head_of_every_part(html):
    page = Page(html)
    assert page.headings[0] == "What the search finds: simulated readers"
    parts = html.split("<h2>")[1:-1]  # the last is the lineage: no figures
    assert len(parts) == 6
    assert all("simulated readers" in part for part in parts)


def test_every_plot_has_a_title_that_says_what_it_shows_and_whose_data():
    drawn = plots(REPORT)
    assert set(drawn) == {"accuracy", "sessions", "training", "recall", "map_before", "map_after"}
    for plot in drawn.values():
        root = ET.fromstring(str(plot))
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert title is not None
        assert root.get("role") == "img"
        assert root.get("aria-labelledby") == title.get("id")
        assert str(title.text).endswith("Data: simulated readers.")


def test_plots_take_the_colour_of_the_page():
    drawn = str(plots(REPORT)["recall"])
    assert "currentColor" in drawn
    assert "#010203" not in drawn


def test_titles_are_escaped(html):
    assert "Foxes &lt;b&gt;&amp; hens" in html
    assert "<b>" not in html


def test_an_example_marks_the_document_opened_next_and_says_where_each_system_had_it(html):
    words = Page(html).words
    assert "✓ Owls" in words
    assert "✓ Hens" not in words
    assert "Tuned model: place 1 of 4,061" in words
    assert "Untuned model: place 3,100 of 4,061" in words
    assert "BM25: not found" in words
    assert "nothing: no document shares a word" in words


def test_without_sessions_the_page_says_why_and_still_shows_recall():
    words = Page(render(ALONE)).words
    assert "there is no event log" in words
    assert "0.971" in words
    assert "Untuned model" not in words
    assert plots(ALONE)["accuracy"] is None


def test_an_exact_layer_has_no_sweep_to_draw():
    report = copy.deepcopy(REPORT)
    report["index"] |= {"layer": "brute_force", "sweep": [], "settings": {"k": 10, "num_leaves": None}}
    report["index"]["settings"] |= {"num_leaves_to_search": None, "num_reordering_candidates": None}
    assert plots(report)["recall"] is None
    assert "The layer is exact" in Page(render(report)).words


def test_an_untrained_model_has_no_curve_and_says_so():
    report = copy.deepcopy(REPORT)
    report["model"] |= {"trained": False, "training": []}
    words = Page(render(report)).words
    assert "This model was not tuned" in words
    assert "No training curve: the weights are as they were" in words


def test_the_page_of_one_reader_says_how_little_that_is():
    report = copy.deepcopy(REPORT)
    assert "one reader's" not in Page(render(report)).words
    report["retrieval"]["n_readers"] = 1
    assert "All of this is one reader's" in Page(render(report)).words


def test_a_training_that_logged_no_loss_is_drawn_all_the_same():
    report = copy.deepcopy(REPORT)
    report["model"]["training"] = [{"step": 1, "epoch": 1.0, "accuracy_at_20": 0.3}]
    assert "found in the first 20" in str(plots(report)["training"])


def test_equal_figures_give_an_equal_page(html):
    assert render(copy.deepcopy(REPORT)) == html


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (
            {"mean": 0.088, "low": 0.071, "high": 0.104},
            "8.8 points better than BM25 (95 % interval +7.1 to +10.4): more",
        ),
        ({"mean": -0.02, "low": -0.03, "high": -0.01}, "2.0 points worse"),
        ({"mean": 0.01, "low": -0.01, "high": 0.03}, "includes zero, so no difference is shown"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval(difference, said):
    assert said in verdict(difference, "BM25")


def test_the_closing_table_has_the_quality_figures():
    rows = summary(REPORT)
    assert rows[0] == ["index: recall@10", "0.971", "0.968 to 0.974", "2,000 held-out queries"]
    assert [row[1] for row in rows[1:]] == ["0.321", "0.233", "0.128", "+0.088", "+0.193"]


def test_the_closing_table_without_sessions_says_absent_and_why():
    assert summary(ALONE)[1] == ["next document in the top 20", "absent", "", ABSENT["reason"]]


def test_no_interval_is_no_text():
    assert interval(None) == ""
