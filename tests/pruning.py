"""A net whose directions are pruned in known steps, shared by the tests of training."""

import models
from torch import nn

import hal_kernels

HYPERNETS = [None, "bert"]  # the default, and one that generates factors
# Four layers of rank 4 -> 2: eight directions to prune, two at a time, at steps 2, 4, 6 and 8.
PRUNING = {"init_rank": 4, "interval": 2, "prune_per_interval": 2, "seed": 0}
LAST_ALLOCATION = 8
BUDGET = 2 * 4
CUBIC = {
    "init_rank": 4, "interval": 1, "schedule": "cubic", "tinit": 2, "tfinal": 3, "total_step": 12,
    "allocation": "ema", "seed": 0,
}  # fmt: skip


def patched_net(hypernet, **options):
    return hal_kernels.patch_model(models.net(), 2, hypernet=hypernet, **(PRUNING | options))


def cross_entropy(output, labels):
    return nn.functional.cross_entropy(models.logits_of(output), labels)
