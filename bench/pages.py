"""The pages of docs/results: tables and plots of every suite that has rows."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from hal_kernels import backends

from . import quality, training_time
from .convergence import summary as convergence_summary
from .plots import curves, gamma_points, scaling, score_bars, step_and_memory
from .rows import Row, groups, markdown, newest_each, rows, source

NOT_MEASURED = "not measured"
# Table 7 of the paper: batch -> (MB, ms a step) of AdaLoRA and of HyperAdaLoRA.
PAPER_TABLE7 = {
    1: ((2758, 123.16), (2722, 118.10)), 2: ((2798, 132.60), (2764, 118.82)),
    4: ((3232, 149.38), (3196, 134.54)), 8: ((4115, 189.39), (4078, 178.51)),
    16: ((5906, 284.33), (5870, 272.72)), 32: ((9600, 486.16), (9564, 465.77)),
    64: ((16566, 882.55), (16530, 872.80)),
}  # fmt: skip
PAPER_SIMILARITY = {"P": 0.9861, "Λ": 0.9878, "Q": 0.9811}
PAPER_QUALITY = {  # Tables 1, 3, 9: (task, model, metric) -> AdaLoRA, HyperAdaLoRA
    ("alpaca", "LLaMA3.1-8B", "bleu4"): (55.06, 55.10),
    ("alpaca", "LLaMA3.1-8B", "rouge1"): (58.51, 58.58),
    ("alpaca", "Qwen2.5-7B", "bleu4"): (6.79, 6.79),
    ("alpaca", "Qwen2.5-7B", "rouge1"): (20.17, 20.19),
    ("magpie", "LLaMA3.1-8B", "bleu4"): (70.69, 70.73),
    ("magpie", "LLaMA3.1-8B", "rouge1"): (56.76, 56.78),
    ("magpie", "Qwen2.5-7B", "bleu4"): (56.21, 56.22),
    ("magpie", "Qwen2.5-7B", "rouge1"): (49.43, 49.43),
    ("gsm8k", "LLaMA3.1-8B", "exact_match"): (72.38, 72.54),
    ("humaneval", "LLaMA3.1-8B", "pass_at_1"): (43.54, 43.56),
    ("open-platypus", "Qwen2.5-7B", "bleu4"): (19.87, 19.92),
    ("open-platypus", "Qwen2.5-7B", "rouge1"): (44.24, 44.65),
    ("open-platypus", "LLaMA3.1-8B", "bleu4"): (34.86, 35.95),
    ("open-platypus", "LLaMA3.1-8B", "rouge1"): (52.90, 53.00),
}
PAPER_TIME = 6650 / 8125  # Table 6: LLaMA3.1-8B on Alpaca, seconds of all training

Plot = Callable[[Path], None]
Page = tuple[str, dict[str, Plot]]  # Markdown, and by file name what draws a plot


def table7() -> Page | None:
    found = rows("table7")
    if not found:
        return None
    text, plots = "# Memory and latency by batch size (Table 7)\n", {}
    for own in groups(found, "model", "layers", "checkpointing", "length"):
        own = sorted(newest_each(own, "batch"), key=lambda row: row["batch"])
        first = own[0]
        title = f"{first['model']}, sequences of {first['length']}"
        title += ", gradient checkpointing" if first["checkpointing"] else ""
        title += f", {first['layers']} blocks" if first["layers"] else ""
        name = "table7-" + title.replace(", ", "-").replace(" ", "-") + ".png"
        methods = list(dict.fromkeys(m for row in own for m in row["methods"]))
        body = [
            [str(row["batch"]), *(_memory_and_time(row["methods"].get(m, {})) for m in methods)]
            for row in own
        ]
        text += f"\n## {title}\n\nPeak MB / ms a step (median).\n\n"
        text += markdown(["batch", *methods], body) + source(own[-1]) + f"\n![{title}]({name})\n"
        plots[name] = lambda path, own=own: step_and_memory(own, path)
    body = [
        [str(batch), f"{a[0]} / {a[1]}", f"{h[0]} / {h[1]}", f"{h[1] / a[1]:.3f}"]
        for batch, (a, h) in PAPER_TABLE7.items()
    ]
    text += "\n## The paper's (its text does not name the model; A100 40 GB)\n\n"
    text += markdown(["batch", "AdaLoRA", "HyperAdaLoRA", "ratio of latencies"], body)
    return text, plots


def _memory_and_time(result: Row) -> str:
    if result.get("out_of_memory"):
        return "out of memory"
    if "step" not in result:
        return ""
    return f"{result['peak_mb']:.0f} / {result['step']['median_ms']:.1f}"


def scaling_page() -> Page | None:
    found = newest_each(rows("scaling"), "axis", "value")
    if not found:
        return None
    text = "# Cost of a step by depth, width, rank, tokens and processes\n\n"
    text += "![ms a step](scaling.png)\n"
    for own in groups(found, "axis"):
        own.sort(key=lambda row: row["value"])
        methods = list(own[0]["methods"])
        body = [
            [str(r["value"]), *(f"{r['methods'][m]['step']['median_ms']:.1f}" for m in methods)]
            for r in own
        ]
        label = own[0]["label"]
        text += f"\n## {label[0].upper() + label[1:]}: {own[0]['title']}\n\nMs a step, medians.\n\n"
        text += markdown([label, *methods], body) + source(own[-1])
        if "sent_bytes" in own[0]["methods"][methods[0]]:
            body = [
                [str(r["value"]), *(f"{r['methods'][m]['sent_bytes'] / 1e6:.3g}" for m in methods)]
                for r in own
            ]
            text += "\nMB that each process sends in a step, counted (ring algorithm).\n\n"
            text += markdown([label, *methods], body)
    return text, {"scaling.png": lambda path: scaling(found, path)}


def gamma() -> Page | None:
    found = newest_each(rows("gamma"), "task", "model", "steps", "lr", "gamma", "seed")
    if not found:
        return None
    text, plots = "# The weight γ of the orthogonality penalty (Tables 5, 11)\n", {}
    for own in groups(found, "task", "model", "steps", "lr"):
        first = own[0]
        body = []
        for at in groups(sorted(own, key=lambda row: row["gamma"]), "gamma"):
            cells = [f"{at[0]['gamma']:g}", str(len(at))]
            for field in ("accuracy", "loss", "orthogonality", "seconds"):
                cells.append(_mean_and_range([row[field] for row in at]))
            body.append(cells)
        title = f"{first['task']}, {first['model']}, {first['steps']} steps, lr {first['lr']:g}"
        name = f"gamma-{first['task']}-{first['model']}-{first['steps']}-{first['lr']:g}.png"
        text += f"\n## {title}\n\nMeans over seeds [least–largest].\n\n"
        head = ["γ", "seeds", "accuracy", "training loss", "‖PᵀP − I‖² + ‖QQᵀ − I‖²", "seconds"]
        text += markdown(head, body) + source(own[-1]) + f"\n![{title}]({name})\n"
        plots[name] = lambda path, own=own: gamma_points(own, path)
    return text, plots


def similarity() -> Page | None:
    found = newest_each(rows("similarity"), "task", "model", "steps", "peer", "lr", "seed")
    if not found:
        return None
    text = "# Similarity of P, Λ, Q to AdaLoRA's (Table 8)\n\n"
    text += "How directions are matched: bench/similarity.py. Means over layers and seeds.\n"
    parts = ("P", "Λ", "Q", "ΔW")
    for own in groups(found, "task", "model", "steps", "peer", "lr"):
        first = own[0]
        body = [["the paper", *(f"{v}" for v in PAPER_SIMILARITY.values()), ""]]
        for kind in first["similarity"]:
            values = [row["similarity"][kind] for row in own]
            cells = (
                f"{statistics.fmean(v[p] for v in values):.4f}" if p in values[0] else ""
                for p in parts
            )
            body.append([kind, *cells])
        text += f"\n## {first['peer']}: {first['task']}, {first['model']}, {first['steps']} steps, "
        text += f"{len(own)} seeds\n\n" + markdown(["", *parts], body) + source(own[-1])
    return text, {}


def training_time_page() -> Page | None:
    found = newest_each(rows("training_time"), "task", "seed", "steps", "base_steps", "lr_scale")
    if not found:
        return None
    text = "# Seconds to a loss, and of all steps (Tables 2, 4, 6, 10)\n\n"
    text += "A tiny Llama that reads bytes; each method at the best of its learning rates.\n"
    plots: dict[str, Plot] = {}
    for own in groups(found, "task", "steps", "base_steps"):
        runs = training_time.best(own)
        target = training_time.default_target(runs)
        body = []
        for method, chosen in runs.items():
            values = training_time.outcome(chosen, target).values()
            cells = ("not reached" if v is None else f"{v:.4g}" for v in values)
            body.append([method, f"{chosen[0]['lr']:g}", str(len(chosen)), *cells])
        task, steps = own[0]["task"], own[0]["steps"]
        name = f"training_time-{task}-{steps}.png"
        text += f"\n## {task}, {steps} steps; target: a mean loss of {target:.3f} nats a byte\n\n"
        head = ["method", "lr", "seeds", "s to the target", "s in all", "last loss", "held out"]
        by_command = {row["machine"]["command"]: row for row in own}  # one for each set of rates
        text += markdown(head, body) + "".join(map(source, by_command.values()))
        text += f"\n![{task}]({name})\n"
        plots[name] = lambda path, runs=runs: curves(runs, "loss (nats a byte)", path)
    return text, plots


def quality_page() -> Page | None:
    found = rows("quality")
    if not found:
        return None
    text = "# How good the generated text is (Tables 1, 3, 9)\n\n"
    text += "Greedy answers to held-out prompts. BLEU-4 and ROUGE-1 are 0 to 100, exact match and "
    text += (
        "pass@1 0 to 1. Means over seeds [least–largest], each method at the learning rate with "
    )
    text += 'the lowest last loss; "frozen" is the model before it is fine-tuned.\n'
    plots: dict[str, Plot] = {}
    own_run = ("task", "model", "steps", "base_steps", "batch", "length", "new_tokens", "held_out")
    for own in groups(newest_each(found, *own_run, "method", "lr", "seed"), *own_run):
        first = own[0]
        runs = quality.best(own)
        title = f"{first['task']}, {first['model']}, {first['steps']} steps"
        text += f"\n## {title}\n\n"
        text += f"{first['held_out']} prompts, answers of at most {first['new_tokens']} tokens"
        if first["model"] == quality.TINY.name:
            text += "; the model reads bytes, and writes words but no answers: its scores compare "
            text += "the methods on it and say nothing else"
        name = f"quality-{first['task']}-{first['model']}-{first['steps']}.png"
        text += ".\n\n" + markdown(*quality.summary(runs, _mean_and_range)) + source(own[-1])
        text += f"\n![{title}]({name})\n"
        plots[name] = lambda path, runs=runs: score_bars(runs, quality.METRICS, path)
    body = [
        [task, model, quality.METRICS[metric], *(f"{value:.2f}" for value in values)]
        for (task, model, metric), values in PAPER_QUALITY.items()
    ]
    text += "\n## The paper's (exact match and pass@1 in %)\n\n"
    text += markdown(["task", "model", "", "AdaLoRA", "HyperAdaLoRA"], body)
    return text, plots


def _mean_and_range(values: Sequence[float | None]) -> str:
    """Of seconds, null where the machine was shared: nothing then."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.4g}–{max(values):.4g}]"


