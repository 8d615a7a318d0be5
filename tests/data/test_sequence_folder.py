"""Folders of sequences: read, cut, padded, checked, and trained on by NEPA with the loop of images."""

import numpy as np
import pytest
import torch
from PIL import Image
from recorder import trainer
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import nepa_plugin
from nepa_plugin.data import DataError, ImageData
from nepa_plugin.data.sequences import SequenceFolder, SequencePipeline
from nepa_plugin.methods import NEPA

COUNT = 60


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Digits as rows of eight pixels, the last ones left off at random; by class, half of them safetensors."""
    root, digits = tmp_path_factory.mktemp("rows"), load_digits()
    draws = np.random.default_rng(0)
    for i in range(COUNT):
        folder = root / str(digits.target[i])
        folder.mkdir(exist_ok=True)
        array = (digits.images[i][: draws.integers(3, 9)] / 8 - 1).astype(np.float32)
        if i % 2:
            np.save(folder / f"{i:03d}.npy", array)
        else:
            save_file({"rows": torch.from_numpy(array)}, folder / f"{i:03d}.safetensors")
    return root


def nepa(**kwargs):
    torch.manual_seed(0)
    args = {"input_dim": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return NEPA(
        **(
            {"batch_size_per_device": 12, "num_classes": 10, "backbone": "nepa_sequence_tiny", "backbone_args": args}
            | kwargs
        )
    )


def batches(root, epochs=1, **options):
    """What the loader gives in so many epochs."""
    data, method = ImageData(str(root), **({"batch_size_per_device": 12, "seed": 3} | options)), nepa()
    seen = []
    method.on_train_batch_start = lambda batch, index: seen.append(batch)
    trainer(epochs).fit(method, datamodule=data)
    return seen


def test_files_classes_and_values(rows):
    folder, digits = SequenceFolder(rows), load_digits()
    assert len(folder) == COUNT and folder.width == 8 and folder.dataset.classes == [str(i) for i in range(10)]
    assert folder.check().bad == {}
    for index in range(COUNT):
        vectors, label, name = folder[index]
        number = int(name.split("/")[1].split(".")[0])
        assert label == digits.target[number] == int(name[0]) and vectors.dtype == torch.float32
        np.testing.assert_allclose(vectors.numpy(), digits.images[number][: len(vectors)] / 8 - 1, rtol=1e-6)


def test_a_batch_is_padded_to_its_longest_and_says_how_long_each_is(rows):
    seen, folder = batches(rows, epochs=2), SequenceFolder(rows)
    assert len(seen) == 2 * 5
    names = [name for batch in seen[:5] for name in batch[2]]
    assert sorted(names) == sorted(folder.get_filenames()) and names != sorted(names)
    by_name = {name: vectors for vectors, _, name in (folder[i] for i in range(COUNT))}
    for (view,), labels, files, (lengths,) in seen:
        assert view.shape == (12, int(lengths.max()), 8)
        for one, label, file, length in zip(view, labels, files, lengths, strict=True):
            assert torch.equal(one[:length], by_name[file]) and not one[length:].any() and int(file[0]) == label


def test_long_sequences_are_cut_where_seed_epoch_and_place_say(rows):
    first, again, other = (batches(rows, 2, max_tokens=3, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0][0], b[0][0]) for a, b in zip(first, other, strict=True))
    assert all(batch[0][0].shape == (12, 3, 8) and (batch[3][0] == 3).all() for batch in first)
    pipeline, long = SequencePipeline(3), torch.arange(10)[:, None]
    starts = {int(pipeline.view(long, (0, 0, index))[0]) for index in range(200)}
    assert starts == set(range(8))


def test_the_loss_is_that_of_each_sequence_alone(rows):
    method = nepa(num_classes=0).eval()
    (view,), _, _, (lengths,) = batches(rows)[0]
    loss, features = method.step([view], [lengths])
    alone = [method.step([one[None, :length]]) for one, length in zip(view, lengths, strict=True)]
    expected = sum(value * length for (value, _), length in zip(alone, lengths, strict=True)) / lengths.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(features, torch.cat([feature for _, feature in alone]), rtol=0, atol=1e-5)


def test_files_that_cannot_be_used_are_named_or_left_out(rows, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8)))
    np.save(tmp_path / "flat.npy", np.zeros(8))
    np.save(tmp_path / "narrow.npy", np.zeros((4, 7)))
    np.save(tmp_path / "none.npy", np.zeros((0, 8)))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:90])
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    save_file({"a": torch.zeros(2, 8), "b": torch.zeros(2, 8)}, tmp_path / "two.safetensors")
    bad = SequenceFolder(tmp_path).check().bad
    assert set(bad) == {
        "flat.npy",
        "narrow.npy",
        "none.npy",
        "objects.npy",
        "cut.npy",
        "bad.safetensors",
        "two.safetensors",
    }
    assert bad["narrow.npy"] == "7 numbers in a vector, others have 8" and bad["none.npy"] == "no vector"
    assert bad["flat.npy"] == "holds no vectors (T, D), but an array (8,)"
    assert bad["two.safetensors"] == "holds 2 tensors (a, b), where one is looked for"
    with pytest.raises(DataError, match=r"7 file\(s\) cannot be read as sequences: .*Remove or repair them"):
        ImageData(str(tmp_path)).check_images()
    assert ImageData(str(tmp_path), on_bad_image="skip").check_images() == 7


def test_what_does_not_go_together_is_one_clear_error(rows, tmp_path):
    with pytest.raises(DataError, match=r"data.val_dir: .* holds sequences, which have none"):
        ImageData(str(rows), str(rows))
    with pytest.raises(DataError, match=r"data.pipeline: .* holds sequences"):
        ImageData(str(rows), pipeline="tensor")
    with pytest.raises(DataError, match=r"holds no image"):
        ImageData(str(tmp_path))
    images = nepa(backbone="nepa_vit_tiny_patch14_224", backbone_args={"depth": 1})
    with pytest.raises(DataError, match=r"holds sequences, but the backbone takes images: .*input_dim 8"):
        ImageData(str(rows)).check_method(images)
    wide = nepa(backbone_args={"input_dim": 9, "depth": 1})
    with pytest.raises(DataError, match=r"has 8 numbers in a vector, but the backbone takes 9: .*input_dim 8"):
        ImageData(str(rows)).check_method(wide)
    with pytest.raises(DataError, match="holds images, but the backbone takes sequences"):
        ImageData(demo="digits").check_method(nepa())
    with pytest.raises(ValueError, match="CPC trains on images alone"):
        nepa_plugin.methods.CPC(backbone="nepa_sequence_tiny", backbone_args={"input_dim": 8, "depth": 1})
    with pytest.raises(ValueError, match="predictor_head='simsiam' has a BatchNorm, which would count padding"):
        nepa(predictor_head="simsiam")
    with pytest.raises(DataError, match=r"data.min_side goes with images"):
        ImageData(str(rows), max_tokens=6, min_side=8)


def test_a_folder_with_an_image_is_one_of_images(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8)))
    assert ImageData(str(tmp_path)).sequences is not None
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert ImageData(str(tmp_path)).sequences is None


def test_without_a_class_token_each_sequence_still_counts_alone(rows):
    args = {"input_dim": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
    method = nepa(num_classes=0, backbone_args=args).eval()
    view, lengths = torch.randn(3, 7, 8), torch.tensor([7, 3, 5])
    loss, features = method.step([view], [lengths])
    alone = [method.step([one[None, :length]]) for one, length in zip(view, lengths, strict=True)]
    expected = sum(value * (length - 1) for (value, _), length in zip(alone, lengths, strict=True)) / 12
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(features, torch.cat([feature for _, feature in alone]), rtol=0, atol=1e-5)
