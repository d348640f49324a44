"""Checkpoints with random damage that their digest vouches for: each loads, or is refused."""

import hashlib
import json
import random

import models
import pytest
import torch
from lifecycle import patched, unchanged
from safetensors.torch import load, save
from training import adam, batches, train

import hal_kernels

VALUES = (
    None, True, 0, -1, 3, 10**8, 10**400, 0.5, float("nan"), float("inf"), "", "up.0", "\ud800",
    "(a+)+$", "(" * 3000, [], ["up.0"], ["classifier"], {}, {"(.*)*x": 3}, "float64", "bert",
)  # fmt: skip
TENSORS = (
    torch.Tensor.double, torch.Tensor.half, torch.Tensor.int, torch.Tensor.cfloat,
    lambda t: t * torch.nan, lambda t: t[:-1], lambda t: t[None], torch.sum, lambda t: t - 9,
    lambda t: torch.cat([t, t]),
)  # fmt: skip


def places(node):
    """(container, key) of everything in nested lists and dicts."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def damaged(header, tensors, chance):
    """(JSON, file) after one random change to the header, a tensor, or bits of the file."""
    header, tensors = json.loads(json.dumps(header)), dict(tensors)
    kind = chance.choice(["header", "tensor", "bits"])
    if kind == "header":
        node, key = chance.choice([*places(header)])
        node[key] = chance.choice(VALUES)
    if kind == "tensor":
        name = chance.choice(sorted(tensors))
        change = chance.choice([None, *TENSORS])
        value = tensors.pop(name)
        if change is not None:
            tensors[chance.choice([name, name, "hal.x", "x"])] = change(value).contiguous()
    original = {k: v for k, v in header.items() if k != "tensors"}
    data = bytearray(save(tensors, {"header": json.dumps(original)}))
    if kind == "bits":
        size = int.from_bytes(data[:8], "little")
        data[chance.choice([chance.randrange(8 + size), chance.randrange(len(data))])] ^= 4
    if isinstance(header["tensors"], dict):
        header["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    return json.dumps(header), bytes(data)


@pytest.mark.parametrize("options", [{"allocation": "ema"}, {"hypernet": "bert"}])
def test_random_damage(options, tmp_path, small_hypernets):
    model = patched(init_rank=3, rank_pattern={"up.0": 4}, **options)
    train(model, adam(model), batches(model, 2))
    hal_kernels.save_adapter(model, tmp_path)
    header = json.loads((tmp_path / "adapter.json").read_text())
    file = tmp_path / header["tensors"]["file"]
    tensors = load(file.read_bytes())  # load_file would map the file, which is overwritten
    chance, refused = random.Random(0), 0
    plain, adapted = models.net(), patched(init_rank=3, rank_pattern={"up.0": 4}, **options)
    for i in range(30):
        text, data = damaged(header, tensors, chance)
        (tmp_path / "adapter.json").write_text(text)
        file.write_bytes(data)
        target = (plain, adapted)[i % 2]
        try:
            with unchanged(target):
                hal_kernels.load_adapter(target, tmp_path)
        except (ValueError, TypeError) as error:
            assert len(str(error)) > 20, error
            refused += 1
        except AssertionError:  # it changed: it was loaded, so the damage is one of values
            assert hal_kernels.factors(target)
            plain = models.net() if target is plain else plain
    assert refused > 15
