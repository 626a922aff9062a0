"""What goes wrong in a labelling job and is the user's to mend."""

from __future__ import annotations


class LabellingError(ValueError):
    """One sentence for the user: what, wanted, got, what to do."""


class Interrupted(Exception):  # noqa: N818 (stopping is no error)
    """The job was asked to stop; everything finished so far is on disk.

    progress: what is done, as a clause: "120 of 2000 utterances are labelled, …".
    """

    def __init__(self, progress: str) -> None:
        super().__init__(progress)
        self.progress = progress


def readable(text: str) -> str:
    """Returns `text` as every file format takes it: what of a path is not UTF-8 becomes backslash escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def reason_of(error: BaseException) -> str:
    """Returns an error's message on one line, with its type where nobody has written it for people."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return readable(f"{error.strerror}{where}")
    text = readable(" ".join(str(error).split()))
    if not isinstance(error, (ValueError, RuntimeError, OSError, MemoryError)):
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text or type(error).__name__
