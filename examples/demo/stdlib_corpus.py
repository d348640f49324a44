"""A text classification set that is on every machine: the standard library's own words.

The examples are the docstrings and comments of the installed Python standard library; the label is
the family of modules they come from. The held-out split is by file: no file gives examples to both
sides. The same interpreter, seed and options always give the same data set.
"""

from __future__ import annotations

import ast
import io
import random
import re
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from hal_finetune.data import Task
from hal_finetune.options import OptionsError
from hal_finetune.prompts import CLASSIFICATION
from hal_finetune.rows import Example

# Top-level module or package -> family. Families that this Python lacks (a build without tkinter
# and idlelib, say) are left out by `load`.
FAMILIES: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio", "asyncore", "asynchat"),
    "files": (
        *("tarfile", "zipfile", "shutil", "tempfile", "gzip", "bz2", "lzma", "pathlib"),
        *("os", "posixpath", "ntpath", "genericpath", "glob", "fnmatch", "filecmp"),
    ),
    "gui": ("tkinter", "idlelib", "turtle", "turtledemo"),
    "mail": ("email", "mailbox", "smtplib", "smtpd", "imaplib", "poplib", "nntplib"),
    "markup": ("xml", "html", "plistlib", "_markupbase"),
    "processes": ("multiprocessing", "concurrent", "threading", "subprocess", "queue", "sched"),
    "testing": ("unittest", "doctest", "pdb", "bdb", "trace", "profile", "cProfile", "pstats"),
    "web": ("http", "urllib", "wsgiref", "ftplib", "xmlrpc", "socketserver", "webbrowser", "cgi"),
}
TRAIN_PER_FAMILY = 700
DEV_PER_FAMILY = 64
MIN_PER_FAMILY = 100  # a family with fewer examples is left out

_TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}
_MIN_WORDS = 5
_MAX_CHARACTERS = 400
_WORD = re.compile(r"[A-Za-z]{2,}")
_NOT_PROSE = re.compile(r"^#!|^#.*-\*-|^#\s*(type|noqa|pragma|pylint|fmt)\b:?", re.IGNORECASE)


def load(
    seed: int = 0,
    *,
    train_per_family: int = TRAIN_PER_FAMILY,
    dev_per_family: int = DEV_PER_FAMILY,
    root: Path | None = None,
) -> Task:
    """Build the data set from the standard library under `root` (default: this Python's).

    Raises:
        OptionsError: fewer than two families have enough text, as where Python ships no sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    by_family = _examples_by_family(root)
    names = [name for name in sorted(by_family) if _is_usable(by_family[name])]
    if len(names) < 2:
        raise OptionsError(
            f"{root} holds too little Python source for a data set ({len(names)} of "
            f"{len(FAMILIES)} module families); give --train-file and --dev-file instead"
        )
    train: list[Example] = []
    dev: list[Example] = []
    for label, name in enumerate(names):
        rng = random.Random(f"{seed}:{name}")
        family_train, family_dev = _split_by_file(by_family[name], rng)
        train += _examples(family_train, train_per_family, label, rng)
        dev += _examples(family_dev, dev_per_family, label, rng)
    random.Random(seed).shuffle(train)
    name = "docstrings and comments of the Python standard library"
    return Task(CLASSIFICATION, name, train, dev, names)


_Texts = dict[str, list[str]]  # file, relative to the library's root -> its texts


def _examples_by_family(root: Path) -> dict[str, _Texts]:
    seen: set[str] = set()  # over all files: licence notes and copied text must not cross the split
    by_family: dict[str, _Texts] = defaultdict(dict)
    for family, modules in FAMILIES.items():
        for path in _source_files(root, modules):
            texts = []
            for text in _texts_of(path):
                key = " ".join(_WORD.findall(text.lower()))
                if key not in seen:
                    seen.add(key)
                    texts.append(text)
            if texts:
                by_family[family][path.relative_to(root).as_posix()] = texts
    return by_family


def _source_files(root: Path, modules: Iterable[str]) -> Iterator[Path]:
    for module in modules:
        candidates = [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]
        for path in candidates:
            if path.is_file() and not _TEST_FOLDERS.intersection(path.relative_to(root).parts):
                yield path


def _texts_of(path: Path) -> Iterator[str]:
    """Docstrings, then blocks of comments, of one file; none where it cannot be parsed."""
    try:
        with tokenize.open(path) as stream:
            source = stream.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return
    for raw in (*_docstrings(tree), *_comments(source)):
        text = " ".join(raw.split())[:_MAX_CHARACTERS]
        if len(_WORD.findall(text)) >= _MIN_WORDS:
            yield text


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _comments(source: str) -> Iterator[str]:
    """Comments, those on consecutive lines as one text."""
    block: list[str] = []
    last_line = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or _NOT_PROSE.match(token.string):
            continue
        if token.start[0] != last_line + 1:
            yield " ".join(block)
            block = []
        block.append(token.string.lstrip("#:! "))
        last_line = token.start[0]
    yield " ".join(block)


def _is_usable(texts: _Texts) -> bool:
    return len(texts) >= 2 and sum(map(len, texts.values())) >= MIN_PER_FAMILY


def _split_by_file(texts: _Texts, rng: random.Random) -> tuple[_Texts, _Texts]:
    """Hold out files, in random order, until they hold a fifth of the texts."""
    total = sum(map(len, texts.values()))
    files = sorted(texts)
    rng.shuffle(files)
    held_out: list[str] = []
    count = 0
    for file in files:
        if count >= total / 5:
            break
        # A file that would take more than a third away from training stays there.
        if count + len(texts[file]) <= total / 3:
            held_out.append(file)
            count += len(texts[file])
    # Where every file is larger than that, the smallest one is held out.
    held_out = held_out or [min(files, key=lambda file: len(texts[file]))]
    dev = {file: texts[file] for file in held_out}
    return {file: texts[file] for file in files if file not in dev}, dev


def _examples(texts: _Texts, limit: int, label: int, rng: random.Random) -> list[Example]:
    examples = [Example(text, label, source=file) for file in sorted(texts) for text in texts[file]]
    rng.shuffle(examples)
    return examples[:limit]
