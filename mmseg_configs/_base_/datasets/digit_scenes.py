# Scenes of handwritten digits, 11 classes, 64x32, written by tools/make_digit_scenes.py to $DIGIT_SCENES or the folder
# below. No flips: a mirrored digit is another shape.
_base_ = "./ade20k.py"  # its loaders and metric
dataset_type = "DigitScenes"
data_root = "{{$DIGIT_SCENES:data/digit_scenes}}"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
test_pipeline = train_pipeline
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=r, keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
in_process = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(type=dataset_type, data_root=data_root, pipeline=train_pipeline), **in_process)
val_dataloader = dict(
    batch_size=25, dataset=dict(type=dataset_type, data_root=data_root, pipeline=test_pipeline), **in_process
)
test_dataloader = val_dataloader
