"""Numbers in README, the model card and the docs are those of the JSON files in docs/."""

import json
import re
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest

from multimodal.hub.names import find_model
from multimodal.model.checkpoint import read_config

ROOT = Path(__file__).resolve().parent.parent
OF_STARTER = ("val", "heldout")
REPORTS = {name: ROOT / f"docs/starter_{name}.json" for name in OF_STARTER}
CARD = "multimodal/starter/README.md"
# {REPORT FOLDER TASK SCORE:FORMAT}, or {FILE PATH.OF.A.VALUE:FORMAT}, with % for one in [0, 1]
ROWS = {
    "README.md": (
        "CIDEr with 5 beams; greedy | {val flickr8k captioning CIDEr_beams:.3f}; "
        "{val flickr8k captioning CIDEr:.3f} | the best constant sentence "
        "{val flickr8k captioning CIDEr_constant:.3f}; its captions for other photos "
        "{val flickr8k captioning CIDEr_beams_shuffled:.3f}; the nearest photos' caption, by its "
        "encoder, {val flickr8k captioning CIDEr_lookup:.3f} |",
        "in the first ten; and the reverse | {val flickr8k retrieval text_to_image@10:%}; "
        "{val flickr8k retrieval image_to_text@10:%} |",
        "all; open questions | {val easy_vqa answers accuracy:%}; {val easy_vqa answers open:%} | "
        "about a grey picture {val easy_vqa answers blind_accuracy:%}; "
        "{val easy_vqa answers blind_open:%} |",
        "objects said right | {val scenes scene_captions attribute_precision:%}; "
        "{val scenes scene_captions object_recall:%} |",
        "with the right colour | {val scenes scene_drawings objects:%}; "
        "{val scenes scene_drawings colours:%} | "
        "true pictures after encoding and decoding "
        "{val scenes scene_drawings objects_of_reconstructions:%}",
        "hours, has {seeing flickr8k captioning CIDEr_beams:.3f} with beams",
    ),
    "docs/training/language_models.md": (
        "(perplexity before: {language_model before.perplexity:.2f})",
        "{seeing_photos flickr8k captioning CIDEr:.3f}; "
        "{seeing_photos flickr8k captioning CIDEr_beams:.3f} | not measured |",
        "| {seeing flickr8k captioning CIDEr:.3f}; {seeing flickr8k captioning CIDEr_beams:.3f} | "
        "{language_model after.perplexity:.2f} |",
    ),
    "docs/guides/serving.md": (
        "| 32 clients | {serving at_once.captions_per_second:.1f} | "
        "{serving at_once.first_token_p50:.2f}; {serving at_once.first_token_p99:.2f} s | "
        "{serving at_once.whole_p50:.2f}; {serving at_once.whole_p99:.2f} s |",
        "one by one | {serving one_by_one.captions_per_second:.1f} |",
        "behind a route | {serving transformers.captions_per_second:.1f} |",
        "is worth {serving ratio:.1f} times",
    ),
    "docs/guides/retrieval.md": (
        "question alone | {documents_smollm2 rows.alone.right.value:%} (1.1 to 5.7) | "
        "{documents_smollm2 rows.alone.wrong.value:%} (",
        "nearest documents | {documents_smollm2 rows.nearest.right.value:%} (84.5 to 93.0) | "
        "{documents_smollm2 rows.nearest.wrong.value:%} (",
        "among the first 3 of 200 | 100 % (98 to 100) | {documents found.embeddings.value:%} (",
        "first of 1,000 (flickr8k val) | {documents captions.words.1.value:%} (",
        ") | {documents captions.embeddings.1.value:%} (21.5 to 26.7) | "
        "{documents captions.both.1.value:%} (",
        "among the first 10 | {documents captions.words.10.value:%} (63.6 to 69.5) | "
        "{documents captions.embeddings.10.value:%} (52.6 to 58.8) | "
        "{documents captions.both.10.value:%} (",
    ),
    "docs/training/adapting.md": (
        "{fine_tuning smollm2_seeds.means.lora.CIDEr:.3f} for "
        "{fine_tuning smollm2_seeds.means.full.CIDEr:.3f} greedy and "
        "{fine_tuning smollm2_seeds.means.lora.CIDEr_beams:.3f} for "
        "{fine_tuning smollm2_seeds.means.full.CIDEr_beams:.3f} with beams (three seeds)",
        "cut paper {fine_tuning paper.means.lora.memory_GB:.2f} GB for "
        "{fine_tuning paper.means.full.memory_GB:.2f}, at 94 % of the CIDEr "
        "({fine_tuning paper.means.lora.CIDEr:.2f} for "
        "{fine_tuning paper.means.full.CIDEr:.2f}, three seeds)",
        "it takes {fine_tuning smollm2.rows.lora.memory_GB:.2f} GB for "
        "{fine_tuning smollm2.rows.full.memory_GB:.2f} and little more than half of the time a "
        "step, and CIDEr is "
        "{fine_tuning smollm2.rows.lora.CIDEr.value:.3f} for "
        "{fine_tuning smollm2.rows.full.CIDEr.value:.3f} greedy, "
        "{fine_tuning smollm2.rows.lora.CIDEr_beams.value:.3f} for "
        "{fine_tuning smollm2.rows.full.CIDEr_beams.value:.3f} with beams",
    ),
    "docs/training/preferences.md": (
        "draws {preferences rows.dpo-mean.guidance_1_5.objects:%} of the objects of new scenes "
        "right (three runs: 68.3 to {preferences rows.dpo-0.guidance_1_5.objects:%}), before "
        "{preferences rows.before.guidance_3.objects:%}",
        "{invented_objects rows.mean.greedy.invented:%} of the named objects, before "
        "{invented_objects rows.before.greedy.invented.value:%}, at a CIDEr of "
        "{invented_objects rows.mean.greedy.CIDEr:.3f} for "
        "{invented_objects rows.before.greedy.CIDEr.value:.3f}",
        "has {invented_objects rows.with_cider.greedy.invented.value:%} at "
        "{invented_objects rows.with_cider.greedy.CIDEr.value:.3f} (one run",
    ),
    "docs/decisions/experts.md": (
        *(
            f"{{experts rows.{row}.millions:.2f}}; "
            f"{{experts rows.{row}.active_millions:.2f}} million | "
            f"{{experts rows.{row}.total:.3f}} | {{experts rows.{row}.caption_nats:.3f}}; "
            f"{{experts rows.{row}.image_nats:.3f}}; {{experts rows.{row}.reconstruct_nats:.3f}} | "
            f"{{experts rows.{row}.CIDEr:.3f}} |"
            for row in ("dense", "experts")
        ),
        "takes {experts step_time_ratio:.1f} times as long",
        "trains {experts rows.dense.tokens_per_second:,.0f} tokens in a second, the other "
        "{experts rows.experts.tokens_per_second:,.0f} (",
    ),
    "docs/training/objectives.md": (
        "| 0 | {few_shot smollm2.before.0_shots.value:.3f} | "
        "{few_shot smollm2.trained.0_shots.value:.3f} | "
        "{few_shot smollm2.trained.0_shuffled.value:.3f} |",
        "| 2 | {few_shot smollm2.before.2_shots.value:.3f} | "
        "{few_shot smollm2.trained.2_shots.value:.3f} ("
        "{few_shot smollm2.trained.2_shots.low:.3f} to "
        "{few_shot smollm2.trained.2_shots.high:.3f}) | "
        "{few_shot smollm2.trained.2_shuffled.value:.3f} |",
        "| 4 | {few_shot smollm2.before.4_shots.value:.3f} ("
        "{few_shot smollm2.before.4_shots.low:.3f} to "
        "{few_shot smollm2.before.4_shots.high:.3f}) | "
        "**{few_shot smollm2.trained.4_shots.value:.3f} ("
        "{few_shot smollm2.trained.4_shots.low:.3f} to "
        "{few_shot smollm2.trained.4_shots.high:.3f})** | "
        "{few_shot smollm2.trained.4_shuffled.value:.3f} |",
        "add {few_shot smollm2.trained.4_minus_0.value:.3f} ("
        "{few_shot smollm2.trained.4_minus_0.low:.3f} to "
        "{few_shot smollm2.trained.4_minus_0.high:.3f})",
        "scenes by {few_shot starter.trained.4_minus_0.value:.3f} after four",
    ),
    "docs/decisions/language_models.md": (
        *(
            f"| {n} | {{few_shot smollm2.before.{n}_shots.value:.3f}}; "
            f"{{few_shot smollm2.before.{n}_shuffled.value:.3f}} | "
            f"{bold}{{few_shot smollm2.trained.{n}_shots.value:.3f}}{bold}; "
            f"{{few_shot smollm2.trained.{n}_shuffled.value:.3f}} |"
            for n, bold in ((0, ""), (1, ""), (2, ""), (4, "**"))
        ),
        "on new scenes {few_shot starter.trained.0_shots.value:.3f}, "
        "{few_shot starter.trained.1_shots.value:.3f}, "
        "{few_shot starter.trained.2_shots.value:.3f} and "
        "{few_shot starter.trained.4_shots.value:.3f} after",
    ),
    "docs/decisions/captions.md": (
        *(
            f"{{invented_objects rows.before.{way}.invented.value:%}} | "
            f"{{invented_objects rows.before.{way}.captions_with.value:%}} | "
            f"{{invented_objects rows.before.{way}.right.value:.2f}} | "
            f"{{invented_objects rows.before.{way}.CIDEr.value:.3f}} | "
            f"{{invented_objects rows.before.{way}.distinct_captions:.0f}} |"
            for way in ("greedy", "beams")
        ),
        *(f"**{{invented_objects rows.mean.{way}.invented:%}}**" for way in ("greedy", "beams")),
        *(
            f"one run | {{invented_objects rows.with_cider.{way}.invented.value:%}} ({change}) | "
            f"{{invented_objects rows.with_cider.{way}.captions_with.value:%}} | "
            f"{{invented_objects rows.with_cider.{way}.right.value:.2f}} | "
            f"{{invented_objects rows.with_cider.{way}.CIDEr.value:.3f}} ("
            for way, change in (("greedy", "-4.7"), ("beams", "-3.9"))
        ),
        *(
            f"| {{invented_objects rows.mean.{way}.captions_with:%}} | "
            f"{{invented_objects rows.mean.{way}.right:.2f}} | "
            f"{{invented_objects rows.mean.{way}.CIDEr:.3f}} ("
            for way in ("greedy", "beams")
        ),
    ),
    "docs/decisions/drawing.md": (
        *(
            f"{{preferences rows.{row}.guidance_1.objects:%}}{gain}"
            for row, gain in (("before", " | "), ("dpo-0", " (+7.8 to +17.6) | **"))
        ),
        "seed 1 | {preferences rows.dpo-1.guidance_1.objects:%} (+9.4 to +18.8) | "
        "{preferences rows.dpo-1.guidance_1_5.objects:%} (+10.7 to +21.1) | ",
        "seed 2 | {preferences rows.dpo-2.guidance_1.objects:%} (+4.8 to +14.7) | "
        "{preferences rows.dpo-2.guidance_1_5.objects:%} (+7.7 to +18.2) | ",
        "mean of three | {preferences rows.dpo-mean.guidance_1.objects:%} | "
        "**{preferences rows.dpo-mean.guidance_1_5.objects:%}** | "
        "{preferences rows.dpo-mean.guidance_3.objects:%} |",
        "(+7.2 to +16.9) | {preferences rows.kto-0.guidance_1_5.objects:%} (+8.8 to +19.3) | "
        "{preferences rows.kto-0.guidance_3.objects:%} (+3.5 to +13.1) |",
        "(-7.3 to +2.1) | {preferences rows.ipo-0.guidance_1_5.objects:%} (-2.9 to +6.5) | "
        "{preferences rows.ipo-0.guidance_3.objects:%} (-1.2 to +9.7) |",
    ),
    "docs/training/distillation.md": (
        "| the starter, its teacher | 4.92 million | {distillation rows.teacher.CIDEr.value:.3f}; "
        "{distillation rows.teacher.CIDEr_beams.value:.3f} |",
        *(
            f"{{distillation rows.{row}.CIDEr.value:.3f}}; "
            f"{{distillation rows.{row}.CIDEr_beams.value:.3f}}{end} | "
            f"{{distillation rows.{row}.share_of_teacher:%}}; "
            f"{{distillation rows.{row}.share_of_teacher_beams:%}} | "
            f"{{distillation rows.{row}.distinct_captions.value:.0f}}; "
            f"{{distillation rows.{row}.distinct_captions_beams.value:.0f}} |"
            for row, end in (("taught", "**"), ("alone", ""), ("recipe", ""))
        ),
        "**{distillation rows.rewarded.CIDEr.value:.3f}**; "
        "{distillation rows.rewarded.CIDEr_beams.value:.3f} | "
        "{distillation rows.rewarded.share_of_teacher:%}; "
        "{distillation rows.rewarded.share_of_teacher_beams:%} |",
        "({distillation rows.taught.CIDEr.low:.3f} to "
        "{distillation rows.taught.CIDEr.high:.3f} and "
        "{distillation rows.alone.CIDEr.low:.3f} to "
        "{distillation rows.alone.CIDEr.high:.3f} greedy",
    ),
    "docs/guides/engines.md": (
        "CIDEr {gguf CIDEr:.3f}): | GGUF of the starter",
        *(
            f"| `{dtype}` | {{gguf llama_cpp.{dtype}.megabytes:.1f}} | "
            f"{{gguf llama_cpp.{dtype}.equal:d}} | {{gguf llama_cpp.{dtype}.CIDEr:.3f}} |"
            for dtype in ("float32", "q8_0", "q4_k")
        ),
        "CIDEr {gguf_smollm2 CIDEr:.3f}): `float32` "
        "{gguf_smollm2 llama_cpp.float32.megabytes:.0f} MB and "
        "{gguf_smollm2 llama_cpp.float32.equal:d} captions, `q8_0` "
        "{gguf_smollm2 llama_cpp.q8_0.megabytes:.0f} MB and "
        "{gguf_smollm2 llama_cpp.q8_0.equal:d} (CIDEr {gguf_smollm2 llama_cpp.q8_0.CIDEr:.3f}), "
        "`q4_k` {gguf_smollm2 llama_cpp.q4_k.megabytes:.0f} MB and "
        "{gguf_smollm2 llama_cpp.q4_k.equal:d} ({gguf_smollm2 llama_cpp.q4_k.CIDEr:.3f})",
        "the first {onnx photos:d} photos of flickr8k val are all those of torch, and decoded "
        "pixels differ by {onnx pixels_differ_by:.0e}",
        *(
            f"| {{fewer_bits rows.{dtype}.CIDEr.value:.3f}} | {{fewer_bits rows.{dtype}.agree:%}} "
            f"| {{fewer_bits rows.{dtype}.tokens_per_second.alone:,.0f}} | "
            f"{{fewer_bits rows.{dtype}.tokens_per_second.together:,.0f}} |"
            for dtype in ("float32", "bfloat16", "int8", "int4", "int4_with_samples")
        ),
        *(
            f"| {{fewer_bits_smollm2 rows.{dtype}.CIDEr.value:.3f}} | "
            f"{{fewer_bits_smollm2 rows.{dtype}.agree:%}} | "
            f"{{fewer_bits_smollm2 rows.{dtype}.tokens_per_second.alone:.1f}} | "
            f"{{fewer_bits_smollm2 rows.{dtype}.tokens_per_second.together:.0f}} |"
            for dtype in ("float32", "bfloat16", "int8", "int4", "int4_with_samples")
        ),
    ),
    "docs/guides/evaluation.md": (
        "for men alone for {val flickr8k person_words women_said_men:%} of 195 photos of women",
        "women alone for {val flickr8k person_words men_said_women:%} of 359 photos of men",
        "adults for {val flickr8k person_words children_said_adults:%} of 222 photos of children",
    ),
    CARD: (
        "greedy: CIDEr {val flickr8k captioning CIDEr:.3f}, BLEU-4 "
        "{val flickr8k captioning Bleu_4:.3f}; 5 beams, length penalty 0.5: CIDEr "
        "{val flickr8k captioning CIDEr_beams:.3f}; different captions "
        "{val flickr8k captioning distinct_captions:.0f} and "
        "{val flickr8k captioning distinct_captions_beams:.0f}",
        "constant sentence {val flickr8k captioning CIDEr_constant:.3f}; the captions with beams, "
        "each for another photo, {val flickr8k captioning CIDEr_beams_shuffled:.3f}; of the "
        "captions of the 25 nearest training photos, by the same encoder, the most agreed one "
        "{val flickr8k captioning CIDEr_lookup:.3f}",
        "random absent things {val flickr8k presence random_accuracy:%}, frequent ones "
        "{val flickr8k presence popular_accuracy:%}, those that fit "
        "{val flickr8k presence adversarial_accuracy:%}",
        "templates of open_clip; chance 1 % | {val caltech101 classification top1:%}",
        "greedy answers; chance 50 % | {val nlvr answers accuracy:%}",
        "recall at 10 (chance 1 %) | text to image {val flickr8k retrieval text_to_image@10:%}, "
        "image to text "
        "{val flickr8k retrieval image_to_text@10:%}",
        "{val easy_vqa answers accuracy:%}; not answered by yes or no "
        "{val easy_vqa answers open:%}; about a grey picture "
        "{val easy_vqa answers blind_accuracy:%}, {val easy_vqa answers blind_open:%}",
        "{val scenes scene_captions attribute_precision:%} of the claims true, "
        "{val scenes scene_captions object_recall:%} of the objects",
        "600 scenes of heldout | {heldout scenes scene_captions attribute_precision:%}, "
        "{heldout scenes scene_captions object_recall:%}",
        "{val scenes answers accuracy:%}; by yes or no {val scenes answers closed:%}; about a grey "
        "picture {val scenes answers blind_accuracy:%}",
        "each, recall at 10 | text to image {val scenes retrieval text_to_image@10:%}, "
        "image to text {val scenes retrieval image_to_text@10:%}",
        "code by code: {val scenes scene_drawings objects:%} of the objects with the right colour "
        "and shape, {val scenes scene_drawings colours:%} with the right colour; masked: "
        "{val scenes scene_drawings objects_masked:%}, "
        "{val scenes scene_drawings colours_masked:%}. The true pictures, encoded and decoded: "
        "{val scenes scene_drawings objects_of_reconstructions:%}, "
        "{val scenes scene_drawings colours_of_reconstructions:%}",
    ),
}


