"""Building and loading of the native operators, and life without them."""

import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

import hal_kernels
from hal_kernels.backends import LIBRARY, _defect, _load

ROOT = Path(hal_kernels.__file__).parents[1]
BUILT = pytest.mark.skipif(not LIBRARY.exists(), reason="the native operators are not built")
SOURCE = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")

# One operator of the public interface, and what serves it.
USE = """
import hal_kernels, torch
one = torch.ones(2, 3, requires_grad=True)
hal_kernels.ops.svd_adapter_add(one, one, one, one[:, 0], one, scaling=0.5).sum().backward()
assert one.grad.isfinite().all()
print(*hal_kernels.backends()["svd_linear"]["cpu"], sep="|")
"""


FORKS = """
import os, sys, torch
code, folder, *settings = sys.argv[1:]
for index, native in enumerate(settings):
    if os.fork() == 0:
        os.environ["HAL_KERNELS_NATIVE"] = native
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{index}.{kind}", os.O_WRONLY | os.O_CREAT), number)
        exec(compile(code, "<string>", "exec"))
        sys.exit()
    assert os.wait()[1] == 0
"""


def use(folder, *settings):
    """(backend, reason, what stands on stderr) in a process with HAL_KERNELS_NATIVE so set, for
    each of `settings`. One imports torch for all of them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-c", FORKS, USE, str(folder), *map(str, settings)]
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for index in range(len(settings)):
        said, errors = ((folder / f"{index}.{kind}").read_text() for kind in ("out", "err"))
        yield *said.strip().split("|"), errors


def build(*arguments, **variables):
    """Run setup.py; what it wrote on stderr."""
    command = [sys.executable, "setup.py", "-q", *map(str, arguments)]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stderr


# ---- loading -------------------------------------------------------------------------------


def truncated(content):
    return content[: len(content) * 2 // 3], "the file is truncated"


def garbage(content):
    return bytes(range(256)) * 64, "it is not a library of hal_kernels"


def of_another_version(content):
    changed = content.replace(b"penalty(Tensor[] factors", b"penalty(tensor[] factors")
    problem = "it was built for another version of hal_kernels (orthogonality_penalty has changed)"
    return changed, problem


@BUILT
def test_what_is_loaded(tmp_path):
    """Nothing if told so, a library that is named, and for a broken one: a warning, no crash."""
    copy = shutil.copy(LIBRARY, tmp_path / "copy.so")
    problems = {}
    for spoil in (truncated, garbage, of_another_version):
        content, problem = spoil(LIBRARY.read_bytes())
        broken = tmp_path / f"{spoil.__name__}.so"
        broken.write_bytes(content)
        problems[broken] = problem
    off, (name, reason, errors), *others = use(tmp_path, "0", copy, *problems)
    assert off == ("default", "the native operators are turned off by HAL_KERNELS_NATIVE=0", "")
    assert (name, errors) == ("native", "") and reason.startswith("copy.so, ")
    for (broken, problem), (name, reason, errors) in zip(problems.items(), others, strict=True):
        assert name == "default"
        assert reason == f"the native operators in {broken} cannot be used: {problem}"
        assert errors.count("hal_kernels:") == 1
        assert f"<string>:2: UserWarning: hal_kernels: {reason}. Plain PyTorch serves" in errors


@BUILT
def test_defects_that_are_found_before_loading(tmp_path):
    content = LIBRARY.read_bytes()
    assert _defect(content) is None
    assert _defect(b"") == "it is not a library of hal_kernels"
    assert _defect(b"\x7fELF\x02") == "the file is truncated"
    for length in (10, 64, 5000, len(content) - 1):
        assert _defect(content[:length]) in (
            "the file is truncated", "it is not a library of hal_kernels"
        )  # fmt: skip
    assert _defect(Path(sys.executable).resolve().read_bytes()) == (
        "it is not a library of hal_kernels"
    )
    undecodable = content.replace(b"orthogonality_penalty(", b"orthogonality_penalty\xff")
    assert "another version" in _defect(undecodable)
    known = b"orthogonality_penalty(Tensor[] factors, "
    assert known in content
    for other in (b"orthogonality_penalty(Tensor[] faCtors, ", b"orthogonality_penaLty(Tensor[] "):
        changed = content.replace(known, other.ljust(len(known), b" "))
        assert _defect(changed).startswith(
            f"it was built for another version of hal_kernels ({other.split(b'(')[0].decode()}"
        )


def test_what_the_loader_itself_reports(tmp_path):
    missing = tmp_path / "none.so"
    assert _load(missing) == f"[Errno 2] No such file or directory: '{missing}'"
    script = tmp_path / "script.so"
    script.write_bytes(b"hal_kernels schemas\n\0")
    assert "script.so" in _load(script)


def test_nothing_is_warned_about_in_this_process():
    """Either it is loaded or it was not built: pytest makes an error of our warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hal_kernels.backends()["svd_linear"]["cpu"]
    assert found.name in ("native", "default") and found.reason


# ---- building --------------------------------------------------------------------------------


@SOURCE
def test_metadata_needs_no_torch(tmp_path):
    """setup.py is run for every question about the project, in environments without torch."""
    script = (
        "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


@SOURCE
@pytest.mark.parametrize(
    "variables, message",
    [
        ({"HAL_KERNELS_BUILD": "0"}, "HAL_KERNELS_BUILD=0: plain PyTorch serves."),
        (
            {"CXX": "no-such-compiler"},
            "the native CPU operators were not built: there is no C++ compiler "
            "'no-such-compiler' (CXX names another one). Plain PyTorch serves instead.",
        ),
        ({"CXX": "false"}, "the native CPU operators were not built: this command failed: false"),
    ],
)
def test_a_build_without_the_library_is_no_error(tmp_path, variables, message):
    before = LIBRARY.exists()
    stderr = build(
        "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects", **variables
    )
    assert stderr.count("hal_kernels: ") == 1
    assert f"hal_kernels: {message}" in stderr
    assert not list(tmp_path.rglob("*.so"))
    assert LIBRARY.exists() == before


@SOURCE
def test_the_source_distribution_has_the_sources(tmp_path):
    build("egg_info", "--egg-base", tmp_path)
    listed = (tmp_path / "hal_kernels.egg-info/SOURCES.txt").read_text().split()
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / "csrc").glob("*.*") if f.is_file()}
    assert len(sources) > 5
    assert sources <= set(listed)


def wheel(folder, **variables):
    build(
        "egg_info", "--egg-base", folder, "build", "--build-base", folder / "build",
        "bdist_wheel", "--bdist-dir", folder / "wheel", "--dist-dir", folder, **variables,
    )  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


@SOURCE
@BUILT
@pytest.mark.slow
def test_a_wheel_serves_every_python(tmp_path):
    """It holds the library and nothing that depends on the Python it was built with."""
    made = wheel(tmp_path)
    assert made.stem.split("-", 2)[2].startswith("py3-none-")
    assert not made.stem.endswith("-any")
    with zipfile.ZipFile(made) as file:
        file.extractall(tmp_path / "installed")
    library = tmp_path / "installed/hal_kernels/libhal_kernels.so"
    ((name, _, errors),) = use(tmp_path, library)
    assert (name, errors) == ("native", "")


@SOURCE
@pytest.mark.slow
def test_a_wheel_without_the_library_serves_every_platform(tmp_path):
    made = wheel(tmp_path, HAL_KERNELS_BUILD="0")
    assert made.stem.endswith("py3-none-any")
    assert not [n for n in zipfile.ZipFile(made).namelist() if n.endswith(".so")]
