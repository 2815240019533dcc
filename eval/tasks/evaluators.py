"""What a model can do, measured: small classes that yield ``(name, value)``.

An evaluator says which samples it can use; what it found for single samples is kept in
``examples``, to be looked at. To add one, write a class like these and put it into tasks.py.

Shapes: N samples, n codes of an image, D dimensions of an embedding.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.answering import normalise, same_answer, score_answers
from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.metrics.distribution import score_distribution
from multimodal.eval.metrics.features import Features
from multimodal.eval.metrics.objects import objects_said
from multimodal.eval.metrics.reconstruction import score_reconstructions
from multimodal.eval.metrics.retrieval import score_retrieval
from multimodal.eval.metrics.scene_captions import score_scene_captions
from multimodal.eval.metrics.scene_drawings import (
    objects_asked,
    score_drawn_claims,
    score_scene_drawings,
    whole_caption,
)
from multimodal.inference.drawing import DRAWN, Method, decode_images, draw_codes
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.inference.sampling import Sampling
from multimodal.inference.text import caption_codes, encode_images, text_after
from multimodal.model.lessons import asked_of, descriptions_of
from multimodal.model.sequences import OBJECTIVES, draw, pack
from multimodal.model.templates import Templates
from multimodal.scenes.claims import check_caption, parse_caption
from multimodal.scenes.scene import Scene

BEAMS = 5


def shapes_said(caption: str) -> set[str]:
    """The kinds of things a caption about a scene speaks of.

    Captions that name one that is not there are CHAIR's share of sentences (Rohrbach et al. 2018,
    arXiv:1809.02156), here without its doubts, as all is known that is there.
    """
    return {claim.value for claim in parse_caption(caption) if claim.kind == "shape"}


def is_described(sample: Sample) -> bool:
    return bool(descriptions_of(sample.record))


def scene_of(sample: Sample) -> Scene | None:
    scene = sample.record.get("scene")
    return None if scene is None else Scene.from_json(scene)


@dataclass
class Captioning:
    """Captions beside references; of scenes, which of their statements are true."""

    name: ClassVar[str] = "captioning"
    protocol: ClassVar[str] = (
        f"greedy, at most 64 tokens, and CIDEr_beams with {BEAMS} beams, length penalty "
        f"{Sampling().length_penalty}; Penn Treebank tokens, pycocoevalcap"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return is_described(sample)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        keys = [sample.key for sample in subject.samples]
        model, codes = subject.model, subject.codes
        said = subject.over(range(len(keys)), lambda rows: caption_codes(model, codes[list(rows)]))
        found = dict(zip(keys, said, strict=True))
        truth = {sample.key: descriptions_of(sample.record) for sample in subject.samples}
        scores = score_captions(found, truth)
        each = scores["per_image"]
        yield "CIDEr", [each[key]["CIDEr"] for key in keys]
        for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"):
            yield name, scores[name]  # a corpus' figure is not the mean of its images'
        yield "ROUGE_L", [each[key]["ROUGE_L"] for key in keys]
        by_search = Sampling(beams=BEAMS)
        searched = subject.over(
            range(len(keys)),
            lambda rows: caption_codes(model, codes[list(rows)], sampling=by_search),
        )
        by_beams = score_captions(dict(zip(keys, searched, strict=True)), truth)["per_image"]
        yield "CIDEr_beams", [by_beams[key]["CIDEr"] for key in keys]
        yield "words", [float(len(text.split())) for text in said]
        yield "distinct", len(set(said)) / len(said)
        for n in (1, 2):
            grams = [gram for text in said for gram in zip(*(text.split()[i:] for i in range(n)),
                                                           strict=False)]  # fmt: skip
            yield f"distinct_{n}", len(set(grams)) / max(1, len(grams))
        quality = {key: each[key]["CIDEr"] for key in keys}
        scenes = {sample.key: scene for sample in subject.samples if (scene := scene_of(sample))}
        if scenes and len(scenes) == len(keys):
            results = {key: check_caption(found[key], scene) for key, scene in scenes.items()}
            quality = {key: (one.precision + one.recall) / 2 for key, one in results.items()}
            for name, value in score_scene_captions(found, scenes).items():
                if name != "n":
                    yield f"scene_{name}", value
            yield (
                "hallucinated",
                [
                    float(bool(shapes_said(found[key]) - {thing.shape for thing in scene.objects}))
                    for key, scene in scenes.items()
                ],
            )
        elif not scenes:  # CHAIR, by sentences and by objects
            named = {key: objects_said(text) for key, text in found.items()}
            there = {key: objects_said(" ".join(texts)) for key, texts in truth.items()}
            yield "hallucinated", [float(bool(named[key] - there[key])) for key in keys]
            wrong, all_named = (
                sum(map(len, sets))
                for sets in ([named[key] - there[key] for key in keys], named.values())
            )
            yield "hallucinated_objects", wrong / max(1, all_named)
        for sample, image in zip(subject.samples, subject.images, strict=True):
            key = sample.key
            self.examples.append(
                Example(key, f"{found[key]} | {truth[key][0]}", quality[key], image)
            )


Asked: TypeAlias = tuple[int, str, str, str]


def all_asked(subject: Subject) -> list[Asked]:
    """(number of the sample, prompt, question or statement, answer) of everything that is asked."""
    templates = subject.model.config.templates
    return [
        (row, *one)
        for row, sample in enumerate(subject.samples)
        for one in asked_of(sample.record, templates)
    ]


@dataclass
class Answers:
    """Questions and statements: by kind, and beside it what the model says without the image."""

    name: ClassVar[str] = "answers"
    protocol: ClassVar[str] = (
        "greedy, at most 16 tokens; equal but for case, punctuation, articles and numbers in words "
        "or digits (VQA); blind: the "
        "same questions about an even grey picture"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(asked_of(sample.record, Templates()))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        asked = all_asked(subject)
        grey = encode_images(model, torch.zeros_like(subject.pixels[:1]))
        codes = subject.codes

        def answered(part: Sequence[Asked]) -> list[str]:
            prompts = [prompt for _, prompt, _, _ in part]
            return text_after(model, codes[[row for row, *_ in part]], prompts, max_tokens=16)

        def unseeing(part: Sequence[Asked]) -> list[str]:
            prompts = [prompt for _, prompt, _, _ in part]
            return text_after(model, grey.expand(len(part), -1), prompts, max_tokens=16)

        found, blind = subject.over(asked, answered), subject.over(asked, unseeing)
        expected = [answer for _, _, _, answer in asked]
        right = [same_answer(a, b) for a, b in zip(expected, found, strict=True)]
        yield "accuracy", PerQuestion([float(one) for one in right], [one[0] for one in asked])
        for name, value in score_answers(zip(expected, found, strict=True)).items():
            if name in ("open", "closed"):
                yield name, value
        for name, value in score_answers(zip(expected, blind, strict=True)).items():
            if name != "n":
                yield f"blind_{name}", value
        said = Counter(normalise(text) for text in found)
        yes, no = said["yes"], said["no"]
        if yes + no:
            wanted = Counter(map(normalise, expected))
            yield "says_yes", yes / (yes + no)
            yield "yes_is_right", wanted["yes"] / max(1, wanted["yes"] + wanted["no"])
        by_start: dict[str, list[bool]] = {}
        for (_, _, question, _), correct in zip(asked, right, strict=True):
            by_start.setdefault(question.lower().split()[0].strip("?:,."), []).append(correct)
        for start, each in sorted(by_start.items(), key=lambda item: -len(item[1]))[:8]:
            yield f"{start}...", sum(each) / len(each)
        yield "questions", float(len(asked))
        for (row, _, question, answer), text, correct in zip(asked, found, right, strict=True):
            sample = subject.samples[row]
            more = "" if correct else f" (right: {answer})"
            self.examples.append(
                Example(sample.key, f"{question} {text}{more}", float(correct), subject.images[row])
            )


@dataclass
class Retrieval:
    """Which image a text means among all, and which text an image."""

    name: ClassVar[str] = "retrieval"
    protocol: ClassVar[str] = "every caption against every image; ties count against the model"
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return is_described(sample)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        images = subject.rows_over(lambda codes: embed_codes(model, codes), subject.codes)
        texts, owners = list[str](), list[int]()
        for number, sample in enumerate(subject.samples):
            texts += descriptions_of(sample.record)
            owners += [number] * len(descriptions_of(sample.record))
        rows = torch.stack(subject.over(texts, lambda part: list(embed_texts(model, part))))
        scores = score_retrieval(images, rows, owners)
        yield from scores.items()
        likeness = rows @ images.T
        ranks = (likeness >= likeness.gather(1, torch.tensor(owners)[:, None])).sum(1).float()
        yield "text_to_image_median_rank", float(ranks.median())
        yield "images", float(len(images))


@dataclass
class Likelihood:
    """How surprised the model is: bits a byte of captions, nats a code of images."""

    name: ClassVar[str] = "likelihood"
    protocol: ClassVar[str] = (
        "the first caption given its image; codes one by one given the caption"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return is_described(sample)

    @torch.inference_mode()
    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, all_codes = subject.model, subject.codes

        def surprise(rows: Sequence[int]) -> list[tuple[float, float]]:
            """Of each: bits a byte of its caption, nats a code."""
            codes = all_codes[list(rows)]
            captions = [descriptions_of(subject.samples[row].record)[0] for row in rows]
            nats = (-text_likelihoods(model, codes, captions)).tolist()
            found = []
            for row, caption, nat in zip(codes.numpy(), captions, nats, strict=True):
                ids = model.text_tokenizer.encode(caption)
                sequence = draw(model.vocabulary, ids, row)
                packed = pack([sequence], len(sequence), model.vocabulary.pad).to(model.device)
                of_image = packed.objectives == OBJECTIVES.index("image")
                of_image &= packed.targets != model.vocabulary.eoi  # no code, and always sure
                logits = model.transformer.logits(model.hidden(packed)[of_image])
                code_nats = F.cross_entropy(logits, packed.targets[of_image])
                size = len(caption.strip().encode()) + 1  # and the end
                found.append((nat / math.log(2) / size, float(code_nats)))
            return found

        each = subject.over(range(len(subject.samples)), surprise)
        yield "caption_bits_per_byte", [bits for bits, _ in each]
        yield "image_nats_per_code", [nats for _, nats in each]


@dataclass
class Drawing:
    """Drawings after captions of scenes, read off their pixels; others by the model's own view."""

    name: ClassVar[str] = "drawing"
    protocol: ClassVar[str] = (
        f"code by code (masked: in 12 steps), guidance 3, temperature {DRAWN.temperature}; of "
        "scenes after the first caption that names all objects, read off the pixels by program; of "
        "others the model's own alignment score (the product of the embeddings of caption and "
        "drawing); fid and kid of "
        "the drawings, and of the true pictures encoded and decoded, to the true ones, with random "
        "features of seed 0: to compare with one another, with nothing published"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        if "scene" in sample.record:
            return whole_caption(sample.record) is not None
        return is_described(sample)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        prompts = [
            whole_caption(sample.record) if "scene" in sample.record else None
            for sample in subject.samples
        ]
        texts = [
            prompt or descriptions_of(sample.record)[0]
            for prompt, sample in zip(prompts, subject.samples, strict=True)
        ]
        sampling = replace(DRAWN, seed=subject.seed)
        true = subject.codes

        def drawings(method: Method) -> Tensor:
            """int64[N, n]"""
            made = subject.over(
                range(len(texts)),
                lambda rows: list(
                    draw_codes(model, [texts[row] for row in rows], method=method,
                               sampling=sampling, numbers=rows)
                ),
            )  # fmt: skip
            return torch.stack(made)

        codes = drawings("causal")
        meant = torch.stack(subject.over(texts, lambda some: list(embed_texts(model, some))))
        own, real = (
            (subject.rows_over(lambda some: embed_codes(model, some), of) * meant).sum(-1).tolist()
            for of in (codes, true)
        )
        made, again = (
            subject.rows_over(lambda some: decode_images(model, some), of) for of in (codes, true)
        )
        drawn, kept = ([to_image(image) for image in pictures] for pictures in (made, again))
        for end, pictures in (("", made), ("_of_reconstructions", again)):
            found = score_distribution(pictures, subject.pixels, Features(), subject.seed)
            for name, value in found.items():
                yield f"{name}_random_features{end}", value
        yield "own_alignment", own
        yield "own_alignment_of_true_images", real
        if (clip := subject.clip) is not None:
            for name, pictures_of in (("clip_score", drawn), ("clip_score_of_true_images",
                                                              subject.images)):  # fmt: skip
                pairs = list(zip(pictures_of, texts, strict=True))
                yield name, subject.over(pairs, lambda some: clip(*zip(*some, strict=True)))
        quality = own
        if all(prompts):
            scores = score_scene_drawings(texts, drawn)
            best = score_scene_drawings(texts, kept)
            for name in ("objects", "colours", "extra"):
                yield name, scores[name]
                yield f"{name}_of_reconstructions", best[name]
            masked = subject.rows_over(lambda some: decode_images(model, some), drawings("masked"))
            by_mask = score_scene_drawings(texts, [to_image(image) for image in masked])
            for name in ("objects", "colours"):
                yield f"{name}_masked", by_mask[name]
            yield "objects_asked", scores["n"]
            for kind, (share, claims) in score_drawn_claims(texts, drawn).items():
                yield f"{kind}_true", share
                yield f"{kind}_claims", float(claims)
            quality = [
                score_scene_drawings([text], [image])["objects"]
                for text, image in zip(texts, drawn, strict=True)
                if objects_asked(text)
            ]
        for sample, text, image, score in zip(subject.samples, texts, drawn, quality, strict=True):
            self.examples.append(Example(sample.key, text, score, image))


@dataclass
class Reconstruction:
    """What the image tokenizer keeps."""

    name: ClassVar[str] = "reconstruction"
    protocol: ClassVar[str] = (
        "images as the model sees them; perceptual and fid with random features of seed 0: to "
        "compare with one another, with nothing published"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return True

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        tokenizer = copy.deepcopy(subject.model.image_tokenizer).cpu()  # where the pictures are
        scores, again = score_reconstructions(
            tokenizer, subject.pixels, Features(), keep=len(subject.samples),
            on_batch=subject.on_batch,
        )  # fmt: skip
        yield from scores.items()
        errors = (again - subject.pixels).square().mean((1, 2, 3))
        for sample, image, error in zip(subject.samples, again, errors.tolist(), strict=True):
            psnr = -10 * math.log10(max(error, 1e-10) / 4)
            self.examples.append(Example(sample.key, f"{psnr:.1f} dB", psnr, to_image(image)))
