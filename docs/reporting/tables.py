"""The tables of the report, as Markdown, each a function of the JSON files."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from docs.reporting.results import (
    STAGES,
    STARTER,
    anywhere,
    config,
    find,
    parameters,
    read,
    result,
    shown,
    sources,
)
from multimodal.energy import GRAMS_PER_KWH, WATTS_PER_CORE

VAL, HELD_OUT = "starter_val", "starter_heldout"
WORDS = {
    "plain": "as in training",
    "asked: {text}": "asked as the bare question",
    "jpeg": "JPEG",
    "occlusion": "a part hidden",
}
NOT_JUDGED = "not judged"  # a caption that nobody has looked at yet
Rows = list[Sequence[str]]


def table(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def model() -> str:
    """The sizes of the bundled starter."""
    stored = config()
    sizes, layout = stored["transformer"], stored["layout"]["levels"]
    levels = [
        f"{level['name']}: {level['grid']} x {level['grid']} places, {level['groups']} "
        f"code{'s' * (level['groups'] > 1)} of {level['codebook_size']:,} at each"
        for level in layout
    ]
    codes = sum(level["grid"] ** 2 * level["groups"] for level in layout)
    heads = f"{sizes['num_attention_heads']} heads ({sizes['num_key_value_heads']} of keys)"
    image_tokenizer = parameters(STARTER / "image_tokenizer")
    rows: Rows = [
        ("transformer", f"{sizes['num_hidden_layers']} layers of {sizes['hidden_size']}, {heads}"),
        ("its parameters, with both projections",
         f"{(parameters(STARTER) - image_tokenizer) / 1e6:.1f} million"),
        ("parameters of the image tokenizer", f"{image_tokenizer / 1e6:.1f} million"),
        ("an image", f"{stored['preprocessing']['image_size']} pixels square; {codes} codes: "
         + "; ".join(levels)),
        ("levels that are read", ", ".join(stored["reads"])),
        ("texts", f"{stored['text_size']:,} ids of byte-level BPE"),
    ]  # fmt: skip
    return table(("", "bundled starter"), rows)


def data() -> str:
    """What the bundled starter was trained on."""
    rows: Rows = []
    for source in sources():
        count = source.get("samples")
        rows.append(
            (source["name"], f"{count:,}" if count else "", source.get("license") or "not stated")
        )
    return table(("source", "pictures", "licence"), rows)


def abilities() -> str:
    """What the bundled starter can do, beside what needs no model."""
    rows: Rows = []

    def row(what: str, folder: str, task: str, score: str, form: str, beside: str) -> None:
        found = find(VAL, folder, task, score)
        if found is not None:
            rows.append((what, f"{found.n:,}", found.text(form), beside))

    def without(folder: str, task: str, score: str, form: str, words: str) -> str:
        found = anywhere(folder, task, score)
        return "" if found is None else f"{words} {found.text(form)}"

    photos, task = "flickr8k", "captioning"
    constant = without(photos, task, "CIDEr_constant", ".3f", "one sentence for all")
    lookup = without(photos, task, "CIDEr_lookup", ".3f", "lookup")
    row("captions of photos, greedy: CIDEr", photos, task, "CIDEr", ".3f", constant)
    row("the same, 5 beams", photos, task, "CIDEr_beams", ".3f", lookup)
    for way, name in (("text_to_image", "a photo by a caption"), ("image_to_text", "the reverse")):
        row(f"find {name}: in the first ten", photos, "retrieval", f"{way}@10", "%", "chance 1 %")
    for folder, name in (("easy_vqa", "simple shapes"), ("scenes", "scenes")):
        grey = without(folder, "answers", "blind_accuracy", "%", "about a grey picture")
        row(f"answers about {name}", folder, "answers", "accuracy", "%", grey)
    reworded, changed = "scene_answers", "scene_counterfactuals"
    usual = without("scenes", reworded, "usual", "%", "in the usual one")
    row("the same, in wordings never trained", "scenes", reworded, "accuracy", "%", usual)
    stays = without("scenes", changed, "stays", "%", "those that must stay")
    row("one thing changed: answers that must change do", "scenes", changed, "follows", "%", stays)
    said = "scene_captions"
    row("captions of scenes: claims that are true", "scenes", said, "attribute_precision", "%", "")
    row("the same: objects named rightly", "scenes", said, "object_recall", "%", "")
    ceiling = "scene_drawings", "objects_of_reconstructions", "%", "encoded and decoded"
    row("drawn scenes: objects right", "scenes", "scene_drawings", "objects", "%",
        without("scenes", *ceiling))  # fmt: skip
    row("the same: colours right", "scenes", "scene_drawings", "colours", "%", "")
    row("photos encoded and decoded: dB", photos, "reconstruction", "psnr", ".1f", "")
    return table(("what", "n", "starter (95 %)", "beside it"), rows)


def stages() -> str:
    """Photos: what a frozen encoder's codes and a reward bring."""
    measured = (
        ("CIDEr, greedy", "captioning", "CIDEr", ".3f"),
        ("CIDEr, 5 beams", "captioning", "CIDEr_beams", ".3f"),
        ("BLEU-4, greedy", "captioning", "Bleu_4", ".3f"),
        ("captions that name an object nobody named", "captioning", "hallucinated", "%"),
        ("a photo by a caption: in the first ten", "retrieval", "text_to_image@10", "%"),
        ("a caption by a photo: in the first ten", "retrieval", "image_to_text@10", "%"),
        ('"is there a ...?", random absent things', "presence", "random_accuracy", "%"),
        ("the same, absent things that fit", "presence", "adversarial_accuracy", "%"),
    )
    rows: Rows = []
    for what, task, score, form in measured:
        rows.append((what, *(shown(find(r, "flickr8k", task, score), form) for r in
                             STAGES.values())))  # fmt: skip
    return table(("photos of Flickr8k val", *STAGES), rows)


