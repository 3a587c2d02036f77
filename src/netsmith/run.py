"""A run: one folder that can be killed at any moment and continued, and then holds what an undisturbed run would hold.

    problem.yaml        what was asked (`format: 1`): everything needed to repeat the run
    events.jsonl        what happened, one JSON object a line
    stages/NAME.json    results of finished stages, so that a continued run does not compute them again
    checkpoints/NAME    the state of a stage that is under way

Every file is replaced whole (written beside, synced, renamed), so that it is either the old one or the new one. Only
the events grow in place; a line torn by a kill is cut off when the run is opened again.

    with Run.create("runs/x", {"space": "fbnet", "seed": 1}) as run:
        table = run.once("profile", lambda: measure(device))
        run.event("profiled", entries=len(table))
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from netsmith.errors import UserError

FORMAT = 1


class Run:
    """A run's folder, held by one process at a time. From `Run.create` or `Run.open`; close it or use `with`."""

    path: Path
    problem: dict[str, Any]
    """What `problem.yaml` says, without `format`."""
    progress: Callable[[str, int, int, str], None]
    """Set it to see how far the work is: (what, done, to do, newest number). Does nothing as it comes."""

    @classmethod
    def create(cls, path: str | Path, problem: dict[str, Any], *, beside: Sequence[str] = ()) -> Run:
        """Start a run in a new or empty folder (but for what is called one of ``beside``); where the same problem has a
        run already, continue that one.

        UserError: the folder holds something else, another problem's run, or a run that another process has open.
        """
        path = Path(path)
        text = dump_yaml({"format": FORMAT, **problem})
        if not (path / "problem.yaml").exists():
            # What a creation that was killed leaves behind (the lock, a temporary file) counts as nothing.
            if path.exists() and (
                not path.is_dir() or any(not _ours(f) for f in path.iterdir() if f.name not in beside)
            ):
                raise UserError(f"{path} is not empty and is no run of netsmith: give a new or an empty folder")
            with _room_for(path):
                path.mkdir(parents=True, exist_ok=True)
            with _Lock(path), _writing(path / "problem.yaml") as temporary:
                temporary.write_text(text, encoding="utf-8")
        run = cls.open(path)
        run._beside = beside
        if _asked(run.problem) != _asked(load_yaml(dump_yaml(problem))):
            run.close()
            raise UserError(f"{path} is the run of another problem (see its problem.yaml): give a new folder")
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run to continue it.

        UserError: the folder is no run, is from another version of netsmith, or another process has it open.
        """
        path = Path(path)
        file = path / "problem.yaml"
        if not file.is_file():
            raise UserError(f"{path} is no run of netsmith: it has no problem.yaml")
        try:
            problem = load_yaml(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise UserError(f"{path} is no run of netsmith: its problem.yaml cannot be read as YAML") from None
        if not isinstance(problem, dict) or "format" not in problem:
            raise UserError(f"{path} is no run of netsmith: its problem.yaml has no format")
        if problem["format"] != FORMAT:
            raise UserError(f"{path} was written in format {problem['format']!r}; this netsmith reads format {FORMAT}")
        return cls(path, {key: value for key, value in problem.items() if key != "format"})

    def __init__(self, path: Path, problem: dict[str, Any]):
        self.path, self.problem = path, problem
        self._beside: Sequence[str] = ()
        self.progress = lambda name, done, total, note: None
        self._kept = 0  # bytes of events that a mere difference must not cut off
        self._at: int | None = None  # how far into the events this process has come; None: it has not touched them
        with ExitStack() as undo, _room_for(path):
            undo.enter_context(_Lock(path))
            for folder in (path / "stages", path / "checkpoints"):
                folder.mkdir(exist_ok=True)
            self._events = undo.enter_context(open(path / "events.jsonl", "ab+", buffering=0))
            for folder in (path, path / "stages", path / "checkpoints"):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink()
            self._cut(self._read(0, self._size()).rfind(b"\n") + 1)
            self._kept = self._size()
            self._close = undo.pop_all().close

    # Results ------------------------------------------------------------------------------------------------------

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute()`, computed once in the life of the run: JSON data, as it comes back from the disk.

        A tuple comes back as a list, a key as a string, NaN and infinity as None, the first time too. Events written
        by a `compute` that was killed are replaced by those of its repetition. Stages may nest.
        """
        file = self.path / "stages" / f"{_checked(name)}.json"
        if not file.exists():
            stage = {"begin": max(self.mark(), self._kept)}
            _write_json(file, stage)
            self._at = stage["begin"]
        elif "end" in (stage := _read_json(file)):
            self._at = min(stage["end"], self._size())
            return stage["value"]
        else:  # begun by a process that was killed; its events stay for now: `compute` may have a checkpoint among them
            self._go_back(stage["begin"])
        value = _plain(compute())
        end = self.mark()
        self._cut(max(end, self._kept))
        _write_json(file, {**stage, "end": end, "value": value})
        self._kept = self._size()
        return json.loads(json.dumps(value))

    def has(self, name: str) -> bool:
        """Whether the stage `name` has ended."""
        file = self.path / "stages" / f"{_checked(name)}.json"
        return file.exists() and "end" in _read_json(file)

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON data to the file `name` of the run, replacing it whole."""
        _write_json(self.path / _checked(name), _plain(value))

    def read_json(self, name: str) -> Any:
        """The JSON data in the file `name` of the run; UserError if there is no such file."""
        file = self.path / _checked(name)
        if not file.is_file():
            raise UserError(f"the run {self.path} has no {name}")
        return _read_json(file)

    def checkpoint(self, name: str) -> Path:
        """Where the checkpoint `name` lives, written yet or not. Write it with `atomically`, together with `mark()`:

        with atomically(run.checkpoint("train.pt")) as file:
            torch.save({"events": run.mark(), "weights": model.state_dict()}, file)
        """
        return self.path / "checkpoints" / _checked(name)

    def seed(self, name: str) -> int:
        """A seed in [0, 2**32) for one named purpose, the same in every run with this `problem["seed"]` (default 0)."""
        text = json.dumps([self.problem.get("seed", 0), name])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    # Events -------------------------------------------------------------------------------------------------------

    def event(self, kind: str, **data: Any) -> None:
        """Append one line `{"kind": kind, **data}`; NaN and infinity become null.

        A continued run comes past the same events again: one that the file already has at this point is not repeated.
        """
        line = json.dumps({"kind": kind, **{key: _plain(value) for key, value in data.items()}}).encode() + b"\n"
        at = self._at or 0
        if self._read(at, len(line)) == line:
            self._at = at + len(line)
            return
        end = max(at, self._kept)
        self._cut(end)
        with _room_for(self.path / "events.jsonl"):
            try:
                written = self._events.write(line)
                if written != len(line):  # a full disk takes the part that fits
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._cut(end)
                raise
        self._at = self._kept = end + len(line)

    def mark(self) -> int:
        """Where the next event goes: bytes from the start of events.jsonl. Store it in a checkpoint."""
        with _room_for(self.path / "events.jsonl"):
            os.fsync(self._events.fileno())  # what is stored must never point behind the end of the events
        return self._size() if self._at is None else self._at

    def rewind(self, mark: int) -> None:
        """Forget the events after `mark`: the stage goes on from the checkpoint that stored it."""
        if not 0 <= mark <= self._size():
            raise UserError(f"{self.path / 'events.jsonl'} has {self._size()} bytes, the checkpoint expects {mark}")
        self._go_back(mark)
        self._cut(self._kept)

    # The folder ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let another process have the run."""
        self._close()

    def amend(self, **asked: Any) -> None:
        """Let `problem.yaml` ask for something else from now on; what has been computed stays."""
        self.problem |= asked
        with _room_for(self.path), _writing(self.path / "problem.yaml") as temporary:
            temporary.write_text(dump_yaml({"format": FORMAT, **self.problem}), encoding="utf-8")

    def discard(self) -> None:
        """Delete the folder, but for what lies beside the run in it, unless something has been searched or trained: a
        run that can have no result."""
        if {file.stem for file in self.path.glob("stages/*.json")} - {"profile", "reference"}:
            return
        if any(self.path.joinpath(name).exists() for name in self._beside):
            for file in self.path.iterdir():
                if file.name not in self._beside:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
        else:
            shutil.rmtree(self.path, ignore_errors=True)  # what is in it, where it is the current one

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _go_back(self, offset: int) -> None:
        """Expect the events from `offset` on again; those of stages that have ended since are kept."""
        ends = (_read_json(file).get("end", 0) for file in (self.path / "stages").glob("[!.]*.json"))
        self._at = min(offset, self._size())
        self._kept = min(max([offset, *ends]), self._size())

    def _size(self) -> int:
        return os.fstat(self._events.fileno()).st_size

    def _read(self, start: int, count: int) -> bytes:
        return os.pread(self._events.fileno(), count, start)

    def _cut(self, size: int) -> None:
        if self._size() > size:
            self._events.truncate(size)


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a run, also of one that is under way: a torn last line is left out. No run or no events: []."""
    file = Path(path) / "events.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary file to write; it takes the place of `path`, synced, when the block ends without an error."""
    with _room_for(path), _writing(path) as temporary:
        yield temporary


