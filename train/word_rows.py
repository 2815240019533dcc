"""Embeddings for codes of images that start near those of the words they occur with.

A language model knows its words, and nothing of a new code. But the captions of training say which
words a code goes with: a code of grass with "grass", "field" and "dog". So an image begins as a
list of words that it may contain, and training has to make sentences of it. What a word says of a
code is its part of the divergence of the words beside the code from all words,

    g(k, w) = p(w | k) log(p(w | k) / p(w)),

and the embedding of the code is the mean of the words' embeddings, weighted by g.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from multimodal.data.samples import CODES, Sample
from multimodal.data.shards import Shards
from multimodal.model.checkpoint import ModelParts
from multimodal.model.lessons import descriptions_of
from multimodal.model.sequences import OBJECTIVES, Packed
from multimodal.model.training_batch import TrainingSample
from multimodal.tokenizers.text import TextTokenizer

SAMPLES = 10_000  # that are counted at most
STATES_OF = 16  # samples whose hidden states say what is likely to be output
MIN_ROW = 256  # tokens of a row of them
AT_ONCE = 1_000  # encodings in one product of matrices
LONGEST = 2  # lengths of a word: what a longer row outputs is not lowered enough
# By how much logits are lowered, in units of the largest logit of a text.
LOWERED, SPECIALS_LOWERED = 3.0, 0.15
# What a new special starts as: the first of these that the language model has.
LIKE = {
    "<bos>": ("<|endoftext|>", "<|begin_of_text|>", "<s>"),
    "<boi>": ("\n",),
    "<eoi>": (":",),
    "<eos>": ("<|im_end|>", "<|eot_id|>", "</s>", "<|endoftext|>"),
}


def start_rows(parts: ModelParts, shards: Iterable[Shards], row_length: int) -> None:
    """Give the embeddings of specials and codes of a language model a start, in place.

    Args:
        parts: a language model whose table has grown, and its tokenizers.
        shards: the training data. Without stored codes and captions the codes stay as they are.
        row_length: of the training, which an image with a text fits.
    """
    samples = list(captioned(shards, parts.codes_per_image))
    if not samples:
        return
    vocabulary, transformer = parts.vocabulary, parts.network.transformer
    table = transformer.embed_tokens.weight
    some = [TrainingSample(s.key, s.record, s.codes[:1], 0) for s in samples[:STATES_OF]]
    batch = parts.batch_builder(max(MIN_ROW, row_length)).build(some).to(parts.device)
    positions = predicting_texts(batch.packed)
    with torch.no_grad():
        specials = special_rows(table, parts.text_tokenizer)
        examples = captioned_codes(samples, parts.text_tokenizer.encode, parts.read)
        codes = word_rows(table, vocabulary.text_size, vocabulary.codebook_size, examples)
        if transformer.head is table and len(positions):
            states = parts.network.hidden(batch.packed).flatten(0, 1)[positions]
            largest = (states @ table.T).amax(-1).mean()
            offset = largest * silent_offset(states)
            codes = codes.to(offset) + LOWERED * offset
            for name in {"<bos>", "<boi>", "<eoi>"} & specials.keys():
                specials[name] += SPECIALS_LOWERED * offset
        table[vocabulary.image_start : vocabulary.image_end] += codes.to(table)
        for name, row in specials.items():
            table[vocabulary.special(name)] = row


def word_rows(
    table: Tensor, text_size: int, codes: int, examples: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """What the embeddings of codes start with.

    Args:
        table: float[V, D], embeddings. The first ``text_size`` are those of texts.
        text_size: T, the number of ids of texts.
        codes: K, the number of codes.
        examples: for each image its codes, int64[n] in [0, K), and the ids of its captions,
            int64[m] in [0, T).

    Returns:
        float[K, D], offsets from the mean of the texts' embeddings, as long as those of words are
        in the mean, and LONGEST times as long at most: a code that was seen twice is as sure of its
        word as one can be. 0 for a code that goes with no word more than any other code does.
    """
    pairs = list(examples)
    words = torch.unique(torch.cat([torch.zeros(0, dtype=torch.long), *(ids for _, ids in pairs)]))
    together, with_code, with_word = (
        torch.zeros(size) for size in ((codes, len(words)), codes, len(words))
    )
    for first in range(0, len(pairs), AT_ONCE):
        batch = pairs[first : first + AT_ONCE]
        has_code, has_word = torch.zeros(len(batch), codes), torch.zeros(len(batch), len(words))
        for row, (image, ids) in enumerate(batch):
            has_code[row, image] = 1
            has_word[row, torch.searchsorted(words, ids)] = 1
        together += has_code.T @ has_word
        with_word += has_word.sum(0)
        with_code += has_code.sum(0)
    # A count less its standard deviation: what was seen once or twice says nothing.
    seen = (together - together.sqrt()).clamp_min(0)
    of_code = seen / with_code.clamp_min(1)[:, None]
    ratio = of_code * len(pairs) / with_word.clamp_min(1)
    weights = of_code * ratio.clamp_min(1).log()
    texts = table[:text_size].detach().float().cpu()
    offsets = texts - texts.mean(0)
    # Words of a caption have much in common, and what all codes would have says nothing.
    share = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
    rows = share @ offsets[words]
    known = (share.sum(1) > 0) * with_code
    rows = torch.where(known[:, None] > 0, rows - known @ rows / known.sum().clamp_min(1), 0.0)
    length = rows.norm(dim=1).sum() / (known > 0).sum().clamp_min(1)
    usual = offsets.norm(dim=1).mean()
    rows = rows * (usual / length.clamp_min(1e-12))
    return rows * (LONGEST * usual / rows.norm(dim=1, keepdim=True).clamp_min(LONGEST * usual))


def special_rows(table: Tensor, tokenizer: TextTokenizer) -> dict[str, Tensor]:
    """What the embeddings of specials start with: an image stands in a line of its own, and what
    follows it is like what follows a colon.

    Returns:
        for the name of a special float[D]. Those that nothing is like are left out.
    """
    known = tokenizer.vocabulary()
    found = {}
    for name, texts in LIKE.items():
        for text in texts:
            ids = [known[text]] if text in known else tokenizer.encode(text)
            if len(ids) == 1:
                found[name] = table[ids[0]].detach().clone()
                break
    return found


def predicting_texts(packed: Packed) -> Tensor:
    """int64[N], the positions in the flattened rows that predict a text, or its end."""
    texts = torch.tensor([OBJECTIVES.index(name) for name in ("caption", "text", "answer")])
    objectives = packed.objectives.flatten()
    return torch.isin(objectives, texts.to(objectives.device)).nonzero()[:, 0]


def silent_offset(states: Tensor) -> Tensor:
    """What lowers the logit of an embedding that is the output layer, too: by one, in all states.

    A code that starts like "dog" would be as likely as "dog" is, and would have to unlearn it.

    Args:
        states: float[N, D], hidden states that predict texts.

    Returns:
        float[D], by least squares.
    """
    states = states.detach().float()
    products = states.T @ states
    ridge = 0.01 * products.diagonal().mean() * torch.eye(len(products), device=states.device)
    return -torch.linalg.solve(products + ridge, states.sum(0))


def captioned(shards: Iterable[Shards], codes_per_image: int) -> Iterator[Sample]:
    """The first samples that have stored codes and captions. Unusable ones are left out."""

    def usable(sample: Sample) -> bool:
        try:
            codes = sample.codes if CODES in sample.members else None  # a document has none
            return (
                codes is not None
                and codes.shape[1:] == (codes_per_image,)
                and bool(descriptions_of(sample.record))
            )
        except ValueError:
            return False  # training counts and names it

    coded = (folder for folder in shards if folder.encoding is not None)
    return islice(filter(usable, chain.from_iterable(coded)), SAMPLES)


def captioned_codes(
    samples: Iterable[Sample],
    encode: Callable[[str], list[int]],
    read: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """What ``word_rows`` counts: for each encoding of an image its codes, and ids of its captions.

    Args:
        encode: the text tokenizer's.
        read: of all codes of images those that the model reads.
    """
    for sample in samples:
        ids = torch.tensor([i for text in descriptions_of(sample.record) for i in encode(text)])
        yield from ((codes, ids) for codes in read(torch.from_numpy(sample.codes)))
