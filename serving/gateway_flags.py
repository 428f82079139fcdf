"""The gateway's flags: `python -m serving gateway --help`."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from serving.client import DEFAULT_MODEL_NAME, DEFAULT_URL

EXAMPLES = """
examples:
  # beside an index server (make serve); then open http://localhost:8000
  python -m serving gateway --model_base_path work/demo/models/index

  # one process, no index server: up to 100,000 documents
  python -m serving gateway --in_process --model_base_path work/demo/models/index

  # the encoder in a server of its own, documents added at once, feedback logged for the next run
  python -m serving gateway --model_base_path /models/index --encoder_url http://localhost:8080 \\
      --fresh /data/fresh --feedback /data/feedback --user_key_file /secrets/user.key

  # a tenth of the users are served by another version; `python -m pipeline evaluate --ab` compares
  python -m serving gateway --model_base_path /models/index --feedback /data/feedback \\
      --user_key_file /secrets/user.key --compare 20261121123000:0.1
"""


def parser() -> argparse.ArgumentParser:
    """Every flag, its default and what it is for."""
    made = argparse.ArgumentParser(
        prog="python -m serving gateway",
        description="Search for people: typed text in, documents out; a page on /, JSON beside it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_index(made.add_argument_group("the index"))
    _add_encoder(made.add_argument_group("the encoder"))
    _add_listening(made.add_argument_group("requests"))
    _add_files(made.add_argument_group("what is kept beside the index"))
    return made


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags, those that exclude each other refused (exit 2)."""
    made = parser()
    flags = made.parse_args(arguments)
    if flags.in_process and flags.index_url:
        made.error("--in_process and --index_url exclude each other: leave one out")
    if flags.user_key_file and not (flags.feedback or flags.compare):
        made.error(
            "--user_key_file hashes users for --feedback and --compare: give one of them, or leave it out"
        )
    if flags.compare and not flags.user_key_file:
        made.error("--compare wants --user_key_file FILE: without it users would change sides at a restart")
    if flags.compare and flags.in_process:
        made.error("--compare wants an index server that serves both versions: leave --in_process out")
    if flags.encoder_key_file and not flags.encoder_url:
        made.error("--encoder_key_file is for an encoder server: give --encoder_url, or leave it out")
    if flags.encoder_model and not (flags.encoder_url and flags.encoder_api == "openai"):
        made.error(
            "--encoder_model is for --encoder_url with --encoder_api openai: give both, or leave it out"
        )
    flags.index_url = flags.index_url or DEFAULT_URL
    flags.model_base_path = flags.model_base_path or Path("work/models") / flags.model_name
    return flags


def _add_index(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--index_url",
        metavar="URL",
        help=f"TensorFlow Serving's REST API, or this project's server; default {DEFAULT_URL}",
    )
    group.add_argument(
        "--model_name", default=DEFAULT_MODEL_NAME, help="the index's name there; default %(default)s"
    )
    group.add_argument(
        "--model_base_path",
        type=Path,
        metavar="DIR",
        help="the folder that holds the numbered versions, with encoders/ two levels above: documents and "
        "encoder come from there; default work/models/<model_name>",
    )
    group.add_argument(
        "--in_process",
        action="store_true",
        help="no index server: search the version's own rows (assets.extra/rows.npy) here, exactly",
    )
    group.add_argument("--no_hybrid", action="store_true", help="build no BM25: a faster start, less memory")
    group.add_argument(
        "--poll_seconds",
        type=_number(float, "seconds above 0", 0.01),
        default=2.0,
        help="how often to look for a newer version and a changed --items file; default %(default)s",
    )


def _add_encoder(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--encoder_url",
        metavar="URL",
        help="encode by `python -m serving encoder` or Text Embeddings Inference there; default: in this "
        "process, by the encoder that the version names",
    )
    group.add_argument(
        "--encoder_api",
        choices=("tei", "openai"),
        default="tei",
        help="how --encoder_url is asked: POST /embed, or POST /v1/embeddings; default %(default)s",
    )
    group.add_argument("--encoder_model", metavar="NAME", help="the model that --encoder_api openai asks for")
    group.add_argument(
        "--encoder_key_file",
        type=Path,
        metavar="FILE",
        help="the key of --encoder_url, sent as Authorization: Bearer",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="of an encoder in this process"
    )


def _add_listening(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default %(default)s: this machine alone"
    )
    group.add_argument(
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that a proxy on this machine passes on as Host; may be given several times",
    )
    group.add_argument("--port", type=_number(int, "a port of 0 to 65535", 0, 65535), default=8000)
    group.add_argument(
        "--k_max", type=_number(int, "1 to 500", 1, 500), default=100, help="results of a request at most"
    )
    group.add_argument(
        "--max_query_chars",
        type=_number(int, "1 or more", 1),
        default=2000,
        help="letters of a query at most; default %(default)s",
    )
    group.add_argument(
        "--max_queued",
        type=_number(int, "1 or more", 1),
        default=1000,
        help="requests that may be under way; more are answered 429; default %(default)s",
    )
    group.add_argument(
        "--max_body_bytes",
        type=_number(int, "1 or more", 1),
        default=4 << 20,
        help="largest request; default %(default)s",
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--items", type=Path, metavar="FILE", help="canned answers: a CSV, read again when changed"
    )
    group.add_argument(
        "--fresh",
        type=Path,
        metavar="DIR",
        help="take POST /documents, and keep what it adds and removes there",
    )
    group.add_argument("--feedback", type=Path, metavar="DIR", help="log searches and what was opened there")
    group.add_argument(
        "--user_key_file",
        type=Path,
        metavar="FILE",
        help="the key that users are hashed by; made where it is not there",
    )
    group.add_argument(
        "--compare",
        metavar="VERSION:SHARE",
        help="serve this version, too, to this share of the users; the index server must serve both, and "
        "with --encoder_url that one encoder must have made both",
    )


def _number(kind: type, wanted: str, low: float, high: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"is {text}, wanted {wanted}")
        return value

    return read
