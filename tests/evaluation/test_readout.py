import io

import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from nepa_plugin import NepaViT
from nepa_plugin.evaluation import (
    ReadoutRow,
    concat_depths,
    extract_depth_features,
    knn_accuracy,
    logistic_probe,
    readout,
    readout_figure,
    readout_table,
)
from nepa_plugin.evaluation.readout import best_row, chosen_held_out, hold_out


def _loaders():
    images, labels = load_digits(n_class=4, return_X_y=True)
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1
    images = torch.nn.functional.interpolate(images, size=(16, 16)).expand(-1, 3, -1, -1)
    samples = [(images[i], int(labels[i]), str(i)) for i in range(200)]
    return DataLoader(samples[:140], batch_size=64), DataLoader(samples[140:], batch_size=64)


def _model():
    torch.manual_seed(0)
    return NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)


def test_rows_equal_separate_probes():
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train, val = (extract_depth_features(model, loader, "cpu") for loader in _loaders())
    train, val = concat_depths(train, 2), concat_depths(val, 2)
    rows = readout(train, val, k=5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

    depths = ["embedding", "block 1", "block 2", "final norm"]
    assert [(row.depth, row.pool) for row in rows] == [(d, p) for d in depths for p in ("last", "mean", "concat")]
    for row in rows:
        fit, score = train.features[row.depth][row.pool], val.features[row.depth][row.pool]
        assert row.knn == knn_accuracy(fit, train.labels, score, val.labels, k=5)
        assert row.linear == logistic_probe(fit, train.labels, score, val.labels)
        held = hold_out(train.labels)
        assert row.held_out == logistic_probe(fit[~held], train.labels[~held], fit[held], train.labels[held])
    assert chosen_held_out(rows) and best_row(rows).held_out == max(row.held_out for row in rows)


def test_every_fifth_image_of_each_class_is_held_out():
    labels = torch.tensor([0, 1] * 7 + [0])
    held = hold_out(labels)
    assert held.nonzero().flatten().tolist() == [8, 9]  # the fifth zero and the fifth one
    assert hold_out(torch.tensor([0] * 20 + [1] * 4)) is None


def test_the_best_row_is_not_chosen_on_the_scored_images():
    rows = [ReadoutRow("block 1", "mean", 0.0, 90.0, 70.0), ReadoutRow("block 2", "mean", 0.0, 80.0, 75.0)]
    assert best_row(rows) == rows[1]
    rows[1] = ReadoutRow("block 2", "mean", 0.0, 80.0)  # by an older version, or too few images
    assert not chosen_held_out(rows) and best_row(rows) == rows[0]


def _render(table, **kwargs):
    stream = io.StringIO()
    Console(file=stream, width=200, **kwargs).print(table)
    return stream.getvalue()


def test_table_values_and_bold():
    rows = {
        "untrained": [ReadoutRow("embedding", "last", 10.0, 20.0), ReadoutRow("final norm", "last", 30.0, 40.0)],
        "pretrained": [
            ReadoutRow("embedding", "last", 15.0, 25.0),
            ReadoutRow("block 1", "last", 50.0, 87.25),
            ReadoutRow("final norm", "last", 35.0, 45.0),
        ],
    }
    table = readout_table(rows)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert len(cells) == 1 + 2 * 1 * 2  # depth; models x poolings x probes
    assert sorted(cells[0]) == ["block 1", "embedding", "final norm"]
    by_depth = {depth: [column[i] for column in cells[1:]] for i, depth in enumerate(cells[0])}
    assert by_depth["embedding"] == ["10.0", "20.0", "15.0", "25.0"]
    assert by_depth["block 1"] == ["", "", "[bold]50.0[/bold]", "[bold]87.2[/bold]"]
    assert by_depth["final norm"] == ["[bold]30.0[/bold]", "[bold]40.0[/bold]", "35.0", "45.0"]
    text = _render(table)
    assert "untrained" in text and "pretrained" in text and "87.2" in text and "bold" not in text


def test_figure_has_a_line_per_model_and_pool(tmp_path):
    rows = [ReadoutRow(depth, pool, 10.0, 20.0) for depth in ("embedding", "block 1") for pool in ("last", "mean")]
    readout_figure({"pretrained": rows}, tmp_path / "one.png")
    readout_figure(
        {"pretrained": rows, "untrained": [ReadoutRow("embedding", "last", 5.0, 90.0)]}, tmp_path / "two.png"
    )
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.size == two.size and min(one.size) > 300
        assert one.tobytes() != two.tobytes()
