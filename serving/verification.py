"""A version's files against the checksums of its manifest, before anything of them is loaded."""

import json
import logging
import os
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from serving.handles import LoadError

log = logging.getLogger("serving")

MANIFEST = Path("assets.extra", "manifest.json")
REMEDY = "copy or publish the version again, or start with --verify_manifest=false"
MAX_MANIFEST_BYTES = 64 * 2**20


def verify_manifest(folder: Path) -> None:
    """Read every file that assets.extra/manifest.json names, and compare its sha256.

    A version without a manifest is taken as it is.

    Files that the manifest does not name are not looked at: publication.json is one. Files are read side by
    side in small pieces, so that memory does not grow with them; what was read stays in the system's cache,
    from where it is loaded.

    Raises:
        LoadError: DATA_LOSS, and which file is missing or was changed.
    """
    path = folder / MANIFEST
    if not path.exists():
        return
    if not path.is_file():  # reading a pipe would wait for ever
        raise LoadError("DATA_LOSS", f"{path} is no file, wanted checksums of every file: {REMEDY}")
    started = time.monotonic()
    wanted = _checksums(path)
    with ThreadPoolExecutor(_n_threads(len(wanted)), thread_name_prefix="verify") as threads:
        # The largest first: one thread then reads it while others read the rest.
        names = sorted(wanted, key=lambda name: -_size(folder / name))
        found = threads.map(lambda name: _damage(folder / name, wanted[name]), names)
        damage = sorted(what for what in found if what)
    if damage:
        others = f" (and {len(damage) - 1} more files)" if len(damage) > 1 else ""
        raise LoadError("DATA_LOSS", f"{damage[0]}{others}: {REMEDY}")
    log.info("%s: %d files are as published (%.1f s)", folder, len(wanted), time.monotonic() - started)


def _checksums(path: Path) -> Mapping[str, str]:
    """{name below the version folder: sha256}.

    Raises:
        LoadError: the manifest cannot be read, lists no files, or lists one outside of the version.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
        manifest = json.loads(text)
    except OSError as error:
        raise LoadError("DATA_LOSS", f"{path} cannot be read: {error.strerror}: {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise LoadError("DATA_LOSS", f"{path} is no JSON ({error}), perhaps half copied: {REMEDY}") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(hashed, str) for hashed in files.values()):
        raise LoadError("DATA_LOSS", f'{path} has no "files", wanted {{name: sha256}}: {REMEDY}')
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise LoadError(
                "DATA_LOSS", f"{path} names {name!r}, wanted a file of the version itself: {REMEDY}"
            )
    return files


def _damage(path: Path, wanted: str) -> str | None:
    """What is wrong with a file; None where it is as published."""
    from pipeline.artifacts import sha256  # PyArrow comes along: only where there is a manifest

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            return f"{path} is no file, wanted sha256 {wanted}"
        got = sha256(path)
    except FileNotFoundError:
        return f"{path} is not there, wanted sha256 {wanted}"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}, wanted sha256 {wanted}"
    return None if got == wanted else f"{path} has sha256 {got}, wanted {wanted}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _n_threads(n_files: int) -> int:
    return max(1, min(n_files, os.cpu_count() or 1))
