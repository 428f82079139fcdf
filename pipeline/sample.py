"""The sample that every installation can make: real docstrings as documents, simulated readers as events.

The documents are the docstrings of the public functions and classes of the standard library and of the
installed packages. The readers are a seeded walk over them: the next document stands in the same source
file, or is one that the docstring itself refers to. The walk never looks at how alike two texts are.
"""

import ast
import bisect
import contextlib
import gzip
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pkgutil
import random
import re
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import InputError

START = datetime(2026, 1, 5, tzinfo=UTC)  # fixed: the same seed gives the same bytes on any day

DOTS = type("Dots", (), {"__repr__": lambda self: "..."})()  # stands for a default that is not plain
ROOTS = (str(Path(__file__).parents[1]),)  # where a child process finds this module
# Packages that do things when imported, or hold no interface of their own.
# fmt: off
LEFT_OUT = frozenset((
    "antigravity", "ensurepip", "idlelib", "isympy", "lib2to3", "nt", "pip", "pipeline", "pkg_resources",
    "posix", "py", "pydoc_data", "pylab", "serving", "test", "tests", "this", "turtledemo",
))
# Modules that are private in all but name, carry another package's code, or test their own.
PRIVATE_MODULES = frozenset((
    "backend", "benchmarks", "cli", "command", "commands", "compat", "conftest", "contrib", "core",
    "examples", "extern", "externals", "impl", "internal", "internals", "protos", "python",
    "scripts", "src", "test", "testing", "tests", "tools", "vendor", "vendored", "v1",
))
# fmt: on
# Seconds to import: hidden from the packages that can do without.
HEAVY = frozenset(("tensorflow", "torch"))
MAX_IMPORTS = 120  # submodules a package, so that a large one costs seconds; the nearest to the top first
MAX_PARTS = 4  # of a name: package.module.module.function
MAX_LAZY_NAMES = 1500  # getting a lazy package's names imports them all: larger ones are left as loaded

