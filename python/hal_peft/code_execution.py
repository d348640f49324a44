"""Run programs that a model wrote: in a process of their own, with limits of time and memory.

This is no sandbox. A program can read files and open connections as the user who runs it: where
that matters, run the evaluation in a container or virtual machine without network or secrets.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile

# Sets limits that the program cannot raise, takes its output away, and says a word only this module
# knows when the program came to its end: leaving early, as by sys.exit(0), is not passing.
_RUNNER = """
import os, resource, sys
seconds, size, word = int(sys.argv[1]), int(sys.argv[2]), sys.argv.pop()
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
source = sys.stdin.read()
out, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nothing, stream)
exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
os.write(out, word.encode())
"""


def passes(source: str, *, seconds: float = 10.0, memory_mb: int = 1024) -> bool:
    """Whether a Python program runs to its end without an exception, within the limits.

    Args:
        source: the program.
        seconds: of wall clock; its processor time is limited to as much, rounded up.
        memory_mb: address space, in MiB.

    Raises:
        RuntimeError: this system has no resource limits (Windows).
    """
    if importlib.util.find_spec("resource") is None:
        raise RuntimeError(
            "programs can't be limited on this system: the resource module is missing"
        )
    word = secrets.token_hex(16)
    limits = [str(int(seconds) + 1), str(memory_mb << 20), word]
    with tempfile.TemporaryDirectory(prefix="hal_program_") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "PATH": os.defpath},
            start_new_session=True,  # what the program starts is killed with it
        )
        try:
            said, _ = process.communicate(source.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_group(process)
    return process.returncode == 0 and said.decode(errors="replace") == word


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
