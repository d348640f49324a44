"""Files that belong together, written so that a kill at any moment costs none of them."""

import contextlib
import ctypes
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

_RANDOM = "[a-z0-9_]" * 8  # what tempfile ends a name with
_HERE, _EXCHANGE = -100, 2  # Linux: AT_FDCWD, RENAME_EXCHANGE


def folder_path(path: str | os.PathLike[str], *, to_write: bool = False) -> Path:
    """`path` as a folder's path; nothing is made.

    Raises:
        TypeError: it is no path. ValueError: it is empty. NotADirectoryError: `to_write`, and a
            file is in the way.
    """
    given: object = path
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else given
    if not isinstance(text, str):
        raise TypeError(f"path is {path!r}, a {type(path).__name__}; expected a folder's path")
    if not text or "\0" in text:
        raise ValueError(f"path is {text!r}, expected a folder's path ('.' is the current folder)")
    folder = Path(text)
    if to_write:
        there = next((p for p in (folder, *folder.parents) if p.exists()), folder.parent)
        if there.exists() and not there.is_dir():
            raise NotADirectoryError(f"path is {text!r}, expected a folder: {there} is a file")
    return folder


def serialized(
    tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> bytes:
    """A safetensors file's contents. Tensors that share memory are written each by itself."""
    copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    return save(copies, metadata)


@contextlib.contextmanager
def held(folder: Path, names: Sequence[str]) -> Iterator[bool]:
    """Make a folder, keep others from saving there meanwhile, and remove what killed saves left.

    The lock is the kernel's, on the folder itself, and ends with the process that has it. So who
    has it knows that temporary files found there are nobody's any more. On a file system without
    such locks nothing is removed.

    Args:
        names: of the files that are written there; patterns as of `Path.glob`.

    Yields:
        Whether the lock is held.
    """
    import fcntl  # which Windows lacks, where the package is imported too

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            while not os.path.samestat(os.fstat(handle), os.stat(folder)):  # it was exchanged
                os.close(handle)
                handle = os.open(folder, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        if locked:
            for name in names:
                for left in folder.glob(f".{name}.{_RANDOM}"):
                    left.unlink(missing_ok=True)
        yield locked
    finally:
        with contextlib.suppress(OSError):  # a process forked meanwhile holds the lock, too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that `path` is at every moment the former file or all of the new one."""
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)
    _sync(path.parent)


def write_together(folder: Path, files: dict[str, bytes]) -> None:
    """Write files of which each makes sense only with the others, and none with former ones.

    A kill leaves the former files or all of the new ones: where more than one differs, the folder
    is exchanged for a new one in a single step. That needs Linux, a file system that can, and a
    folder that holds nothing else and is not the current one. Else the last file, which readers
    open first, is missing while they are replaced.

    Args:
        files: contents by name; all have been written at an earlier time, or none has.
    """
    first = next(reversed(files))
    with held(folder, list(files)) as locked:
        if locked:
            _remove_exchanged(folder.resolve(), files)
        changed = [n for n, data in files.items() if not _holds(folder / n, data)]
        replaces = len(changed) > 1 and (folder / first).exists()
        if replaces and locked and _exchanged(folder.resolve(), files):
            return
        with contextlib.ExitStack() as stack:
            ready = [
                (stack.enter_context(_temporary(folder / n, files[n])), folder / n) for n in changed
            ]
            if replaces:
                (folder / first).unlink()
                _sync(folder)
            for temporary, path in ready:
                os.replace(temporary, path)
                _sync(folder)


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[str]:
    """A file with these contents beside `path`, on the disk; it is gone, or renamed, afterwards."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        yield temporary
    finally:
        Path(temporary).unlink(missing_ok=True)


def _remove_exchanged(folder: Path, files: Mapping[str, bytes]) -> None:
    """Remove what killed processes were about to exchange `folder` for, or had exchanged it for."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.{_RANDOM}"):
        inside = [p.name for p in left.iterdir()] if left.is_dir() else [""]
        if all(any(name in (n, f".{n}{name[-9:]}") for n in files) for name in inside):
            shutil.rmtree(left, ignore_errors=True)


def _exchanged(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether `folder` was exchanged for a new one that holds these files alone."""
    if {p.name for p in folder.iterdir()} != files.keys() or folder == Path.cwd():
        return False
    try:
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except PermissionError:
        return False
    try:
        for name, data in files.items():
            with _temporary(fresh / name, data) as temporary:
                os.replace(temporary, fresh / name)
        os.chmod(fresh, stat.S_IMODE(folder.stat().st_mode))
        _sync(fresh)
        exchange = getattr(ctypes.CDLL(None), "renameat2", None)
        names = os.fsencode(fresh), os.fsencode(folder)
        if exchange is None or exchange(_HERE, names[0], _HERE, names[1], _EXCHANGE) != 0:
            return False
        _sync(folder.parent)
        return True
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
