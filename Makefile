# make demo and make test are all that a fresh machine needs: both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo demo-detection bench bench-check test test-all test-browser test-gpu lint format docs clean

setup: $(VENV)/.installed

# Installed anew whenever the dependencies change. Python's own pip may be an old one, which takes twice as long to choose
# versions; pip compiles on one core, and a few files of others are for newer Pythons.
$(VENV)/.installed: pyproject.toml
	@echo "setting up $(VENV) (about two minutes, most of it PyTorch)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --no-compile -e ".[test,lint]"
	@$(BIN)/python -m compileall -q -j 0 -x /tests/ $(VENV)/lib > $(VENV)/compiled.log || true
	@touch $@

demo: setup
	$(BIN)/python datasets/motion/generate.py --root $(DEMO)/motion
	$(BIN)/mvit-train experiment=motion data.root=$(DEMO)/motion hydra.run.dir=$(DEMO)/train
	$(BIN)/mvit-eval data=motion data.root=$(DEMO)/motion weights=$(DEMO)/train/checkpoints/best.ckpt views=5x1 \
		hydra.run.dir=$(DEMO)/eval
	$(BIN)/mvit-predict $(DEMO)/motion/val/rotating_clockwise/0000.mp4 weights=$(DEMO)/train/checkpoints/best.ckpt \
		topk=3 per_clip=true output=$(DEMO)/predictions.json
	@echo
	@echo "learning curve    $(DEMO)/train/learning_curve.png"
	@echo "evaluation        $(DEMO)/eval/report.html"
	@echo "results           $(DEMO)/eval/results.json"
	@echo "predictions       $(DEMO)/predictions.json"
	@echo "checkpoint        $(DEMO)/train/checkpoints/best.ckpt"

demo-detection: setup
	$(BIN)/python datasets/shapes/make_shapes.py --root $(DEMO)/shapes
	$(BIN)/mvit-train experiment=shapes data.root=$(DEMO)/shapes hydra.run.dir=$(DEMO)/detector
	$(BIN)/mvit-eval data=shapes data.root=$(DEMO)/shapes weights=$(DEMO)/detector/checkpoints/best.ckpt \
		hydra.run.dir=$(DEMO)/detector-eval
	$(BIN)/mvit-predict $(DEMO)/shapes/val weights=$(DEMO)/detector/checkpoints/best.ckpt save=[png] \
		save_dir=$(DEMO)/drawn output=$(DEMO)/objects.json

test: setup
	$(BIN)/python -m pytest -q

test-all: setup
	$(PIP) -e ".[test,lint,lora,sweep]"
	$(BIN)/python -m pytest -q -m "not gpu and not browser"

test-browser: setup
	$(PIP) playwright
	$(BIN)/python -m pytest -q -m browser

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu

bench: setup
	$(PIP) -e ".[test,lint,torchcodec,decord]"
	$(BIN)/python benchmarks/positions.py
	$(BIN)/python benchmarks/decode.py --write
	$(BIN)/python benchmarks/loader.py --write
	$(BIN)/python benchmarks/model.py --write
	$(BIN)/python benchmarks/learning.py --write
	$(BIN)/python benchmarks/detection.py --write
	$(BIN)/python benchmarks/action_detection.py --write

docs: setup
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_architecture.py

# Fails where the model lost more than a tenth of its recorded lead over torchvision's.
bench-check: setup
	$(BIN)/python benchmarks/model.py --check

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) outputs multirun build dist
