"""What netsmith says when it cannot go on: one sentence, what was given, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the person at the keyboard can mend; the message is one sentence. The CLI exits with 2."""

    exit_code = 2


class PromiseBroken(UserError):
    """The measured file does not keep its budget. The CLI exits with 3."""

    exit_code = 3


def unknown(kind: str, given: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the nearest known one.

    >>> str(unknown("space", "fbnett", ["fbnet", "prunet"]))
    "unknown space 'fbnett'; did you mean 'fbnet'? (allowed: fbnet, prunet)"
    """
    names = list(allowed)
    near = get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {given!r}{hint} (allowed: {', '.join(names)})")