def operators() -> Page | None:
    found = newest_each(rows("operators"), "operator", "size")
    found = [row for row in found if row["operator"] in backends()]  # rows of former ones stay
    if not found:
        return None
    text = "# Operators\n\nForward and backward, median µs; how near the roofline floor.\n"
    names = ("hal", "eager", "compile", "peft")
    for own in groups(found, "operator"):
        body = []
        for row in own:
            times = row["times"]
            cells = (f"{times[n]['median_us']:.0f}" if n in times else "" for n in names)
            error = f"{row['errors']['hal']:.0e}"
            body.append([row["size"], *cells, f"{row['floor_share']:.0%}", error])
        text += f"\n## {own[0]['operator']}\n\n"
        text += markdown(["size", *names, "floor ÷ hal", "relative error"], body) + source(own[-1])
    return text, {}


def convergence() -> Page | None:
    kinds = ("task", "model", "steps", "rank")
    found = newest_each(rows("convergence"), *kinds, "method", "lr", "seed")
    if not found:
        return None
    text = "# Training loss against steps and seconds (Figures 2, 3)\n\n"
    text += "Each method at the learning rate with the lowest last loss, among those with the most "
    text += "seeds; band: least to largest over seeds. What was tried and what it gave: "
    text += "[convergence](../convergence.md).\n"
    plots: dict[str, Plot] = {}
    for own in groups(found, *kinds):
        runs: dict[str, list[Row]] = {}
        body = []
        for method in dict.fromkeys(row["method"] for row in own):
            mine = [row for row in own if row["method"] == method]
            entry = min(convergence_summary(mine, 0.0), key=lambda e: (-e["seeds"], e["final"]))
            runs[method] = [row for row in mine if row["lr"] == entry["lr"]]
            cells = [f"{entry[k]:.4g}" for k in ("lr", "final", "accuracy")]
            body.append([method, str(entry["seeds"]), *cells])
        first = own[0]
        kind = [first["task"], first["model"], f"{first['steps']} steps", f"rank {first['rank']}"]
        name, title = f"convergence-{'-'.join(kind)}.png".replace(" ", "-"), ", ".join(kind)
        text += f"\n## {title}\n\n"
        text += markdown(["method", "seeds", "lr", "last loss", "accuracy"], body)
        text += source(own[-1]) + f"\n![{title}]({name})\n"
        plots[name] = lambda path, runs=runs: curves(runs, "training loss (nats)", path)
    return text, plots


