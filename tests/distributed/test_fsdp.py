"""FSDP: the frozen base sharded, what trains held whole by every process; else it is refused."""

import models
import pytest
import torch
import training
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import adapter_state, assert_close, trainable

import hal_kernels
from hal_kernels.nn import hypernet

from .processes import run, share

STEPS, ROWS, BEFORE = 6, 4, 3  # saved and loaded after BEFORE steps
KINDS = ("bert", "direct", "spectral")
OPTIONS = {"init_rank": 4, "interval": 1, "seed": 0, "dtype": torch.float64}


def base():
    return models.llama(dtype=torch.float64)


def patched(kind):
    model = base()
    options = {"update": kind} if kind == "spectral" else {"hypernet": kind}
    return hal_kernels.patch_model(model, 2, **options, **OPTIONS)


def optimizer_of(model):
    return torch.optim.SGD(trainable(model), lr=0.1)


def shard(model, world):
    whole = hal_kernels.replicate(model)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return model


def shard_flat(model, **options):
    """FSDP1."""
    options |= {"use_orig_params": True, "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(model, **options)


def train(model, optimizer, first, last, rank, world, wrapped=None):
    data = (models.batch(model, ROWS, seed=index) for index in range(first, last))
    mine = (share(inputs, rank, world) for inputs in data)
    return training.train(wrapped or model, optimizer, mine)


def in_processes(rank, world, folder):
    hypernet.HIDDEN, hypernet.INNER = 24, 32
    found = {}
    for kind in KINDS:
        model = shard(patched(kind), world)
        sharded = {n for n, p in model.named_parameters() if isinstance(p, DTensor)}
        found[kind, "sharded"] = sharded
        assert isinstance(model.model.layers[0], FSDPModule)
        optimizer = optimizer_of(model)
        losses = train(model, optimizer, 0, BEFORE, rank, world)
        if rank == 0:
            hal_kernels.save_adapter(model, f"{folder}/{kind}")
        torch.distributed.barrier()
        losses += train(model, optimizer, BEFORE, STEPS, rank, world)
        found[kind] = losses, adapter_state(model)
        again = shard(hal_kernels.load_adapter(base(), f"{folder}/{kind}"), world)
        rest = train(again, optimizer_of(again), BEFORE, STEPS, rank, world)
        found[kind, "loaded"] = rest, adapter_state(again)
        flat = patched(kind)
        wrapped = shard_flat(flat, ignored_states=list(hal_kernels.replicate(flat)))
        found[kind, "FSDP1"] = (
            train(flat, optimizer_of(flat), 0, STEPS, rank, world, wrapped),
            adapter_state(flat),
        )
        found[kind, "refused"] = refused(kind, world)
    return found


def refused(kind, world):
    """What the first forward pass raises, by how the model is wrapped."""
    mesh = init_device_mesh("cpu", (world,))
    wraps = {
        "FSDP1, adapter left out": lambda m: shard_flat(m, ignored_modules=[m.hal]),
        "FSDP1": shard_flat,
        "FSDP2": lambda m: fully_shard(m, mesh=mesh),
        "FSDP2, blocks alone": lambda m: [fully_shard(b, mesh=mesh) for b in m.model.layers],
        "FSDP2 that shards what is replicated": lambda m: (
            hal_kernels.replicate(m) and fully_shard(m, mesh=mesh)
        ),
        "Join": DistributedDataParallel,
    }
    messages = {}
    for how, wrap in wraps.items():
        model = patched(kind)
        made = wrap(model)
        wrapped = made if isinstance(made, torch.nn.Module) else model
        try:
            if how == "Join":
                with Join([wrapped]):
                    wrapped(**models.batch(model, 2))
            else:
                wrapped(**models.batch(model, 2))
        except RuntimeError as error:
            messages[how] = str(error)
    return messages


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(in_processes, 2, str(tmp_path_factory.mktemp("adapters")))


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_sharded_and_the_rest_is_whole(kind, ranks):
    names = {n for n, _ in patched(kind).named_parameters()}
    assert ranks[0][kind, "sharded"] == {n for n in names if not n.startswith("hal.")}


@pytest.mark.parametrize("how", ["FSDP2", "FSDP1"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_state_equal_one_process(kind, how, ranks, small_hypernets):
    model = patched(kind)
    losses = train(model, optimizer_of(model), 0, STEPS, 0, 1)
    results = [rank[kind if how == "FSDP2" else (kind, how)] for rank in ranks]
    means = torch.tensor([found for found, _ in results]).double().mean(0)
    # transformers takes this loss of logits in float32: rounding of sums in another order
    torch.testing.assert_close(means.tolist(), losses, rtol=1e-6, atol=0)
    for _, found in results:
        assert_close(found, adapter_state(model), 1e-5)
        assert torch.equal(found["mask"], model.hal.mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_goes_on_equally(kind, ranks):
    for rank in ranks:
        losses, expected = rank[kind]
        rest, found = rank[kind, "loaded"]
        assert rest == losses[BEFORE:]
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_part_or_hang_is_refused(kind, ranks):
    """In the first forward pass, by what to do instead: nothing was sent or trained before."""
    for rank in ranks:
        messages = dict(rank[kind, "refused"])
        assert "the same number of batches" in messages.pop("Join")
        assert len(messages) == 5
        for message in messages.values():
            assert "DistributedDataParallel, or call hal_kernels.replicate(model)" in message


def test_replicate_needs_processes():
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        hal_kernels.replicate(patched("direct"))
    with pytest.raises(ValueError, match="not patched"):
        hal_kernels.replicate(base())
