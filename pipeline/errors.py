"""Every error that a person should read as one line, and the exit code each one ends with.

PipelineError            1  a fault on our side of the contract
 ├── InputError          2  events, documents or a model that cannot be used
 ├── ConfigError         2  a setting that does not exist, has the wrong type or contradicts another
 ├── ArtifactError       2  a stage's folder that is missing, incomplete or of another format
 ├── BusyError           2  another run holds the work folder
 └── RefusedError        3  the publication gate found a figure that fell short
"""

import errno
import os
import shutil


class PipelineError(Exception):
    """Where, what was got, what was wanted, what to do: one line, no traceback."""

    exit_code = 1


class InputError(PipelineError):
    exit_code = 2


class ConfigError(PipelineError):
    exit_code = 2


class ArtifactError(PipelineError):
    exit_code = 2


class BusyError(PipelineError):
    exit_code = 2


class RefusedError(PipelineError):
    exit_code = 3


FULL_DISK = ("No space left", "os error 28", "Disk quota exceeded", "file write failed")
MISTAKEN_PATHS = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG)


def is_full_disk(error: BaseException) -> bool:
    """Whether a library's error is the disk's: safetensors, PyTorch and shutil keep no errno."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in FULL_DISK)


def from_os_error(error: BaseException) -> PipelineError | None:
    """One line for the operating system's refusals that a person can mend, else None."""
    if is_full_disk(error):
        where = getattr(error, "filename", None)
        return InputError(
            f"{where + ': ' if isinstance(where, str) else ''}the disk is full; make room and run the same "
            "command again: what is complete is kept"
        )
    if not isinstance(error, OSError) or isinstance(error, shutil.Error):
        return None
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"{where}{os.strerror(error.errno)}; give this user write access")
    if error.errno in MISTAKEN_PATHS:
        return InputError(f"{where}{os.strerror(error.errno)}; check the path")
    return None
