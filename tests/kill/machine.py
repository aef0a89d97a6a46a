"""What only some machines let a test do: small disks of their own (tmpfs), and a tracer that interferes (strace)."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir", "openat", "ftruncate")
"""System calls of a run at which it can be killed; also those of writers in Rust."""
_ROOMY = "64m"


@functools.cache
def why_no_small_disk(scratch: Path) -> str:
    """Why no small disk can be made here; "" where it can."""
    place = scratch / "small-disk"
    try:
        with small_disk(place, "1m"):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no tmpfs can be mounted here: {getattr(error, 'stderr', '') or error}"
    return ""


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of this size at ``place``."""
    place.mkdir(parents=True, exist_ok=True)
    _call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield
    finally:
        _call("umount", "-l", str(place))


def make_room(place: Path) -> None:
    """Somebody has bought a larger disk."""
    _call("mount", "-o", f"remount,size={_ROOMY}", str(place))


def _call(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    subprocess.run(command, check=True, capture_output=True, text=True)


@functools.cache
def why_no_tracer() -> str:
    """Why no process can be traced here; "" where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    sleeper = subprocess.Popen(["sleep", "5"])
    tracer = None
    try:
        tracer = trace(sleeper.pid, ["-e", "trace=fsync"])
    except OSError as error:
        return f"strace cannot attach to a process here: {error}"
    finally:
        sleeper.kill()
        sleeper.wait()
        if tracer is not None:
            tracer.wait(timeout=10)
    return ""


def trace(pid: int, options: list[str]) -> subprocess.Popen[bytes]:
    """A tracer that has attached to a process and its threads. Raises OSError where it cannot."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-p", str(pid), *(["-o", "/dev/null"] if "-o" not in options else []), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(500):
        if "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8"):
            return tracer
        if tracer.poll() is not None:
            break
        time.sleep(0.01)
    tracer.kill()
    tracer.wait()
    raise OSError("it did not attach")