def load_yaml(text: str) -> Any:
    """Plain data from YAML, where `1e-3` is the number it looks like. yaml.YAMLError: malformed."""
    return yaml.load(text, _Loader)


def dump_yaml(data: Any) -> str:
    """YAML that `load_yaml` reads back, keys in their order. yaml.YAMLError: something else than plain data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """PyYAML takes `1e-3` for a string, since YAML 1.1 asks for `1.0e-3`, and of a key given twice the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # pyright: ignore[reportUnknownMemberType]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Knows that float too: the string "1e-3" has to be quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
    )


class _Lock:
    """The folder's lock: the operating system lets go of it when the process ends, however it ends."""

    def __init__(self, path: Path):
        with _room_for(path):
            self._file = open(path / ".lock", "a+")  # noqa: SIM115 -- held as long as the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{path} is in use by another process: wait for it, or end it") from None
        _locks.add(self)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.close()


# A data loader's forked workers inherit the lock and would keep it when the run has died: they close their copy.
_locks: weakref.WeakSet[_Lock] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _locks])


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being written into a UserError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sentence = f"no space left to write {path}: make room and continue, all written before is kept"
        else:
            sentence = f"{path} cannot be written: {error.strerror or error}"
        raise UserError(sentence) from error


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)  # the renaming is on disk only when the folder is


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Any) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: it is no JSON; delete it, and what it held is computed again") from None


def _plain(value: Any) -> Any:
    """Strict JSON data: arrays and scalars of numpy and torch as lists and numbers, what is not finite as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, (str, int, float)) and hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def _asked(problem: dict[str, Any]) -> dict[str, Any]:
    """The problem without the words in which it was put."""
    return {key: value for key, value in problem.items() if key != "command"}


def _ours(file: Path) -> bool:
    return file.name == ".lock" or (file.name.startswith(".") and file.name.endswith(".tmp"))


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._@+=-]*", name):
        raise ValueError(f"{name!r} is no name for a file of a run: letters, digits and . _ - @ + = are allowed")
    return name
