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


def from_os_error(error: OSError) -> PipelineError | None:
    """One line for the operating system's refusals that a person can mend, else None."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"{where}the disk is full; make room and run the same command again: what is complete is kept"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"{where}{os.strerror(error.errno)}; give this user write access")
    return None
