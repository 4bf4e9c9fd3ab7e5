"""What the engine refuses, as a Python exception."""

from __future__ import annotations


class RKVError(RuntimeError):
    """The engine refused a call; the message is one line that says why and, where possible, what to do."""
