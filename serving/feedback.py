"""What people did with what they were shown: logs for the next training, and two versions side by side.

Three logs, JSON Lines, a file a UTC day, each line whole and written at once:

    events-DAY.jsonl    user_id, document_id, timestamp: what was opened, in the form of events.paths
    queries-DAY.jsonl   query, document_id, user_id, timestamp: what answered a query, as queries.paths wants
    searches-DAY.jsonl  what was shown and what was opened of it, by version: for `evaluate --ab`

A user_id is hashed with a key before it is written, so that the logs name nobody, and whoever has a list of
users but not the key cannot tell who is in them. Without a user_id nothing is written. A thread writes, so
that a slow disk holds up no search.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, from_os_error

log = logging.getLogger("serving")

MAX_QUERY = 2_000  # characters; more is a document that somebody pasted
MAX_ID = 1_000  # characters of a document_id; a longer one would be another document's if it were cut
MAX_SHOWN = 100  # documents of a search
MIN_KEY = 16  # bytes
MAX_WAITING = 10_000  # lines; a disk that takes them so slowly costs those that come then
SAID_EVERY = 60.0  # seconds between two lines about a log that cannot be written
MODE = 0o640  # the queries are people's words
WANTED = "wanted VERSION:SHARE, such as 20261122074922:0.1"


# --- The key -----------------------------------------------------------------------------------------


def user_key(path: Path) -> bytes:
    """The key of a file; a new one where there is no file, which its owner alone may read (mode 0600).

    Whoever has the key can find a known user's lines, so it lies best where the logs' readers cannot see it.
    With another key every user is somebody new, in the logs and in a split.

    Raises:
        InputError: it cannot be read or made, or holds fewer than 16 bytes.
    """
    try:
        _make_key(path)
        key = path.read_bytes().strip()
    except OSError as error:
        raise from_os_error(error) or InputError(f"{path}: {error.strerror}") from None
    if len(key) < MIN_KEY:
        raise InputError(
            f"{path}: holds {len(key)} bytes, wanted a secret of at least {MIN_KEY}; "
            "put one there, or remove the file: a new one is made then"
        )
    return key


def _make_key(path: Path) -> None:
    """Whole or not at all, and never over one that is there: two processes may start at once."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_hex(32).encode() + b"\n")
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.close(descriptor)
        draft.unlink()


def _keyed(key: bytes, use: bytes, text: str) -> bytes:
    """16 bytes of a text that only the key's holder can find; another use gives others.

    Keyed BLAKE2b takes keys of up to 64 bytes: a longer one counts by its hash.
    """
    short = key if len(key) <= 64 else hashlib.blake2b(key).digest()
    return hashlib.blake2b(text.encode("utf-8", "replace"), key=short, person=use, digest_size=16).digest()


