"""Test functions that a model wrote: in processes of their own, with limits of time and memory.

Two processes share the work. The *judge* runs the tests, and its exit status is the verdict. The
*program*, its child, runs what the model wrote; it gets the arguments of each call and gives back
plain data (numbers, text, None, lists, tuples, sets, dicts). Neither tests nor verdict are ever in
its memory, so that all it can do to pass is return what the tests expect.

What holds:
- Leaving early, printing, patching Python, or looking through frames and /proc/self passes nothing.
- A call returns within the time given and a few seconds more, whatever the program does.
- On Linux everything that the program started is killed, also what left its session and parent.
  Elsewhere that is its process group.

What does not: this is no sandbox. A program can read files and open connections as the user who
runs it, kill its judge (which fails it, and may leave a process behind), and, as root, write the
judge's memory. Where that matters, run the evaluation in a container or virtual machine without
network or secrets.
"""

import builtins
import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO, Any, NoReturn

_GRACE = 5.0  # seconds that starting and cleaning up may take beyond the limit
_KINDS: dict[str, Any] = {
    "dict": dict, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter,
}  # fmt: skip
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36  # of Linux' prctl


def passes(
    program: str,
    tests: str,
    *,
    entry_point: str,
    head: str = "",
    seconds: float = 10.0,
    memory_mb: int = 1024,
) -> bool:
    """Whether a program's function passes its tests, within the limits.

    Args:
        program: source that defines the function. It is not trusted.
        tests: source that calls the function by its name, and raises where it is wrong.
        entry_point: that name. Arguments are copies: what the function does to them is not seen.
        head: source of what else the tests use, run before them: imports, helpers.
        seconds: of wall clock, for definitions and tests together. The program's processor time is
            limited to as much, rounded up.
        memory_mb: address space of each process, in MiB.

    Raises:
        RuntimeError: this system has no resource limits (Windows).
    """
    if importlib.util.find_spec("resource") is None:
        raise RuntimeError(
            "programs can't be limited on this system: the resource module is missing"
        )
    job = {"program": program, "head": head, "tests": tests, "entry_point": entry_point}
    folder = tempfile.mkdtemp(prefix="hal_program_")
    judge = subprocess.Popen(
        [sys.executable, "-I", __file__, str(seconds), str(memory_mb)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"HOME": folder, "PATH": os.defpath},
        start_new_session=True,
    )
    try:
        judge.communicate(json.dumps(job).encode(), timeout=seconds + _GRACE)
    except subprocess.TimeoutExpired:
        _kill_descendants(judge.pid)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it is gone
            os.killpg(judge.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            judge.wait(_GRACE)
        with contextlib.suppress(RecursionError):  # of folders in folders
            shutil.rmtree(folder, ignore_errors=True)
    return judge.returncode == 0


# -- in the judge ----------------------------------------------------------------------------------


def _judge() -> NoReturn:
    """Start the program, run the tests, kill what is left, and leave with the verdict."""
    seconds, memory_mb = float(sys.argv[1]), int(sys.argv[2])
    # Who loses its parent becomes a child of this process.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:  # before anything is known of the tests
        try:
            ours.close()
            _serve(theirs, seconds, memory_mb)
        finally:
            os._exit(1)
    theirs.close()
    # Other processes of the same user may not write this one's memory.
    _prctl(_PR_SET_DUMPABLE, 0)
    passed = False
    try:
        _limit(memory_mb)
        signal.signal(signal.SIGALRM, _time_is_up)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        job = json.load(sys.stdin)
        pipe = ours.makefile("rw", encoding="ascii")
        _ask(pipe, job["program"])

        def function(*args: Any, **kwargs: Any) -> Any:
            return _ask(pipe, [job["entry_point"], _packed(args), _packed(kwargs)])

        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(job["head"], "<head>", "exec"), namespace)
        namespace[job["entry_point"]] = function
        exec(compile(job["tests"], "<tests>", "exec"), namespace)
        passed = True
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        _kill_descendants(os.getpid())
        os._exit(0 if passed else 1)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _time_is_up(*_: Any) -> None:
    raise TimeoutError


def _ask(pipe: IO[str], question: Any) -> Any:
    """What the program answers; the exception that it met is raised here, if it is a built-in."""
    pipe.write(json.dumps(question) + "\n")
    pipe.flush()
    answer = json.loads(pipe.readline())
    if "error" in answer:
        kind = getattr(builtins, answer["error"], None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind
        raise RuntimeError(answer["error"])
    return _unpacked(answer["value"])


def _limit(memory_mb: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# -- in the program --------------------------------------------------------------------------------


def _serve(connection: socket.socket, seconds: float, memory_mb: int) -> None:
    """Run the program that comes first, then answer calls until there are none."""
    import resource

    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    _limit(memory_mb)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
    pipe = connection.makefile("rw", encoding="ascii")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(json.loads(pipe.readline()), "<program>", "exec"), namespace)
    answer: dict[str, Any] = {"value": None}
    while True:
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()
        name, args, kwargs = json.loads(pipe.readline())
        try:
            result = namespace[name](*_unpacked(args), **_unpacked(kwargs))
            answer = {"value": _packed(result)}
        except Exception as error:
            answer = {"error": type(error).__name__}


# -- in both ---------------------------------------------------------------------------------------


def _packed(value: Any) -> Any:
    """Plain data as JSON's; `_unpacked` is the inverse, but for subclasses and iterators."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_packed(entry) for entry in value]
    if isinstance(value, dict):
        return {"dict": [[_packed(k), _packed(v)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if hasattr(value, "item"):  # NumPy's numbers
        return _packed(value.item())
    kinds = (name for name in ("tuple", "set", "frozenset") if isinstance(value, _KINDS[name]))
    return {next(kinds, "iterator"): [_packed(entry) for entry in value]}


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, entries),) = value.items()
    parts = [_unpacked(entry) for entry in entries]
    if kind == "complex":
        return complex(*parts)
    return _KINDS[kind](parts)


def _kill_descendants(root: int) -> None:
    """Kill what a process started, what that started, and so on, until nothing is left."""
    end = time.monotonic() + _GRACE / 2
    while (found := _descendants(root)) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(ChildProcessError):
        while root == os.getpid() and os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _descendants(root: int) -> list[int]:
    """Processes below one that still run, as /proc has them; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(OSError, ValueError, IndexError):  # ended meanwhile; no process
            with open(f"/proc/{int(name)}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


if __name__ == "__main__":
    _judge()
