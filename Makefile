# What a person has to remember: make reproduce, make test, make lab, make help.
PROFILE ?= mini
DATA    ?= data/$(PROFILE)
LAUNCH  ?=
SOURCES ?=
PYTHON  ?= python3
VENV    ?= .venv
# stages run side by side: on the embedded dataset one a core, elsewhere one at a time, unless given
JOBS    ?= $(if $(filter mini,$(PROFILE)),$(shell nproc 2>/dev/null || sysctl -n hw.ncpu),1)

SHELL := bash
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
$(foreach name,SOURCES $(if $(filter file,$(origin DATA)),,DATA),$(if $(call fits,$(name),[[:alnum:]_./~+@=:-]*),,\
  $(error $(name)='$(value $(name))': give a path of letters, digits and _ . / ~ + @ = : - only)))

export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONHASHSEED := 0

BIN     := $(VENV)/bin
READY   := $(VENV)/ready
YAML    := nbs/profiles/$(PROFILE).yaml
OUT     := reports/$(PROFILE)
MODELS  := data/runs/$(PROFILE)

# of the profile: its own name, which the notebooks name folders by, and what goes to the shell
OWN := $(shell sed -n 's/^profile: *\([^ \#]*\).*/\1/p' $(YAML) 2>/dev/null)
ODD := $(shell sed -nE 's/^(variants|seeds|pseudo_labels|modern|sweep): *\[(.*)\].*/\2/p; s/.*weights: *([^,} ]*).*/\1/p' \
         $(YAML) 2>/dev/null | grep -m 1 '[^[:alnum:]_., /-]')
$(if $(wildcard $(YAML)),$(if $(filter-out x$(PROFILE),x$(OWN)),$(error $(YAML): its profile must be $(PROFILE), not '$(OWN)')))
$(if $(ODD),$(error $(YAML): '$(ODD)': lists and paths hold letters, digits and _ . / - only))

# `list NAME` reads a one-line list of the profile
comma := ,
list = $(subst $(comma), ,$(shell sed -n 's/^$(1): *\[\(.*\)\].*/\1/p' $(YAML) 2>/dev/null | tr -d ' '))
SEEDS   := $(call list,seeds)
# trainings from scratch: a start for the runs of each seed, and three more for the collapse figure
STARTS  := $(SEEDS:%=pretrain-s%)
SCRATCH := $(firstword $(STARTS)) pretrain-plain pretrain-noise1 pretrain-noise1-plain
SWEEP   := $(call list,sweep)
LABELS  := $(foreach variant,$(call list,pseudo_labels),$(SEEDS:%=$(variant)-s%))
RUNS    := $(foreach variant,$(call list,variants),$(SEEDS:%=$(variant)-s%))
EXTRA   := $(if $(SWEEP),$(SCRATCH) $(SWEEP:%=noise1-s$(firstword $(SEEDS))-lr%))
# segmentation: what learns pseudo-labels, what learns true masks, and other backbones than the paper's
BOUND   := $(SEEDS:%=supervised-s%)
MODERN  := $(patsubst %,noise1-s$(firstword $(SEEDS))/segment-%,$(call list,modern))
SEGMENT := $(LABELS:%=%/segment) $(BOUND:%=%/segment) $(MODERN)
NETWORK := table2 table3 table4 figure3 years
RESULTS := table1 table5 figure1 figure2 figure4 threshold figure5 $(if $(LABELS),pseudo $(NETWORK)) $(if $(SWEEP),collapse)

# files of published weights that the profile names; PUBLIC: a profile whose data `make data` fetches
WEIGHTS := $(filter-out null data/runs/%,$(shell sed -n 's/.*weights: *\([^,} ]*\).*/\1/p' $(YAML) 2>/dev/null | sort -u))
PUBLIC  := $(filter voc coco,$(PROFILE))
START   := $(filter-out %.params,$(WEIGHTS))

# SOURCES: a JSON file with other addresses, sizes and hashes (bnrcam.download.read_sources), for a mirror or a smaller set
UPPER   := $(patsubst coco,COCO,$(PUBLIC:voc=VOC))
OTHERS  := $(if $(SOURCES),$(comma) read_sources('$(SOURCES)'$(comma) $(UPPER)_FILES)$(comma) None)

SCENES := $(if $(filter data/mini,$(DATA)),data/mini/scenes.json)
IMAGES := $(OUT)/.data $(SCENES) $(WEIGHTS)
BEFORE := $(READY) $(OUT)/.profile $(if $(PUBLIC),$(DATA)/ImageSets)

