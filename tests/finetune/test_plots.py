"""What plots are made of."""

import pytest

pytest.importorskip("matplotlib")

from hal_finetune.plots import place, plot_losses, plot_ranks


@pytest.mark.parametrize(
    "layer, block, kind",
    [
        ("m.layer.10.a.out.dense", "m.layer.10", "a.out.dense"),
        ("encoder.block.0.layer.1.q", "encoder.block.0", "layer.1.q"),
        ("0.up", "0", "up"),
        ("m.pooler.dense", "", "m.pooler.dense"),
        ("layers.3", "", "layers.3"),
    ],
)
def test_layers_by_block_and_kind(layer, block, kind):
    assert place(layer) == (block, kind)


def test_every_layer_has_a_cell(tmp_path, monkeypatch):
    """Also where an encoder and a decoder have blocks of the same number."""
    from matplotlib.axes import Axes

    said, write = {}, Axes.text
    monkeypatch.setattr(
        Axes,
        "text",
        lambda self, x, y, s, **o: said.update({(x, y): s}) or write(self, x, y, s, **o),
    )
    names = [f"{side}.{i}.{kind}" for side in "ed" for i in (0, 1) for kind in ("q", "a.v")]
    before = dict.fromkeys([*names, "pooler"], 5)
    after = {name: rank for rank, name in enumerate(before)}
    plot_ranks("a run", before, after, tmp_path / "ranks.png")
    assert sorted(said.values()) == sorted(f"5→{rank}" for rank in after.values())
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_lie_beside_the_training_loss(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, plot = {}, Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *a, **o: lines.update({o["label"]: ([*x], [*y])})
        or plot(self, x, y, *a, **o),
    )  # fmt: skip
    options = {"every": 2, "mean_of": 2}
    path = tmp_path / "loss.png"
    plot_losses({"run": [3.0, 2.0]}, path, **options, evaluated=[(3, 2.5), (4, 1.5)])
    assert lines == {"run": ([2, 4], [3.0, 2.0]), "evaluation": ([3, 4], [2.5, 1.5])}
    assert path.read_bytes().startswith(b"\x89PNG")
