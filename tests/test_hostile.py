"""Hostile logs: the real stage counts what tests/data/hostile/README.md derives. And hostile documents."""

from pathlib import Path

import polars as pl
import pytest

from pipeline import config, pairs
from pipeline.errors import InputError

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


HEADER = b"document_id,text\n"
FINE = HEADER + "a,one\nb,🙂\n".encode()


def of_documents(tmp_path: Path, **files: bytes) -> pairs.Pairs:
    paths = []
    for name, content in files.items():
        paths.append(tmp_path / f"{name}.csv")
        paths[-1].write_bytes(content)
    given = config.from_dict({"documents": {"paths": [str(path) for path in paths]}})
    return pairs.run(given.pairs, given.events, given.documents, tmp_path / "pairs")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"d": FINE + b"c,\n"}, r"d\.csv: row 4 \(document_id 'c'\) has no text; every document needs both"),
        ({"d": FINE + b"c,caf\xe9\n"}, r"d\.csv: row 4 is not UTF-8 \(b'c,caf\\xe9'\)"),
        ({"d": FINE + b"a,two\n"}, r"'a' stands twice: \S*d\.csv row 2 and \S*d\.csv row 4 \(1 ids do\)"),
        ({"d": FINE, "e": HEADER + b"b,x\n"}, r"'b' stands twice: \S*d\.csv row 3 and \S*e\.csv row 2"),
        ({"d": HEADER}, r"d\.csv: no documents in it"),
        ({"d": b""}, r"d\.csv: empty; wanted documents"),
    ],
)
def test_documents_that_cannot_be_used_stop_the_stage_in_a_line(tmp_path, files, message):
    with pytest.raises(InputError, match=message) as caught:
        of_documents(tmp_path, **files)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pairs").exists()


def test_documents_of_emoji_of_a_megabyte_and_with_a_null_byte_are_kept(tmp_path):
    made = of_documents(tmp_path, d=FINE + b"c," + b"x" * 1_000_000 + b"\nd,nul\0byte\n")
    assert made.read("documents")["text"].to_pylist() == ["one", "🙂", "x" * 1_000_000, "nul\0byte"]
    assert made.facts["excluded"] == {}
