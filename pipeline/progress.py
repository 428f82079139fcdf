"""How far a Beam line is: workers leave empty files whose names say it, the driver draws a bar.

This needs nothing of a runner but the file system that driver and workers share anyway.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath

from apache_beam.io.filesystems import FileSystems
from tqdm import tqdm

from pipeline.storage import is_local, make_folder, names, remove_folder

EVERY = 1.0  # seconds between two looks at a local folder
EVERY_REMOTE = 15.0  # a bucket's listing is slow, and is paid for


def marks_of(folder: str, line: str) -> str:
    """Where a line's marks are, in the folder that driver and workers share."""
    return f"{folder}/marks-{line.replace(' ', '-')}"


def mark(folder: str, part: str, done: int, counts: Mapping[str, int]) -> None:
    """Say from a worker that `done` units more are done; a part that is tried again overwrites its mark.

    Args:
        folder: `marks_of` the line.
        part: names the piece of work, without dots: "000003-000012".
        counts: what the bar shows beside it.
    """
    said = "".join(f".{name}={count}" for name, count in counts.items() if name.isidentifier())
    FileSystems.create(f"{folder}/{part}.done={done}{said}").close()


def read_marks(folder: str) -> dict[str, int]:
    """The sum of all marks: done, and the counts."""
    total: dict[str, int] = {}
    for path in names(folder, "*"):
        for pair in PurePath(path).name.split(".")[1:]:
            name, _, value = pair.partition("=")
            total[name] = total.get(name, 0) + int(value)
    return total


@contextmanager
def shown(title: str, total: int, unit: str, folder: str) -> Iterator[None]:
    """Draw a bar with rate and time left while a line runs."""
    make_folder(folder)
    ended = threading.Event()
    with tqdm(total=total, desc=title, unit=unit, unit_scale=True, file=sys.stderr, leave=False) as bar:
        watcher = threading.Thread(target=_watch, args=(bar, folder, ended), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
    remove_folder(folder)


def _watch(bar: tqdm, folder: str, ended: threading.Event) -> None:
    while not ended.wait(EVERY if is_local(folder) else EVERY_REMOTE):
        try:
            marks = read_marks(folder)
        except OSError:
            continue  # a look that failed is no reason to stop the work
        bar.set_postfix(
            {name: f"{count:,}" for name, count in marks.items() if name != "done"}, refresh=False
        )
        bar.update(marks.get("done", 0) - bar.n)
