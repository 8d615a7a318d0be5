PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo
SCENES ?= data/digit_scenes
SEG_RUN ?= runs/demo_segmentation
SEG_CONFIG := mmseg_configs/nepa_tiny_digits_seg.py

COMPARISON ?= runs/comparison
METHODS := nepa simclr mocov3 simsiam byol dino lejepa mae beit ijepa ibot aim igpt cpc

.PHONY: help setup demo compare segment-demo test test-fast lint docs clean
help:
	@echo "make setup      create .venv and install everything (once; several GB, some minutes)"
	@echo "make demo       pretrain NEPA on handwritten digits and look at what it learned (under ten minutes)"
	@echo "make segment-demo   the same, then segmentation of scenes of digits in mmsegmentation (ten minutes)"
	@echo "make compare    fourteen methods on the digits, searched, fine-tuned, three seeds, and a report (two hours)"
	@echo "make test       run all tests          make test-fast   without the slow ones"
	@echo "make docs       build the documentation's site into site/"
	@echo "make lint       ruff and mypy          make clean       remove the environments"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "Python 3.10 to 3.13 is needed: make setup PYTHON=python3.11"; exit 1; }
	@echo "Installing into $(VENV): PyTorch, lightly, timm, mmsegmentation and the rest, several GB. This takes minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check "setuptools<81" wheel
	@# bytecode of what is imported is written then: of everything, it is a quarter of the installation's time
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -e ".[mmseg,dev]"
	@touch $(STAMP)

demo: setup
	@$(BIN)/nepa demo --run_dir $(RUN)

compare: setup
	$(BIN)/python tools/compare.py $(METHODS:%=lightly_configs/%_digits.yaml) --data digits --seeds 0 1 2 --jobs 2 \
		--search 3 --search_length 0.5 --evaluate finetune,readout,knn,linear --recipe vit_digits --finetune.epochs 10 \
		--out $(COMPARISON) --title "Fourteen methods on handwritten digits"

segment-demo: setup
	test -d $(RUN)/backbone || \
		$(BIN)/python tools/pretrain.py --config lightly_configs/nepa_demo.yaml --run_dir $(RUN) --ckpt_path auto
	test -d $(SCENES) || $(BIN)/python tools/make_digit_scenes.py $(SCENES)
	DIGIT_SCENES=$(SCENES) $(BIN)/mim train mmsegmentation $(SEG_CONFIG) --work-dir $(SEG_RUN) --resume \
		--cfg-options model.backbone.init_cfg.checkpoint=$(RUN)/backbone
	DIGIT_SCENES=$(SCENES) $(BIN)/mim test mmsegmentation $(SEG_CONFIG) --checkpoint $(SEG_RUN)/iter_500.pth \
		--work-dir $(SEG_RUN)/test
	$(BIN)/python tools/segment.py $(SEG_CONFIG) $(SEG_RUN)/iter_500.pth $(SCENES)/images/validation/*.png \
		--out $(SEG_RUN)/pictures
	@echo
	@echo "Image, prediction and label:  $(SEG_RUN)/pictures/000_0000.png and the others there"
	@echo "IoU per class:                $(SEG_RUN)/pictures/class_iou.csv"
	@echo "Next, your own segmentation task: docs/segmentation.md"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test-fast: setup
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-onedl .venv-oldest