REFERENCE = re.compile(
    r":(?:py:)?(?:func|class|meth|obj|data):`~?\.?([\w.]+)(?:\(\))?`"  # Sphinx
    r"|`{1,2}([A-Za-z_][\w.]*)\(\)`{1,2}|`{1,2}([A-Za-z_]\w*(?:\.\w+)+)`{1,2}"  # `name()`, `a.name`
)
SEE_ALSO = re.compile(r"^See Also\n-+\n(.*?)(?=^\S[^\n]*\n-{3,}|\Z)", re.MULTILINE | re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`])")
ADDRESS = re.compile(r"<([\w.]+)[^<>]* at 0x[0-9a-f]+>")  # differs from run to run


@dataclass
class Docstring:
    """One public function or class as a package shows it."""

    name: str  # as a user writes it: pandas.merge
    parameters: str  # "left, right, how"; empty where Python does not know them
    signature: str  # "(left, right, how='inner')"
    paragraph: str  # the docstring's first, on one line
    sentences: list[str]  # of the whole docstring's prose; what a reader highlights
    references: list[str]  # names that the docstring points to, as written there
    source: str  # file that defines it, relative to the package's folder; the neighbourhood
    line: int  # in that file
    package: str = field(default="")

    @property
    def title(self) -> str:
        return self.name + _shortened(self.signature, 160)

    @property
    def text(self) -> str:
        """On one line; few parameters, for a long list of them would outweigh what the function is for."""
        parameters = self.parameters
        if len(parameters) > 40:
            parameters = parameters[:40].rpartition(", ")[0] + ", ..."
        return f"{self.name}({parameters}): {_shortened(self.paragraph, 800)}"


def make(
    out: Path,
    seed: int = 7,
    n_readers: int = 3000,
    n_documents: int = 10_000,
    n_days: int = 60,
    packages: Sequence[str] | None = None,
    timeout: float = 45,
) -> dict[str, Any]:
    """Write `out/events.jsonl.gz` and `out/documents.parquet`, both or neither.

    The same installation and seed give the same bytes.

    Args:
        n_documents: at most; the largest packages are cut first, and all to the same size.
        packages: import names; default: every installed one and the standard library.
        timeout: seconds that one package may take to import.

    Returns:
        events, readers, documents, packages (counts), and failed ({package: reason}).

    Raises:
        InputError: the packages have no docstrings to read.
    """
    names = sorted(packages) if packages is not None else installed_packages()
    collected, failed = collect_all(names, timeout)
    for name, reason in failed.items():
        print(f"sample: left out {name}: {reason}", file=sys.stderr)
    documents = choose(collected, n_documents, seed)
    if len(documents) < 2:
        raise InputError(
            f"sample: {', '.join(names[:5])} gave {len(documents)} docstrings; name more packages"
        )
    events = simulate(documents, seed, n_readers, n_days)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _write_both(out, events, documents)
    return {
        "events": len(events),
        "readers": len({event["user_id"] for event in events}),
        "documents": len(documents),
        "packages": len({document.package for document in documents}),
        "failed": failed,
    }


# ---- documents: one child process a package


def installed_packages() -> list[str]:
    """Import names of the standard library and of every installed distribution, sorted."""
    names = set(sys.stdlib_module_names) | set(metadata.packages_distributions())
    public = {n for n in names if n.isidentifier() and not n.startswith("_")} - LEFT_OUT
    return sorted(n for n in public if importlib.util.find_spec(n))  # winreg is not on every system


def collect_all(names: Sequence[str], timeout: float) -> tuple[list[Docstring], dict[str, str]]:
    """Read every package in a child process of its own, a few at once.

    Returns:
        The docstrings in the order of `names`, and {package: why it gave none} for those that failed.
    """
    from tqdm import tqdm

    collected, failed = {}, {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        slow_first = sorted(names, key=_n_files(), reverse=True)  # else the slowest would end alone
        jobs = {name: pool.submit(_in_child, name, Path(folder), timeout) for name in slow_first}
        for name in tqdm(slow_first, desc="sample: docstrings", unit="package", disable=None):
            try:
                collected[name] = jobs[name].result()
            except ChildError as error:
                failed[name] = str(error)
    return [d for name in names for d in collected.get(name, [])], dict(sorted(failed.items()))


class ChildError(Exception):
    """Why a package's child process gave nothing, in a few words."""


def _in_child(name: str, folder: Path, timeout: float) -> list[Docstring]:
    """Collect without the frameworks, and once more with them where the package cannot do without."""
    try:
        return _run_child(name, folder, timeout, "light")
    except ChildError as error:
        if isinstance(error.__cause__, subprocess.TimeoutExpired):
            raise
        return _run_child(name, folder, timeout, "whole")


def _run_child(name: str, folder: Path, timeout: float, mode: str) -> list[Docstring]:
    result = folder / f"{name}.json"
    command = [sys.executable, "-m", "pipeline.sample", name, str(result), mode]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_USE_LEGACY_KERAS": "1", "CUDA_VISIBLE_DEVICES": ""}
    apart = {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    same = {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(ROOTS)}
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **quiet, **apart, **same}, timeout=timeout, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"took more than {timeout:g} s to import") from error
    if done.returncode != 0 or not result.exists():
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise ChildError(_shortened(last, 120))
    return [Docstring(**d) for d in json.loads(result.read_text(encoding="utf-8"))]


def _n_files() -> Any:
    """A key for sorting import names by how much their distribution installs."""
    owners = metadata.packages_distributions()
    return lambda name: sum(len(metadata.files(owner) or ()) for owner in set(owners.get(name, ())))


class _WithoutHeavy(PathFinder):
    """Finds modules as Python does, but for the frameworks, which seem not to be installed."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname in HEAVY else PathFinder.find_spec(fullname, path, target)


def _hide_heavy(package: str) -> None:
    if package not in HEAVY:
        sys.meta_path[:] = [_WithoutHeavy if finder is PathFinder else finder for finder in sys.meta_path]


def collect(package: str) -> list[Docstring]:
    """Import a package and read the docstrings of its public functions and classes, sorted by name.

    An object with several names goes by the one with the fewest parts; of those by one in the module
    that defines it or above, not in one that imported it; then by the shortest.

    Raises:
        Exception: whatever the package raises when it is imported.
    """
    found: dict[int, tuple[tuple, str, Any]] = {}
    for path, module in _public_modules(package):
        for name, value in _public_members(module):
            if _is_of(package, value):
                full = name if path == "builtins" else f"{path}.{name}"
                borrowed = not str(getattr(value, "__module__", None)).startswith(path)
                rank = (full.count("."), borrowed, *_order(full))
                if id(value) not in found or rank < found[id(value)][0]:
                    found[id(value)] = (rank, full, value)
    by_paragraph: dict[str, Docstring] = {}
    for _, name, value in sorted(found.values(), key=lambda item: item[0]):
        read = read_docstring(name, value, package)
        if read is not None:
            by_paragraph.setdefault(read.paragraph, read)
    return sorted(by_paragraph.values(), key=lambda d: d.name)


def _order(name: str) -> tuple[int, int, str]:
    return name.count("."), len(name), name


def _public_modules(package: str) -> Iterator[tuple[str, ModuleType]]:
    """The package and its public submodules with the names they are reached by, nearest to the top first."""
    queue: deque[tuple[str, ModuleType]] = deque([(package, importlib.import_module(package))])
    seen, n_imports = {package}, 0
    while queue:
        path, module = queue.popleft()
        yield path, module
        if path.count(".") >= MAX_PARTS - 2:
            continue
        for info in sorted(pkgutil.iter_modules(vars(module).get("__path__", ())), key=lambda i: i.name):
            if not _is_private_module(info.name) and n_imports < MAX_IMPORTS:
                n_imports += 1
                # An optional dependency is missing: that costs only this submodule.
                with contextlib.suppress(Exception, SystemExit):
                    importlib.import_module(f"{module.__name__}.{info.name}")
        for name, value in sorted(vars(module).items()):
            if isinstance(value, ModuleType) and not _is_private_module(name):
                home = value.__name__
                if home.split(".")[0] == package and home not in seen:
                    seen.add(home)
                    queue.append((f"{path}.{name}", value))


def _is_private_module(name: str) -> bool:
    return name.startswith("_") or name in PRIVATE_MODULES or name.endswith(("_pb2", "_test", "_tests"))


def _public_members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    names = vars(module).get("__all__")
    if not isinstance(names, list | tuple) or len(names) > MAX_LAZY_NAMES:
        names = list(vars(module))
    for name in sorted(str(n) for n in names):
        if name.startswith("_"):
            continue
        try:
            yield name, getattr(module, name)
        except Exception:  # a lazy name whose own import fails
            continue


def _is_of(package: str, value: Any) -> bool:
    """Whether this is a function or class that the package defines, not one that it imported."""
    if isinstance(value, ModuleType) or not callable(value):
        return False
    home = getattr(value, "__module__", None)
    if not isinstance(home, str):  # C functions such as numpy.add do not say
        return True
    top = home.partition(".")[0]
    accelerator = top.startswith("_") or top == "posix"  # the C half of a module such as os
    standard = sys.stdlib_module_names
    return top == package or (accelerator and (top[1:] == package or {top, package} <= standard))


def read_docstring(name: str, value: Any, package: str) -> Docstring | None:
    """One function's or class's own docstring, or None where it has none of at least three words."""
    documentation = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    if not isinstance(documentation, str) or documentation == type(value).__doc__:
        return None  # an instance shows its class's
    paragraphs = _paragraphs(documentation, name.rpartition(".")[2])
    if not paragraphs or len(paragraphs[0].split()) < 3:
        return None
    source, line = _where(value, package)
    signature, parameters = _signature(value)
    return Docstring(
        name=name,
        parameters=parameters,
        signature=signature,
        paragraph=paragraphs[0],
        sentences=_sentences(paragraphs),
        references=_references(inspect.cleandoc(documentation)),
        source=source,
        line=line,
        package=package,
    )


def _paragraphs(documentation: str, name: str) -> list[str]:
    """The docstring's paragraphs, each on one line; one that only repeats the signature is left out."""
    cleaned = ADDRESS.sub(r"<\1>", inspect.cleandoc(documentation))
    blocks = re.split(r"\n\s*\n", cleaned)
    if re.match(rf"[\w.]*\b{re.escape(name)}\(", blocks[0]):  # as C functions and named tuples do
        after = re.sub(rf"^[\w.]*\b{re.escape(name)}\(.*\n?", "", blocks[0], flags=re.MULTILINE)
        blocks[0] = after.removeprefix("--").strip()
    blocks = [b for b in blocks if b.strip()]
    return [" ".join(block.split()) for block in blocks]


def _sentences(paragraphs: list[str]) -> list[str]:
    prose = [p for p in paragraphs[:6] if p[0].isalpha() and "---" not in p and ">>>" not in p]
    sentences = [s for p in prose for s in SENTENCE.split(p) if 4 <= len(s.split()) <= 60]
    return sentences[:8] or [paragraphs[0]]


def _signature(value: Any) -> tuple[str, str]:
    """As written with defaults, and the bare parameter names; empty where Python does not know them."""
    try:
        signature = inspect.signature(value)
    except Exception:  # C functions without one, and classes whose own __signature__ fails
        return "", ""
    empty = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=empty, default=p.default if p.default is empty or _is_plain(p.default) else DOTS)
        for p in signature.parameters.values()
    ]
    written = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    names = ", ".join(name for name in signature.parameters if name not in ("self", "cls"))
    return " ".join(str(written).split()), names


def _is_plain(default: Any) -> bool:
    """Whether a default is written the same on every machine and in every run: no address, time or path."""
    try:
        written = repr(default)
        ast.literal_eval(written)
    except Exception:  # no literal, or its repr fails
        return False
    return "/" not in written


def _references(documentation: str) -> list[str]:
    """Names that the docstring points to, in order: "See Also" first, then cross-references."""
    listed = [
        name
        for section in SEE_ALSO.findall(documentation)
        for names in re.findall(r"^([A-Za-z_][\w.]*(?:, *[A-Za-z_][\w.]*)*)", section, re.MULTILINE)
        for name in names.replace(" ", "").split(",")
    ]
    inline = ["".join(groups).strip(".") for groups in REFERENCE.findall(documentation)]
    return list(dict.fromkeys(listed + inline))[:16]


def _where(value: Any, package: str) -> tuple[str, int]:
    """The file that defines it, relative to the package's folder, and the line; else its module, and 0."""
    function: Any = value
    if inspect.isclass(value):
        methods = [f for f in vars(value).values() if inspect.isfunction(f)]
        function = next((f for f in methods if f.__module__ == value.__module__), value)
    code = getattr(inspect.unwrap(function), "__code__", None)
    file = Path(code.co_filename) if code else Path()
    if code and package in file.parts:
        depth = len(file.parts) - 1 - file.parts[::-1].index(package)
        return "/".join(file.parts[depth:]), code.co_firstlineno
    if code and file.name == f"{package}.py":
        return file.name, code.co_firstlineno
    return str(getattr(value, "__module__", None) or package), 0


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


# ---- which documents


def choose(collected: Sequence[Docstring], n_documents: int, seed: int) -> list[Docstring]:
    """At most `n_documents`, sorted by name: no name or text twice, and no package more than it must.

    All packages are cut to the same size, so that one of thousands of functions does not crowd out
    the small ones. Of a package stay those that other docstrings refer to, then those nearest to its
    top, and among equals a seeded choice.
    """
    names, texts, unique = set(), set(), []
    for document in sorted(collected, key=lambda d: _order(d.name)):
        if document.name not in names and document.paragraph not in texts:
            names.add(document.name)
            texts.add(document.paragraph)
            unique.append(document)
    referred = {target for targets in resolve(unique) for target in targets}
    packages = defaultdict(list)
    for i, document in enumerate(unique):
        rank = (i not in referred, document.name.count("."), _hash(seed, document.name))
        packages[document.package].append((rank, document))
    limit = _limit([len(documents) for documents in packages.values()], n_documents)
    kept = [document for documents in packages.values() for _, document in sorted(documents)[:limit]]
    return sorted(kept, key=lambda d: d.name)


def resolve(documents: Sequence[Docstring]) -> list[list[int]]:
    """Which documents each one refers to, as positions in `documents`.

    A reference may be the full name, or what is left of it within the package: for `pandas.merge`,
    "merge_asof" is pandas.merge_asof. One that could be several is none.
    """
    full = {document.name: i for i, document in enumerate(documents)}
    endings: dict[tuple[str, str], set[int]] = defaultdict(set)
    for i, document in enumerate(documents):
        parts = document.name.split(".")
        for start in range(1, len(parts)):
            endings[document.package, ".".join(parts[start:])].add(i)
    resolved = []
    for i, document in enumerate(documents):
        targets: dict[int, None] = {}
        for reference in document.references:
            within = reference.removeprefix("np.").removeprefix("pd.").removeprefix("tf.")
            near = f"{document.name.rpartition('.')[0]}.{within}"
            meant = endings.get((document.package, within), set())
            target = full.get(reference, full.get(near, next(iter(meant)) if len(meant) == 1 else i))
            if target != i:
                targets[target] = None
        resolved.append(list(targets))
    return resolved


def _limit(sizes: Sequence[int], total: int) -> int:
    """The largest limit for which the sizes, each cut to it, add up to `total` at most."""
    limits = range(max(sizes, default=0) + 1)
    return bisect.bisect_right(limits, total, key=lambda limit: sum(min(s, limit) for s in sizes)) - 1


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


# ---- simulated readers


@dataclass(frozen=True)
class Habits:
    """How simulated readers move; shares of steps, and seconds."""

    follow_reference: float = 0.4  # where the docstring has one; else the next two
    read_neighbour: float = 0.45  # in the same file, mostly the next few above or below
    own_interest: float = 0.08  # another document of the reader's packages
    # what is left: any document, as if by an outside link
    mean_steps: float = 3.5  # of a session, after its first document
    mean_sessions: float = 3.5  # of a reader, after the first
    median_pause: float = 90  # between two documents of a session


class Shelf:
    """The documents as readers meet them: neighbours, references, popularity.

    Popularity is long-tailed: what many docstrings refer to is read more, and so are, by chance, a few.
    """

    def __init__(self, documents: Sequence[Docstring], rng: random.Random) -> None:
        self.documents = documents
        self.references = resolve(documents)
        n_referring = [1] * len(documents)
        for target in itertools.chain.from_iterable(self.references):
            n_referring[target] += 1
        self.popularity = [math.sqrt(n) * min(rng.paretovariate(1.2), 50) for n in n_referring]
        self.everything = _Lot(range(len(documents)), self.popularity)
        packages: dict[str, list[int]] = defaultdict(list)
        files: dict[tuple[str, str], list[int]] = defaultdict(list)
        order = sorted(range(len(documents)), key=lambda i: (documents[i].line, documents[i].name))
        for i in order:
            packages[documents[i].package].append(i)
            files[documents[i].package, documents[i].source].append(i)
        self.packages = {
            name: _Lot(rows, [self.popularity[i] for i in rows]) for name, rows in packages.items()
        }
        names = sorted(packages)
        self.package_names = _Lot(
            names, [math.sqrt(len(packages[n])) * rng.paretovariate(1.5) for n in names]
        )
        # A file with one document has no neighbourhood: the package is the next larger one.
        self.places = {
            i: (rows, place) if len(rows) > 1 else (packages[package], packages[package].index(i))
            for (package, _), rows in files.items()
            for place, i in enumerate(rows)
        }

    def neighbour(self, document: int, rng: random.Random) -> int:
        """A document of the same file, mostly one of the next few above or below."""
        rows, place = self.places[document]
        if len(rows) == 1:
            return document
        distance = 1 + int(rng.expovariate(1 / 2.5))
        return rows[(place + rng.choice((-1, 1)) * distance) % len(rows)]


class _Lot:
    """Draws one of `items` by weight."""

    def __init__(self, items: Sequence[Any], weights: Sequence[float]) -> None:
        self.items = items
        self.cumulative = list(itertools.accumulate(weights))

    def draw(self, rng: random.Random) -> Any:
        return rng.choices(self.items, cum_weights=self.cumulative)[0]


def simulate(
    documents: Sequence[Docstring],
    seed: int,
    n_readers: int,
    n_days: int = 60,
    habits: Habits = Habits(),  # frozen
) -> list[dict[str, str]]:
    """The highlights of simulated readers over `n_days`, sorted by time.

    Returns:
        Rows of user_id, document_id, timestamp (ISO 8601, UTC) and text, a sentence of the docstring.
    """
    rng = random.Random(seed)
    shelf = Shelf(documents, rng)
    rows = []
    for reader in range(1, n_readers + 1):
        interests = [shelf.packages[shelf.package_names.draw(rng)] for _ in range(rng.randint(1, 3))]
        for _ in range(1 + int(rng.expovariate(1 / habits.mean_sessions))):
            hour = min(max(rng.gauss(14, 4), 0), 23)
            time = START + timedelta(days=rng.randrange(n_days), hours=hour)
            for document in _walk(shelf, interests, habits, rng):
                rows.append(
                    (time, f"reader-{reader:05}", document, rng.choice(documents[document].sentences))
                )
                time += timedelta(seconds=2 + rng.lognormvariate(math.log(habits.median_pause), 1))
    return [
        {
            "user_id": user_id,
            "document_id": documents[document].name,
            "timestamp": time.isoformat(timespec="seconds"),
            "text": text,
        }
        for time, user_id, document, text in sorted(rows)
    ]


def _walk(shelf: Shelf, interests: Sequence[_Lot], habits: Habits, rng: random.Random) -> Iterator[int]:
    """The documents of one session, never the same twice in a row."""
    document = rng.choice(interests).draw(rng)
    yield document
    for _ in range(int(rng.expovariate(1 / habits.mean_steps))):
        following = _step(shelf, document, interests, habits, rng)
        if following != document:
            document = following
            yield document


def _step(shelf: Shelf, document: int, interests: Sequence[_Lot], habits: Habits, rng: random.Random) -> int:
    chance = rng.random()
    if chance < habits.follow_reference and shelf.references[document]:
        return rng.choice(shelf.references[document])
    if chance < habits.follow_reference + habits.read_neighbour:
        return shelf.neighbour(document, rng)
    if chance < habits.follow_reference + habits.read_neighbour + habits.own_interest:
        return rng.choice(interests).draw(rng)
    return shelf.everything.draw(rng)


def _write_both(out: Path, events: Sequence[dict[str, str]], documents: Sequence[Docstring]) -> None:
    """Both files under temporary names first: a full disk or a kill leaves what was there before."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("document_id", "title", "text", "package")
    rows = [dict(zip(columns, (d.name, d.title, d.text, d.package), strict=True)) for d in documents]
    temporary = {name: out / f".{name}.tmp" for name in ("documents.parquet", "events.jsonl.gz")}
    try:
        pq.write_table(pa.Table.from_pylist(rows), temporary["documents.parquet"])
        with (
            temporary["events.jsonl.gz"].open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,  # no name, no time: the same bytes
        ):
            file.writelines(json.dumps(event, ensure_ascii=False).encode() + b"\n" for event in events)
        for name, path in temporary.items():
            path.replace(out / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _main(package: str, result: Path, mode: str) -> None:
    """The child process of `_run_child`."""
    if mode == "light":
        _hide_heavy(package)
    result.write_text(json.dumps([asdict(d) for d in collect(package)]), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
