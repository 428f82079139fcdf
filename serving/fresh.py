"""Fresh documents: a small exact side index for what no published version holds yet, or still holds.

A folder holds `fresh.sqlite` and a lock. What add(), remove() or published() has returned from is on the
disk: one transaction each, in SQLite's write-ahead log with a sync at every commit, so a kill at any moment
leaves all of a call or nothing of it. Searching reads an immutable picture in memory, which a change replaces
whole: readers wait for nobody.
"""

import json
import sqlite3
import threading
import unicodedata
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.artifacts import locked
from pipeline.errors import ArtifactError, BusyError, InputError
from serving.errors import ServingError
from serving.lexical import Counted, WordCounts, counts_of
from serving.published import searched_text, title_of
from serving.shown import shown, shows
from serving.titles import Titles

DATABASE = "fresh.sqlite"
LOCK = "lock"
FORMAT = 1  # PRAGMA user_version
APPLICATION = 0x48325346  # PRAGMA application_id: tells another program's database from one of ours
MAX_DOCUMENTS = 10_000  # 15 MB of vectors of 384; a search of them all takes milliseconds
MAX_TEXT_CHARS = 10_000  # an encoder reads some hundreds of words, and every text is held in memory
MAX_DOCUMENT_BYTES = 1 << 16  # of a document as JSON, its further fields included
MAX_ID_CHARS = 1_000
KEPT_ENCODERS = 3  # whose vectors stay, so that going back to the version before encodes nothing again
NOWHERE = np.float32(-np.inf)

SCHEMA = """
CREATE TABLE documents (
    position INTEGER PRIMARY KEY, document_id TEXT NOT NULL UNIQUE, document TEXT NOT NULL
);
CREATE TABLE vectors (
    document_id TEXT NOT NULL, encoder_sha256 TEXT NOT NULL, vector BLOB NOT NULL,
    PRIMARY KEY (document_id, encoder_sha256)
);
CREATE TABLE removed (document_id TEXT PRIMARY KEY);
CREATE TABLE encoders (position INTEGER PRIMARY KEY, encoder_sha256 TEXT NOT NULL UNIQUE);
"""
PUT_DOCUMENT = (
    "INSERT INTO documents (document_id, document) VALUES (?, ?) "
    "ON CONFLICT (document_id) DO UPDATE SET document = excluded.document"
)
PUT_VECTOR = "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)"
FORGET_ENCODERS = (
    "DELETE FROM {table} WHERE encoder_sha256 NOT IN "
    "(SELECT encoder_sha256 FROM encoders ORDER BY position DESC LIMIT ?) "
    "AND encoder_sha256 NOT IN (SELECT value FROM json_each(?))"
)

Document = dict[str, Any]
TextsOf = Callable[[str], Sequence[str]]


