# What a person has to remember: make reproduce, make test, make lab, make help.
PROFILE ?= mini
DATA    ?= data/$(PROFILE:scratch=mini)
LAUNCH  ?=
SOURCES ?=
RUN     ?=
PHOTOS  ?=
LABELS  ?=
PYTHON  ?= python3
VENV    ?= .venv
# stages run side by side: on the embedded dataset one a core, elsewhere one at a time, unless given
JOBS    ?= $(if $(filter mini scratch when,$(PROFILE)),$(shell nproc 2>/dev/null || sysctl -n hw.ncpu),1)

# make 3.81, which macOS brings, takes no .SHELLFLAGS: a stage that fails would look done
$(if $(filter 3.%,$(MAKE_VERSION)),$(error this is GNU make $(MAKE_VERSION), and 4 or newer is needed: make (Debian, \
  Fedora), brew install make (macOS), then gmake in place of make))
SHELL := bash
$(if $(shell echo yes),,$(error no bash, in which the recipes are written: install bash (Debian, Fedora, Homebrew)))
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SECONDARY:
.DEFAULT_GOAL := help
DRY := $(findstring n,$(filter-out --% -j%,$(firstword -$(MAKEFLAGS))))
ifeq ($(filter -j%,$(MAKEFLAGS)),)
MAKEFLAGS += -j$(JOBS)
endif
# what goes to the shell as it is must be a name or a path to it, and no more
fits = $(shell [[ '$(subst ','\'',$(value $(1)))' =~ ^$(2)$$ ]] && echo yes)
$(if $(call fits,PROFILE,[[:alnum:]_][[:alnum:]_.-]*),,\
  $(error PROFILE='$(value PROFILE)': give the name of a file in nbs/profiles, without .yaml))
$(if $(filter api bench readme,$(PROFILE)),\
  $(error PROFILE='$(PROFILE)': reports/$(PROFILE) is a folder of the project; give another name))
$(foreach name,SOURCES RUN,$(if $(call fits,$(name),[[:alnum:]_./~+@=:-]*),,\
  $(error $(name)='$(value $(name))': give a path of letters, digits and _ . / ~ + @ = : - only)))
$(if $(filter file,$(origin DATA)),,$(if $(call fits,DATA,[[:alnum:]_./~+@=-]+),,\
  $(error DATA='$(value DATA)': give a folder, a path of letters, digits and _ . / ~ + @ = - only)))

export PHOTOS LABELS
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONHASHSEED := 0

BIN    := $(VENV)/bin
READY  := $(VENV)/ready
YAML   := nbs/profiles/$(PROFILE).yaml
OUT    := reports/$(PROFILE)
MODELS := data/runs/$(PROFILE)
BENCH  := $(patsubst %,reports/bench/%.ipynb,network pseudo_labels roofline notebooks)
TRIED  := reports/bench/supported.ipynb
CARD   := reports/bench/card.ipynb
# SOURCES: a JSON file with other addresses, sizes and hashes (bnrcam.datasets.download.read_sources), for a mirror or a
# smaller set of the data that `make data` fetches; which, FETCHED, the profile says
SCENES := $(if $(filter data/mini,$(DATA)),data/mini/scenes.json)$(if $(PHOTOS),$(DATA)/ImageSets)
# errors in one line, without the traceback
SHORT  := import sys; sys.excepthook = lambda kind, error, _: print(f'{kind.__name__}: {error}', file=sys.stderr);

# what set-up needs, looked for before anything is fetched
PREREQUISITES := { command -v $(PYTHON) >/dev/null || { echo 'no $(PYTHON): install python3 and python3-venv (Debian), \
  python3 (Fedora), python (Homebrew), or name one, as in make PYTHON=python3.12' >&2; exit 1; }; } \
  && $(PYTHON) -I -S bnrcam/study/prerequisites.py $(VENV)

# One batch a profile at a time: locks that live as long as make or one of its stages. And what dates do not tell:
# products that were made from other files than today's, or damaged, or come from the future.
GUARD  := $(or $(wildcard $(BIN)/python),$(PYTHON)) -I -S bnrcam/study/batch.py
LOCKS  := reports/.$(PROFILE).lock data/runs/.$(PROFILE).lock
MAKES  := $(filter reproduce readme $(OUT)/%,$(MAKECMDGOALS))
ASKS   := $(MAKES)$(filter verify plan data,$(MAKECMDGOALS))
ifneq ($(MAKES)$(filter verify clean,$(MAKECMDGOALS)),)
ifeq ($(DRY)$(MAKE_RESTARTS),)
# a Python that is too old cannot read batch.py; what is wanted besides is said by set-up
$(if $(or $(wildcard $(BIN)/python),$(filter clean,$(MAKECMDGOALS))),,\
  $(if $(shell $(PREREQUISITES) >/dev/null && echo yes),,$(error nothing was fetched)))
HELD   := $(shell $(GUARD) hold $$PPID $(LOCKS) 2>&1)
$(if $(filter held,$(HELD)),,$(error $(HELD)))
endif
endif

# The study: every job of the profile, what it is made from, and whether that changed (bnrcam.study.graph). Without an
# environment there is no graph; make then sets that up, as a makefile that is out of date, and begins again.
ifneq ($(ASKS),)
$(if $(DRY),,$(eval -include $(READY)))
WRITE  := $(BIN)/python -m bnrcam.study.graph $(YAML) $(DATA)
ifneq ($(wildcard $(READY)),)
quoted = '$(subst ','\'',$(subst $$,$$$$,$(value $(1))))'
$(if $(SCENES),$(if $(DRY),,$(shell $(MAKE) -s VENV=$(VENV) PYTHON=$(PYTHON) PROFILE=$(PROFILE) DATA=$(DATA) \
  PHOTOS=$(call quoted,PHOTOS) LABELS=$(call quoted,LABELS) -o $(READY) $(SCENES) >&2)))
GRAPH  := $(shell $(WRITE) $(if $(and $(MAKES),$(if $(DRY),,yes)),$(OUT)/.graph.mk,$$(mktemp) dry))
-include $(GRAPH)
$(shell rm -f $(filter-out $(OUT)/%,$(GRAPH)))
endif
ifeq ($(GRAPH),)
$(ASKS): no_graph
no_graph: $(if $(DRY),$(READY))
	@exit 2
endif
endif

.PHONY: help reproduce verify plan test fuzz export lab docs data fetched notebooks bench supported check-gpu readme start clean again no_graph $(BENCH) $(TRIED) $(CARD)
help:  ## this list
	@echo 'make TARGET [PROFILE=mini|scratch|when|animals|voc|coco] [DATA=folder in VOC layout] [JOBS=n] [LAUNCH="srun --gpus 1"]'
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)

