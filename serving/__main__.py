"""Command line of the local index server, of asking one, and of the search gateway and its encoder server."""

import argparse
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import PipelineError, from_os_error
from serving.client import DEFAULT_MODEL_NAME, DEFAULT_URL

ASK_EXAMPLES = """
examples:
  python -m serving ask "merge two tables on a key" -k 10
  python -m serving ask "merge two tables on a key" --body > query.json
  curl -d @query.json -X POST http://localhost:9090/v1/models/index:predict
  python -m serving ask "merge two tables on a key" --body --signature_name search -k 50 > search.json
"""
PROBE_EXAMPLES = """
examples:
  python -m serving probe
  python -m serving probe --query query.json --version 20261121123000
"""
TOUR_EXAMPLES = """
examples:
  python -m serving tour --model_base_path work/demo/models/index --text "merge two tables on a key"
"""
SIGNATURES = ("serving_default", "search", "exact", "search_filtered")
DEFAULT_TEXT = "merge two tables on a key"


def main(arguments: list[str]) -> int:
    """Run one command; the exit code."""
    commands = {"ask": _ask, "encoder": _encoder, "gateway": _gateway, "probe": _probe, "tour": _tour}
    name = arguments[0] if arguments else ""
    try:
        if name in commands:
            return commands[name](arguments[1:])
        return _serve(arguments)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        known = from_os_error(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return known.exit_code


def _serve(arguments: list[str]) -> int:
    from serving.flags import parse

    _log()
    flags = parse(arguments)
    from serving.server import serve

    serve(flags)
    return 0


def _gateway(arguments: list[str]) -> int:
    from serving.gateway_flags import parse

    flags = parse(arguments)
    _log()
    from serving.gateway import serve

    serve(flags)
    return 0


def _encoder(arguments: list[str]) -> int:
    from serving.encoder_server import parser, serve

    flags = parser().parse_args(arguments)
    _log()
    serve(flags)
    return 0


def _log() -> None:
    """What the server itself says; of the libraries that it loads only what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("serving").setLevel(logging.INFO)


def _ask(arguments: list[str]) -> int:
    parser = _parser(
        "python -m serving ask",
        "Encode a text with the served version's own model, ask the server, show the documents found.",
        ASK_EXAMPLES,
    )
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("-k", type=_positive, help="documents to show; default: all that were found")
    parser.add_argument("--body", action="store_true", help="print only the JSON body for curl")
    parser.add_argument(
        "--signature_name",
        choices=SIGNATURES,
        default=SIGNATURES[0],
        help="with --body: whose; all but %(default)s take -k, and get the version's own settings, to edit",
    )
    parser.add_argument("--url", default=DEFAULT_URL, help="default %(default)s")
    _add_model(parser)
    args = parser.parse_args(arguments)
    if args.signature_name != SIGNATURES[0] and not args.body:
        parser.error(
            f"--signature_name {args.signature_name} wants --body: documents are shown by row number"
        )
    from serving.ask import ask, request_body, served_version
    from serving.client import Client

    with Client(args.url, args.model_name) as client:
        if args.body:
            version = served_version(client, _base_path(args))
            print(request_body(version, args.text, args.signature_name, args.k))
        else:
            print(ask(client, _base_path(args), args.text, args.k))
    return 0


def _probe(arguments: list[str]) -> int:
    parser = _parser("python -m serving probe", "Whether an index is served and answers.", PROBE_EXAMPLES)
    parser.add_argument("--url", default=DEFAULT_URL, help="default %(default)s")
    parser.add_argument("--model_name", default=DEFAULT_MODEL_NAME, help="default %(default)s")
    parser.add_argument("--query", type=Path, help="file with the body of a request to send")
    parser.add_argument(
        "--dim", type=_positive, default=384, help="without --query: width of the vector sent; default 384"
    )
    parser.add_argument("--version", type=_positive, help="the version that must be served; default: any")
    parser.add_argument("--timeout", type=_seconds, default=5.0, help="seconds for each request; default 5")
    args = parser.parse_args(arguments)
    from serving.client import Client
    from serving.probe import probe, read_query, unit_vector

    vector = read_query(args.query) if args.query else unit_vector(args.dim)
    with Client(args.url, args.model_name, timeout=args.timeout, retries=0) as client:
        print(probe(client, vector, args.version))
    return 0


def _tour(arguments: list[str]) -> int:
    parser = _parser(
        "python -m serving tour",
        "Start a server on a free port, ask it for status, metadata and documents, stop it.",
        TOUR_EXAMPLES,
    )
    _add_model(parser)
    parser.add_argument("--text", default=DEFAULT_TEXT, help="what to search for; default %(default)r")
    parser.add_argument("-k", type=_positive, help="documents to show; default: all that were found")
    args = parser.parse_args(arguments)
    from serving.tour import tour

    tour(_base_path(args), args.model_name, args.text, args.k)
    return 0


def _parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the real server knows no short forms of its flags
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name", default=DEFAULT_MODEL_NAME, help="default %(default)s")
    parser.add_argument(
        "--model_base_path",
        type=Path,
        help="the folder that holds the numbered versions; default work/models/<model_name>",
    )


def _base_path(args: argparse.Namespace) -> Path:
    return args.model_base_path or Path("work/models") / args.model_name


def _positive(text: str) -> int:
    return int(_number(text, int, "a whole number of 1 or more", 1))


def _seconds(text: str) -> float:
    return _number(text, float, "seconds, 0 or more", 0)


def _number(text: str, kind: Callable[[str], float], wanted: str, low: float) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}, wanted {wanted}")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
