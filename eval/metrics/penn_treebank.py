r"""Texts as tokens of the Penn Treebank, as COCO's evaluation splits captions to score them.

COCO's evaluation (Chen et al. 2015, arXiv:1504.00325) calls Stanford's PTBTokenizer of 2014, a Java
program, and drops the tokens that are punctuation. This is the same without Java. The rules were
found by giving texts to that program and looking at its tokens. None of its code is here.
``tests/eval/ptb_tokens.tsv`` holds 2,233 texts with the tokens that it gave.

A text is read from left to right. At each place all rules are tried, and the longest match makes
the next token. Of two matches of one length the earlier rule wins.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeAlias

Writer: TypeAlias = Callable[[str], str]

LONGEST = 500  # characters of a token: so the time grows with the length, not its square

# COCO's evaluation drops these. Its list names brackets in upper case, while the tokens come in
# lower case: so "-lrb-" stays, and so does "!!".
DROPPED = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
# Quotes, also those of Windows-1252 that were read as Latin-1.
QUOTES = {
    **dict.fromkeys("`\u2018\u201b\u2039\u0091", "`"),
    **dict.fromkeys("\u2019\u203a\u0092", "'"),
    **dict.fromkeys("\u201c\u00ab\u0093", "``"),
    **dict.fromkeys("\u201d\u00bb\u0094", "''"),
}

# Abbreviations that may end a sentence: before a capital the stop counts twice.
ENDING = """
al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext
feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nebr
nev nov oct okla penn plc ppte ppty pte ptes pty ptys rd rt sep sept seq sq sr sys tel tenn thu
thur thurs tue tues univ va vt wed wis wisc wyo"""
ENDING_CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
# Titles and the like, which never end one.
LEADING = """
adj adm adv alex asst assoc atty attys ave brig capt cf cie cmdr col cpl dept det dr drs elec ens
ft gen gov govs hon insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc
ph pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt vs wm"""
BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"
# After U.S. and the like a sentence begins with one of these, also in capitals.
STARTERS = r"""
A About According After An As At But Earlier He Her Here However If In It Last Many More Now Once
One Other Our She Since So Some Such That The Their Then There These They This We What When While
Yet You Mr\. Ms\."""
FILE_SUFFIXES = """
bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png
ppt ps py sql tar txt wav x xml zip"""

# Marks that belong to words, and signs that stand alone: first and last of each range, in hex. The
# program knows the Unicode of its time. It drops later signs, and all above U+FFFF, like emoji.
MARKS = """
2c2 2c5 2d2 2df 2e5 2eb 2ed 2ed 2ef 36f 375 375 378 379 384 385 3f6 3f6 483 487 55a 55f 591 5bd 5bf
5bf 5c1 5c2 5c4 5c5 5c7 5c7 615 61a 64b 65e 670 670 6d6 6e4 6e7 6ed 6fd 6fe 70f 70f 711 711 730 74c
7a6 7b0 7eb 7f3 900 903 93c 93c 93e 94e 951 955 962 963 981 983 9bc 9bc 9be 9c4 9c7 9c8 9cb 9cd 9d7
9d7 9e2 9e3 a01 a03 a3c a3c a3e a4f a81 a83 abc abc abe acf b82 b82 bbe bc2 bc6 bc8 bca bcd c01 c03
c3e c56 d3e d44 d46 d48 e31 e31 e34 e3a e47 e4e eb1 eb1 eb4 ebc ec8 ecd"""
SIGNS = """
21 2f 3a 40 5b 60 7b 7e a1 a1 a5 a9 ac ac ae b4 b6 b9 bf bf d7 d7 f7 f7 37e 37e 387 387 589 589
5be 5be 5c0 5c0 5c3 5c3 5c6 5c6 5f3 5f4 600 603 606 60c 614 614 61b 61b 61e 61f 66a 66a 66d 66d
6d4 6d4 700 70d 7f6 7f8 964 965 e3f e3f e4f e4f 1fbd 1fbd 2016 2017 201a 201a 201e 2023 2030
2038 203b 203b 203e 2042 2070 2070 2074 207e 2080 208e 20a4 20a4 2100 2101 2103 2106 2108 2109
2114 2114 2116 2118 211e 2123 2125 2125 2127 2127 2129 2129 212e 212e 213a 213b 2140 2144 214a
214d 214f 214f 2155 215e 2190 2bff 3001 3002 3012 3012 30fb 30fb ff01 ff0f ff1a ff20 ff3b ff40
ff5b ff65 ffe0 ffe1 ffe5 ffe6"""


def ptb_tokenize(text: str) -> str:
    """The tokens that COCO's evaluation scores: in lower case, a space between them.

    A text is read by itself. (Java reads all captions as one text: there an abbreviation at the end
    of a caption is split by the first word of the next one.)
    """
    return " ".join(token for token in ptb_tokens(text) if token not in DROPPED)


def ptb_tokens(text: str) -> Iterator[str]:
    """All tokens of a text, punctuation too, in lower case."""
    text, at = text.rstrip() + "\n\n", 0
    while at < len(text):
        if word := _PLAIN_WORD.match(text, at, at + LONGEST):
            yield word[1].lower()
            at = word.end()
            continue
        best: re.Match[str] | None = None
        write: Writer = _as_it_is
        for pattern, writer in _rules():
            match = pattern.match(text, at, at + LONGEST)
            if match and (best is None or match.end() > best.end()):
                best, write = match, writer
        if best is None:  # a space, or a sign that the program does not know
            at += 1
            continue
        token = best[best.re.groups]  # the group, or all where there is none
        yield from filter(None, write(token).lower().split(" "))
        at += len(token)


# A word that no rule splits or prolongs: a quick way for most of a caption.
_PLAIN_WORD = re.compile(r"(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)\b)([A-Za-z]+)[ \n]")


def _as_it_is(token: str) -> str:
    """Brackets by their names, no-break spaces, no soft hyphens in words."""
    token = (token.replace("\u00ad", "") or "-").replace("&amp;", "&")
    return _one_word("".join(BRACKETS.get(sign, sign) if sign in "()" else sign for sign in token))


def _one_word(token: str) -> str:
    return re.sub(r"\s", "\u00a0", token)


def _straight(token: str) -> str:
    """With a plain apostrophe."""
    return re.sub("['\u2019\u0092]|&apos;", "'", token)


def _in_two(token: str) -> str:
    return f"{token[:3]} {token[3:]}"


def _stop_twice(token: str) -> str:
    return f"{token} ."


@cache
def _rules() -> tuple[tuple[re.Pattern[str], Writer], ...]:
    """Patterns, each with how its token is written.

    Where a pattern has a group, the group is the token. What follows it counts for the length, and
    is read again. Each text ends with two line breaks, so something always follows.
    """
    letters, digits = _letters(), _digits()
    L, D, W = f"[{letters}]", f"[{digits}]", f"[{letters}{digits}]"  # noqa: N806
    apostrophe, any_apostrophe = "['\u2019\u0092]", "(?:['\u2019\u0092]|&(?i:apos);)"
    name_apostrophe = "['\u2019\u0092`]"
    hyphen = "[-_\u058a\u2010\u2011]"
    number = f"(?:{D}*(?:[.:,\u00ad\u066b\u066c]{D}+)+|{D}+)"
    accented = f"(?:{L}|&(?i:[aeiou](?:acute|grave|uml));)"
    sentence = rf"{L}{W}*(?:[.!?]{L}{W}*)*"
    elided = f"(?:[dDoOlL]{name_apostrophe}{W})?"
    hyphenated = f"{elided}{W}+(?:{hyphen}{elided}{W}+)*"
    clitic = "(?i:s|d|m|ll|re|ve)"
    endings = (
        f"(?i:{_any_of(ENDING)}|ph\\.d)|{_any_of(ENDING_CAPITAL + ' ' + ENDING_CAPITAL.upper())}"
    )
    starts = rf"\s+(?:(?:{_any_of(STARTERS + STARTERS.upper())})\s|<[A-Za-z!?/][^>]*>)"
    part = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    attribute = r"\s+[A-Za-z][\w:.-]*(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'))?"
    host = r"[^ \t\n\f\r\"'`<>|.!?(){}$,-_]"  # also without the signs between the comma and _
    link, link_end = r"[^\s\"<>|()]", r"[^\s\"<>|.!?(){},-]"
    same = _as_it_is
    table: list[tuple[str, Writer]] = [
        # Markup and entities
        (rf"<[!?][A-Za-z-][^>]*>|</?[A-Za-z][\w:.-]*(?:{attribute})*\s*/?>", _one_word),
        (r"&(?i:mdash|ndash|md);|[\u2013-\u2015\u0096\u0097]|-{2,4}", lambda _: "--"),
        (r"-{5,}", same),
        (r"&(?i:amp);", lambda _: "&"),
        (r"&(?i:lt);", lambda _: "<"),
        (r"&(?i:gt);", lambda _: ">"),
        (r"&(?i:nbsp);", lambda _: ""),
        (r"&(?!quot|apos)(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq|quot|apos|#[0-9]+);", same),
        # Words with an apostrophe, and words that are two
        (rf"((?i:cannot|gonna|gotta|lemme|gimme|wanna))[^{letters}{digits}]", _in_two),
        (r"('[tT])(?i:is|was)", same),
        (rf"([A-Za-z]+?)[nN](?:{any_apostrophe}|`)[tT]", same),
        (r"(?i:cont)'d\.", same),
        (rf"({L}{W}*){any_apostrophe}{clitic}[^A-Za-z]", same),
        (rf"[nN](?:{any_apostrophe}|`)[tT][sS]?", _straight),
        (rf"({any_apostrophe}{clitic})[^A-Za-z]", _straight),
        (rf"{apostrophe}[nN]{apostrophe}?|[lLdDjJ]{apostrophe}|[oO][lL]{apostrophe}", same),
        (rf"(?i:dunkin|somethin){apostrophe}|&apos;em|&apos;[2-9]0[sS]", same),
        (rf"{apostrophe}(?i:em|till?|cause)|{apostrophe}[2-9]0[sS]", same),
        (rf"(?i:nor'easter|c'mon|c'est|e'er|s'mores|ev'ry|li'l|nat'l|o{apostrophe}o)", same),
        (rf"[A-HJ-XZn]{name_apostrophe}{L}{{2,}}", same),
        (rf"{L}+[aeiouyAEIOUY]{name_apostrophe}[aeiouA-Z]{L}*", same),
        (rf"([yY]{apostrophe}){L}", same),
        # Addresses
        (rf"(?i:https?)://{link}+{link_end}", same),
        (
            rf"(?:www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}|(?:{host}+\.)+(?i:com|net|org|edu))"
            rf"(?:/{link}+{link_end})?",
            str,
        ),
        (r"<?[a-zA-Z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|(){}.]+>?", same),
        (rf"@[A-Za-z_]\w*|#{L}+", same),
        # Numbers
        (rf"[-+]?{number}", same),
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", same),
        (r"(?:\d{1,4}[-\s])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", same),
        (f"[{''.join(FRACTIONS)}]", FRACTIONS.__getitem__),
        (r"(?:\(\d{2,3}\)\s?|(?:\+\+?)?(?:\d{2,4}[-\s])?\d{2,4}[-\s])\d{3,4}[-\s]?\d{3,5}", same),
        (r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}", same),
        (r"[A-Z]*\$", same),
        ("[\u20ac\u20a0\u00a4\u0080]", lambda _: "$"),
        ("£", lambda _: "#"),
        ("¢", lambda _: "cents"),
        # Abbreviations
        (rf"((?:{endings})\.)\s(?:[\sA-Z]|<[A-Za-z!?/][^>]*>)", _stop_twice),
        (rf"(?i:{_any_of(LEADING)})\.", same),
        (rf"((?i:{_any_of(BEFORE_NUMBERS)})\.)\s*{D}", same),
        (rf"([A-Za-z](?:\.[A-Za-z])+\.){starts}", _stop_twice),
        (rf"([A-Za-z])\.{starts}", same),
        (rf"((?:{sentence}|{number}|{hyphenated})\.)[,;:\u3001]", same),
        (r"[A-Za-z](?:\.[A-Za-z])*\.", same),
        (rf"((?i:non-u\.s\.)){starts}", _stop_twice),
        (rf"(?:[A-Za-z0-9]+-)+[A-Za-z](?:\.[A-Za-z])+\.|[A-Z](?:\.[A-Z])+\.-{L}+", same),
        (rf"{accented}(?:{accented}|{D})*(?:[.!?]{L}{W}*)*", same),
        (rf"((?:{endings})\.)[\s\S]{{2}}", same),
        (rf"([A-Za-z0-9]+(?:\.[A-Za-z0-9]+)*\.(?i:{_any_of(FILE_SUFFIXES)}))[\s.,!?]", same),
        # Words
        (hyphenated, same),
        (rf"{W}++(?:[.,]{W}++)++(?:-{W}++)++", same),
        (r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+|[cC](?:\+\+|#)", same),
        (rf"{part}(?:\\?/{part}){{1,2}}", same),
        # Faces
        (r"([<>]?[:;=][-o'*]?[()\[\]{DdPpO\\|@])[^A-Za-z0-9]", same),
        (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", same),
        # Signs
        (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u2026\u0085]", lambda _: "..."),
        (r"[?!]{2,}|\\?\*+|_+|#{2,}|@{2,}|<<|>>|-(?i:[lr][rcs]b)-", same),
        (r"(\"|&quot;)[A-Za-z0-9$]", lambda _: "``"),
        (r"\"|''|&quot;", lambda _: "''"),
        (r"(')[A-Za-z]\S", lambda _: "`"),
        (rf"{any_apostrophe}{clitic}", _straight),
        (r"('\d\d)\s", same),
        (r"'|&apos;", lambda _: "'"),
        (f"[{''.join(QUOTES)}]{{1,2}}", lambda token: "".join(map(QUOTES.__getitem__, token))),
        (r"[()\[\]{}]", BRACKETS.__getitem__),
        (f"[{_pairs(SIGNS)}]|{W}", same),
    ]
    return tuple((re.compile(pattern), writer) for pattern, writer in table)


def _any_of(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


def _letters() -> str:
    numbers = [n for n in range(0x10000) if unicodedata.category(chr(n))[0] == "L"]
    return "\u00ad" + _ranges(numbers) + _pairs(MARKS)


def _digits() -> str:
    return _ranges([n for n in range(0x10000) if unicodedata.category(chr(n)) == "Nd"])


def _ranges(numbers: list[int]) -> str:
    """The inside of a character class that has these characters."""
    starts = [n for n, before in zip(numbers, [-2, *numbers], strict=False) if n != before + 1]
    ends = [n for n, after in zip(numbers, [*numbers[1:], -2], strict=True) if n != after - 1]
    return "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, ends, strict=True))


def _pairs(ranges: str) -> str:
    numbers = [int(number, 16) for number in ranges.split()]
    return "".join(
        rf"\U{a:08x}-\U{b:08x}" for a, b in zip(numbers[::2], numbers[1::2], strict=True)
    )
