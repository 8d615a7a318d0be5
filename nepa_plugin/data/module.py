"""The data module: image folders, shards and the embedded digits for Lightning's loop.

Every random choice about a sample (its place in the epoch, its crop, its flip) is a function of (seed, epoch, index).
A resumed run therefore sees exactly what an uninterrupted one sees, whatever the number of workers.
"""

from collections.abc import Callable
from typing import Any, Literal

from lightly.data import LightlyDataset
from PIL import Image
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from nepa_plugin.data.digits import digits_folder
from nepa_plugin.data.files import MAX_PIXELS, class_names, fingerprint
from nepa_plugin.data.native import GridBatchSampler, NativePipeline, NativeSizes, check_native, native_sizes
from nepa_plugin.data.pipelines import (
    FileDataset,
    MaskedPipeline,
    PilPipeline,
    PipelineDataset,
    PipelineName,
    build_pipeline,
)
from nepa_plugin.data.samples import (
    DataError,
    EpochBatchSampler,
    EqualShares,
    ResumableLoader,
    SeededDataset,
    loader_workers,
)
from nepa_plugin.data.sequences import SequenceFolder, SequencePipeline, check_width, is_sequence_folder
from nepa_plugin.data.shards import ShardDataset, ShardLoader, open_shards
from nepa_plugin.data.tables import VAL, open_images, table_splits
from nepa_plugin.runtime.ranges import NonNegativeInt, PositiveFraction, PositiveInt, check_ranges
from nepa_plugin.runtime.step_seed import trained_batches