def looking() -> str:
    """How much of a score needs the picture."""
    rows: Rows = []
    for folder, name in (("scenes", "scenes"), ("easy_vqa", "simple shapes")):
        for part, words in (("", "all"), ("closed", "yes or no"), ("open", "open")):
            seen, grey = (
                find(VAL, folder, "answers", score)
                for score in (part or "accuracy", f"blind_{part or 'accuracy'}")
            )
            rows.append((f"answers about {name}: {words}", shown(seen, "%"), shown(grey, "%")))
    for stage, report in STAGES.items():
        for score, words in (("CIDEr", "greedy"), ("CIDEr_beams", "5 beams")):
            names = (score, f"{score}_shuffled")
            own, other = (find(report, "flickr8k", "captioning", name) for name in names)
            if other is not None:
                rows.append((f"CIDEr of photos, {words} ({stage})", shown(own), shown(other)))
    return table(("", "with its picture", "grey, or another picture"), rows)


def unseen() -> str:
    """Pairs of colour and shape that training never shows."""
    rows: Rows = []
    for what, score in (
        ("claims that are true", "attribute_precision"),
        ("claims about colour", "precision_colour"),
        ("claims about shape", "precision_shape"),
        ("objects named with the right colour and shape", "object_recall"),
        ("captions without an error", "perfect"),
    ):
        found = (find(report, "scenes", "scene_captions", score) for report in (VAL, HELD_OUT))
        rows.append((what, *(shown(each, "%") for each in found)))
    return table(("captions of scenes", "pairs as in training", "one pair never seen"), rows)


def drawing() -> str:
    """Drawn scenes, read off the pixels."""
    task, rows = "scene_drawings", Rows()
    for what, score in (("right colour and shape", "objects"), ("right colour", "colours")):
        names = (score, f"{score}_masked", f"{score}_of_reconstructions")
        rows.append((what, *(shown(find(VAL, "scenes", task, name), "%") for name in names)))
    names = ("extra", "extra_masked", "extra_of_reconstructions")
    extra = (shown(find(VAL, "scenes", task, name), "%") for name in names)
    rows.append(("drawn objects that the text does not name", *extra))
    for what in ("count", "position", "relation", "size", "background"):
        rows.append((f"{what}s that are true", shown(find(VAL, "scenes", task, f"{what}_true"),
                                                    "%"), "-", "-"))  # fmt: skip
    return table(("objects", "code by code", "masked", "true pictures, coded and decoded"), rows)