# --- Two versions side by side -------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Which users are served by another version than the live one.

    A user stays where they are as long as the key, the other version and the share are the same; a larger
    share only moves users to the other version. Users without an id are served by the live version: nothing
    of theirs could be counted together.

    Attributes:
        live: the version of all others.
        compared: the version of `share` of the users.
        share: above 0 and below 1.
    """

    live: int
    compared: int
    share: float
    key: bytes

    def version_for(self, user_id: str | None) -> int:
        if not user_id:
            return self.live
        # A comparison's users are drawn anew: who saw the last one's other version may see this one's live.
        drawn = int.from_bytes(_keyed(self.key, b"split", f"{self.compared}:{user_id}")[:8], "big")
        return self.compared if drawn < self.share * 2**64 else self.live


def parse_compare(text: str) -> tuple[int, float]:
    """VERSION:SHARE as (version, share).

    Raises:
        InputError: it is something else, or the share is not between 0 and 1.
    """
    version, colon, share = text.partition(":")
    try:
        found = float(share)
    except ValueError:
        found = None
    if not colon or found is None or not (version.isascii() and version.isdecimal()):
        raise InputError(f"--compare {text}: {WANTED}")
    if not 0 < found < 1:
        raise InputError(f"--compare {text}: the share is {share}, wanted more than 0 and less than 1")
    return int(version), found


# --- The logs ------------------------------------------------------------------------------------------


class Feedback:
    """Writes the logs, on a thread of its own. A log that cannot be written costs its line, never an answer.

    Attributes:
        lost: lines that were not written, since the start.
        split: the comparison that is going on, which every line says; None: none. Whoever serves sets it.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder = folder
        self.lost = 0
        self.split: Split | None = None
        self._key = key
        self._said_at = -SAID_EVERY
        self._said_lost = 0
        self._losing = threading.Lock()  # of the three counts above
        self._room = threading.Semaphore(MAX_WAITING)
        self._writer = ThreadPoolExecutor(1, "feedback")  # the interpreter ends after what waits is written

    @classmethod
    def open(cls, folder: Path, *, user_key: bytes | None) -> "Feedback":
        """Make the folder where it is missing.

        Args:
            user_key: None: a key that ends with this process, so that after a restart, and in a second
                process, the same user is another; this is said.

        Raises:
            InputError: nothing can be written there.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise from_os_error(error) or InputError(f"{folder}: {error.strerror}") from None
        if user_key is None:
            log.warning(
                "%s: no user key: users are others after a restart; give --user_key_file to know them again",
                folder,
            )
        return cls(folder, secrets.token_bytes(32) if user_key is None else user_key)

    def searched(self, user_id: str | None, query: str, document_ids: Sequence[str], version: int) -> None:
        """Log what a search showed, best first; nothing of a user without an id."""
        if not user_id:
            return
        now = _now()
        line = self._of_version("search", now, user_id, query, version)
        self._write("searches", now, line | {"document_ids": list(document_ids[:MAX_SHOWN])})

    def opened(
        self, user_id: str | None, document_id: str, query: str | None, rank: int | None, version: int
    ) -> None:
        """Log that a document was opened; nothing of a user without an id.

        Args:
            query: what had been asked; None where it was found otherwise, as by "related".
            rank: its place among what was shown, from 1; None where it had none.
        """
        if not user_id or not document_id.strip() or len(document_id) > MAX_ID:
            return
        now = _now()
        hashed, at = self.hashed(user_id), _iso(now)
        self._write("events", now, {"user_id": hashed, "document_id": document_id, "timestamp": at})
        if query is None or not query.strip():
            return
        asked = {"query": query.strip()[:MAX_QUERY], "document_id": document_id}
        self._write("queries", now, asked | {"user_id": hashed, "timestamp": at})
        line = self._of_version("open", now, user_id, query, version)
        self._write("searches", now, line | {"document_id": document_id, "rank": rank})

    def hashed(self, user_id: str) -> str:
        """What stands for a user in the logs: 32 hexadecimal digits."""
        return _keyed(self._key, b"user", user_id).hex()

    def close(self) -> None:
        """Write what waits; what comes after it is lost."""
        self._writer.shutdown()

    def _of_version(self, kind: str, now: datetime, user_id: str, query: str, version: int) -> dict[str, Any]:
        split = self.split
        return {
            "kind": kind,
            "timestamp": _iso(now),
            "user_id": self.hashed(user_id),
            "query": query.strip()[:MAX_QUERY],  # an open finds its search by it
            "version": version,
            "live": split.live if split else None,
            "compared": split.compared if split else None,
            "share": split.share if split else None,
            # Where that version is not there another serves the user, which is no part of a comparison
            "drawn": split.version_for(user_id) if split else None,
        }

    def _write(self, name: str, now: datetime, line: dict[str, Any]) -> None:
        # JSON's own escapes would keep half a character, which no reader of the log could use.
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
        path = self.folder / f"{name}-{now:%Y-%m-%d}.jsonl"
        if not self._room.acquire(blocking=False):
            self._lose(path, f"{MAX_WAITING} lines wait already")
            return
        try:
            self._writer.submit(self._append, path, text.encode("utf-8", "replace"))
        except RuntimeError:
            self._lose(path, "the server is ending")

    def _append(self, path: Path, line: bytes) -> None:
        try:
            append(path, line)
        except OSError as error:
            self._lose(path, error.strerror or type(error).__name__)
        finally:
            self._room.release()

    def _lose(self, path: Path, why: str) -> None:
        """Count a lost line, and say so at most once in SAID_EVERY seconds: each request would say it."""
        with self._losing:
            self.lost += 1
            now = time.monotonic()
            if now - self._said_at < SAID_EVERY:
                return
            lines, lost = self.lost - self._said_lost, self.lost
            self._said_at, self._said_lost = now, lost
        log.error(
            "%s cannot be written (%s); lines of feedback lost: %d (since the start: %d); make room or give "
            "write access; searches go on",
            path, why, lines, lost,
        )  # fmt: skip


def append(path: Path, line: bytes) -> None:
    """Append one line, whole or not at all, also where other processes write the same file.

    It is opened anew each time (some microseconds), so that a file may be moved or removed at any moment.

    Raises:
        OSError: it cannot be written; what a full disk took of it was cut off again.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # the kernel's: it ends with the process
        end = os.fstat(descriptor).st_size
        if end and os.pread(descriptor, 1, end - 1) != b"\n":  # a process was killed while the disk was full
            line = b"\n" + line
        try:
            while line:  # a disk that is nearly full takes a part, and says why at the next
                line = line[os.write(descriptor, line) :]
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _now() -> datetime:
    return datetime.now(UTC)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
