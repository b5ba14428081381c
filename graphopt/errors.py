"""Every error that graphopt raises on purpose: what happened, where, and the way out."""

from __future__ import annotations


class GraphoptError(Exception):
    """The base of graphopt's errors.

    Args:
        message: what is wrong, naming the thing.
        where: the place in the user's code, model or inputs.
        hint: the way out.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.hint:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


class InputError(GraphoptError):
    """The inputs are missing, or not what the model was optimized for."""


class CaptureError(GraphoptError):
    """The model cannot be captured as one graph."""


class TargetError(GraphoptError):
    """The target or the executors asked for do not exist here."""


class PassError(GraphoptError):
    """A pass name is unknown, or a pass broke its contract."""


class LoweringError(GraphoptError):
    """An executor cannot compile or run a region."""


class ExecutionError(GraphoptError):
    """A plan failed while it ran: a program, or a thread that runs its steps; no results are handed out."""


class SessionError(GraphoptError):
    """A session cannot serve a request: it failed, or one of the kinds below."""


class QueueFullError(SessionError):
    """The session's queue is full, and stayed so as long as the caller would wait."""


class DeadlineError(SessionError):
    """A request's deadline passed before its turn came."""


class SessionClosedError(SessionError):
    """The session is closed, or was closed before the request's turn came."""


class SpecError(GraphoptError):
    """A SPEC does not lead to a model."""


class OutputError(GraphoptError):
    """The place to write to is taken or cannot be written."""


def said(error: BaseException) -> str:
    """An exception in words: its type and its message."""
    return f"{type(error).__name__}: {error}"
