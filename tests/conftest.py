"""What holds for every test: seeds, memory filled with NaN, one thread, no network."""

import os

# Before anything imports a Hugging Face library or creates a CUDA context.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it

import gc
import random
import sys
import zlib

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run under Triton's interpreter, which it asks about when it is imported.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton is imported already: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # tests run in parallel processes; their tensors are small

# Examples are random on a developer's machine, the same ones at every run of CI.
hypothesis.settings.register_profile("dev", deadline=None, max_examples=15, database=None)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=15, database=None, derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: no search for garbage has to go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Random numbers depend on the test's own name only, not on what ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def small_hypernets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypernetworks of the same structure and fewer parameters than the paper's."""
    import lifecycle

    lifecycle.small_hypernets(monkeypatch)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A trained "direct" model and the folder it was saved in. Not to be changed."""
    from lifecycle import patched
    from training import adam, batches, train

    import hal_kernels

    model = patched(init_rank=3, interval=2, allocation="ema")
    train(model, adam(model), batches(model, 5))
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    hal_kernels.save_adapter(model, folder)
    return model, folder


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """Fill `torch.empty` and its kin with NaN: what an operator forgets to write then shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    like = torch.zeros(2, 3)
    for fresh in (torch.empty(4), like.new_empty(4), torch.empty_like(like)):
        assert fresh.isnan().all(), "uninitialised memory is not poisoned"
    yield
    torch.use_deterministic_algorithms(False)