# One batch a profile at a time: a lock that lives as long as make or one of its stages. And what dates do not tell:
# products that were made from other files than today's, or damaged, or come from the future.
GUARD   := $(or $(wildcard $(BIN)/python),$(PYTHON)) -I -S bnrcam/batch.py
LOCK    := reports/.$(PROFILE).lock
ifneq ($(filter reproduce readme verify clean $(OUT)/%,$(MAKECMDGOALS)),)
ifeq ($(DRY),)
HELD    := $(shell $(GUARD) hold $(LOCK) $$PPID 2>&1)
$(if $(filter held,$(HELD)),,$(error $(HELD)))
$(shell $(GUARD) redate $(YAML) $(IMAGES) $(wildcard nbs/stages/*.ipynb nbs/results/*.ipynb bnrcam/*.py))
endif
$(shell $(GUARD) stale $(OUT)): again
endif

# errors in one line, without the traceback
SHORT   := import sys; sys.excepthook = lambda kind, error, _: print(f'{kind.__name__}: {error}', file=sys.stderr);
BENCH   := $(patsubst %,reports/bench/%.ipynb,network pseudo_labels roofline)

# the code that a stage runs, so that only what changed is stale
code         = $(1:%=bnrcam/%.py)
TRAIN_CODE  := $(call code,data transforms conformer models cam losses launch train)
SEEDS_CODE  := $(TRAIN_CODE) $(call code,seeds evaluate)
TRUNK_CODE  := $(call code,data transforms launch train resnet38)
PSEUDO_CODE := $(call code,workers crf resnet38 affinity)
LEARN_CODE  := $(call code,segment submit)
REPORT_CODE := $(call code,paper submit figures report)

.PHONY: help reproduce verify plan test lab docs data voc coco notebooks bench readme clean again $(BENCH)
help:  ## this list
	@echo 'make TARGET [PROFILE=mini|animals|voc|coco] [DATA=folder in VOC layout] [JOBS=n] [LAUNCH="srun --gpus 1"]'
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)

reproduce: $(OUT)/index.ipynb  ## run what is stale of the study; the result is reports/PROFILE/index.html
	@echo "$(if $(BUILT),Done,Nothing to do: all is up to date). Open $(OUT)/index.html"

verify: $(READY)  ## count the pixels again, and recompute every number and table of a finished study
	@$(BIN)/python -c "$(SHORT) from bnrcam.report import verify; verify('$(YAML)', '$(DATA)')"

plan: $(READY)  ## what reproduce would run, and how long, on this machine: a few steps of each stage are timed
	@$(BIN)/python -c "$(SHORT) from bnrcam.plan import plan; plan('$(YAML)', '$(DATA)')"

test: $(READY)  ## every test: notebooks, parity with the reference, bad input, the batch, the page
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lab: $(READY)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs

docs: $(READY)  ## pages of all modules and functions, from their docstrings: reports/api/index.html
	@rm -rf reports/api
	@$(BIN)/pdoc bnrcam '!bnrcam._modidx' --no-show-source --template-directory nbs/api --output-directory reports/api
	@echo 'Done. Open reports/api/index.html'

data: $(READY) $(SCENES) $(PUBLIC) $(WEIGHTS)  ## make the embedded dataset; PROFILE=voc or coco: fetch that into DATA, and weights

voc coco: $(READY)
	@$(BIN)/python -c "$(SHORT) from bnrcam.datasets import *; from bnrcam.download import *; prepare_$@('$(DATA)'$(OTHERS))"

notebooks: $(READY)  ## after an edit: export the package, run the library notebooks, clean them, make the README
	$(BIN)/nbdev_export
	TQDM_DISABLE=1 KINETO_LOG_LEVEL=99 $(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/*.ipynb nbs/engine/[0-9]*.ipynb
	$(BIN)/nbdev_clean
	@touch nbs/index.ipynb; $(MAKE) README.md

README.md: nbs/index.ipynb | $(READY)
	$(BIN)/jupyter nbconvert --to markdown --no-input --stdout $< 2>/dev/null \
	  | sed 's|](\.\./|](|g; s|](\([0-9][0-9]_\)|](nbs/\1|g' > $@

bench: $(BENCH)  ## time and memory of every stage against the textbook's forms, on DATA, and the machine's limit (20 minutes)
	@echo "Done. Open $(BENCH); the numbers are in the .json files beside them"

readme: reproduce  ## after a run of mini: its Tables 2 and 5, Figures 1, 3 and 4, and the last bench, into the README
	mkdir -p reports/readme
	cp $(OUT)/table2.md $(OUT)/table5.md $(OUT)/figure1.png $(OUT)/figure3.png $(OUT)/figure4.png \
	  $(wildcard reports/bench/network.json) reports/readme/
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/index.ipynb
	$(BIN)/nbdev_clean --fname nbs/index.ipynb
	@touch nbs/index.ipynb; $(MAKE) README.md

clean:  ## remove the products of PROFILE: reports, weights, CAMs (not the data)
	rm -rf $(OUT) $(MODELS)

# pydensecrf2 is compiled here, by a newer Cython than the one that it names, whose C++ Python 3.13 refuses
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -I -S bnrcam/prerequisites.py
	@echo 'Setting up $(VENV) (a few minutes, several GB with the GPU libraries)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) cython setuptools wheel
	CYTHON_FORCE_REGEN=1 $(PIP) --no-build-isolation pydensecrf2
	$(PIP) -e '.[study,dev]'
	@touch $@

# another DATA makes everything stale: its name is a file that is written only when it changes
$(OUT)/.data: $(if $(filter $(DATA),$(shell cat $(OUT)/.data 2>/dev/null)),,again)
	@mkdir -p $(@D)
	@echo '$(DATA)' > $@

# papermill makes code of the profile: it is read first, and refused unless it holds plain values
$(OUT)/.profile: $(YAML) | $(READY)
	@mkdir -p $(@D)
	@$(BIN)/python -c "$(SHORT) from bnrcam.plan import read_profile; read_profile('$<')"
	@touch $@

$(DATA)/ImageSets:
	@echo '$(DATA): no data there yet; make data PROFILE=$(PROFILE) fetches it'; exit 1

data/weights/conformer%.pth: | $(READY) $(OUT)/.profile
	@$(BIN)/python -c "$(SHORT) from bnrcam.download import CONFORMER_S, fetch; fetch(CONFORMER_S, '$(@D)')"

%.params: | $(READY) $(OUT)/.profile
	@$(BIN)/python -c "$(SHORT) from bnrcam.download import by_hand; by_hand('resnet38', '$@')"

data/mini/scenes.json: bnrcam/scenes.py | $(READY)
	rm -rf data/mini
	$(BIN)/python -c "$(SHORT) from bnrcam.scenes import write_scenes; write_scenes('data/mini')"
	@touch $@

# The executed notebook is the product. A notebook that fails stays beside it as NAME.failed.ipynb, for reading.
# NAME.made records what it was made from; while it is made, file 9 shares the lock.
# $(call papermill,PARAMETERS): runs the rule's first prerequisite.
define papermill
	@mkdir -p $(@D)
	@echo '[$(patsubst reports/%.ipynb,%,$@)]'
	@$(GUARD) begin $@ $(filter-out again,$^)
	@exec 9<> $(LOCK); $(GUARD) share 9; $(if $(findstring /stages/,$<),$(LAUNCH)) $(BIN)/papermill $< \
	    $(@:.ipynb=.failed.ipynb) $(YAML:%=-f %) -p root $(DATA) $(1) \
	    --log-output --no-progress-bar --start-timeout 600 2>&1 | tee $(@:.ipynb=.log) \
	  | { grep --line-buffered '%|' || true; } | sed -u 's|^[[:cntrl:]]*|  $(patsubst reports/%.ipynb,%,$@) |' \
	  || { echo "[$(patsubst reports/%.ipynb,%,$@)] $$(grep -v '^ *$$' $(@:.ipynb=.log) | tail -n 1)"; \
	       echo '  failed: read $(@:.ipynb=.failed.ipynb); an earlier stage runs again once its notebook is removed'; exit 1; }
	@$(GUARD) end $@
endef
part = $(word $(1),$(subst -, ,$*))

own_seed = $(or $(patsubst s%,%,$(filter s%,$(call part,2))),$(firstword $(SEEDS)))
pretrain_arguments = $(if $(findstring plain,$*),-p similar False) $(if $(findstring noise1,$*),-p variant noise1)
$(sort $(STARTS:%=$(OUT)/%/pretrain.ipynb) $(SCRATCH:%=$(OUT)/%/pretrain.ipynb)): $(OUT)/%/pretrain.ipynb: \
    nbs/stages/pretrain.ipynb $(YAML) $(IMAGES) $(TRAIN_CODE) | $(BEFORE)
	$(call papermill,-p run $* -p seed $(own_seed) $(pretrain_arguments))

# runs are named VARIANT-sSEED or VARIANT-sSEED-lrRATE; second expansion: each depends on the start of its seed
.SECONDEXPANSION:
$(OUT)/%/train.ipynb: nbs/stages/train.ipynb $(YAML) $(IMAGES) $(TRAIN_CODE) \
    $(if $(START),,$(OUT)/pretrain-$$(call part,2)/pretrain.ipynb) | $(BEFORE)
	$(call papermill,-p run $* -p variant $(call part,1) -p seed $(own_seed) \
	  $(patsubst lr%,-p lr %,$(call part,3)) -p start $(or $(START),$(MODELS)/pretrain-$(call part,2)/model.safetensors))

$(SCRATCH:%=$(OUT)/%/seeds.ipynb): $(OUT)/%/seeds.ipynb: \
    nbs/stages/seeds.ipynb $(YAML) $(SEEDS_CODE) $(OUT)/%/pretrain.ipynb
	$(call papermill,-p run $* -p variant $(if $(findstring noise1,$*),noise1,baseline) -p seed $(own_seed))

$(OUT)/%/seeds.ipynb: nbs/stages/seeds.ipynb $(YAML) $(SEEDS_CODE) $(OUT)/%/train.ipynb
	$(call papermill,-p run $* -p variant $(call part,1) -p seed $(own_seed))

# ResNet38 from scratch, where the profile has no published weights for it
TRUNK := $(if $(shell grep '^trunk:' $(YAML) 2>/dev/null),$(OUT)/trunk/trunk.ipynb)
$(OUT)/trunk/trunk.ipynb: nbs/stages/trunk.ipynb $(YAML) $(IMAGES) $(TRUNK_CODE) | $(BEFORE)
	$(call papermill)

$(OUT)/%/pseudo.ipynb: nbs/stages/pseudo.ipynb $(YAML) $(PSEUDO_CODE) $(OUT)/%/seeds.ipynb $(TRUNK)
	$(call papermill,-p run $* -p variant $(call part,1) -p seed $(own_seed))

segment_arguments = -p run $* -p variant $(call part,1) -p seed $(own_seed)
$(BOUND:%=$(OUT)/%/segment.ipynb): $(OUT)/%/segment.ipynb: \
    nbs/stages/segment.ipynb $(YAML) $(IMAGES) $(TRUNK_CODE) $(PSEUDO_CODE) $(call code,evaluate) $(LEARN_CODE) $(TRUNK) | $(BEFORE)
	$(call papermill,$(segment_arguments))

$(OUT)/%/segment.ipynb: nbs/stages/segment.ipynb $(YAML) $(LEARN_CODE) $(OUT)/%/pseudo.ipynb
	$(call papermill,$(segment_arguments))

$(MODERN:%=$(OUT)/%.ipynb): nbs/stages/segment.ipynb $(YAML) $(LEARN_CODE) \
    $(OUT)/noise1-s$(firstword $(SEEDS))/pseudo.ipynb
	$(call papermill,-p run noise1-s$(firstword $(SEEDS)) -p variant noise1 -p seed $(firstword $(SEEDS)) \
	  -p backbone $(patsubst segment-%,%,$(notdir $(@:.ipynb=))))

$(RESULTS:%=$(OUT)/%.ipynb): $(OUT)/%.ipynb: nbs/results/%.ipynb $(YAML) $(REPORT_CODE) $(RUNS:%=$(OUT)/%/seeds.ipynb)
	$(call papermill)
$(OUT)/table1.ipynb $(OUT)/pseudo.ipynb: $(LABELS:%=$(OUT)/%/pseudo.ipynb)
$(NETWORK:%=$(OUT)/%.ipynb): $(SEGMENT:%=$(OUT)/%.ipynb) $(wildcard data/test_scores_$(PROFILE).csv)
$(OUT)/collapse.ipynb: $(EXTRA:%=$(OUT)/%/seeds.ipynb)

$(OUT)/index.ipynb: nbs/results/index.ipynb $(REPORT_CODE) $(RESULTS:%=$(OUT)/%.ipynb)
	@$(GUARD) check $(RESULTS:%=$(OUT)/%.ipynb)
	$(call papermill)
	$(eval BUILT := yes)

# no part of a study: it takes no profile, and runs whenever it is asked for
$(BENCH): YAML :=
$(BENCH): LOCK := reports/.bench.lock
$(BENCH): reports/%.ipynb: nbs/%.ipynb $(if $(filter data/mini,$(DATA)),data/mini/scenes.json) | $(READY)
	$(call papermill)
# one after the other: each wants the machine to itself
$(word 2,$(BENCH)): | $(word 1,$(BENCH))
$(word 3,$(BENCH)): | $(word 2,$(BENCH))
