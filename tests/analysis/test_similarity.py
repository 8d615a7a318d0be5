import numpy as np
import pytest
import torch
from PIL import Image

from nepa_plugin import NepaViT
from nepa_plugin.analysis.figures import plot_similarity
from nepa_plugin.analysis.similarity import similarity_maps


def _model(**kwargs):
    torch.manual_seed(0)
    return NepaViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, init_values=0.5, **kwargs)


def _images(height=16, width=16):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_equals_brute_force():
    model, images, queries = _model().train(), _images(16, 24), [0, 5, 23]
    model.set_input_size((16, 24))
    maps = similarity_maps(model, images, queries)
    assert model.training
    assert maps.shape == (2, 3, 4, 6) and not maps.requires_grad
    model.eval()
    with torch.no_grad():
        embeddings, predictions = model.predict_next(images)
    for b in range(2):
        for i, query in enumerate(queries):
            for row in range(4):
                for column in range(6):
                    patch = embeddings[b, 1 + row * 6 + column]
                    cosine = torch.cosine_similarity(predictions[b, query], patch, dim=0)
                    assert maps[b, i, row, column].item() == pytest.approx(cosine.item(), abs=1e-5)


def test_prediction_does_not_see_its_patch():
    model, images = _model(), _images()
    changed = images.clone()
    changed[:, :, 4:8, 4:8] = 3.0  # patch 5
    before, after = similarity_maps(model, images, [5, 6]), similarity_maps(model, changed, [5, 6])
    other = torch.arange(16) != 5
    torch.testing.assert_close(before[:, 0].flatten(1)[:, other], after[:, 0].flatten(1)[:, other])
    assert not torch.allclose(before[:, 1].flatten(1)[:, other], after[:, 1].flatten(1)[:, other], atol=1e-4)


def test_any_size_model():
    assert similarity_maps(_model(dynamic_img_pad=True), _images(15, 21), [23]).shape == (2, 1, 4, 6)


@pytest.mark.parametrize("queries", [[16], [-1], [0, 99]])
def test_bad_queries(queries):
    with pytest.raises(ValueError, match=r"not in 0\.\.15"):
        similarity_maps(_model(), _images(), queries)


def test_plot_writes_a_picture(tmp_path):
    images = _images()
    maps = torch.stack([torch.ones(4, 4), -torch.ones(4, 4)]).expand(2, -1, -1, -1)
    path = tmp_path / "maps.png"
    plot_similarity(images, maps, [0, 9], path, (0.5,) * 3, (0.5,) * 3)
    assert path.stat().st_size > 10_000
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 500
    lime = (pixels[..., 1] > 230) & (pixels[..., 0] < 60) & (pixels[..., 2] < 60)
    assert lime.any()  # the outlines of the queries
    # the panel of cosine 1 is redder than that of cosine -1
    red = (pixels[..., 0] - pixels[..., 2]).clip(0).sum(0)
    blue = (pixels[..., 2] - pixels[..., 0]).clip(0).sum(0)
    width = pixels.shape[1]
    assert red[: width * 6 // 10].sum() > blue[width * 3 // 10 : width * 5 // 10].sum()