PAGES: dict[str, Callable[[], Page | None]] = {
    "table7": table7,
    "scaling": scaling_page,
    "gamma": gamma,
    "similarity": similarity,
    "training_time": training_time_page,
    "quality": quality_page,
    "operators": operators,
    "convergence": convergence,
}


def write(folder: Path, check: bool = False) -> list[str]:
    """Write the pages that are out of date, with their plots; returns their names."""
    old = []
    for name, page in PAGES.items():
        made = page()
        if made is None:
            continue
        text, plots = made
        path = folder / f"{name}.md"
        missing = [plot for plot in plots if not (folder / plot).exists()]
        if not path.exists() or path.read_text() != text or missing:
            old.append(f"docs/results/{name}.md")
            if not check:
                folder.mkdir(parents=True, exist_ok=True)
                for plot, draw in plots.items():
                    draw(folder / plot)
                path.write_text(text)
    return old


def beside_the_paper() -> str:
    """What the paper says of HyperAdaLoRA over AdaLoRA, and what was measured here."""
    body: list[list[str]] = []
    measured = {row["batch"]: row for row in rows("table7", model="roberta-base", layers=None)}
    for batch, (peer, ours) in PAPER_TABLE7.items():
        mine = measured.get(batch, {"methods": {}})["methods"]
        both = [mine.get(name, {}) for name in ("adalora", "hal-hyper")]
        for words, place, value in (
            ("ms a step", 1, lambda m: m["step"]["median_ms"]),
            ("peak memory", 0, lambda m: m["peak_mb"]),
        ):
            here = NOT_MEASURED
            if all("step" in m for m in both):
                here = f"{value(both[1]) / value(both[0]):.3f}"
            body.append([f"{words}, batch {batch}", f"{ours[place] / peer[place]:.3f}", here])
    found = rows("similarity", peer="adalora")
    for part, value in PAPER_SIMILARITY.items():
        here = NOT_MEASURED
        if found:
            values = [row["similarity"]["matched"][part] for row in found]
            chance = [row["similarity"]["chance"][part] for row in found]
            here = f"{statistics.fmean(values):.3f} (chance: {statistics.fmean(chance):.3f})"
        body.append([f"cosine of {part}", f"{value:.3f}", here])
    body.append(["seconds of a whole run, Alpaca", f"{PAPER_TIME:.3f}", _time_ratio()])
    for (task, model, metric), (peer, ours) in PAPER_QUALITY.items():
        if model == "LLaMA3.1-8B":
            here = _score_ratio(task, metric)
            body.append([f"{quality.METRICS[metric]}, {task}, {model}", f"{ours / peer:.3f}", here])
    return markdown(["HyperAdaLoRA ÷ AdaLoRA", "paper", "here"], body)


def _time_ratio() -> str:
    found: Sequence[Row] = rows("training_time", task="alpaca")
    runs = training_time.best(list(found)) if found else {}
    if not {"adalora", "hal-hyper"} <= runs.keys():
        return NOT_MEASURED
    ours, peer = (training_time.outcome(runs[m], 0.0)["in_all"] for m in ("hal-hyper", "adalora"))
    assert ours and peer  # of all steps, so always there
    return f"{ours / peer:.3f} (for the same number of steps)"


def _score_ratio(task: str, metric: str) -> str:
    """Of the paper's model alone: a small one's scores are no answer to the paper's."""
    found = [row for row in rows("quality", task=task) if "llama-3.1-8b" in row["model"].lower()]
    runs = quality.best(found)
    if not {"adalora", "hal-hyper"} <= runs.keys():
        return NOT_MEASURED
    ours, peer = (
        statistics.fmean(row["scores"][metric] for row in runs[m]) for m in ("hal-hyper", "adalora")
    )
    return f"{ours / peer:.3f}" if peer else "AdaLoRA scores 0"
