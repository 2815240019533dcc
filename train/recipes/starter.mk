# The bundled starter from its data, step by step: `make starter`. What is done is skipped, and a
# training that was stopped goes on where it stopped. docs/starter.md says what must lie in data/,
# and how long each step takes.

M := $(VENV)/bin/multimodal
ENCODER ?= data/efficientnet-lite0.pth
NAMES := imagenet_1k_sample caltech101 tuxpaint_stamps
OTHERS := tiny_imagenet fashion_products grocery_store nlvr easy_vqa noto_emoji scenes128
FOLDERS := flickr8k-asked $(NAMES) $(OTHERS)
CODES := $(patsubst %,data/%-codes/manifest.json,$(FOLDERS))

# $(call fit,RECIPE,OUTPUT,OPTIONS OF A NEW RUN): train a recipe, or go on with it. FIT are options
# of all trainings: FIT="--trainer.precision 32-true" where bfloat16 is slow.
define fit
	if [ -e $(2)/checkpoints/last.ckpt ]; \
	then $(M) fit --config $(1) --ckpt_path last $(FIT); \
	else $(M) fit --config $(1) $(3) $(FIT); fi
	touch $@
endef

.PHONY: starter
starter: runs/starter/config.json  ## make the bundled starter again, from its data: about three hours of two cores

data/%/manifest.json:
	@echo "data/$* is missing: docs/starter.md says what must lie there" >&2; exit 1

data/scenes128/manifest.json:
	$(M) data scenes data/scenes128 --count 12000 --seed 5 --size 128

data/flickr8k-asked/manifest.json:
	$(M) data questions data/flickr8k data/flickr8k-asked --pairs 3

data/scenes-fit/manifest.json:
	$(M) data scenes data/scenes-fit --count 1200 --seed 1 --size 128

# The starter before gives its network, its text tokenizer and its level of detail.
BEFORE := 2d43942db132e31c11d0da07ce7fe7ee4bf6ef9a
runs/starter-before/config.json:
	mkdir -p $(@D)
	git archive $(BEFORE) multimodal/starter | tar -x -C $(@D) --strip-components 2

# Mostly photos: codes of shapes would be taken from them (docs/decisions/captions.md).
FITTED := flickr8k-asked $(NAMES) tiny_imagenet fashion_products grocery_store nlvr scenes-fit
runs/meaning/config.json: $(patsubst %,data/%/manifest.json,$(FITTED))
	$(M) tokenizer meaning $(patsubst %,data/%,$(FITTED)) --out runs/meaning --half \
		--encoder timm:tf_efficientnet_lite0=$(ENCODER) --groups 1 --codes 2048 --channels 256 \
		--positions 200000 --rounds 12

runs/image-tokenizer/config.json: runs/meaning/config.json runs/starter-before/config.json
	$(M) tokenizer join runs/meaning runs/starter-before/image_tokenizer --out runs/image-tokenizer

# Photos are cropped and mirrored. Captions of shapes say left and right.
data/flickr8k-asked-codes/manifest.json: CROPS := --encodings 4 --crop-scale 0.4 --mirror
$(patsubst %,data/%-codes/manifest.json,$(NAMES)): CROPS := --encodings 2 --crop-scale 0.5 --mirror
data/%-codes/manifest.json: runs/image-tokenizer/config.json | data/%/manifest.json
	$(M) tokenizer encode data/$* data/$*-codes --tokenizer runs/image-tokenizer $(CROPS)

runs/starter-joint.done: $(CODES)
	$(call fit,starter_joint.yaml,runs/starter-joint,--init_from runs/starter-before)

runs/starter-photos.done: runs/starter-joint.done
	$(call fit,starter_photos.yaml,runs/starter-photos,--init_from runs/starter-joint/model)

runs/starter-reward.done: runs/starter-photos.done
	$(call fit,starter_reward.yaml,runs/starter-reward,--init_from runs/starter-photos/model)

runs/starter/config.json: runs/starter-reward.done
	$(M) export model runs/starter-reward/model runs/starter --dtype bfloat16
