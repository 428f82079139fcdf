"""Hostile logs: the real stage counts what tests/data/hostile/README.md derives."""

from pathlib import Path

import polars as pl
import pytest

from pipeline import config, pairs

FOLDER = Path(__file__).parent / "data" / "hostile"
NOT_LOGS = {".gitattributes", "README.md", "documents.jsonl"}


def table() -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """The README's rows: file -> (counts, rejects by reason)."""
    found = {}
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 6 or not cells[2].isdecimal():
            continue
        rejects = {reason: int(n) for reason, n in (part.split() for part in cells[5].split(","))}
        counts = dict(zip(("read", "in_sessions", "duplicates"), map(int, cells[2:5]), strict=True))
        found[cells[0]] = (counts | {"rejected": sum(rejects.values())}, rejects)
    return found


def test_every_hostile_log_is_in_the_readme():
    assert set(table()) == {path.name for path in FOLDER.iterdir()} - NOT_LOGS
    assert len(table()) == 10


@pytest.mark.parametrize("name", sorted(table()))
def test_the_readmes_counts_add_up(name):
    counts, _ = table()[name]
    assert counts["read"] == counts["in_sessions"] + counts["duplicates"] + counts["rejected"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(table()))
def test_a_hostile_log_gives_the_counts_of_the_readme(name, tmp_path):
    given = config.from_dict(
        {
            "events": {"paths": [str(FOLDER / name)], "text": "text", "max_rejected_share": 1.0},
            "documents": {"paths": [str(FOLDER / "documents.jsonl")]},
        }
    )
    made = pairs.run(given.pairs, given.events, given.documents, tmp_path / "pairs")
    counts, rejects = table()[name]
    no_negative = made.facts["rejects"].pop("no_negative", 0)  # of pairs, not of the log
    assert made.facts["rejects"] == rejects
    assert made.facts["events"] == counts
    named = pl.read_parquet(made.path / "rejects-*.parquet")["reason"].value_counts()
    in_one_row = rejects | {"too_many_events": 1} if "too_many_events" in rejects else rejects
    assert dict(named.iter_rows()) == in_one_row
    assert made.rows["rejects"] == counts["rejected"] + no_negative