reproduce: $(if $(GRAPH),$(OUT)/index.ipynb)  ## run what is stale of the study; the result is reports/PROFILE/index.html
	@echo "$(if $(BUILT),Done,Nothing to do: all is up to date). Open $(OUT)/index.html"

verify: $(READY)  ## count the pixels again, and recompute every number and table of a finished study
	@$(BIN)/python -c "$(SHORT) from bnrcam.study.verify import verify; verify('$(YAML)', '$(DATA)')"

plan: $(READY)  ## what reproduce would run, and how long, on this machine: a few steps of each stage are timed
	@$(BIN)/python -c "$(SHORT) from bnrcam.study.plan import plan; plan('$(YAML)', '$(DATA)')"

test: $(READY)  ## every test: notebooks, parity with the reference, bad input, the batch, the page; FAST=1: the quick ones
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup $(if $(FAST),-m 'not slow')

fuzz: $(READY)  ## the property-based tests of every reader, with 20 times as many examples, new ones each time (half an hour)
	FUZZ=20 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup tests/test_properties.py

export: $(READY)  ## RUN=data/runs/PROFILE/RUN[/segment]: its network, classes and settings in one file, for bnrcam-predict
	@$(BIN)/python -c "$(SHORT) from bnrcam.predict import export_model; print('Done:', export_model('$(RUN)'))"

lab: $(READY)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs

docs: $(READY)  ## pages of all modules and functions, from their docstrings: reports/api/index.html
	@rm -rf reports/api
	@$(BIN)/pdoc bnrcam '!bnrcam._modidx' --no-show-source --template-directory nbs/api --output-directory reports/api
	@echo 'Done. Open reports/api/index.html'