@cache
def stored(name: str) -> Any:
    """A file in docs/, by its name, or by the split for the starter's."""
    return json.loads(REPORTS.get(name, ROOT / f"docs/{name}.json").read_text("utf-8"))


def score_of(report: str, folder: str, task: str, score: str) -> Any:
    (found,) = (
        result["scores"][score]["value"]
        for result in stored(report)["results"]
        if result["task"] == task and Path(result["data"]).name == folder
    )
    return found


def value_at(name: str, path: str) -> Any:
    return reduce(lambda value, key: value[key], path.split("."), stored(name))


def filled(row: str) -> str:
    def text(match: re.Match[str]) -> str:
        names, form = match[1].split(), match[2]
        value = value_at(*names) if len(names) == 2 else score_of(*names)
        found = f"{100 * value:.1f} %" if form == "%" else format(value, form)
        return found.replace("e-0", "e-")

    return re.sub(r"\{([^:}]+):([^}]+)\}", text, row)


@pytest.mark.parametrize("name", ROWS)
def test_the_numbers_in_the_text_are_those_of_the_files(name: str) -> None:
    text = " ".join((ROOT / name).read_text("utf-8").split())
    for row in ROWS[name]:
        assert (expected := filled(row)) in text, expected


def test_the_reports_are_of_the_bundled_starter() -> None:
    fingerprint = read_config(find_model("starter")).fingerprints.model
    for name in ("gguf", "onnx"):
        assert stored(name)["fingerprint"] == fingerprint, name
    assert stored("fewer_bits")["model"] == fingerprint
    for split in OF_STARTER:
        protocol = stored(split)["protocol"]
        assert protocol["fingerprint"] == fingerprint and protocol["split"] == split
        assert (
            protocol["seed"] == 0
            and protocol["dtype"] == "float32"
            and protocol["commit"] != "unknown"
        )
    results = stored("val")["results"]
    sizes = {(Path(r["data"]).name, r["task"]): r["n"] for r in results}
    assert sizes["flickr8k", "captioning"] == 1000 and sizes["scenes", "scene_captions"] == 600


def test_the_hours_in_the_text_are_those_of_the_steps() -> None:
    cost = json.loads((ROOT / "docs/starter_cost.json").read_text("utf-8"))
    hours = round(sum(step["minutes"] for step in cost["steps"]) / 60)
    word = "nought one two three four five six seven eight nine ten".split()[hours]
    for page in ("README.md", CARD):
        text = " ".join((ROOT / page).read_text("utf-8").split())
        assert f"{word} hours of two cpu cores" in text.lower(), page
