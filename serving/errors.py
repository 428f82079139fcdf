"""What a person reads in one line when serving, or asking a server, goes wrong."""

from pipeline.errors import PipelineError


class ServingError(PipelineError):
    """A server that cannot start, is not there, refuses, or answers something else than an index.

    Attributes:
        status: the HTTP status where there was an answer, else None.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