data: $(READY) $(SCENES) $(if $(FETCHED),fetched) $(WEIGHTS)  ## make the embedded dataset; of another profile: fetch what it names into DATA, and weights

start: $(READY)  ## train the start weights in data/start again: about an hour on two cores
	@echo 'Trains on 48,000 and 32,000 generated scenes, one core each; a stopped training goes on. Results: data/start'
	@$(MAKE) --no-print-directory conformer_mini.start resnet38_eighth.start

%.start: | $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -c "$(SHORT) from bnrcam.study.start import make_start; make_start('$*')"

fetched: $(READY)
	@$(BIN)/python -c "$(SHORT) from bnrcam.datasets.registry import prepare; prepare('$(FETCHED)', '$(DATA)', '$(SOURCES)')"

notebooks: $(READY)  ## after an edit: export the package, run the library notebooks, clean them, make the README
	@$(BIN)/python -c "$(SHORT) from bnrcam.study.graph import cells; list(map(cells, sys.argv[1:]))" nbs/*.ipynb nbs/*/*.ipynb
	$(BIN)/nbdev_export
	TQDM_DISABLE=1 KINETO_LOG_LEVEL=99 $(BIN)/jupyter nbconvert --to notebook --execute --inplace $(wildcard nbs/*.ipynb nbs/*/[0-9]*.ipynb)
	$(BIN)/nbdev_clean
	@touch nbs/index.ipynb; $(MAKE) README.md

README.md: nbs/index.ipynb | $(READY)
	$(BIN)/jupyter nbconvert --to markdown --no-input --stdout $< 2>/dev/null \
	  | sed -E 's|\]\(\.\./|](|g; s#\]\(([0-9][0-9]_|study/|engine/|datasets/)#](nbs/\1#g' > $@

bench: $(BENCH)  ## time and memory of every stage against the textbook's forms, on DATA, and the machine's limit (25 minutes)
	@echo "Done. Open $(BENCH); the numbers are in the .json files beside them"

supported: $(TRIED)  ## which networks of timm can be CAM networks: each file's smallest is tried (5 minutes)
	@cp $(<:.ipynb=.csv) $(<:.ipynb=.md) $(<:.ipynb=.json) reports/readme/

check-gpu: $(CARD)  ## what first to run with a new GPU: its numbers against the processor's, memory, speed, advice (10 minutes)
	@$(BIN)/jupyter nbconvert --to html $< 2>/dev/null
	@echo 'Done. Open $(CARD:.ipynb=.html); the numbers are in $(CARD:.ipynb=.json)'

readme: reproduce  ## after a run of mini: its Tables 2 and 5, Figures 1, 3 and 4, the last bench and sweep, into the README
	mkdir -p reports/readme
	cp $(OUT)/table2.md $(OUT)/table5.md $(OUT)/figure1.png $(OUT)/figure3.png $(OUT)/figure4.png \
	  $(wildcard reports/bench/network.json reports/when/when*.png reports/when/when*.json reports/when/when*.csv) reports/readme/
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/index.ipynb
	$(BIN)/nbdev_clean --fname nbs/index.ipynb
	@touch nbs/index.ipynb; $(MAKE) README.md

clean:  ## remove the products of PROFILE: reports, weights, CAMs (not the data)
	rm -rf $(OUT) $(MODELS)

# pydensecrf2 is compiled here, by a newer Cython than the one that it names, whose C++ Python 3.13 refuses
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
$(READY): settings.ini setup.py constraints.txt
	@$(PREREQUISITES)
	@echo 'Setting up $(VENV) (a few minutes, several GB with the GPU libraries)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) cython setuptools wheel
	CYTHON_FORCE_REGEN=1 $(PIP) --no-build-isolation pydensecrf2
	$(PIP) -e '.[study,dev]'
	@touch $@

# of photographs with a table of labels, PHOTOS and LABELS, if these are given
$(DATA)/ImageSets: | $(READY)
	@$(if $(PHOTOS),$(BIN)/python -c "$(SHORT) import os; from bnrcam.datasets.folder import folder_from_table; \
	  from bnrcam.study.profile import read_profile; \
	  folder_from_table(os.environ['LABELS'], os.environ['PHOTOS'], '$(DATA)', read_profile('$(YAML)')['dataset']['classes'])" \
	  ,echo '$(DATA): no data there yet; make data PROFILE=$(PROFILE) fetches it'; exit 1)

