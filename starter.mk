# The bundled starter from its data, step by step: `make starter`. What is done is skipped, and a
# training that was stopped goes on where it stopped. docs/starter.md says what must lie in data/,
# and how long each step takes.

M := $(VENV)/bin/multimodal
ENCODER := runs/efficientnet-lite0.pth
NAMES := imagenet_1k_sample tiny_imagenet caltech101 tuxpaint_stamps fashion_products grocery_store
SHAPES := nlvr noto_emoji easy_vqa
READ := flickr8k-asked $(NAMES) $(SHAPES) scenes128
DRAWN := flickr8k-asked noto_emoji scenes128

# Train a recipe, or go on with it: $(call fit,RECIPE,MORE ARGUMENTS OF A NEW RUN)
fit = if [ -f runs/$(1)/checkpoints/last.ckpt ]; \
	then $(M) fit --config $(1).yaml --ckpt_path runs/$(1)/checkpoints/last.ckpt; \
	else $(M) fit --config $(1).yaml $(2); fi && touch $@

.PHONY: starter
starter: runs/starter.done  ## make the bundled starter again, from its data: about a day of two cores

data/scenes128/manifest.json:
	$(M) data scenes data/scenes128 --count 24000 --seed 0 --size 128

data/flickr8k-asked/manifest.json:
	$(M) data questions data/flickr8k data/flickr8k-asked --pairs 3

IMAGES := $(patsubst %,data/%/manifest.json,$(READ))

runs/starter-text.json: | $(IMAGES)
	$(M) tokenizer text $(patsubst %,data/%,$(READ)) --out $@ --vocabulary-size 4096

runs/meaning/config.json: | $(IMAGES)
	$(M) tokenizer meaning $(patsubst %,data/%,$(READ)) --out runs/meaning --half \
		--encoder timm:tf_efficientnet_lite0=$(ENCODER) --groups 2 --codes 1024 --channels 256 \
		--images 1600 --positions 200000 --rounds 12

# Photos are cropped and mirrored. Captions of shapes say left and right.
data/flickr8k-asked-codes/manifest.json: CROPS := --encodings 8 --crop-scale 0.4 --mirror
$(patsubst %,data/%-codes/manifest.json,$(NAMES)): CROPS := --encodings 4 --crop-scale 0.5 --mirror
data/%-codes/manifest.json: runs/meaning/config.json data/%/manifest.json
	$(M) tokenizer encode data/$* data/$*-codes --tokenizer runs/meaning --precision bfloat16 $(CROPS)

runs/starter_read.done: runs/starter-text.json $(patsubst %,data/%-codes/manifest.json,$(READ))
	$(call fit,starter_read)

runs/starter_detail.done: | $(IMAGES)
	$(call fit,starter_detail)

runs/starter_detail_decoder.done: runs/starter_detail.done runs/meaning/config.json
	$(call fit,starter_detail_decoder,--init_from runs/starter_detail/model)