def robust() -> str:
    """Other wordings and damaged pictures."""
    rows: Rows = []
    for folder, name in (("scenes", "scenes"), ("easy_vqa", "simple shapes")):
        found = result(VAL, folder, "robustness")
        scores = [] if found is None else list(found["scores"])
        for score in scores:
            if not score.startswith("spread"):
                words = WORDS.get(score) or score.replace("asked:", "asked as:")
                right = shown(find(VAL, folder, "robustness", score), "%")
                rows.append((name, words.replace("{text}", "..."), right))
    return table(("questions about", "", "right"), rows)


def examples() -> str:
    """Examples in the prompt."""
    rows: Rows = []
    for folder, name in (("scenes", "scenes"), ("flickr8k", "photos")):
        scores = (find(VAL, folder, "few_shot", f"CIDEr_{n}") for n in (0, 1, 2, 4))
        rows.append((f"{name}: CIDEr", *map(shown, scores)))
    return table(("examples before the picture", "0", "1", "2", "4"), rows)


def retrieved() -> str:
    """The nearest photos with their captions as examples."""
    rows: Rows = []
    names = {
        "without": "no examples",
        "first_caption": "the first caption of the nearest photo, no model",
        "nearest 1": "the nearest photo as an example",
        "random 1": "a photo at random as an example",
        "nearest 4": "the four nearest photos as examples",
        "random 4": "four photos at random as examples",
    }
    for key, row in read("retrieval")["rows"].items():
        low, high = row["interval"]
        value = f"{row['CIDEr']:.3f} ({low:.3f} to {high:.3f})"
        apart = " to ".join(f"{end:+.3f}" for end in row["minus_without"])
        rows.append((names.get(key, key), value, "" if key == "without" else apart))
    return table(("", "CIDEr (95 %)", "minus no examples (95 %)"), rows)


def thirty() -> str:
    """Captions of the first photos of val, beside what people wrote: a list, for people to read."""
    rows = read("starter_captions")["captions"]
    counts = Counter(row.get("judged", NOT_JUDGED) for row in rows)
    words = ["right", "partly", "wrong"] + [NOT_JUDGED] * (NOT_JUDGED in counts)
    lines = [", ".join(f"{counts[word]} {word}" for word in words) + ":", ""]
    for row in rows:
        said, wrote = (
            re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)
            for text in (row["caption"], " / ".join(row["references"][:2]))
        )
        judged = row.get("judged", NOT_JUDGED).capitalize()
        lines.append(f"1. **{said}** {judged}. People: {wrote}")
    return "\n".join(lines)


def cost() -> str:
    """What the training of the bundled starter took."""
    steps = read("starter_cost")["steps"]
    rows: Rows = [
        (step["name"], f"{step['minutes']:.0f}", f"{step['watt_hours']:.1f}", step["how"])
        for step in steps
    ]
    minutes, watt_hours = (sum(step[name] for step in steps) for name in ("minutes", "watt_hours"))
    carbon = f"{watt_hours / 1000 * GRAMS_PER_KWH:.0f} g CO2 at {GRAMS_PER_KWH:.0f} g a kWh"
    rows.append(("**all**", f"**{minutes:.0f}**", f"**{watt_hours:.0f}**", carbon))
    tasks = [each["cost"] for each in read(VAL)["results"]]
    seconds, of_cores = (sum(task[name] for task in tasks) for name in ("seconds", "cpu_seconds"))
    estimate = of_cores / 3600 * WATTS_PER_CORE
    how = f"estimated: CPU seconds x {WATTS_PER_CORE:g} W a core"
    rows.append(("its evaluation, once", f"{seconds / 60:.0f}", f"{estimate:.1f}", how))
    return table(("step", "minutes", "watt hours", ""), rows)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (model, data, abilities, stages, looking, unseen, drawing, robust, examples,
                 retrieved, thirty, cost)
}  # fmt: skip