data/weights/conformer%.pth: | $(READY)
	@$(BIN)/python -c "$(SHORT) from bnrcam.datasets.download import CONFORMER_S, fetch; fetch(CONFORMER_S, '$(@D)')"

%.params: | $(READY)
	@$(BIN)/python -c "$(SHORT) from bnrcam.datasets.download import by_hand; by_hand('resnet38', '$@')"

data/mini/scenes.json: bnrcam/scenes.py | $(READY)
	rm -rf data/mini
	$(BIN)/python -c "$(SHORT) from bnrcam.scenes import write_scenes; write_scenes('data/mini')"
	@touch $@

# The executed notebook is the product. A notebook that fails stays beside it as NAME.failed.ipynb, for reading.
# NAME.provenance records what it was made from; while it is made, files 8 and 9 share the locks. What LAUNCH does not
# launch runs in a warm kernel (bnrcam.engine.kernels).
# $(call papermill,PARAMETERS): runs the notebook among the prerequisites, with the settings among them.
warm = $(if $(or $(filter reports/bench/%,$@),$(and $(LAUNCH),$(findstring nbs/stages/,$^))),,yes)
define papermill
	@mkdir -p $(@D); rm -f $(@:.ipynb=.log)
	@echo '[$(patsubst reports/%.ipynb,%,$@)]'
	@$(GUARD) begin $@ $(filter-out again,$^)
	@exec 9<> $(firstword $(LOCKS)) 8<> $(lastword $(LOCKS)); $(GUARD) share 9 8; \
	  $(if $(warm),BNRCAM_MAKE=$$PPID JUPYTER_PATH="$$PWD/nbs$${JUPYTER_PATH:+:$$JUPYTER_PATH}",$(if $(findstring nbs/stages/,$^),$(LAUNCH))) \
	  $(BIN)/papermill $(firstword $(filter nbs/%.ipynb,$^)) \
	    $(@:.ipynb=.failed.ipynb) $(addprefix -f ,$(filter %.yaml,$^)) $(1) $(if $(warm),-k warm) \
	    --log-output --no-progress-bar --start-timeout 600 2>&1 | tee $(@:.ipynb=.log) \
	  | { grep --line-buffered '%|' || true; } | sed -u 's|^[[:cntrl:]]*|  $(patsubst reports/%.ipynb,%,$@) |' \
	  || { echo "[$(patsubst reports/%.ipynb,%,$@)] $$(grep -v '^ *$$' $(@:.ipynb=.log) | tail -n 1)"; \
	       echo '  failed: read $(@:.ipynb=.failed.ipynb); an earlier stage runs again once its notebook is removed'; exit 1; }
	@$(GUARD) end $@
endef

$(filter-out %/index.ipynb,$(PRODUCTS)): | $(READY) $(if $(FETCHED)$(PHOTOS),$(DATA)/ImageSets) $(WEIGHTS)
	$(call papermill)
$(OUT)/index.ipynb:
	@$(WRITE) $(GRAPH) > /dev/null
	@$(GUARD) check $(RESULTS:%=$(OUT)/%.ipynb)
	$(call papermill)
	$(eval BUILT := yes)
# the settings of a job are written with the graph; where they are not there yet, in a dry run, all is to be done
$(OUT)/%.yaml: ;

# no part of a study: it takes no profile, and runs whenever it is asked for
$(BENCH) $(TRIED) $(CARD): LOCKS := reports/.bench.lock
$(TRIED) $(CARD): reports/%.ipynb: nbs/%.ipynb | $(READY)
	$(call papermill)
$(BENCH): reports/%.ipynb: nbs/%.ipynb $(if $(filter data/mini,$(DATA)),data/mini/scenes.json) | $(READY)
	$(call papermill,-p root $(DATA))
# one after the other: each wants the machine to itself
$(foreach n,1:2 2:3 3:4,$(eval $(word $(lastword $(subst :, ,$n)),$(BENCH)): | $(word $(firstword $(subst :, ,$n)),$(BENCH))))
