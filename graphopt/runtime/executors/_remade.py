"""What can be made again: let go of while nobody needs it, and made by whoever needs it next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remade(Generic[T]):
    """A value that holds much memory, and the way to make it.

    Args:
        make: makes it; called by one thread at a time, and at once.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._making = threading.Lock()
        self._value: T | None = make()

    def get(self) -> T:
        """The value, made first where it was let go of."""
        value = self._value
        if value is None:
            with self._making:
                value = self._value = self._value or self._make()
        return value

    def drop(self) -> bool:
        """Let go of it, once nobody is making it; False where there was nothing to let go of."""
        with self._making:
            there, self._value = self._value is not None, None
        return there
