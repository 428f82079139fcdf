"""benchmarks/gateway*.py: what they compute, what they refuse, and the whole scripts run on little."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gateway_parts import publish
from test_ask import MAKE_ENCODER

from benchmarks import gateway_rehearsal, gateway_tables, gateway_typing
from benchmarks.gateway import (
    TOKENS_APART,
    main,
    newest,
    one_token_words,
    parsed,
    queries_of,
    read_hey,
    text_of,
    with_first_words,
)
from benchmarks.gateway_rehearsal import Event, Seen, back_at, faults, is_clear, said, timeline
from benchmarks.gateway_typing import Typed, as_typed, asked, keys_of, make_titles, with_slip, words_of
from pipeline.artifacts import encoder_sha256, file_hashes
from pipeline.errors import InputError
from serving.encoding import LocalEncoding, Rows

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "work/demo/models/index"
HEY = """
Summary:
  Total:	2.0000 secs
  Average:	0.0125 secs
  Requests/sec:	450.5000

Latency distribution:
  50% in 0.0100 secs

Status code distribution:
  [200]	900 responses
  [429]	1 responses

Error distribution:
  [7]	Post "http://localhost/embed": EOF
  [2]	Post "http://localhost/embed": dial tcp: connection refused
"""
INDEX_AWAY = (
    "no index server answers at http://localhost:9090 (refused): start it with `make serve`, or give its "
    "address as --index_url"
)


# --- Text in, documents out ---


def one(system: str, clients: int, rate: float, p50: float = 1.0) -> dict:
    return {"system": system, "clients": clients, "rate": rate, "p50": p50, "p99": 9.0, "p999": 9.0,
            "errors": 0, "cpu_us": 100.0}  # fmt: skip


def compared(rounds: list[dict], device: str = "cpu") -> list[str]:
    return list(gateway_tables.compared({"device": device}, {"rounds": rounds}))


@pytest.mark.parametrize(
    ("device", "rate", "said"),
    [
        ("cpu", 300, "One process: 3.0 times the requests/s at 64 clients (goal 3: reached)."),
        ("cpu", 290, "One process: 2.9 times the requests/s at 64 clients (goal 3: missed)."),
        ("cuda", 300, "One process: 3.0 times the requests/s at 64 clients (goal 5: missed)."),
    ],
)
def test_the_goal_is_three_times_the_requests_on_a_cpu_and_five_on_a_gpu(device, rate, said):
    assert compared([one("rows", 64, rate), one("rows-apart", 64, 100)], device) == [said]


@pytest.mark.parametrize(("p50", "came_out"), [(10.5, "reached"), (10.6, "missed")])
def test_one_client_waits_no_longer_but_for_a_twentieth(p50, came_out):
    [line] = compared([one("served", 1, 1, p50), one("served-apart", 1, 1, 10.0)])
    assert line.startswith("Beside an index server: p50 at 1 client 10.")
    assert line.endswith(f"{came_out}).")


def test_a_gateway_without_its_other_half_is_compared_with_nothing():
    assert compared([one("rows", 64, 300), one("served-apart", 64, 100)]) == []


def test_queries_are_words_in_a_row_of_documents_and_each_comes_once():
    documents = ["one two three four five six seven eight nine ten", "single", "", "single"]
    first, second = queries_of(documents)
    assert first in documents[0]
    assert 3 <= len(first.split()) <= 8
    assert second == "single"


def test_the_newest_version_is_the_greatest_number(tmp_path):
    for name in ("9", "10", "temporary"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path) == tmp_path / "10"


class Counting:
    """Stands in for a model on two cores: a vector is (1,), and it counts the texts of each call."""

    dim, max_tokens, round_tokens = 1, 100, 2 * TOKENS_APART

    def __init__(self) -> None:
        self.ways = {"query": "query", "document": "document"}
        self.described: dict[str, str] = {}
        self.n_texts: list[int] = []

    def rows(self, texts, way) -> Rows:
        self.n_texts.append(len(texts))
        return Rows(
            np.ones((len(texts), 1), np.float32), np.ones(len(texts), int), np.zeros(len(texts), bool)
        )


def test_one_by_one_means_that_texts_that_come_together_are_encoded_each_by_itself():
    computing = Counting()

    async def ask() -> None:
        encoding = LocalEncoding(computing, cache_bytes=0)
        await asyncio.gather(*(encoding.queries([text]) for text in ("a", "b", "c", "a")))
        await encoding.close()

    asyncio.run(ask())
    assert computing.n_texts == [1, 1, 1, 1]


# --- The encoder alone ---


def test_every_answer_but_200_and_every_broken_connection_is_an_error_of_hey():
    assert read_hey(HEY) == {"requests": 910, "rate": 450.5, "average": 12.5, "errors": 10}


@pytest.fixture
def tokenizer(tmp_path):
    """Words "sea" and "ship" are a token each, all others none that is known; [CLS] stands in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(
        models.WordPiece({"[UNK]": 0, "[CLS]": 1, "sea": 2, "ship": 3, "##s": 4}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    made.enable_truncation(4)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_words_of_two_tokens_make_no_text_of_a_known_length(tokenizer):
    assert one_token_words(tokenizer, ["sea ships", "ship sea"]) == [
        "sea",
        "ship",
    ]  # "ships" is "ship", "##s"


def test_a_text_has_as_many_tokens_as_was_asked_for_the_models_own_included(tokenizer):
    assert text_of(6, tokenizer, ["sea", "ship"]) == "sea ship sea ship sea"


def test_a_length_that_the_models_own_tokens_fill_is_refused(tokenizer):
    with pytest.raises(InputError, match="--lengths 1: the model adds 1 tokens itself; wanted more"):
        text_of(1, tokenizer, ["sea"])


def test_texts_that_are_sent_alike_are_encoded_with_another_first_word_each():
    async def encoded(self, texts, prompt_name=None):
        return texts, prompt_name

    changed = with_first_words(encoded, ["a", "b"])
    texts, name = asyncio.run(changed(None, ["x y z", "x y z", "x y z"], prompt_name="query"))
    assert (texts, name) == (["a y z", "b y z", "a y z"], "query")


# --- As one types ---


def test_a_syllable_is_typed_letter_by_letter():
    assert keys_of("한 가b") == ["ㅎ", "하", "한", "한 ", "한 ㄱ", "한 가", "한 가b"]


@pytest.mark.parametrize(("kind", "typed"), [(0, "abccd"), (1, "abd"), (2, "abdd"), (3, "abdc")])
def test_a_slip_is_a_letter_too_many_too_few_another_one_or_two_swapped(kind, typed):
    assert with_slip("abcd", kind, 2) == typed


def test_a_slip_in_a_syllable_is_another_vowel():
    assert with_slip("가한나", 0, 1) == "가핸나"  # ㅐ comes after ㅏ


def test_a_slip_never_touches_the_space_between_words():
    rng = np.random.default_rng(1)
    typed = {as_typed("abc defg", True, rng).keys[-1] for _ in range(50)}
    assert all(len(text.split()) == 2 for text in typed)
    assert len(typed) > 3


def test_a_title_of_short_words_is_typed_as_it_is():
    assert as_typed("ab cd", True, np.random.default_rng(1)) == Typed(
        ["a", "ab", "ab ", "ab c", "ab cd"], False
    )


def test_a_fifth_of_the_titles_is_hangul_and_frequent_words_come_more_often():
    words = words_of(["the the the cat 12 a_b"])
    assert words == ["the", "cat"]
    titles = make_titles(words, 100, np.random.default_rng(1))
    hangul = [title for title in titles if "가" <= title[0] <= "힣"]
    assert (len(titles), len(hangul)) == (100, 20)
    of_latin = " ".join(title for title in titles if title not in hangul).split()
    assert of_latin.count("the") > 1.5 * of_latin.count("cat")  # twice, by Zipf's law


def test_what_is_shown_at_the_last_key_is_counted_with_and_without_a_slip():
    typed = [Typed(["a", "ab"], False), Typed(["x", "xb"], True)]
    found = asked(lambda text: ["abc"] if "abc".startswith(text) else [], typed, one_in=1)
    assert (found["asked"], found["found_exact"], found["found_slip"]) == (4, 1.0, 0.0)


def test_only_this_project_finds_all_titles_and_most_of_those_with_a_slip(tmp_path):
    found = gateway_typing.measure(["merge tables left right join"] * 3, 200, 10, 1, tmp_path)
    ours, *peers = found["systems"].values()
    assert len(peers) == 3
    assert ours["found_exact"] == 1.0
    assert all(peer["found_exact"] > 0 for peer in peers)  # but not what ends in half a syllable
    assert ours["found_slip"] > max(peer["found_slip"] for peer in peers)


# --- What is refused ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clients", "8", "0"], "--clients is 0, wanted 1 or more"),
        (["--rows", "0"], "--rows is 0, wanted 1 or more"),
        (["--hey-seconds", "0"], "--hey-seconds is 0.0, wanted more than 0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_a_version_says_how_to_publish_one(tmp_path, capsys):
    said = f"{tmp_path} holds no version: make demo publishes one, or give --model_base_path"
    assert main(["--parts", "c", "--model_base_path", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(("part", "tool"), [("a", "wrk"), ("b", "hey")])
def test_the_tool_is_asked_for_before_anything_starts(part, tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--parts", part, "--work", str(tmp_path / "work")]) == 2
    assert capsys.readouterr().err == f"error: {tool} is not on the PATH: apt-get install {tool}\n"
    assert not (tmp_path / "work").exists()


# --- The rehearsal ---


def seen(sent: float, status: int = 200, error: str = "", took: float = 0.1, is_search: bool = True) -> Seen:
    return Seen(sent, took, status, error, is_search)


@pytest.mark.parametrize(
    ("status", "error", "clear"),
    [
        (503, INDEX_AWAY, True),
        (503, "not ready: no version is AVAILABLE at http://localhost:9090 yet", True),
        (500, INDEX_AWAY, False),  # a person's program would not ask again
        (503, "", False),
        (503, f"{INDEX_AWAY}\nTraceback", False),
        (503, "Internal Server Error", False),
    ],
)
def test_an_error_is_clear_when_one_line_says_what_to_do_and_the_status_to_come_back(status, error, clear):
    assert is_clear(status, error) is clear


def test_an_error_that_is_no_json_is_none_that_a_person_reads():
    assert said(b'{"error": "full"}') == "full"
    assert said(b"<html>") == "no JSON with an error: b'<html>'"
    assert not is_clear(503, said(b"[1]"))


def test_answers_are_back_when_ten_in_a_row_came_and_count_from_the_first_of_them():
    searches = [seen(0), seen(1, 503), *(seen(2 + n) for n in range(9))]
    assert back_at(searches) is None
    assert back_at([*searches, seen(11)]) == 2


EVENTS = [
    Event(10, "SIGKILL to the gateway"),
    Event(15, "gateway started again", 3.0),
    Event(30, "SIGTERM to the gateway"),
]


def test_a_rehearsal_in_which_the_gateway_was_missed_only_while_it_was_away_has_no_faults():
    people = [seen(1), seen(9.5, 0), seen(17.9, 0), seen(20, 503, INDEX_AWAY), seen(31, 0)]
    assert faults(people, EVENTS, 10, 0) == []


@pytest.mark.parametrize(
    ("one_more", "fault"),
    [
        (seen(25, 0), "1 requests found no gateway while it ran, the first at 25.0 s"),
        (seen(5, 500, "oh"), "no clear error, 1 times: 500 oh"),
        (seen(5, took=10.1), "somebody waited 10.1 s at second 5, wanted 10"),
    ],
)
def test_what_must_not_be_is_a_fault(one_more, fault):
    assert faults([seen(1), one_more], EVENTS, 10, 0) == [fault]


def test_answers_that_do_not_come_back_and_another_exit_code_are_faults():
    events = [Event(1, "SIGKILL to the index server"), Event(2, "index server started again", None)]
    assert faults([seen(1)], events, 10, -9) == [
        "index server started again, and answers did not come back",
        "the gateway ended with -9 after SIGTERM, wanted 0",
    ]


def test_a_second_counts_what_was_sent_in_it():
    people = [
        seen(1.1, took=0.1),
        seen(1.9, took=0.3),
        seen(2.5, 503, INDEX_AWAY),
        seen(2.6, is_search=False),
    ]
    first, second = timeline(people, [Event(2.0, "SIGKILL to the index server")])
    assert (first["second"], first["answered"], first["p50"], first["what"]) == (1, 2, pytest.approx(200), "")
    assert (second["answered"], second["refused"], second["suggested"]) == (0, 1, 1)
    assert second["what"] == "SIGKILL to the index server"
    assert second["p50"] is None


# --- The scripts ---


def small_version(folder: Path) -> Path:
    """The base path of a version of 41 documents with a tiny encoder of their words, and its rows."""
    words = [f"w{chr(97 + n)}" for n in range(20)]
    texts = [
        f"{words[n % 20]} {words[n // 2]} {words[(3 * n) % 20]} {words[(7 * n) % 20]}" for n in range(40)
    ]
    texts.append("merge two tables on a key")  # an encoder that knows no word of it is refused
    made, vectors = folder / "made" / "encoder", folder / "vectors.npy"
    command = [sys.executable, "-c", MAKE_ENCODER, str(made), str(vectors), *texts]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    sha256 = encoder_sha256(file_hashes(made))
    (folder / "encoders").mkdir()
    made.rename(folder / "encoders" / sha256)
    documents = [{"document_id": f"d{n}", "title": text, "text": text} for n, text in enumerate(texts)]
    publish(folder, documents=documents, has_rows=False, encoder_sha256=sha256, dim=16)
    return folder / "models" / "index"


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (shutil.which("wrk") and shutil.which("hey")), reason="wrk or hey is not on the PATH")
def test_the_script_measures_every_part_and_writes_all_that_was_asked_for(tmp_path):
    command = [
        sys.executable, "benchmarks/gateway.py", "--model_base_path", str(small_version(tmp_path)),
        "--systems", "rows", "rows-apart", "--clients", "1", "64", "--rounds", "1", "--seconds", "1",
        "--lengths", "4", "16", "--requests", "64", "--hey-clients", "16", "--hey-seconds", "5",
        "--rows", "500", "--typed", "10", "--work", str(tmp_path / "work"),
        "--json", str(tmp_path / "all.json"), "--markdown", str(tmp_path / "all.md"),
        "--plot", str(tmp_path / "all.png"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "all.json").read_text())
    rounds = results["a"]["rounds"]
    assert [(r["system"], r["clients"]) for r in rounds] == [
        (name, clients) for clients in (1, 64) for name in ("rows", "rows-apart")
    ]
    assert all(r["rate"] > 0 and r["errors"] == 0 for r in rounds)
    assert results["a"]["shared"] == {"rows": 1.0, "rows-apart": 1.0}
    assert [size["title"].split(",")[0] for size in results["b"]["sizes"]] == [
        "1 layers of 16",
        "2 layers of 16",
    ]
    assert [(r["size"], r["length"], r["errors"]) for r in results["b"]["measured"]] == [
        (size, length, 0) for size in ("once", "twice") for length in (4, 16)
    ]
    report = (tmp_path / "all.md").read_text()
    assert "One process: p50 at 1 client" in report
    assert "p95 of a key" in report
    assert (tmp_path / "all.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(600)
@pytest.mark.skipif(not DEMO.is_dir(), reason="make demo publishes the version that is served")
def test_the_rehearsal_shows_what_users_saw_and_that_all_came_back(tmp_path):
    arguments = ["--rate", "5", "--steady", "1", "--down", "1", "--longest", "30",
                 "--json", str(tmp_path / "all.json"), "--plot", str(tmp_path / "all.png"),
                 "--markdown", str(tmp_path / "all.md")]  # fmt: skip
    assert gateway_rehearsal.main(["--model_base_path", str(DEMO), *arguments]) == 0
    results = json.loads((tmp_path / "all.json").read_text())
    assert [what for _, what, _ in results["events"]] == [
        f"{done}{name}{again}" for name in ("index server", "encoder server", "gateway")
        for done, again in (("SIGKILL to the ", ""), ("", " started again"))
    ] + ["SIGTERM to the gateway"]  # fmt: skip
    read = " ".join(error for _, _, status, error, _ in results["seen"] if status == 503)
    assert "no index server answers at" in read
    assert "the encoder server cannot be reached" in read
    assert (
        "What was read" in (tmp_path / "all.md").read_text()
        or "what was read" in (tmp_path / "all.md").read_text()
    )
    assert (tmp_path / "all.png").stat().st_size > 10_000
