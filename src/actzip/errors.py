"""The errors that actzip raises on purpose: one small hierarchy.

Every message says what was wrong, where, and what would be right. The command line turns each into one
line and the exit code of its class (``exit_code``); ``--debug`` shows the traceback.
"""

from __future__ import annotations

import os
import sys
import warnings

__all__ = [
    "ActzipError",
    "ActzipWarning",
    "CodecError",
    "DataError",
    "InputError",
    "LayerError",
    "RecipeError",
    "StreamError",
    "TrainingError",
    "UnsupportedError",
    "told",
]


class ActzipError(Exception):
    """Base of all errors that actzip raises on purpose."""

    exit_code = 1


class InputError(ActzipError, ValueError):
    """A value given by the caller is unusable: dtype, shape, range, non-finite numbers, option."""

    exit_code = 2


class CodecError(ActzipError, ValueError):
    """A blob, or a file of blobs, is damaged, truncated or of a kind that this version cannot read.

    The message names the place: byte offset, chunk, map.
    """

    exit_code = 3


class StreamError(CodecError):
    """A frame of a stream was lost, or came twice or out of order; the message says which was
    expected."""


class DataError(ActzipError):
    """A data set, weights file or folder is missing, empty or unreadable."""

    exit_code = 4


class RecipeError(ActzipError, ValueError):
    """A recipe is wrong: the message names the key, the line and what is allowed there."""

    exit_code = 5


class LayerError(ActzipError, KeyError):
    """A layer was named that the model does not have, or that cannot be used for this; near matches
    are named."""

    exit_code = 6

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class UnsupportedError(ActzipError, NotImplementedError):
    """The engine cannot run an operator, shape or dtype of this model; the message names it and
    where it is."""

    exit_code = 7


class TrainingError(ActzipError, RuntimeError):
    """Training cannot go on (a non-finite loss, say); the last good checkpoint is kept and named."""

    exit_code = 8


class ActzipWarning(UserWarning):
    """Something worth knowing that does not stop the work: a dead layer, a saturated quantizer, a
    slower path."""


_HERE = os.path.dirname(__file__) + os.sep


def told(text: str) -> None:
    """An :class:`ActzipWarning` at the line that called the package, however deep in it this is."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, ActzipWarning, stacklevel=level)