class FreshDocuments:
    """The fresh documents as one encoder sees them. Every method may be called from any thread.

    A document added here wins over a published one with the same id: the index's answer for that id is
    hidden, also while the document waits for its vector (`stale`), because its old text may be what was to be
    corrected.
    """

    def __init__(self, store: "_Store", dim: int, encoder_sha256: str) -> None:
        self._store, self.dim, self._encoder = store, dim, encoder_sha256

    @classmethod
    def open(
        cls,
        folder: Path,
        dim: int,
        encoder_sha256: str,
        *,
        max_documents: int = MAX_DOCUMENTS,
        max_text_chars: int = MAX_TEXT_CHARS,
    ) -> "FreshDocuments":
        """Open the folder, which is made where there is none, and hold it for this process.

        Args:
            dim: width of the encoder's vectors.
            max_documents: as many documents may be held, and as many removals; what a folder holds beyond a
                limit lowered since then is kept and searched.

        Raises:
            BusyError: another process holds the folder.
            ArtifactError: the database is damaged, of another program or of an unknown format.
            ServingError: 507 or 503, the disk is full or refuses to be written.
        """
        store = _Store(Path(folder), max_documents, max_text_chars)
        try:
            return store.view(dim, encoder_sha256)
        except BaseException:
            store.close()
            raise

    def under(self, dim: int, encoder_sha256: str) -> "FreshDocuments":
        """The same documents as another encoder sees them, for a version that is about to be served.

        Both stay usable side by side: encode `stale()` of the new one, hand them to its `encoded`, and answer
        by it then.
        """
        return self._store.view(dim, encoder_sha256)

    @property
    def encoder_sha256(self) -> str:
        return self._encoder

    @property
    def removed(self) -> frozenset[str]:
        """Ids hidden from the index's answers until a version without them is published."""
        return self._store.held.removed

    @property
    def hides(self) -> frozenset[str]:
        """Ids that the index must not answer with: the removed ones and those held here."""
        return self._store.held.hides

    @property
    def n_documents(self) -> int:  # no __len__: an empty index would be false where `if fresh:` is asked
        return len(self._store.held.documents)

    def documents(self) -> list[Document]:
        """Every document held, searched or not, in the order in which they first came."""
        return [dict(document) for document in self._store.held.documents.values()]

    def document(self, document_id: str) -> Document | None:
        held = self._store.held.documents.get(document_id)
        return None if held is None else dict(held)

    def vector(self, document_id: str) -> np.ndarray | None:
        """A document's unit row, float32 (dim,); None where it is not held or waits for this encoder."""
        rows = self._store.held.rows[self._encoder]
        at = rows.at.get(document_id)
        return None if at is None else rows.vectors[at].copy()

    def stale(self) -> list[Document]:
        """Documents that this encoder has not encoded: encode their texts and hand both to `encoded`."""
        held = self._store.held
        searched = held.rows[self._encoder].at
        return [dict(document) for name, document in held.documents.items() if name not in searched]

    def check(self, documents: Sequence[Mapping[str, Any]], document_ids: Sequence[str] = ()) -> None:
        """Refuse what `change` would refuse of these, before anybody encodes their texts.

        Raises:
            InputError: a document or an id cannot be used; the first such one is named.
        """
        self._checked(documents, document_ids)

    def add(self, documents: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> None:
        """Hold these documents, all or none; one whose id is held already is replaced, a removed one is back.

        Args:
            documents: document_id, text and any further JSON fields, such as title, url, language, threshold.
            vectors: of their texts by this encoder, float32 (n, dim), unit length.

        Raises:
            InputError: a document cannot be used; the first such one is named.
            ServingError: 507, there is no room for them or on the disk; 503, the disk refuses to be written.
            ValueError: the vectors are not the encoder's.
        """
        self.change(documents, vectors, ())

    def remove(self, document_ids: Sequence[str]) -> None:
        """Hold these documents no longer, and hide them from the index's answers; raises as `add`."""
        self.change((), np.empty((0, self.dim), np.float32), document_ids)

    def change(
        self, documents: Sequence[Mapping[str, Any]], vectors: np.ndarray, document_ids: Sequence[str]
    ) -> None:
        """`add` and `remove` as one change: all of both, or nothing; raises as `add`."""
        checked = self._checked(documents, document_ids)
        given = _checked_vectors(vectors, (len(checked), self.dim))
        self._store.change(self._encoder, checked, given, list(document_ids))

    def _checked(
        self, documents: Sequence[Mapping[str, Any]], document_ids: Sequence[str]
    ) -> dict[str, Document]:
        checked = _checked(documents, self._store.max_text_chars)
        for number, document_id in enumerate(document_ids, 1):
            where = f"removal {number} of {len(document_ids)}"
            if _check_id(document_id, where) in checked:
                raise InputError(
                    f"{where}: {shown(document_id)} is to be added in the same request; send one of them"
                )
        return checked

    def encoded(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        """Take the vectors of what `stale` gave; what was changed or removed since then stays as it is now.

        Args:
            vectors: as of `add`.

        Raises:
            ServingError, ValueError: as `add`.
        """
        given = _checked_vectors(vectors, (len(documents), self.dim))
        self._store.encoded(self._encoder, {each["document_id"]: each for each in documents}, given)

    def search(
        self, queries: np.ndarray, k: int, keep: Callable[[Document], bool] | None = None
    ) -> list[list[tuple[float, Document]]]:
        """The k best documents for each query, best first; of equal scores the smaller id comes first.

        A document below its own `threshold` is no match and takes nobody's place.

        Args:
            queries: float32 (n, dim), unit length.
            keep: whether a document, which it must not change, may be answered with; None: each may.

        Returns:
            (score, document) at most k times for each query.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries of shape {queries.shape}, wanted (n, {self.dim})")
        held = self._store.held  # one picture for the whole answer
        rows = held.rows[self._encoder]
        scores = queries.astype(np.float32, copy=False) @ rows.vectors.T
        scores[scores < rows.thresholds] = NOWHERE
        if keep is not None:
            out = [not keep(held.documents[name]) for name in rows.ids]
            scores[:, np.array(out, bool)] = NOWHERE
        return [
            [(float(row[at]), dict(held.documents[rows.ids[at]])) for at in _best(row, rows.ids, k)]
            for row in scores
        ]

    def by_words(
        self,
        scores_of: Callable[[Counted], np.ndarray],
        k: int,
        keep: Callable[[Document], bool] | None = None,
    ) -> list[tuple[float, Document]]:
        """The k documents with the best scores above 0, best first; of equal ones the smaller id comes first.

        Words are counted at the first call after a change, of the new documents alone: call it in a thread.

        Args:
            scores_of: the words of n documents -> scores float32 (n,), as Lexical.scores_of.
            keep: as of `search`.
        """
        held = self._store.held
        scores = scores_of(held.counted)
        scores[scores <= 0] = NOWHERE
        if keep is not None:
            out = [at for at in np.flatnonzero(scores > 0).tolist() if not keep(held.listed[at])]
            scores[out] = NOWHERE
        names = tuple(held.documents)
        return [(float(scores[at]), dict(held.listed[at])) for at in _best(scores, names, k)]

    def titled(self, typed: str, k: int) -> list[tuple[float, Document]]:
        """The k documents whose titles, or first lines, are best for what is typed so far; as Titles.find.

        All titles are read at the first call after a change, ten thousand in 0.2 s: call it in a thread.

        Returns:
            (score from 0 to 1, document), best first.
        """
        held = self._store.held
        found = held.titles.find(typed, k)
        return [(score, dict(held.listed[row])) for row, score in found]

    def published(self, *texts_of: TextsOf) -> int:
        """Let go of what newly served versions hold, and of removals that they have followed.

        A document is dropped where each version holds its id with the same text, whatever its spaces and
        however its accents are composed; a removal where no version has the id any more.

        Args:
            texts_of: one for each version that is served (two while they are compared): document_id -> the
                texts of its rows there, in order; several where it was encoded in passages, none where it is
                not there.

        Returns:
            Documents and removals dropped.

        Raises:
            ServingError: as `add`.
        """
        held = self._store.held
        here = {
            name: document
            for name, document in held.documents.items()
            if texts_of and all(_is_cut_of(texts(name), document["text"]) for texts in texts_of)
        }
        gone = [name for name in held.removed if texts_of and not any(texts(name) for texts in texts_of)]
        return self._store.drop(here, gone) if here or gone else 0

    def close(self) -> None:
        """Give the folder back; no encoder's view of it can change it after that."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# --- What is held in memory ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """One encoder's rows: row i is of ids[i]; never changed once made."""

    ids: tuple[str, ...]
    vectors: np.ndarray  # float32 (n, dim), contiguous
    thresholds: np.ndarray  # float64 (n,), -inf where a document has none
    at: Mapping[str, int]  # id -> row

    @classmethod
    def of(cls, ids: Sequence[str], vectors: np.ndarray, documents: Mapping[str, Document]) -> "_Rows":
        given = (documents[name].get("threshold") for name in ids)
        thresholds = np.array([-np.inf if value is None else value for value in given], np.float64)
        at = {name: row for row, name in enumerate(ids)}
        return cls(tuple(ids), np.ascontiguousarray(vectors, np.float32), thresholds, at)

    def without(self, names: Collection[str]) -> tuple[list[str], np.ndarray]:
        """Ids and vectors of the others."""
        kept = [row for row, name in enumerate(self.ids) if name not in names]
        return [self.ids[row] for row in kept], self.vectors[kept]


@dataclass(frozen=True)
class _Held:
    """Everything at one moment; a change makes another one."""

    documents: Mapping[str, Document]
    removed: frozenset[str]
    rows: Mapping[str, _Rows]  # by encoder
    hides: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hides", self.removed | self.documents.keys())

    @cached_property
    def listed(self) -> tuple[Document, ...]:
        """The documents by number, in the order in which they first came."""
        return tuple(self.documents.values())

    @cached_property
    def titles(self) -> Titles:
        """The title of each of `listed`."""
        return Titles.of([title_of(document) for document in self.listed])

    @cached_property
    def counted(self) -> Counted:
        """The words of each of `listed`."""
        return Counted.of([_words_of(document) for document in self.listed])

    def added(self, encoder: str, documents: Mapping[str, Document], vectors: np.ndarray) -> "_Held":
        """These documents held, and encoded by this encoder; others have still to encode a new text."""
        after = {**self.documents, **documents}
        changed = self.rewritten(documents)
        rows = {}
        for name, before in self.rows.items():
            if name == encoder:
                ids, kept = before.without(documents.keys())
                rows[name] = _Rows.of([*ids, *documents], np.concatenate([kept, vectors]), after)
            else:
                rows[name] = _Rows.of(*before.without(changed), after)
        return _Held(after, self.removed - documents.keys(), rows)

    def removing(self, names: Sequence[str]) -> "_Held":
        """Without these documents, which the index must not answer with either."""
        return self.without(frozenset(names), self.removed.union(names)) if names else self

    def without(self, names: Collection[str], removed: frozenset[str]) -> "_Held":
        """Without these documents, and with these removals in place of the ones before."""
        after = {name: document for name, document in self.documents.items() if name not in names}
        rows = {encoder: _Rows.of(*rows.without(names), after) for encoder, rows in self.rows.items()}
        return _Held(after, removed, rows)

    def rewritten(self, documents: Mapping[str, Document]) -> set[str]:
        """Ids of those that are held with another text."""
        held = self.documents
        return {name for name in documents if name in held and held[name]["text"] != documents[name]["text"]}


def _words_of(document: Document) -> WordCounts:
    return _counts_of(document.get("title"), document["text"])


@lru_cache(maxsize=2 * MAX_DOCUMENTS)  # a change counts the words of what is new alone
def _counts_of(title: str | None, text: str) -> WordCounts:
    return counts_of(searched_text(title, text))


def _best(scores: np.ndarray, ids: Sequence[str], k: int) -> list[int]:
    """Rows of the k highest of scores (n,), best first, equal ones by id; none at -inf."""
    at = np.flatnonzero(scores > NOWHERE)
    if k < len(at):
        kth = np.partition(scores[at], len(at) - k)[len(at) - k] if k > 0 else np.inf
        at = at[scores[at] >= kth]
    return sorted(at.tolist(), key=lambda row: (-scores[row], ids[row]))[: max(k, 0)]


# --- What is held on the disk ----------------------------------------------------------------------------


class _Store:
    """The database, its lock, and the picture of it that searches read. Changes come one at a time."""

    def __init__(self, folder: Path, max_documents: int, max_text_chars: int) -> None:
        self.path = folder / DATABASE
        self.max_documents, self.max_text_chars = max_documents, max_text_chars
        self._changing = threading.RLock()
        self._views: weakref.WeakSet[FreshDocuments] = weakref.WeakSet()
        self._open = ExitStack()
        try:
            self._lock(folder)
            self._connection = self._connect()
            self._open.callback(self._connection.close)
            with self._readable():
                self._prepare()
        except BaseException:
            self._open.close()
            raise
        self.held = _Held({}, frozenset(), {})

    def view(self, dim: int, encoder_sha256: str) -> FreshDocuments:
        """The documents under an encoder, its vectors read where they are not held yet."""
        with self._changing:
            seen = FreshDocuments(self, dim, encoder_sha256)
            self._views.add(seen)
            self._remember(encoder_sha256)
            if encoder_sha256 not in self.held.rows:
                self.held = self._read()
            return seen

    def change(
        self, encoder: str, documents: Mapping[str, Document], vectors: np.ndarray, gone: Sequence[str]
    ) -> None:
        """Add documents and remove others, in one transaction."""
        with self._changing:
            before, ids = self.held, [(name,) for name in documents]
            after = before.added(encoder, documents, vectors).removing(gone)
            self._check_room("documents", len(after.documents), len(before.documents))
            self._check_room("removals", len(after.removed), len(before.removed))
            blobs = [
                (*name, encoder, row.astype("<f4").tobytes()) for name, row in zip(ids, vectors, strict=True)
            ]
            with self._writing() as write:
                self._delete(write, "vectors", before.rewritten(documents))
                write.executemany(PUT_DOCUMENT, [(name, _json(each)) for name, each in documents.items()])
                write.executemany(PUT_VECTOR, blobs)
                self._delete(write, "removed", documents)
                self._delete(write, "vectors", gone)
                self._delete(write, "documents", gone)
                write.executemany("INSERT OR IGNORE INTO removed VALUES (?)", [(name,) for name in gone])
            self.held = after

    def encoded(self, encoder: str, documents: Mapping[str, Document], vectors: np.ndarray) -> None:
        with self._changing:  # nothing changes between the look and the addition
            held, names = self.held.documents, list(documents)
            same = [row for row, name in enumerate(names) if held.get(name) == documents[name]]
            if same:
                self.change(encoder, {names[row]: documents[names[row]] for row in same}, vectors[same], ())

    def drop(self, documents: Mapping[str, Document], removed: Sequence[str]) -> int:
        """Let go of these documents, but for one that was replaced meanwhile, and of these removals."""
        with self._changing:
            names = [name for name, each in documents.items() if self.held.documents.get(name) == each]
            back = self.held.removed.intersection(removed)
            with self._writing() as write:
                self._delete(write, "vectors", names)
                self._delete(write, "documents", names)
                self._delete(write, "removed", back)
            self.held = self.held.without(frozenset(names), self.held.removed - back)
            return len(names) + len(back)

    def close(self) -> None:
        with self._changing:
            self._open.close()

    def _lock(self, folder: Path) -> None:
        try:
            self._open.enter_context(locked(folder, LOCK))
        except BusyError:
            raise BusyError(
                f"{folder}: another process keeps its fresh documents there; stop it, or give this one "
                "another folder"
            ) from None

    def _connect(self) -> sqlite3.Connection:
        try:
            return sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise ArtifactError(
                f"{self.path} cannot be opened: {error}; check the path and its rights"
            ) from None

    def _prepare(self) -> None:
        """Check whose database this is and of what format, and make a new one's tables."""
        ask = self._connection.execute
        application, known = (
            ask(f"PRAGMA {each}").fetchone()[0] for each in ("application_id", "user_version")
        )
        is_new = not application and not ask("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not is_new and application != APPLICATION:
            raise ArtifactError(f"{self.path} is another program's database; give a folder of its own")
        if not is_new and known != FORMAT:
            raise ArtifactError(
                f"{self.path} has format {known}, and format {FORMAT} is known here: it was written by "
                "another release; start that one, or give an empty folder and add the documents again"
            )
        ask("PRAGMA journal_mode = WAL")  # a reader beside it never waits
        ask("PRAGMA synchronous = FULL")  # what was acknowledged survives a power cut too
        if is_new:
            pragmas = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {FORMAT};"
            self._connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {pragmas} COMMIT;")

    def _read(self) -> _Held:
        """All that is there, with the vectors of every encoder in use, of one moment."""
        ask = self._connection.execute
        with self._readable(), self._connection:
            ask("BEGIN")
            found = ask("SELECT document_id, document FROM documents ORDER BY position").fetchall()
            documents = {name: json.loads(text) for name, text in found}
            removed = frozenset(name for (name,) in ask("SELECT document_id FROM removed"))
            widths = {view.encoder_sha256: view.dim for view in self._views}
            return _Held(
                documents, removed, {each: self._rows(each, widths[each], documents) for each in widths}
            )

    def _rows(self, encoder: str, dim: int, documents: Mapping[str, Document]) -> _Rows:
        found = self._connection.execute(
            "SELECT document_id, vector FROM vectors JOIN documents USING (document_id) "
            "WHERE encoder_sha256 = ? AND length(vector) = ? ORDER BY position",
            (encoder, 4 * dim),
        ).fetchall()
        matrix = np.frombuffer(b"".join(vector for _, vector in found), "<f4").reshape(len(found), dim)
        return _Rows.of([name for name, _ in found], matrix, documents)

    def _remember(self, encoder: str) -> None:
        """Note who was asked for last, and let go of vectors that nobody has asked for since long."""
        in_use = json.dumps(sorted({view.encoder_sha256 for view in self._views}))
        with self._writing() as write:
            write.execute("DELETE FROM encoders WHERE encoder_sha256 = ?", (encoder,))
            write.execute("INSERT INTO encoders (encoder_sha256) VALUES (?)", (encoder,))
            for table in ("vectors", "encoders"):
                write.execute(FORGET_ENCODERS.format(table=table), (KEPT_ENCODERS, in_use))

    def _delete(self, write: sqlite3.Connection, table: str, document_ids: Iterable[str]) -> None:
        write.executemany(f"DELETE FROM {table} WHERE document_id = ?", [(name,) for name in document_ids])

    def _check_room(self, what: str, after: int, before: int) -> None:
        """Refuse what makes more of them than may be.

        The status is 507 (Insufficient Storage) and no 429: to try again later helps nobody before a version
        is published.
        """
        if after > max(self.max_documents, before):
            raise ServingError(
                f"fresh {what}: {after:,} would be held and {self.max_documents:,} may be; publish a version "
                "that takes them over, or allow more",
                507,
            )

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: when this is left, all of it is on the disk, or nothing and an error tells why."""
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
        except sqlite3.Error as error:
            is_full = getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"
            advice = "make room on the disk" if is_full else "check the disk and the folder's rights"
            status = 507 if is_full else 503
            raise ServingError(f"{self.path}: nothing was changed: {error}; {advice}", status) from None

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{self.path} cannot be read: {error}; put a copy back, or give an empty folder and add the "
                "documents again"
            ) from None


# --- What may be added -----------------------------------------------------------------------------------


def _checked(documents: Sequence[Mapping[str, Any]], max_text_chars: int) -> dict[str, Document]:
    """The documents by id, as JSON gives them back.

    Raises:
        InputError: which one cannot be used, why, and what was wanted.
    """
    found: dict[str, Document] = {}
    for number, document in enumerate(documents, 1):
        where = f"document {number} of {len(documents)}"
        if not isinstance(document, Mapping):
            raise InputError(f"{where} is {_kind(document)}, wanted an object with document_id and text")
        name = _check_id(document.get("document_id"), where)
        where += f" ({shown(name)})"
        if name in found:
            raise InputError(f"{where} has the id of an earlier one in the same request; send one of them")
        _check_text(document.get("text"), where, max_text_chars)
        _check_fields(document, where)
        found[name] = json.loads(_checked_json(document, where))
    return found


def _check_id(document_id: Any, where: str) -> str:
    if not isinstance(document_id, str) or not shows(document_id):
        got = "empty" if isinstance(document_id, str) else _kind(document_id)
        raise InputError(f"{where}: its document_id is {got}, wanted some letters")
    if len(document_id) > MAX_ID_CHARS:
        raise InputError(
            f"{where}: its document_id has {len(document_id):,} characters, wanted at most {MAX_ID_CHARS:,}"
        )
    _check_unicode(document_id, f"{where}: its document_id")
    return document_id


def _check_text(text: Any, where: str, max_text_chars: int) -> None:
    if not isinstance(text, str) or not shows(text):
        got = "empty" if isinstance(text, str) else _kind(text)
        raise InputError(f"{where}: its text is {got}, wanted words to be found by")
    if len(text) > max_text_chars:
        raise InputError(
            f"{where}: its text has {len(text):,} characters, wanted at most {max_text_chars:,}; send it in "
            "parts, each with an id of its own"
        )
    _check_unicode(text, f"{where}: its text")


def _check_fields(document: Mapping[str, Any], where: str) -> None:
    """The further fields that an answer reads: null counts as not there."""
    for name in ("title", "url", "language"):
        value = document.get(name)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}: its {name} is {_kind(value)}, wanted text or nothing")
    threshold = document.get("threshold")
    if threshold is None:
        return
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not is_number or not -1 <= threshold <= 1:  # NaN is not between either
        got = repr(threshold) if is_number else _kind(threshold)
        raise InputError(f"{where}: its threshold is {got}, wanted a score from -1 to 1, or nothing")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has half a character at place {error.start} ({text[error.start]!r}), which no file can "
            "hold; send whole characters"
        ) from None


def _checked_json(document: Mapping[str, Any], where: str) -> str:
    try:
        text = _json(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be written as JSON: {error}") from None
    _check_unicode(text, where)
    if (size := len(text.encode())) > MAX_DOCUMENT_BYTES:
        raise InputError(
            f"{where} has {size:,} bytes as JSON, wanted at most {MAX_DOCUMENT_BYTES:,}; leave out fields "
            "that no answer needs"
        )
    return text


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(dict(document), ensure_ascii=False, allow_nan=False)


def _checked_vectors(vectors: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    given = np.asarray(vectors, np.float32)
    if not shape[0] and not given.size:
        return np.empty(shape, np.float32)
    if given.shape != shape or not np.isfinite(given).all():
        raise ValueError(f"vectors of shape {given.shape}, wanted finite ones of shape {shape}")
    return given


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return (
        "not there"
        if value is None
        else kinds.get(type(value), "text" if isinstance(value, str) else "no JSON")
    )


# --- What a version holds --------------------------------------------------------------------------------


def _is_cut_of(parts: Sequence[str], text: str) -> bool:
    """Whether these are the whole text, or passages of it from its first word to its last, none left out."""
    whole, pieces = _plain(text), [_plain(part) for part in parts]
    if not pieces or not whole.startswith(pieces[0]) or not whole.endswith(pieces[-1]):
        return False
    start, end = 0, len(pieces[0])
    for piece in pieces[1:]:
        start = whole.find(piece, start + 1)  # each begins later than the one before
        if start < 0 or whole[end:start].strip():  # missing, or words are left out before it
            return False
        end = max(end, start + len(piece))
    return end == len(whole)


def _plain(text: str) -> str:
    """A text as two writers of it would agree: composed, one space between words."""
    return " ".join(unicodedata.normalize("NFC", text).split())
