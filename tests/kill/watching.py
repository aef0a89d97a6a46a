"""Where the places are hooked in: file operations of the run folder, the bytes of its files, the steps of a run.

Python announces file operations before they happen (audit events), whoever calls them; a hook that raises refuses
them. Writing and flushing are not announced: files opened for writing below the run folder get a raw file of our own
under their buffers, and ``os.write`` and ``os.fsync`` are wrapped. What writes in Rust (safetensors) is wrapped at its
Python entrance.
"""

from __future__ import annotations

import builtins
import functools
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill.points import STEPS, Points, die, plain_name

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NO_FOLDER = -1


class Watch:
    """Hooks one process; there is no way back, the process is thrown away."""

    def __init__(self, points: Points) -> None:
        self.points, self.refusals = points, points.refusals
        # Audit events give resolved and relative paths alike.
        self.roots = {points.root, points.root.resolve()}
        self.paths: dict[int, Path] = {}
        """Open descriptors of the run folder."""

    def install(self) -> None:
        """Hook everything in."""
        sys.addaudithook(self._announced)
        self._wrap_descriptors()
        self._wrap_files()
        self._wrap_rust()

    def name_of(self, path: Any) -> str | None:
        """Name of a path below the run folder; None for all others."""
        if isinstance(path, int):
            known = self.paths.get(path)
            return None if known is None else self.name_of(known)
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        whole = Path(os.path.abspath(os.fsdecode(path)))
        for root in self.roots:
            if whole == root or root in whole.parents:
                return plain_name(whole, root)
        return None

    # File operations

    def _announced(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            self._opening(*args[:3])
        elif event in _EVENTS:
            if event == "os.mkdir" and os.path.isdir(args[0]):
                return  # the system says EEXIST, whatever state the disk is in; makedirs(exist_ok=True) asks so
            operation, num_paths, folder_at = _EVENTS[event]
            folder = args[folder_at] if folder_at < len(args) else _NO_FOLDER
            names = [self._name_in(path, folder) for path in args[:num_paths]]
            if any(names):
                self.points.reach(operation, " to ".join(n or "elsewhere" for n in names))

    def _name_in(self, path: Any, folder: Any) -> str | None:
        """Name of a path that may be relative to an open folder."""
        if isinstance(folder, int) and folder != _NO_FOLDER and folder in self.paths:
            return self.name_of(self.paths[folder] / os.fsdecode(path))
        return self.name_of(path)

    def _opening(self, path: Any, mode: Any, flags: Any) -> None:
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
            mode is None and isinstance(flags, int) and flags & _WRITE_FLAGS
        )
        name = None if isinstance(path, int) else self.name_of(path)
        if name is None:
            return
        if writes:
            self.points.reach("open", name)
        else:
            self.refusals("read", name)

    # Descriptors

    def _wrap_descriptors(self) -> None:
        real_open, real_fsync, real_write, real_close = os.open, os.fsync, os.write, os.close

        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            descriptor = real_open(path, flags, *args, **kwargs)
            folder = kwargs.get("dir_fd")
            base = self.paths.get(folder) if folder is not None else None
            whole = base / os.fsdecode(path) if base is not None else path
            self._know(descriptor, whole)
            return descriptor

        def fsync(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            name = self.name_of(descriptor)
            if name is not None:
                self.points.reach("fsync", name)
            real_fsync(descriptor)
            if name is not None:
                self.points.unflushed.flushed(descriptor)

        def write(descriptor: int, content: Any) -> int:
            return self.written(self.name_of(descriptor), content, functools.partial(real_write, descriptor))

        def closed(descriptor: int) -> None:
            self.paths.pop(descriptor, None)
            real_close(descriptor)

        os.open, os.fsync, os.write, os.close = opened, fsync, write, closed  # type: ignore[assignment]
        if hasattr(os, "fdatasync"):
            os.fdatasync = fsync

    def _know(self, descriptor: int, path: Any) -> None:
        if not isinstance(path, int) and self.name_of(path) is not None:
            self.paths[descriptor] = Path(os.path.abspath(os.fsdecode(path)))
        else:
            self.paths.pop(descriptor, None)

    def written(self, name: str | None, content: Any, write: Callable[[Any], int]) -> int:
        """Hand ``content`` to the system: whole, in part, or in part and then die."""
        if name is None:
            return write(content)
        data = bytes(content)
        manner = self.points.reach("write", name + _kind_of(data, name))
        if manner:
            part = data[: len(data) // 2] if manner == "half" else data[:-1]
            while part:
                part = part[write(part) :]
            die()
        return write(data[: self.refusals.shortened(name, len(data))])

    # Files

    def _wrap_files(self) -> None:
        real_open, watch = io.open, self

        class RawFile(io.FileIO):
            """A file whose writes are watched."""

            def __init__(self, path: Any, mode: str, name: str) -> None:
                super().__init__(path, mode)
                self.short_name = name
                watch._know(self.fileno(), path)

            def write(self, content: Any) -> int:
                return watch.written(self.short_name, content, super().write)

            def close(self) -> None:
                if not self.closed:
                    watch.paths.pop(self.fileno(), None)
                super().close()

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            name = watch.name_of(file)
            if name is None or not set(mode) & set("wax+") or opener is not None or isinstance(file, int):
                return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = RawFile(file, mode.replace("b", "").replace("t", ""), name)
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            text = io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, buffering == 1)
            text.mode = mode  # type: ignore[misc]
            return text

        io.open = builtins.open = opened
        accessor = getattr(__import__("pathlib"), "_NormalAccessor", None)  # Python 3.10
        if accessor is not None:
            accessor.open = staticmethod(opened)

    # Rust

    def _wrap_rust(self) -> None:
        import safetensors.torch

        real = safetensors.torch.serialize_file

        def serialize_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
            name = self.name_of(filename)
            if name is None:
                return real(tensors, filename, *args, **kwargs)
            try:
                manner = self.points.reach("rust", name)
            except OSError as error:
                self._refuse_as_rust(error, filename)
            done = real(tensors, filename, *args, **kwargs)
            if manner:
                size = os.path.getsize(filename)
                os.truncate(filename, size // 2 if manner == "half" else size - 1)
                die()
            return done

        safetensors.torch.serialize_file = serialize_file

    @staticmethod
    def _refuse_as_rust(error: OSError, filename: Any) -> None:
        """The library's own words for a refusal, with half a file left behind."""
        import safetensors

        with io.FileIO(filename, "w") as handle:
            io.FileIO.write(handle, b"\0" * 1000)
        raise safetensors.SafetensorError(
            f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
        ) from None


_EVENTS = {
    # event: (operation, how many of its arguments are paths, index of the folder descriptor)
    "os.rename": ("rename", 2, 2),
    "os.mkdir": ("mkdir", 1, 2),
    "os.remove": ("remove", 1, 1),
    "os.rmdir": ("rmdir", 1, 1),
    "os.truncate": ("truncate", 1, 9),
    "os.link": ("link", 2, 2),
    "os.symlink": ("link", 2, 2),
    "os.chmod": ("chmod", 1, 2),
    "os.utime": ("utime", 1, 3),
}


def _kind_of(data: bytes, name: str) -> str:
    """A journal's writes are told apart by the kind of their first record."""
    if not name.endswith(".jsonl"):
        return ""
    try:
        return ":" + str(json.loads(data.split(b"\n", 1)[0])["kind"])
    except (ValueError, KeyError, TypeError):
        return ":part"


def watch_steps(points: Points) -> None:
    """Hook in what happens in memory: passes, updates, verdicts, snapshots."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from finitune.train.step import TrainPort

    def around(owner: Any, attribute: str, name: str) -> None:
        real = getattr(owner, attribute)

        @functools.wraps(real)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            points.reach(STEPS, f"before {name}")
            done = real(*args, **kwargs)
            points.reach(STEPS, f"after {name}")
            return done

        setattr(owner, attribute, wrapped)

    for method in ("forward_backward", "commit", "abort", "settle", "restore"):
        if method in vars(TrainPort):
            around(TrainPort, method, method)
    around(torch.Tensor, "backward", "backward")
    around(torch, "_foreach_copy_", "copying tensors")

    def before_update(*_: Any) -> None:
        points.reach(STEPS, "before update")

    def after_update(*_: Any) -> None:
        points.reach(STEPS, "after update")

    register_optimizer_step_pre_hook(before_update)
    register_optimizer_step_post_hook(after_update)