class ImageData(LightningDataModule):
    """Folders of images for any of the methods, read by lightly.

    Args:
        train_dir: Folder of training images: one sub-folder per class (ImageNet style), or flat (no labels); or a table
            of Hugging Face's ``datasets``, of which the split ``train`` is taken: a folder of ``save_to_disk``, or of
            parquet or arrow files; or a folder of sequences of vectors (T, D), ``.npy`` or ``.safetensors``, for a
            backbone ``nepa_sequence_*``.
        val_dir: Folder of validation images for the online probe, with the same classes; or a table, of which
            ``validation``, ``val`` or ``test`` is taken. Optional.
        demo: ``"digits"`` uses scikit-learn's bundled handwritten digits instead of folders.
        batch_size_per_device: Images per device and forward pass.
        num_workers: Loader processes per device; by default the cores divided by the devices on this machine, at most
            16, and none where there are two cores or fewer.
        crop_pct: Centre crop over resized side of the validation images.
        train_shards: Training images packed into tar files, instead of ``train_dir``: a folder of them, or a pattern of
            paths or URLs, such as ``images-{000000..000146}.tar``.
        allow_pipe: Let ``train_shards`` be a ``pipe:`` command, which is run in a shell.
        shuffle_buffer: Images of shards to shuffle among in each loader process; they are kept as files.
        on_bad_image: ``"error"`` stops before training if a file is no readable image; ``"skip"`` leaves such files
            out and counts them.
        pipeline: How training images become views: ``"pil"``; ``"tensor"``, faster, on uint8 tensors in the loader; or
            ``"device"``, where the loader only reads files and all else is batched on the device. The last two are for
            methods whose augmentation is one random crop and flip.
        seed: Seed of the order and the augmentation; the command sets it to ``seed_everything``.
        max_image_pixels: The most pixels that an image may have; one with more is a bad image. By default Pillow's own
            bound against small files that fill the memory.
        max_tokens: The most vectors of a sequence; of a longer one so many in a row, at another place in each epoch.
            With images, each is trained on at its own aspect ratio and size, reduced to at most so many patches; by
            default all are as large as the model's ``img_size`` says.
        min_side: The shorter side of the smallest image in pixels, with ``max_tokens``; smaller ones are enlarged.
    """

    def __init__(
        self,
        train_dir: str | None = None,
        val_dir: str | None = None,
        demo: Literal["digits"] | None = None,
        batch_size_per_device: PositiveInt = 256,
        num_workers: NonNegativeInt | None = None,
        crop_pct: PositiveFraction = 0.875,
        on_bad_image: Literal["error", "skip"] = "error",
        pipeline: PipelineName = "pil",
        train_shards: str | None = None,
        shuffle_buffer: PositiveInt = 1000,
        seed: int = 1337,
        allow_pipe: bool = False,
        max_image_pixels: PositiveInt = MAX_PIXELS,
        max_tokens: PositiveInt | None = None,
        min_side: PositiveInt | None = None,
    ) -> None:
        try:
            check_ranges(ImageData, dict(locals()), "data.")
        except ValueError as error:
            raise DataError(str(error)) from None
        super().__init__()
        if train_dir is None and train_shards is None and demo is None:
            raise DataError("data.train_dir is not set: give a folder of images, or --data.demo digits.")
        if train_dir is not None and train_shards is not None:
            raise DataError("data.train_dir and data.train_shards are both set: give one of them.")
        if train_dir is None and train_shards is None:
            folder = digits_folder()
            train_dir, val_dir = str(folder / "train"), str(folder / "val")
        self.batch_size_per_device = batch_size_per_device
        self.num_workers = num_workers
        self.crop_pct = crop_pct
        self.on_bad_image = on_bad_image
        self.pipeline = pipeline
        self.shuffle_buffer = shuffle_buffer
        self.max_image_pixels = max_image_pixels
        self.seed = seed
        self.train_shards = open_shards(train_shards, allow_pipe) if train_shards else None
        self.max_tokens, self.min_side = max_tokens, min_side
        self.train_images: LightlyDataset | None = None
        if train_dir:
            if is_sequence_folder(train_dir) and not table_splits(train_dir):
                self.train_images = SequenceFolder(train_dir)
            else:
                self.train_images = open_images(train_dir, "data.train_dir", max_image_pixels)
            if self.sequences and (val_dir or pipeline != "pil"):
                option = "val_dir" if val_dir else "pipeline"
                raise DataError(f"data.{option}: {train_dir} holds sequences, which have none; leave it out.")
        if min_side is not None and (max_tokens is None or self.sequences is not None):
            raise DataError("data.min_side goes with images and data.max_tokens; leave it out.")
        if max_tokens is not None and (train_shards or pipeline != "pil"):
            option = "data.train_shards" if train_shards else f"data.pipeline {pipeline}"
            raise DataError(f"data.max_tokens does not go with {option}; leave one of them out.")
        self.val_images = open_images(val_dir, "data.val_dir", max_image_pixels, VAL) if val_dir else None
        self._indices: dict[int, list[int]] = {}
        #: What the sizes of the images are multiples of, once a method is known; and these sizes, once they are asked.
        self._patch_size: tuple[int, int] | None = None
        self._sizes: NativeSizes | None = None
        self._together = 0  # images of a batch over all devices, which they follow from
        classes = self.train_shards.classes if self.train_shards else class_names(self.train_images)
        val_classes = class_names(self.val_images)
        if val_classes and classes != val_classes:
            odd = sorted(set(classes) ^ set(val_classes))[:6]
            raise DataError(
                f"data.val_dir has other classes than data.{'train_shards' if train_shards else 'train_dir'}: "
                f"{', '.join(odd)} only in one of them."
            )
        #: Names of the classes; none where the folder has no labels.
        self.classes: list[str] = list(classes)
        #: Number of classes; 0 where the folder has no labels.
        self.num_classes = len(classes) if len(classes) > 1 else 0

    def check_images(self) -> int:
        """Find unreadable files before anything long starts.

        Returns:
            How many are skipped.

        Raises:
            DataError: If there are any and ``on_bad_image`` is ``"error"``, or if no image is left.
        """
        skipped = 0
        for images in (self.train_images, self.val_images):
            if images is None:
                continue
            files = images.get_filenames()
            check = images.check()
            bad = check.bad
            if bad and self.on_bad_image == "error":
                kind = "images" if self.sequences is None else "sequences"
                raise check.refusal(images.input_dir, "Remove or repair them, or pass --data.on_bad_image skip.", kind)
            self._indices[id(images)] = [i for i, file in enumerate(files) if file not in bad]
            if not self._indices[id(images)]:
                raise DataError(f"{images.input_dir} holds no readable image.")
            skipped += len(bad)
        return skipped

    def check_batch(self, world_size: int, accumulate: int = 1) -> None:
        """Check that there are enough images for one step, and enough shards for every process that reads them.

        Args:
            world_size: Number of devices.
            accumulate: Batches of each that make one optimizer step.

        Raises:
            DataError: If there are not.
        """
        used = len(self.train_shards or self._indices[id(self.train_images)])
        if used < self.batch_size_per_device * world_size * accumulate:
            times = f", {accumulate} times" if accumulate > 1 else ""
            raise DataError(
                f"{used} images are fewer than one batch of {self.batch_size_per_device} on {world_size} device(s)"
                f"{times}; lower --data.batch_size_per_device (and --global_batch_size)."
            )
        if self._patch_size is not None:
            self._check_sizes(world_size, accumulate)
        shards, readers = self.train_shards, world_size * max(1, self.num_workers or 0)
        if shards is not None and len(shards.urls) < readers:
            raise DataError(
                f"{len(shards.urls)} shard(s) are fewer than the {readers} processes that read them. Make smaller ones "
                "(tools/make_shards.py --images_per_shard), or lower --data.num_workers."
            )

    def _check_sizes(self, world_size: int, accumulate: int) -> None:
        """Learn the sizes of the images, and check that there is a step of them."""
        assert self._patch_size is not None
        assert self.max_tokens is not None
        indices, together = self._indices[id(self.train_images)], self.batch_size_per_device * world_size
        sizes = self._sizes
        if sizes is None or self._together != together:
            sizes = native_sizes(self.train_images, indices, self._patch_size, self.max_tokens, self.min_side, together)
        batches = GridBatchSampler(sizes.grids, together, self.seed, accumulate=accumulate)
        if not len(batches):
            raise DataError(
                f"There are not {accumulate} batches of {together} images of one size; lower "
                "--data.batch_size_per_device (and --global_batch_size)."
            )
        if self._sizes is None:
            rank_zero_info(f"Images of {sizes}: {len(batches)} batches of {together} in an epoch.")
        self._sizes, self._together = sizes, together

    @property
    def sizes(self) -> dict[tuple[int, int], int] | None:
        """How many images are trained on at each (height, width) in pixels, where they keep their own."""
        return None if self._sizes is None else self._sizes.counts

    @property
    def native(self) -> bool:
        """Whether images are trained on at their own sizes."""
        return self.max_tokens is not None and self.sequences is None

    def check_method(self, method: Any) -> None:
        """Check that the method's augmentation can go through the pipeline.

        Args:
            method: A :class:`~nepa_plugin.methods.Method`.

        Raises:
            DataError: If it cannot.
        """
        backbone = getattr(method, "backbone", None)  # fine-tuning has a network instead, of images
        check_width(self.sequences, getattr(backbone, "input_dim", None))
        if self.native:
            check_native(method)
            self._patch_size = method.backbone.patch_embed.patch_size
        if self.sequences is None:
            build_pipeline(self.pipeline, method.train_transform(), type(method).__name__)

    @property
    def sequences(self) -> SequenceFolder | None:
        """The training data where they are sequences."""
        return self.train_images if isinstance(self.train_images, SequenceFolder) else None

    def setup(self, stage: str) -> None:
        """Learn which images are used; the record of rank zero's check makes this quick on the others."""
        if not self._indices:
            self.check_images()
        trainer = self.trainer
        if self.native and trainer:
            self.check_method(trainer.lightning_module)
        self.check_batch(*((trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)))

    def _workers(self) -> int:
        workers = loader_workers(self.num_workers, self.trainer.num_devices if self.trainer else 1)
        if self.train_shards is None or self.num_workers is not None:
            return workers
        return min(workers, len(self.train_shards.urls) // (self.trainer.world_size if self.trainer else 1))

    @property
    def _pin_memory(self) -> bool:
        """Whether batches go to a CUDA device."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _dataset(self, images: LightlyDataset, transform: Callable[[Image.Image], Any]) -> SeededDataset:
        return SeededDataset(images, transform, self.seed, self._indices[id(images)], self.on_bad_image)

    def _position(self, length: int) -> tuple[int, int]:
        """Return (epoch, batch) to go on at. Lightning's count of finished batches survives every kind of restart."""
        assert self.trainer is not None
        limit = self.trainer.limit_train_batches
        length = min(length, limit) if isinstance(limit, int) else int(length * limit)
        return divmod(trained_batches(self.trainer), max(1, length))

    def train_dataloader(self) -> ResumableLoader | ShardLoader:
        """Return batches of (views, labels, filenames), and of masks where the method has any.

        The last part of the pipeline is still to be done with the views.
        """
        assert self.trainer is not None
        workers, rank = self._workers(), self.trainer.global_rank
        method: Any = self.trainer.lightning_module
        if self.sequences is not None:
            self._pipeline: PilPipeline = SequencePipeline(self.max_tokens)
        elif self._sizes is not None:
            self._pipeline = NativePipeline(method.train_transform, self._sizes)
        else:
            self._pipeline = build_pipeline(self.pipeline, method.train_transform(), type(method).__name__)
        masks = getattr(method, "masks", None)
        if masks is not None:
            self._pipeline = MaskedPipeline(self._pipeline, masks)
        if self.train_shards is not None:
            shards = ShardDataset(
                self.train_shards,
                self._pipeline,
                self.batch_size_per_device,
                self.seed,
                rank,
                self.trainer.world_size,
                self.shuffle_buffer,
                self.on_bad_image,
                self.max_image_pixels,
                self.trainer.accumulate_grad_batches,
            )
            return ShardLoader(shards, self._position, workers, self._pin_memory)
        images = self.train_images
        assert images is not None
        cls = PipelineDataset if self.pipeline == "pil" else FileDataset
        dataset = cls(images, self._pipeline, self.seed, self._indices[id(images)], self.on_bad_image)
        batches = (
            self.batch_size_per_device,
            self.seed,
            rank,
            self.trainer.world_size,
            self._position,
            self.trainer.accumulate_grad_batches,
        )
        sampler = (
            EpochBatchSampler(len(dataset), *batches)
            if self._sizes is None
            else GridBatchSampler(self._sizes.grids, *batches)
        )
        return ResumableLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self._pipeline.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._pin_memory,
        )

    def training_data(self) -> dict[str, Any]:
        """Return what a run's summary says about the training images: where, how many, and which."""
        if self.train_shards is not None:
            shards = self.train_shards
            return {"train_dir": shards.source, "train_images": len(shards), "train_fingerprint": shards.fingerprint}
        images = self.train_images
        assert images is not None
        sizes = {f"{width}x{height}": count for (height, width), count in (self.sizes or {}).items()}
        return {
            "train_dir": str(images.input_dir),
            "train_images": len(images),
            "train_fingerprint": fingerprint(images),
            **({"train_sizes": sizes} if sizes else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of images in shards depends on, besides the seed."""
        if self.train_shards is None or self.trainer is None:
            return {}
        return {
            "world_size": self.trainer.world_size,
            "data.num_workers": self._workers(),
            "data.batch_size_per_device": self.batch_size_per_device,
            "data.shuffle_buffer": self.shuffle_buffer,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the order of images in shards cannot go on as it was."""
        changed = [
            f"{name} {now} instead of {state_dict[name]}"
            for name, now in self.state_dict().items()
            if state_dict.get(name, now) != now
        ]
        if changed:
            rank_zero_warn(
                f"Resumed with {', '.join(changed)}: the rest of this epoch is in another order, in which some images "
                "come twice and others not at all."
            )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Do the device's part of the pipeline; the method gets the same as from PIL."""
        if self.pipeline == "pil" or self.trainer is None or not self.trainer.training:
            return batch
        views, labels, filenames, *masks = batch
        batch = [self._pipeline.finish(views, labels.device, filenames), labels, filenames, *masks]
        return self.trainer.precision_plugin.convert_input(batch)

    def eval_transform(self) -> Callable[[Image.Image], Any]:
        """Return the transform of the validation images, the method's."""
        assert self.trainer is not None
        transform: Callable[[Image.Image], Any] = self.trainer.lightning_module.eval_transform(self.crop_pct)
        return transform

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of (images, labels, filenames), as many for every process.

        Every image comes once over all processes, but for images of class ``PADDING``, which fill up the last batches.
        """
        if self.val_images is None or self.num_classes == 0:
            return []
        assert self.trainer is not None
        dataset = self._dataset(self.val_images, self.eval_transform())
        workers = self._workers()
        return DataLoader(
            EqualShares(dataset, self.trainer.global_rank, self.trainer.world_size),
            batch_size=self.batch_size_per_device,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._pin_memory,
        )
