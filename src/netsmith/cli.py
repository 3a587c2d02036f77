"""The command line. It parses first and then imports only what the verb needs: `netsmith --help` loads no torch."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import fields
from io import StringIO
from typing import TYPE_CHECKING

from netsmith.errors import UserError, unknown

if TYPE_CHECKING:
    from netsmith.verbs import Verb

VERBS = {
    "search": "search a network that keeps a budget: with no options, for handwritten digits on this CPU",
    "compress": "make a trained network keep a budget, and lose as little as possible",
    "compare": "run several methods on one problem, beside the baselines, at equal compute",
    "train": "train a network by a named recipe, on one machine or many; or once more what a search found",
    "ship": "export the network of a run again, and judge the file",
    "measure": "time an ONNX file, or the networks of a run, on this machine",
    "profile": "measure the layers of a space on a device, and how well they predict whole networks",
    "plan": "predict a training's step time, hours and all-reduce share on many devices",
    "report": "write one HTML page about one or several runs",
    "list": "list the spaces, methods, devices, tasks or costs there are",
}
"""Verb -> what it does; its class in `verbs.py` has the same name."""

HELP = """usage: netsmith VERB [OPTIONS]

Vision networks that keep a budget, as measured on the file you ship.

{verbs}

netsmith VERB --help   says more about a verb
netsmith VERB --json   prints one JSON object instead of text
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 (a bug), 2 (UserError), 3 (PromiseBroken), 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in arguments
    try:
        return _run(arguments)
    except UserError as error:
        return _fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt as stop:
        hint = "".join(f"; continue with: {note}" for note in getattr(stop, "__notes__", []))
        return _fail(f"stopped{hint}", 130, as_json)
    except BrokenPipeError:  # the reader of `netsmith list spaces | head -1` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the last resort: a bug should not hide behind a page of traceback, nor get lost
        return _fail(_unexpected(error), 1, as_json)


@contextmanager
def _for_the_answer() -> Iterator[None]:
    """Drop what libraries print on stdout (the solver of the knapsack has lines for its developers)."""
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()  # of prints, while they still go nowhere
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:8} {text}" for name, text in VERBS.items())), end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"netsmith {version('netsmith')}")
        return 0
    if arguments[0] not in VERBS:
        raise unknown("verb", arguments[0], VERBS)
    asked = _parse(arguments[0], arguments[1:])
    if asked is None:
        return 0
    with _for_the_answer():
        answer = asked.run()
    if asked.json:
        print(json.dumps(answer.data))
    else:
        answer.show()
    sys.stdout.flush()
    return _fail(answer.broken, answer.exit_code) if answer.broken else 0


def _parse(name: str, arguments: list[str]) -> Verb | None:
    """The verb with its options; None where only help was asked for. Raises: UserError in one sentence."""
    import tyro

    from netsmith import verbs

    kind = getattr(verbs, name.capitalize())
    default = kind.before(arguments) if hasattr(kind, "before") else None
    printed = StringIO()
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    try:
        with redirect_stderr(printed):
            asked, rest = tyro.cli(
                kind,
                prog=f"netsmith {name}",
                args=arguments,
                default=default,
                config=config,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(f"{_sentence(printed.getvalue())} (see netsmith {name} --help)") from None
        return None
    if rest:
        unnamed = "unless_given", "folder", "target", "what"
        named = [f.name for f in fields(kind) if f.name not in unnamed and f.default_factory is not dict]  # in a file
        flags = ["--" + field.replace("_", "-") for field in named]
        raise (
            unknown(f"option of {name}", rest[0], flags)
            if rest[0].startswith("-")
            else UserError(f"netsmith {name} cannot place {rest[0]!r} (see netsmith {name} --help)")
        )
    return asked


def _sentence(box: str) -> str:
    """What tyro says in a box, in one line: the first paragraph, without frame and what Python says about types."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    text = " ".join(lines).split("───")[0].split("Got errors:")[0]
    text = re.sub(r"no type matching (\S+) could be instantiated from \[(.*)\]", r"\2 is no \1", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".")


def _fail(sentence: str, code: int, as_json: bool = False) -> int:
    with suppress(OSError):
        if as_json:
            print(json.dumps({"error": sentence}))
        sys.stdout.flush()
    print(f"netsmith: {sentence}", file=sys.stderr)
    return code


def _unexpected(error: Exception) -> str:
    """One line about a bug, its traceback put into a file."""
    first = (str(error).splitlines() or [""])[0]
    what = f"unexpected {type(error).__name__}" + (f": {first}" if first else "")
    try:
        from netsmith.cost.meter import cache_folder

        file = cache_folder() / "errors" / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)))
    except OSError as reason:
        return f"{what} (and its traceback could not be written: {reason.strerror})"
    return f"{what} (this is a bug; the traceback is in {file})"
