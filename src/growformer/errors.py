"""What can go wrong, and the exit code each kind has at the command line.

Exit codes (the same for every command): 0 all required claims hold; 1 the function changed or a claim failed;
2 the request or its input is bad; 3 something required could not be checked.
"""


class GrowformerError(Exception):
    """Base of every error this package raises on purpose; its text is one message for a user."""

    exit_code = 2


class RequestError(GrowformerError):
    """The request has no exact answer, or makes no sense; the message names the nearest request that works."""


class DivergedError(RequestError):
    """Training has got to a loss that is no number."""


class PatternError(GrowformerError):
    """A tensor and its declared pattern disagree; the message shows family, tensor, pattern and both sizes."""


class SourceError(GrowformerError):
    """A checkpoint folder is missing, damaged, or in a form that is not read; the message names the file."""


class TargetError(GrowformerError):
    """The output cannot be written: it exists already, or the disk cannot hold it."""


class ChangedError(GrowformerError):
    """A claim failed: the grown model is not the source's function."""

    exit_code = 1


class UncheckedError(GrowformerError):
    """A required claim could not be checked; the message names it."""

    exit_code = 3
