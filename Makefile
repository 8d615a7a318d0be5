PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo

.PHONY: help setup demo test test-fast lint clean
help:
	@echo "make setup      create .venv and install everything (once; several GB, some minutes)"
	@echo "make demo       pretrain NEPA on handwritten digits and look at what it learned (under ten minutes)"
	@echo "make test       run all tests          make test-fast   without the slow ones"
	@echo "make lint       ruff and mypy          make clean       remove .venv"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "Python 3.10 to 3.13 is needed: make setup PYTHON=python3.11"; exit 1; }
	@echo "Installing into $(VENV): PyTorch, lightly, timm, mmsegmentation and the rest, several GB. This takes minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check "setuptools<81" wheel
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[mmseg,dev]"
	@touch $(STAMP)

demo: setup
	$(BIN)/python tools/pretrain.py --config lightly_configs/nepa_digits.yaml --run_dir $(RUN) --ckpt_path auto
	$(BIN)/python tools/evaluate.py $(RUN)/backbone --data digits --protocol readout --out $(RUN)
	$(BIN)/python tools/visualize.py $(RUN)/backbone --data digits --out $(RUN)/similarity.png
	@echo
	@echo "The loss:      $(RUN)/loss.png"
	@echo "What it sees:  $(RUN)/similarity.png"
	@echo "The backbone:  $(RUN)/backbone    timm.create_model('local-dir:$(RUN)/backbone', pretrained=True)"
	@echo "All curves:    $(BIN)/tensorboard --logdir $(RUN)"
	@echo "Next, your own images:"
	@echo "  $(BIN)/python tools/pretrain.py --config lightly_configs/nepa_vit_b.yaml --data.train_dir YOUR_IMAGES"

test: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
