"""Which versions are served, and when: as tensorflow/serving r2.11 decides, with servables that are empty."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.handles import LoadError
from serving.protocol import RequestError, Route
from serving.versions import Models
from serving.wanted import (
    All,
    Latest,
    ModelConfig,
    Specific,
    Version,
    next_action,
    parse_version,
    wanted_folders,
)

LATEST = Route("predict", "index")


class Counted:
    """Stands in for a SavedModel: knows its folder, and whether it was closed; then tells `events`."""

    def __init__(self, folder: Path, events: list[str] | None = None) -> None:
        self.signatures: dict = {}
        self.folder = folder
        self._events = [] if events is None else events
        self.is_closed = False

    def run(self, signature_name, inputs):
        assert not self.is_closed
        return {}

    def close(self):
        self.is_closed = True
        self._events.append(f"close {self.folder.name}")


class Opener:
    """Opens a folder that holds a file `whole`, and remembers what it was asked for, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.opened: list[Counted] = []

    def __call__(self, folder: Path) -> Counted:
        self.events.append(f"open {folder.name}")
        if not (folder / "whole").exists():
            raise LoadError("NOT_FOUND", f"Could not find whole in {folder}")
        self.opened.append(Counted(folder, self.events))
        return self.opened[-1]


class Gated(Opener):
    """An Opener whose second try of a folder, and each after it, waits until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def __call__(self, folder: Path) -> Counted:
        if f"open {folder.name}" in self.events:
            assert self.gate.wait(20)
        return super().__call__(folder)


def publish(base: Path, *versions: int | str) -> None:
    for version in versions:
        (base / f"{version}").mkdir(parents=True, exist_ok=True)
        (base / f"{version}" / "whole").touch()


def withdraw(base: Path, version: int) -> None:
    (base / f"{version}" / "whole").unlink(missing_ok=True)
    (base / f"{version}").rmdir()


@pytest.fixture
def base(tmp_path) -> Path:
    publish(tmp_path / "index", 7)
    return tmp_path / "index"


def served(base: Path, policy=Latest(), opener: Opener | None = None, labels=None, **settings) -> Models:  # noqa: B008
    """One model, looked at once."""
    opener = opener or Opener()
    config = ModelConfig("index", base, policy, labels or {})
    models = Models([config], opener, **({"max_num_load_retries": 0} | settings))
    models.poll()
    return models


def states(models: Models, name: str = "index") -> dict[int, str]:
    """{version: state}, in the order of the status."""
    return {row.version: row.state for row in models.status(Route("status", name))}


def answering(models: Models, route: Route = LATEST) -> int:
    with models.use(route) as loaded:
        loaded.servable.run("serving_default", {})
        return loaded.version


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# Which folders are versions


@pytest.mark.parametrize(
    ("name", "version"),
    [
        # strings/numbers.cc, safe_strto64: blanks, a minus, digits
        ("7", 7),
        ("007", 7),
        ("0", 0),
        ("-9", -9),
        (" 5 ", 5),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
        (str(2**63), None),
        (str(-(2**63) - 1), None),
        ("1" * 200, None),
        ("+5", None),
        ("1.5", None),
        ("7a", None),
        ("", None),
        ("-", None),
        ("٣", None),
        (".10.partial", None),
        (".staging-8", None),
    ],
)
def test_a_name_is_a_version_where_all_of_it_is_an_int64(name, version):
    assert parse_version(name) == version


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        (Latest(), [9]),
        (Latest(0), [9]),  # less than one is one
        (Latest(2), [8, 9]),
        (Latest(5), [1, 8, 9]),
        (All(), [1, 8, 9]),
        (Specific((8, 4, 1)), [1, 8]),  # 4 is not there
        (Specific((4,)), []),
    ],
)
def test_a_policy_picks_among_the_numbers(policy, versions):
    config = ModelConfig("index", Path("/models/index"), policy)
    wanted = wanted_folders(config, ["9", "1", "8", "not-a-version"])
    assert sorted(wanted) == versions
    assert all(folder == Path(f"/models/index/{version}") for version, folder in wanted.items())


@pytest.mark.parametrize(("policy", "name"), [(Latest(), "7"), (Specific((7,)), "7"), (All(), "007")])
def test_of_two_names_for_one_number_one_is_served(policy, name):
    # In the order of std::set<string>, "007" then "7": the map keeps the last, AspireAllVersions the first.
    config = ModelConfig("index", Path("/models/index"), policy)
    assert wanted_folders(config, ["7", "007"]) == {7: Path("/models/index") / name}


def test_a_file_named_as_a_version_is_one_and_fails(base):
    (base / "8").write_text("a file")
    models = served(base)
    assert states(models) == {8: "END"}
    assert models.failure().version == 8


def test_a_link_to_a_folder_is_a_version_and_so_is_a_broken_link(base, tmp_path):
    publish(tmp_path, "elsewhere")
    (base / "8").symlink_to(tmp_path / "elsewhere")
    models = served(base)
    assert answering(models) == 8
    (base / "9").symlink_to(tmp_path / "nowhere")
    models.poll()
    assert states(models) == {9: "END", 8: "AVAILABLE"}


# What is loaded and unloaded when


@pytest.mark.parametrize(
    ("versions", "action"),
    [
        ("7 new wanted", "load 7"),
        ("7 new wanted, 8 new wanted", "load 8"),
        ("7 ready old, 8 new wanted", "load 8"),  # availability: load first
        ("7 ready old, 8 loading wanted", None),
        ("7 ready old, 8 ready wanted", "unload 7"),
        ("7 ready old, 8 ended wanted", None),  # 8 failed: 7 goes on
        ("7 ready old", "unload 7"),  # nothing is wanted
        ("6 ready old, 7 ready old, 8 new wanted", "unload 6"),  # one old version is enough
        ("6 ready old, 7 ready wanted, 8 new wanted", "unload 6"),  # another wanted one answers
        ("7 unloading old, 8 ready wanted", None),
        ("7 ready wanted", None),
        ("", None),
    ],
)
def test_the_next_action_keeps_the_model_available(versions, action):
    # core/availability_preserving_policy.cc
    given = [one.split() for one in versions.split(", ") if one]
    known = [
        Version("index", int(number), Path(), state=state, is_wanted=kind == "wanted")
        for number, state, kind in given
    ]
    found = next_action(known)
    assert (f"{found[0]} {found[1].number}" if found else None) == action


def test_the_highest_number_is_served_and_a_smaller_one_never_replaces_it(base):
    publish(base, 8, 30)
    models = served(base)
    publish(base, 9)
    models.poll()
    assert states(models) == {30: "AVAILABLE"}
    assert answering(models) == 30


def test_a_newer_version_is_opened_before_the_old_one_is_closed(base):
    opener = Opener()
    models = served(base, opener=opener)
    publish(base, 8)
    models.poll()
    assert opener.events == ["open 7", "open 8", "close 7"]
    assert states(models) == {8: "AVAILABLE", 7: "END"}
    assert [one.is_closed for one in opener.opened] == [True, False]


def test_the_rows_of_old_versions_stay(base):
    models = served(base)
    for version in range(8, 18):
        publish(base, version)
        models.poll()
    assert list(states(models).items()) == [(17, "AVAILABLE"), *((v, "END") for v in range(16, 6, -1))]


def test_removing_the_newest_goes_back_and_removing_all_unloads(base):
    opener = Opener()
    publish(base, 8)
    models = served(base, opener=opener)
    withdraw(base, 8)
    models.poll()
    assert opener.events == ["open 8", "open 7", "close 8"]
    assert states(models) == {8: "END", 7: "AVAILABLE"}
    withdraw(base, 7)
    models.poll()
    assert states(models) == {8: "END", 7: "END"}
    assert {row.error_code for row in models.status(LATEST)} == {"OK"}
    with pytest.raises(RequestError, match=r"^Servable not found for request: Latest\(index\)$"):
        answering(models)
    publish(base, 8)
    models.poll()
    assert answering(models) == 8


def test_with_the_policy_all_every_version_answers_by_its_number(base):
    publish(base, 8)
    models = served(base, All())
    assert [answering(models, Route("predict", "index", version)) for version in (7, 8)] == [7, 8]
    assert answering(models) == 8
    withdraw(base, 7)
    models.poll()
    assert states(models) == {8: "AVAILABLE", 7: "END"}


def test_of_the_latest_two_the_oldest_goes_before_the_newest_comes(base):
    # Another wanted version answers meanwhile, so that the policy unloads first.
    opener = Opener()
    publish(base, 8)
    models = served(base, Latest(2), opener)
    publish(base, 9)
    models.poll()
    assert sorted(opener.events[:2]) == ["open 7", "open 8"]
    assert opener.events[2:] == ["close 7", "open 9"]
    assert states(models) == {9: "AVAILABLE", 8: "AVAILABLE", 7: "END"}


def test_a_specific_version_is_served_once_it_comes(base, caplog):
    models = served(base, Specific((5,)))
    models.poll()
    assert [record.getMessage() for record in caplog.records] == [
        f"model index: {base} holds no version that is wanted: waiting for one"  # said once
    ]
    assert not models.ready()
    publish(base, 5)
    models.poll()
    assert models.ready()
    assert states(models) == {5: "AVAILABLE"}


# Versions that cannot be loaded


def test_a_broken_version_leaves_the_old_one_serving_and_shows_its_error(base):
    models = served(base)
    (base / "8").mkdir()
    models.poll()
    newest, old = models.status(LATEST)
    assert (newest.version, newest.state, newest.error_code) == (8, "END", "NOT_FOUND")
    assert newest.error_message == f"Could not find whole in {base / '8'}"
    assert (old.version, old.state, old.error_code) == (7, "AVAILABLE", "OK")
    assert answering(models) == 7


def test_a_version_that_failed_is_not_tried_again_while_its_folder_stays(base):
    opener = Opener()
    models = served(base, opener=opener)
    (base / "8").mkdir()
    models.poll()
    publish(base, 8)  # mended in its place
    models.poll()
    assert opener.events == ["open 7", "open 8"]
    assert states(models) == {8: "END", 7: "AVAILABLE"}


def test_a_failed_version_that_comes_back_waits_for_a_third(base):
    # aspired_versions_manager.cc postpones the look that wants 7 again, for 7 still answers: so 8 stays
    # wanted and failed, and its return is no news.
    opener = Opener()
    models = served(base, opener=opener)
    (base / "8").mkdir()
    models.poll()
    (base / "8").rmdir()
    models.poll()
    publish(base, 8)
    models.poll()
    assert opener.events == ["open 7", "open 8"]
    publish(base, 9)
    models.poll()
    assert opener.events == ["open 7", "open 8", "open 9", "close 7"]
    assert states(models) == {9: "AVAILABLE", 8: "END", 7: "END"}


def test_a_failed_version_without_an_old_one_is_tried_again_when_its_folder_comes_back(tmp_path):
    base = tmp_path / "index"
    (base / "7").mkdir(parents=True)
    models = served(base)
    assert states(models) == {7: "END"}
    (base / "7").rmdir()
    models.poll()
    publish(base, 7)
    models.poll()
    assert states(models) == {7: "AVAILABLE"}


def test_a_failing_load_is_loading_without_an_error_until_the_tries_are_used_up(base):
    opener = Gated()
    models = served(base, opener=opener, max_num_load_retries=2, load_retry_interval_seconds=0.001)
    (base / "8").mkdir()
    models.poll()  # comes back after the first try
    [row] = models.status(Route("status", "index", 8))
    assert (row.state, row.error_code, row.error_message) == ("LOADING", "OK", "")
    opener.gate.set()
    until(lambda: states(models)[8] == "END")
    assert opener.events == ["open 7", "open 8", "open 8", "open 8"]


def test_between_two_tries_is_the_interval(base):
    opener = Opener()
    models = served(base, opener=opener, max_num_load_retries=1, load_retry_interval_seconds=0.3)
    (base / "8").mkdir()
    started = time.monotonic()
    models.poll()
    until(lambda: states(models)[8] == "END")
    assert time.monotonic() - started >= 0.3


def test_a_load_that_succeeds_at_the_second_try_is_served(base):
    opener = Gated()
    models = served(base, opener=opener, load_retry_interval_seconds=0.001, max_num_load_retries=5)
    (base / "8").mkdir()
    models.poll()
    assert answering(models) == 7
    publish(base, 8)
    opener.gate.set()
    until(lambda: states(models)[8] == "AVAILABLE")
    models.poll()
    assert states(models) == {8: "AVAILABLE", 7: "END"}


def test_while_a_load_is_tried_again_nothing_else_comes_or_goes(base):
    # After the start the real server has no load threads: the tries hold its one managing thread.
    opener = Gated()
    models = served(base, opener=opener, max_num_load_retries=1, load_retry_interval_seconds=0.001)
    (base / "8").mkdir()
    models.poll()
    publish(base, 9)
    models.poll()
    assert states(models) == {8: "LOADING", 7: "AVAILABLE"}
    opener.gate.set()
    until(lambda: states(models)[8] == "END")
    models.poll()
    assert states(models) == {9: "AVAILABLE", 8: "END", 7: "END"}


def test_a_fault_while_opening_refuses_the_version_and_no_more(base, caplog):
    def faulty(folder: Path) -> Counted:
        if folder.name == "8":
            raise KeyError("what no check foresees")
        return Counted(folder)

    models = Models([ModelConfig("index", base)], faulty, max_num_load_retries=0)
    models.poll()
    publish(base, 8)
    models.poll()
    [row] = models.status(Route("status", "index", 8))
    assert (row.state, row.error_code) == ("END", "INTERNAL")
    assert row.error_message == f"{base / '8'}: KeyError: 'what no check foresees'"
    assert answering(models) == 7


def test_a_version_is_verified_before_it_is_opened_and_warm_before_it_is_served(base):
    done = []

    def meanwhile() -> list[int]:
        return models.available("index")

    def verify(folder: Path) -> None:
        done.append(f"verify {folder.name}")
        if folder.name == "8":
            raise LoadError("DATA_LOSS", "changed")

    def warm_up(servable: Counted, folder: Path) -> None:
        done.append(f"warm {folder.name}, {meanwhile()} served")
        if folder.name == "9":
            raise LoadError("INVALID_ARGUMENT", "a bad request")

    opener = Opener()
    settings = {"max_num_load_retries": 0, "verify": verify, "warm_up": warm_up}
    models = Models([ModelConfig("index", base)], opener, **settings)
    models.poll()
    publish(base, 8)
    models.poll()
    publish(base, 9)
    models.poll()
    assert done == ["verify 7", "warm 7, [] served", "verify 8", "verify 9", "warm 9, [7] served"]
    assert opener.events == ["open 7", "open 9", "close 9"]
    assert [one.is_closed for one in opener.opened] == [False, True]
    rows = {row.version: (row.state, row.error_message) for row in models.status(LATEST)}
    assert rows == {9: ("END", "a bad request"), 8: ("END", "changed"), 7: ("AVAILABLE", "")}


def test_a_base_path_that_goes_away_unloads_nothing(base):
    models = served(base)
    base.rename(base.with_name("away"))
    models.poll()
    assert states(models) == {7: "AVAILABLE"}
    base.with_name("away").rename(base)
    publish(base, 8)
    models.poll()
    assert answering(models) == 8


# Several models


def two(tmp_path: Path, opener: Opener | None = None, **settings) -> Models:
    configs = [ModelConfig("a", tmp_path / "a"), ModelConfig("b", tmp_path / "b")]
    return Models(configs, opener or Opener(), **({"max_num_load_retries": 0} | settings))


def test_models_are_served_side_by_side(tmp_path):
    publish(tmp_path / "a", 1)
    publish(tmp_path / "b", 5)
    models = two(tmp_path)
    models.poll()
    assert models.ready()
    assert answering(models, Route("predict", "a")) == 1
    assert answering(models, Route("predict", "b")) == 5
    assert models.available("a") == [1]
    assert {name: rows[0].version for name, rows in models.states().items()} == {"a": 1, "b": 5}
    with pytest.raises(RequestError, match=r"^Servable not found for request: Specific\(a, 5\)$"):
        answering(models, Route("predict", "a", 5))
    with pytest.raises(RequestError, match=r"^Could not find version 5 of model a$"):
        models.status(Route("status", "a", 5))


def test_one_missing_base_path_keeps_every_model_from_being_looked_at(tmp_path):
    # PollFileSystemForConfig returns at the first error, and nothing is aspired
    publish(tmp_path / "a", 1)
    models = two(tmp_path)
    models.poll()
    assert models.states() == {}
    assert models.failure() is None
    publish(tmp_path / "b", 1)
    models.poll()
    assert models.ready()


def test_at_the_start_loads_go_side_by_side(tmp_path):
    both = threading.Barrier(2, timeout=20)

    def open_together(folder: Path) -> Counted:
        both.wait()  # fails unless the other is being opened as well
        return Counted(folder)

    publish(tmp_path / "a", 1)
    publish(tmp_path / "b", 1)
    models = two(tmp_path, open_together)
    models.poll()
    assert models.ready()


def test_the_start_is_over_when_every_load_has_ended(base):
    opener = Gated()
    (base / "6").mkdir()  # broken, and wanted too
    models = served(base, All(), opener, max_num_load_retries=1, load_retry_interval_seconds=0.001)
    assert states(models) == {7: "AVAILABLE", 6: "LOADING"}
    assert not models.ready()
    opener.gate.set()
    until(models.ready)
    assert states(models) == {7: "AVAILABLE", 6: "END"}
    assert models.failure() is None


def test_a_start_that_failed_says_so_in_the_real_servers_words(tmp_path):
    (tmp_path / "a" / "3").mkdir(parents=True)
    publish(tmp_path / "b", 1)
    models = two(tmp_path)
    models.poll()
    assert not models.ready()
    failure = models.failure()
    assert (failure.model_name, failure.version, failure.error_code) == ("a", 3, "NOT_FOUND")
    error = f"NOT_FOUND: Could not find whole in {tmp_path}/a/3"
    assert models.failure_text() == (
        # load_servables_fast.cc: braces around all, around each, and ServableId's own
        "UNKNOWN: 1 servable(s) did not become available: {"
        "{" + "{name: a version: 3}" + f" due to error: {error}" + "}, "
        "}"
    )


def test_a_start_has_not_failed_while_another_model_is_waited_for(tmp_path):
    (tmp_path / "a" / "3").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    models = two(tmp_path)
    models.poll()
    assert models.failure() is None
    publish(tmp_path / "b", 1)
    models.poll()
    assert models.failure().model_name == "a"


def test_a_folder_that_goes_away_during_the_start_ends_its_tries(base):
    opener = Gated()
    (base / "8").mkdir()
    models = served(base, opener=opener, max_num_load_retries=50, load_retry_interval_seconds=0.001)
    assert states(models) == {8: "LOADING"}
    (base / "8").rmdir()
    models.poll()
    assert states(models) == {8: "LOADING", 7: "AVAILABLE"}
    assert not models.ready()
    opener.gate.set()
    until(models.ready)
    assert states(models) == {8: "END", 7: "AVAILABLE"}
    assert opener.events.count("open 8") == 2  # the try that was under way is the last


# Labels


def test_a_label_answers_with_its_version(base):
    publish(base, 8)
    models = served(base, All(), labels={"stable": 7, "canary": 9})
    assert answering(models, Route("predict", "index", label="stable")) == 7
    with pytest.raises(RequestError, match=r"^Servable not found for request: Specific\(index, 9\)$"):
        answering(models, Route("predict", "index", label="canary"))
    withdraw(base, 7)
    models.poll()
    with pytest.raises(
        RequestError, match=r"^Servable not found for request: Specific\(index, 7\)$"
    ) as refusal:
        answering(models, Route("predict", "index", label="stable"))
    assert refusal.value.code == "NOT_FOUND"


@pytest.mark.parametrize("name", ["index", "nope"])
def test_an_unknown_label_is_refused_before_the_model_is_looked_for(base, name):
    models = served(base, labels={"stable": 7})
    with pytest.raises(RequestError, match=r"^Unrecognized servable version label: x$") as refusal:
        answering(models, Route("predict", name, label="x"))
    assert refusal.value.code == "INVALID_ARGUMENT"


def test_a_status_ignores_labels(base):
    models = served(base, labels={"stable": 7})
    assert len(models.status(Route("status", "index", label="nothing"))) == 1


@pytest.mark.parametrize("name", ["../index", "..", ".", "/etc", "index/7", "", "index\0"])
def test_a_models_name_is_no_path(base, name):
    opener = Opener()
    models = served(base, opener=opener)
    with pytest.raises(RequestError, match=r"^Servable not found for request: Latest"):
        answering(models, Route("predict", name))
    with pytest.raises(RequestError, match=r"^Could not find any versions of model"):
        models.status(Route("status", name))
    assert opener.events == ["open 7"]


# Requests while versions change


@contextmanager
def polling(models: Models) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=models.poll)
    thread.start()
    yield thread
    thread.join(20)
    assert not thread.is_alive()


def test_an_old_version_is_closed_when_its_last_request_ends(base):
    opener = Opener()
    models = served(base, opener=opener)
    publish(base, 8)
    with models.use(LATEST) as held, polling(models):
        until(lambda: states(models).get(7) == "UNLOADING")
        assert held.version == 7
        held.servable.run("serving_default", {})  # still open
        assert answering(models) == 8
        with pytest.raises(RequestError, match=r"Specific\(index, 7\)"):
            answering(models, Route("predict", "index", 7))  # nobody new gets it
        assert states(models) == {8: "AVAILABLE", 7: "UNLOADING"}
    until(lambda: states(models)[7] == "END")
    assert opener.opened[0].is_closed


def test_a_request_that_fails_lets_go_of_its_version(base):
    models = served(base)
    with pytest.raises(ZeroDivisionError), models.use(LATEST):
        raise ZeroDivisionError
    publish(base, 8)
    models.poll()
    assert states(models) == {8: "AVAILABLE", 7: "END"}


def test_no_request_finds_a_gap_or_a_closed_version(base):
    models = served(base)
    stop = threading.Event()

    def ask() -> tuple[int, int]:
        n_answers, newest = 0, 0
        while not stop.wait(0.0005):
            version = answering(models)  # a closed one fails its assertion, a gap raises
            assert version >= newest
            n_answers, newest = n_answers + 1, version
        return n_answers, newest

    with ThreadPoolExecutor(4) as pool:
        askers = [pool.submit(ask) for _ in range(4)]
        for version in range(8, 38):
            publish(base, version)
            models.poll()
            until(lambda version=version: states(models)[version - 1] == "END")
            models.poll()
        stop.set()
        assert all(asker.result()[0] > 0 for asker in askers)
    assert models.available("index") == [37]


def test_closing_closes_every_version_and_answers_nothing_more(base):
    opener = Opener()
    publish(base, 8)
    models = served(base, All(), opener)
    models.close()
    assert [one.is_closed for one in opener.opened] == [True, True]
    with pytest.raises(RequestError, match="Servable not found"):
        answering(models)
    publish(base, 9)
    models.poll()
    assert "open 9" not in opener.events


def test_closing_leaves_open_what_still_answers(base):
    opener = Opener()
    models = served(base, opener=opener)
    with models.use(LATEST):
        models.close(grace_seconds=0.01)
        assert not opener.opened[0].is_closed


def test_closing_ends_a_pause_between_tries(base):
    (base / "8").mkdir()
    models = served(base, max_num_load_retries=5, load_retry_interval_seconds=3600)
    models.close()
    until(lambda: states(models)[8] == "END")


def test_who_is_told_of_versions_cannot_stop_them(base, caplog):
    def told(*what) -> None:
        raise ValueError("a fault of who listens")

    models = served(base, on_load=told)
    assert states(models) == {7: "AVAILABLE"}
    assert "telling of a version failed" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read_is_waited_for(base):
    base.chmod(0)
    try:
        models = served(base)
        assert models.states() == {}
    finally:
        base.chmod(0o755)
