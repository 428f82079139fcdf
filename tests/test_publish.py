"""Publication: the gate, the one rename, the encoder first, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import publish
from pipeline.artifacts import Index, Model, Report, locked, writing
from pipeline.config import PublishConfig
from pipeline.errors import ArtifactError, BusyError, RefusedError

CONFIG = PublishConfig(keep_versions=2)
WANTED = {"k": 10, "target_recall": 0.95, "target_latency_ms": None, "memory_mib": None}


def figures(
    recall: float = 0.97,
    tuned: tuple = (0.30, 0.32, 0.34),
    gain: tuple = (0.05, 0.09, 0.12),
    ahead: tuple | None = None,
    asked: str = "documents",
    model: dict | None = None,
) -> dict:
    """A report's figures: (low, mean, high) of the tuned model, of its gain over the untuned, and of how far
    it is ahead of the published one.
    """

    def bounds(of: tuple) -> dict:
        return dict(zip(("low", "mean", "high"), of, strict=True))

    return {
        "description": "simulated readers",
        "index": {
            "recall_at_10": recall,
            "n_queries": 100,
            "contract": {"k": 10, "latency_ms": 0.6, "served_mib": 2100.0, "kinds": []},
            "frontier": [{"num_leaves_to_search": 7, "shipped": True}],
            "builds": [{"num_leaves": 64, "kept": True}],
        },
        "retrieval": {
            "asked": asked,
            "n_pairs": 100,
            "intervals": {"tuned_at_20": bounds(tuned)},
            "tuned_minus_untuned_at_20": bounds(gain),
            **({"tuned_minus_published_at_20": bounds(ahead)} if ahead else {}),
        },
        "model": model or {},
        "examples": [{"query": "what one reader opened"}],
        "map": {"points": []},
        "lost": [{"query": "a reader's own"}],
    }


def standing(report: dict, encoder: str = "live", has_encoder: bool = False) -> publish.Standing:
    """A served version; without its encoder, unless said otherwise."""
    return publish.Standing("7", report, encoder, has_encoder)


def make(
    work: Path, weights: str = "w", rows: str = "r", report: dict | None = None
) -> tuple[Model, Index, Report]:
    """The three artefacts that publication reads, with a few bytes for weights and rows."""
    facts = {
        "base_model": "package:tiny",
        "trained": True,
        "dim": 2,
        "prompts": {"query": "q: ", "document": ""},
    }
    with writing(Model, work / "model", config={"w": weights}, inputs=[]) as draft:
        (draft.folder / "model.safetensors").write_text(weights)
        (draft.folder / "training.jsonl").write_text("{}")
        draft.facts |= facts
    model = Model.open(work / "model")
    with writing(Index, work / "index", config=WANTED | {"r": rows}, inputs=[model]) as draft:
        (draft.folder / "saved_model.pb").write_text(rows)
        (draft.folder / "variables").mkdir(exist_ok=True)
        (draft.folder / "variables" / "variables.index").write_text(rows)
        (draft.folder / "assets.extra").mkdir(exist_ok=True)
        (draft.folder / "assets.extra" / "documents.parquet").write_text(rows)
        (draft.folder / "found.parquet").write_text("answers")
        (draft.folder / "assets").mkdir(exist_ok=True)
        (draft.folder / "assets" / "codes.npy").write_text(rows)
        draft.facts |= {"dim": 2, "layer": "tuned", "settings": {"k": 10}}
    index = Index.open(work / "index")
    with writing(Report, work / "report", config={}, inputs=[model, index]) as draft:
        (draft.folder / "report.json").write_text(json.dumps(report or figures()))
    return model, index, Report.open(work / "report")


def test_a_version_is_whole_and_names_its_encoder(tmp_path):
    model, index, report = make(tmp_path)
    version = publish.run(CONFIG, model, index, report, tmp_path)
    assert sorted(str(p.relative_to(version)) for p in version.rglob("*") if p.is_file()) == [
        "assets.extra/documents.parquet",
        "assets.extra/manifest.json",
        "assets.extra/publication.json",
        "assets.extra/report.json",
        "assets/codes.npy",
        "saved_model.pb",
        "variables/variables.index",
    ]
    manifest = publish.manifest_of(version)
    encoder = tmp_path / "encoders" / manifest["encoder_sha256"]
    assert [p.name for p in encoder.iterdir()] == ["model.safetensors"]
    assert (manifest["k"], manifest["dim"], manifest["description"]) == (10, 2, "simulated readers")
    assert json.loads((version / "assets.extra" / "publication.json").read_text())["version"] == int(
        version.name
    )


def test_a_version_number_is_utc_time_and_always_larger_than_the_last(tmp_path):
    served = tmp_path / "models" / "index"
    served.mkdir(parents=True)
    assert 20260101000000 < publish.next_version(served) < 99991231235959
    (served / "99999999999999").mkdir()
    assert publish.next_version(served) == 100000000000000


def test_a_changed_encoder_is_not_published_again(tmp_path):
    model, index, report = make(tmp_path)
    publish.run(CONFIG, model, index, report, tmp_path)
    folder = publish.copy_encoder(model, tmp_path / "encoders")
    next(file for file in folder.iterdir() if file.name != "README.md").write_bytes(b"other weights")
    with pytest.raises(ArtifactError, match=r"was changed .* put it back as it was published"):
        publish.copy_encoder(model, tmp_path / "encoders")


def test_single_readers_steps_are_not_published(tmp_path):
    version = publish.run(CONFIG, *make(tmp_path), tmp_path)
    published = json.loads((version / "assets.extra" / "report.json").read_text())
    assert not {"examples", "lost", "map"} & set(published)
    assert published["index"]["recall_at_10"] == 0.97


def test_the_same_index_is_not_published_twice(tmp_path):
    made = make(tmp_path)
    assert publish.run(CONFIG, *made, tmp_path) == publish.run(CONFIG, *made, tmp_path)


@pytest.mark.parametrize(
    ("new", "live", "message"),
    [
        (figures(recall=0.94), None, r"index\.recall_at_10 is 0\.9400, wanted index\.target_recall = 0\.95"),
        (figures(gain=(-0.09, -0.05, -0.01)), None, "tuning made the model worse"),
        (
            figures(tuned=(0.20, 0.22, 0.24)),
            standing(figures()),
            r"accuracy_at_20 is 0\.2200 .* the new model is worse",
        ),
    ],
)
def test_a_figure_that_falls_short_is_refused_by_name(new, live, message):
    with pytest.raises(RefusedError, match=message):
        publish.check(new, live, WANTED, "new")


def test_a_version_says_what_it_keeps_to_and_what_was_tried(tmp_path):
    manifest = publish.manifest_of(publish.run(CONFIG, *make(tmp_path), tmp_path))
    index = figures()["index"]
    assert {name: manifest[name] for name in ("contract", "frontier", "builds")} == {
        name: index[name] for name in ("contract", "frontier", "builds")
    }
    assert "assets/codes.npy" in manifest["files"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"target_latency_ms": 0.5}, r"latency_ms is 0\.6, wanted at most index\.target_latency_ms = 0\.5; "),
        ({"memory_mib": 2000}, r"served_mib is 2100, wanted at most index\.memory_mib = 2000; set index\."),
        ({"k": 300}, r"recall@300 of documents asked as queries was not measured"),
    ],
)
def test_what_the_config_asks_of_an_index_is_what_it_is_judged_by(wanted, message):
    publish.check(figures(), None, WANTED, "new")
    with pytest.raises(RefusedError, match=message):
        publish.check(figures(), None, WANTED | wanted, "new")


def test_an_index_whose_recall_too_few_queries_prove_is_refused_in_one_line(tmp_path):
    kinds = [{"name": "document", "recall_at_k": 1.0, "n_queries": 4}]
    few = figures(recall=1.0)
    few["index"]["contract"] |= {"proved": False, "kinds": kinds}
    with pytest.raises(RefusedError) as caught:
        publish.run(CONFIG, *make(tmp_path, report=few), tmp_path)
    said = str(caught.value)
    assert said.startswith(
        "not published: the number of test queries is 4, wanted at least 10 of one kind to"
    )
    assert "hold out more" in said
    assert "\n" not in said
    assert publish.versions(tmp_path / "models" / "index") == []
    few["index"]["contract"]["proved"] = True
    publish.check(few, None, WANTED, "new")


def test_a_version_whose_report_is_of_an_older_format_is_compared_with():
    old = figures()
    old["index"] = {"recall_at_10": 0.97, "n_queries": 100, "sweep": [{"num_leaves_to_search": 1}]}
    with pytest.raises(RefusedError, match="the new model is worse"):
        publish.check(figures(tuned=(0.20, 0.22, 0.24)), standing(old), WANTED, "new")
    publish.check(figures(), standing(old), WANTED, "new")


def test_all_shortfalls_are_said_at_once_a_line_each():
    with pytest.raises(RefusedError, match=r"recall_at_10.*\n  .*tuning made the model worse"):
        publish.check(figures(recall=0.5, gain=(-0.09, -0.05, -0.01)), None, WANTED, "new")


@pytest.mark.parametrize(
    ("new", "live"),
    [
        (figures(recall=0.95), None),
        (figures(gain=(-0.05, 0.0, 0.05)), None),
        (figures(tuned=(0.28, 0.30, 0.32)), standing(figures())),
        (figures() | {"retrieval": {"n_pairs": 0, "tuned_minus_untuned_at_20": None}}, None),
    ],
)
def test_a_version_that_is_not_clearly_worse_is_accepted(new, live):
    publish.check(new, live, WANTED, "new")


COMPARED = {"published": "live"}


def test_a_model_that_is_behind_the_published_one_over_the_same_pairs_is_refused():
    # each by its own test pairs: 0.27 to 0.33 and 0.31 to 0.37 overlap; over the same pairs 0.04 behind
    new = figures(tuned=(0.27, 0.30, 0.33), ahead=(-0.05, -0.04, -0.03), model=COMPARED)
    live = standing(figures(tuned=(0.31, 0.34, 0.37)), has_encoder=True)
    message = r"tuned_minus_published_at_20 is -0\.0400 .* the new model is worse than the published one"
    with pytest.raises(RefusedError, match=message):
        publish.check(new, live, WANTED, "new")


def test_a_model_that_is_as_good_over_the_same_pairs_is_accepted_whatever_other_pairs_gave():
    # the served version's test pairs were easier: 0.60
    new = figures(ahead=(-0.01, 0.01, 0.03), model=COMPARED)
    live = standing(figures(tuned=(0.58, 0.60, 0.62)), has_encoder=True)
    publish.check(new, live, WANTED, "new")


@pytest.mark.parametrize("model", [{}, {"published": None}, {"published": "older"}])
def test_a_report_that_compares_with_another_model_than_the_served_one_opens_no_gate(model):
    new = figures(ahead=(0.1, 0.2, 0.3), model=model)
    with pytest.raises(
        RefusedError, match=r"version 7, which is served, has encoder live: run encode --force"
    ):
        publish.check(new, standing(figures(), has_encoder=True), WANTED, "new")


def test_the_served_versions_own_encoder_needs_no_comparison_with_itself():
    # a new index of the same weights; their report is of the version before, and of harder pairs
    new = figures(tuned=(0.1, 0.12, 0.14), ahead=(-0.3, -0.2, -0.1), model={"published": "older"})
    publish.check(new, standing(figures(), encoder="same", has_encoder=True), WANTED, "same")


def test_a_served_encoder_that_no_longer_loads_is_said_and_keeps_nothing_from_being_published(capsys):
    left_out = {"published": None, "published_left_out": {"encoder": "live", "reason": "broken"}}
    live = standing(figures(), has_encoder=True)
    publish.check(figures(model=left_out), live, WANTED, "new")
    assert "is gone, was changed or does not load: compared by the figures" in capsys.readouterr().err
    with pytest.raises(RefusedError, match="the new model is worse"):
        publish.check(figures(tuned=(0.20, 0.22, 0.24), model=left_out), live, WANTED, "new")


def test_figures_of_other_kinds_of_queries_are_not_compared(capsys):
    new = figures(tuned=(0.20, 0.22, 0.24), asked="queries")
    publish.check(new, standing(figures()), WANTED, "new")
    assert "asked something else: not compared" in capsys.readouterr().err


def test_logged_queries_have_a_target_too():
    new = figures()
    new["index"]["recall_at_10_logged"] = 0.9
    with pytest.raises(RefusedError, match=r"index\.recall_at_10_logged is 0\.9000, wanted"):
        publish.check(new, None, WANTED, "new")


def test_a_version_made_elsewhere_in_between_must_be_compared_with_first(tmp_path):
    publish.run(CONFIG, *make(tmp_path / "one", "one"), tmp_path)
    other = make(tmp_path / "other", "two", "other")
    with pytest.raises(RefusedError, match=r"compares with no published encoder, but .*run encode --force"):
        publish.run(CONFIG, *other, tmp_path)
    (live,) = publish.versions(tmp_path / "models" / "index")
    compared = figures(
        ahead=(0.0, 0.01, 0.02), model={"published": publish.manifest_of(live)["encoder_sha256"]}
    )
    publish.run(CONFIG, *make(tmp_path / "again", "two", "other", compared), tmp_path)
    assert len(publish.versions(tmp_path / "models" / "index")) == 2


def test_a_report_of_another_index_opens_no_gate(tmp_path):
    model, _, report = make(tmp_path / "one")
    _, other, _ = make(tmp_path / "other", rows="other")
    with pytest.raises(ArtifactError, match=r"was made from another .*index: run stage evaluate again"):
        publish.run(CONFIG, model, other, report, tmp_path)


def test_two_publications_into_one_folder_take_turns(tmp_path):
    made = make(tmp_path)
    with locked(tmp_path, publish.LOCK), pytest.raises(BusyError, match="another run is at work"):
        publish.run(CONFIG, *made, tmp_path)


def test_an_index_whose_recall_nobody_measured_is_refused():
    unmeasured = figures() | {"index": {"recall_at_10": None, "n_queries": 0}}
    with pytest.raises(RefusedError, match="was not measured"):
        publish.check(unmeasured, None, WANTED, "new")


def test_a_refused_version_leaves_the_served_folder_as_it_was(tmp_path):
    live = publish.run(CONFIG, *make(tmp_path), tmp_path)
    with pytest.raises(RefusedError):
        publish.run(CONFIG, *make(tmp_path, rows="worse", report=figures(recall=0.5)), tmp_path)
    assert publish.versions(tmp_path / "models" / "index") == [live]
    assert len(list((tmp_path / "encoders").iterdir())) == 1


def test_old_versions_go_and_an_encoder_stays_while_a_kept_version_names_it(tmp_path):
    for weights, rows in (("one", "a"), ("two", "b"), ("two", "c")):
        named = [encoder.name for encoder in tmp_path.glob("encoders/*")]
        report = figures(ahead=(0, 0, 0), model={"published": named[0] if named else None})
        publish.run(CONFIG, *make(tmp_path, weights, rows, report), tmp_path)
    kept = publish.versions(tmp_path / "models" / "index")
    assert [(version / "saved_model.pb").read_text() for version in kept] == ["b", "c"]
    assert [(e / "model.safetensors").read_text() for e in (tmp_path / "encoders").iterdir()] == ["two"]


def test_a_folder_that_something_else_wrote_is_not_touched(tmp_path):
    foreign = tmp_path / "models" / "index" / "1"
    foreign.mkdir(parents=True)
    with pytest.raises(ArtifactError, match="not published by this pipeline"):
        publish.run(CONFIG, *make(tmp_path), tmp_path)
    assert list(foreign.iterdir()) == []


@pytest.mark.parametrize(
    "manifest",
    [
        "{}", "[]", "null", "{", "[" * 100_000,
        '{"digests": {}, "encoder_sha256": ".."}',
        '{"encoder_sha256": "%s"}' % ("0" * 64),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_ours_is_said_by_everyone_who_asks_it(tmp_path, manifest):
    extra = tmp_path / "models" / "index" / "1" / "assets.extra"
    extra.mkdir(parents=True)
    (extra / "manifest.json").write_text(manifest)
    for ask in (
        lambda: publish.run(CONFIG, *make(tmp_path), tmp_path),
        lambda: publish.served_encoder(tmp_path, "index"),
    ):
        with pytest.raises(ArtifactError, match="names its encoder_sha256 and digests: it was not published"):
            ask()


def test_a_served_encoder_that_was_changed_opens_the_gate_by_the_two_reports(tmp_path, capsys):
    live = publish.run(CONFIG, *make(tmp_path), tmp_path)
    encoder = tmp_path / "encoders" / publish.manifest_of(live)["encoder_sha256"]
    (encoder / "model.safetensors").write_text("changed")
    assert not publish.Standing.of(live, tmp_path / "encoders").has_encoder
    # The stage encode left it out, so the report compares with nothing: encode --force would change nothing.
    publish.run(CONFIG, *make(tmp_path, "other", "rows"), tmp_path)
    assert "was changed or does not load: compared by the figures" in capsys.readouterr().err


def test_what_a_killed_publication_left_is_cleared_away(tmp_path):
    left = tmp_path / "models" / "index" / ".staging-20260101000000"
    left.mkdir(parents=True)
    (left / "saved_model.pb").write_text("half")
    version = publish.run(CONFIG, *make(tmp_path), tmp_path)
    assert [p.name for p in (tmp_path / "models" / "index").iterdir()] == [version.name]


@pytest.mark.slow
def test_whenever_it_is_killed_every_numbered_folder_is_whole(tmp_path):
    make(tmp_path)
    script = (
        "import pathlib, sys\n"
        "from pipeline import publish\n"
        "from pipeline.artifacts import Index, Model, Report\n"
        "from pipeline.config import PublishConfig\n"
        "work = pathlib.Path(sys.argv[1])\n"
        "parts = [a.open(work / a.kind) for a in (Model, Index, Report)]\n"
        "print('ready', flush=True)\n"
        "publish.run(PublishConfig(keep_versions=2), *parts, work)\n"
    )
    for delay in (0, 0.002, 0.005, 0.01, 0.02, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        served = tmp_path / "models" / "index"
        for version in publish.versions(served) if served.exists() else []:
            manifest = publish.manifest_of(version)
            for name in ("saved_model.pb", "variables/variables.index", "assets.extra/publication.json"):
                assert (version / name).exists()
            assert (tmp_path / "encoders" / manifest["encoder_sha256"] / "model.safetensors").exists()
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    assert len(publish.versions(tmp_path / "models" / "index")) == 1
