"""Captioning: captions compared with references, and with captions that need no model.

A score of captions says little alone: one sentence for all photos has a CIDEr of its own, and so
has what the training captions of similar photos say. Both are measured beside the model.

Shapes: M training pictures, N pictures, D dimensions of features.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

import torch
from einops import reduce
from torch import Tensor, nn

from multimodal.api import Model
from multimodal.data.documents import image_suffixes
from multimodal.data.objects import named_objects
from multimodal.data.samples import CODES, Sample
from multimodal.data.shards import Shards
from multimodal.distributed import gather_objects
from multimodal.eval.evaluator import Example, Subject, Value, problem_of
from multimodal.eval.metrics.captioning import score_captions, sentence_health
from multimodal.eval.metrics.penn_treebank import ptb_tokenize
from multimodal.eval.metrics.yardsticks import NEIGHBOURS, Lookup, best_constant, shuffled
from multimodal.inference.embedding import EmbeddingCache
from multimodal.inference.text import caption_codes
from multimodal.model.lessons import descriptions_of
from multimodal.options import TextOptions
from multimodal.tokenizers.meaning import Meaning
from multimodal.tokenizers.weights import hash_weights, resize

BEAMS = 5
MAX_TRAINING = 30_000  # training pictures that the yardsticks use, the first ones


@dataclass
class Captioning:
    """Captions compared with references."""

    name: ClassVar[str] = "captioning"
    from_codes: ClassVar[bool] = True  # it needs no pixels
    protocol: ClassVar[str] = (
        f"greedy, at most {TextOptions().max_tokens} tokens, and ..._beams with {BEAMS} beams, "
        f"length penalty {TextOptions().length_penalty}; Penn Treebank tokens, pycocoevalcap; "
        "hallucinated: captions that name an object that no reference names (CHAIR, by a list of "
        "words), if references name objects of the list; CIDEr_shuffled: the same captions, each "
        "for another picture; CIDEr_constant: one training caption for all pictures, the best one "
        "for the training pictures; CIDEr_constant_of_set: the best one for these pictures, of "
        "their own captions and those of training; bad_endings: captions that end in a word like "
        "'a' or 'with'; repetitions: those with a word twice in a row; "
        f"CIDEr_lookup: of the captions of the {NEIGHBOURS} training pictures with the nearest "
        "features (cosine of the mean over the grid of the image tokenizer's frozen encoder) the "
        f"one most similar to the others; at most {MAX_TRAINING:,} training pictures"
    )
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(descriptions_of(sample.record))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, codes = subject.model, subject.codes
        keys = [sample.key for sample in subject.samples]
        rows = range(len(keys))
        texts = subject.map_batches(rows, lambda batch: caption_codes(model, codes[list(batch)]))
        captions = dict(zip(keys, texts, strict=True))
        references = {sample.key: descriptions_of(sample.record) for sample in subject.samples}
        scores = score_captions(captions, references)
        per_image = scores["per_image"]
        yield "CIDEr", [per_image[key]["CIDEr"] for key in keys]
        for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"):
            yield name, scores[name]  # corpus BLEU is not the mean of per-image BLEU
        yield "ROUGE_L", [per_image[key]["ROUGE_L"] for key in keys]
        beam_search = TextOptions(beams=BEAMS)
        beam_texts = subject.map_batches(
            rows, lambda batch: caption_codes(model, codes[list(batch)], beam_search)
        )

        def cider(each: Sequence[str]) -> list[float]:
            of_image = score_captions(dict(zip(keys, each, strict=True)), references)["per_image"]
            return [of_image[key]["CIDEr"] for key in keys]

        yield "CIDEr_beams", cider(beam_texts)
        for name, each in self._yardsticks(subject, texts, beam_texts, references):
            yield name, cider(each)
        yield "words", [float(len(text.split())) for text in texts]
        for suffix, each in (("", texts), ("_beams", beam_texts)):
            health = sentence_health(each)
            yield f"bad_endings{suffix}", health["bad_endings"]
            yield f"repetitions{suffix}", health["repetitions"]
        yield "distinct_captions", float(len(set(texts)))
        yield "distinct_captions_beams", float(len(set(beam_texts)))
        for n in (1, 2):
            grams = [gram for text in texts for gram in _ngrams(text.split(), n)]
            yield f"distinct_{n}", len(set(grams)) / max(1, len(grams))
        yield from _hallucinations(captions, references)
        for sample, image in zip(subject.samples, subject.images, strict=True):
            key = sample.key
            text = f"{captions[key]} | {references[key][0]}"
            self.examples.append(Example(key, text, per_image[key]["CIDEr"], image))

    def _yardsticks(
        self,
        subject: Subject,
        texts: list[str],
        beam_texts: list[str],
        references: Mapping[str, list[str]],
    ) -> Iterator[tuple[str, Sequence[str]]]:
        """(name of the score, N captions). Notes say what was left out, and why."""
        count = len(texts)
        if count > 1:
            yield "CIDEr_shuffled", shuffled(texts, subject.seed)
            yield "CIDEr_beams_shuffled", shuffled(beam_texts, subject.seed)
        if not subject.yardsticks:
            return
        training = {
            row: [ptb_tokenize(caption) for caption in descriptions]
            for row, record in islice(subject.training_records(), MAX_TRAINING)
            if (descriptions := descriptions_of(record))
        }
        if not training:
            self.notes.append("no training split with captions: best constants, lookup left out")
            return
        captions = list(training.values())
        candidates = [caption for each in captions for caption in each]
        of_set = [[ptb_tokenize(caption) for caption in each] for each in references.values()]
        own = [caption for each in of_set for caption in each]
        for name, some, documents in (
            ("constant", candidates, captions),
            ("constant_of_set", candidates + own, of_set),
        ):
            constant = best_constant(some, documents)
            self.notes.append(f"CIDEr_{name}: {constant}")
            yield f"CIDEr_{name}", [constant] * count
        encoder = meaning_encoder(subject.model)
        if encoder is None:
            self.notes.append("the image tokenizer has no pretrained encoder: lookup left out")
        elif subject.has_codes or CODES in subject.training[0].members:
            self.notes.append("the shards hold codes in the place of images: lookup left out")
        else:
            rows = [row for row in training if image_suffixes(subject.training[row].members)]
            known = encoder_features(subject, encoder, subject.training, rows)
            seen = known.isfinite().all(1)  # what cannot be read has no features
            described = [training[row] for row, is_seen in zip(rows, seen, strict=True) if is_seen]
            if not described:
                self.notes.append("no training picture can be read: lookup left out")
                return
            lookup = Lookup(known[seen].numpy(), described)
            features = encoder_features(subject, encoder, subject.samples, range(count))
            found = subject.map_batches(
                range(count), lambda batch: lookup(features[list(batch)].numpy())
            )
            yield "CIDEr_lookup", found


def meaning_encoder(model: Model) -> nn.Module | None:
    """The frozen pretrained encoder of the image tokenizer, if it has one.

    float32[B, 3, H, W] in [-1, 1] -> float32[B, h, w, D].
    """
    meaning = model.image_tokenizer.meaning
    return None if meaning is None else _AtItsSize(meaning)


class _AtItsSize(nn.Module):
    """The encoder of a level of meaning, of images of any size: another level may want more."""

    def __init__(self, meaning: Meaning) -> None:
        super().__init__()
        self.encoder, self.image_size = meaning.encoder, meaning.config.image_size
        self.register_buffer("size", torch.tensor(self.image_size))  # kept features depend on it

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(resize(images, self.image_size))
        return features


def encoder_features(
    subject: Subject, encoder: nn.Module, samples: Shards | Sequence[Sample], rows: Sequence[int]
) -> Tensor:
    """The mean features of images over the grid.

    They are kept in ``subject.cache``, by the encoder, the preprocessing and the images.

    Args:
        samples: any. They are read one batch at a time.
        rows: M numbers of samples.

    Returns:
        float32[M, D]. NaN for an image that cannot be read.
    """
    model, tokenizer = subject.model, subject.model.image_tokenizer
    digest = hashlib.sha256(f"{tokenizer.image_size} {tokenizer.fit}".encode())
    hash_weights(digest, encoder.state_dict())
    for row in rows:
        digest.update(hashlib.sha256(samples[row].image).digest())
    cache = EmbeddingCache(subject.cache, digest.hexdigest()[:16]) if subject.cache else None
    # Ranks on several machines may have different caches, and all of them must take the same way.
    if all(gather_objects([cache is not None and "features" in cache.rows])):
        assert cache is not None
        return cache.rows["features"]

    @torch.inference_mode()
    def encode(batch: Sequence[int]) -> list[Tensor | None]:
        usable = {n: samples[row] for n, row in enumerate(batch) if not problem_of(samples[row])}
        if not usable:
            return [None] * len(batch)
        pixels = Subject(model, list(usable.values())).pixels.to(model.device)
        read = reduce(encoder(pixels), "b h w d -> b d", "mean").float().cpu()
        means = dict(zip(usable, read, strict=True))
        return [means.get(n) for n in range(len(batch))]

    found = subject.map_batches(rows, encode)
    width = next((len(mean) for mean in found if mean is not None), 1)
    nothing = torch.full((width,), torch.nan)
    features = torch.stack([nothing if mean is None else mean for mean in found])
    if cache is not None:
        cache.rows["features"], cache.added = features, len(features)
        cache.save()
    return features


def _ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _hallucinations(
    captions: dict[str, str], references: dict[str, list[str]]
) -> Iterator[tuple[str, Value]]:
    """CHAIR per caption and per object. Nothing if no reference names a known object."""
    true = {key: named_objects(" ".join(texts)) for key, texts in references.items()}
    if not any(true.values()):
        return
    named = {key: named_objects(text) for key, text in captions.items()}
    wrong = {key: named[key] - true[key] for key in captions}
    yield "hallucinated", [float(bool(objects)) for objects in wrong.values()]
    wrong_count, named_count = sum(map(len, wrong.values())), sum(map(len, named.values()))
    yield "hallucinated_objects", wrong_count / max(1, named_count)
