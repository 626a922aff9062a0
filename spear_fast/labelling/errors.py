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


def reason_of(error: BaseException) -> str:
    """Returns an error's message on one line, with its type where the message says nothing."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split())
    return text or type(error).__name__
