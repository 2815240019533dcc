"""Options: their fields, their help, their limits, and the same names for type checkers."""

import inspect
import subprocess
import sys
import types
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from multimodal.options import (
    AnswerOptions,
    CaptionArguments,
    CaptionOptions,
    DrawArguments,
    DrawOptions,
    EditArguments,
    EditOptions,
    Sampling,
    SamplingArguments,
    TextArguments,
    TextOptions,
    make_options,
)

ARGUMENTS: list[tuple[type[Sampling], Any]] = [
    (Sampling, SamplingArguments),
    (TextOptions, TextArguments),
    (CaptionOptions, CaptionArguments),
    (AnswerOptions, TextArguments),
    (EditOptions, EditArguments),
    (DrawOptions, DrawArguments),
]


def with_lists(kind: Any) -> Any:
    """A type as an argument may have it: a list wherever the options have a tuple."""
    if get_origin(kind) is tuple:
        item, _ = get_args(kind)
        return kind | list[item]
    return kind


@pytest.mark.parametrize(("options", "arguments"), ARGUMENTS)
def test_arguments_have_the_fields_and_types_of_the_options(
    options: type[Sampling], arguments: Any
) -> None:
    expected = get_type_hints(options)
    names = [item.name for item in fields(options)]
    hints = get_type_hints(arguments)
    assert sorted(hints) == sorted(names)
    assert hints == {name: with_lists(expected[name]) for name in names}
    assert arguments.__required_keys__ == frozenset(), "every option may be left out"


def test_the_table_above_names_all_options() -> None:
    def below(cls: type) -> set[type]:
        return {cls}.union(*(below(each) for each in cls.__subclasses__()))

    assert {options for options, _ in ARGUMENTS} == below(Sampling)


@pytest.mark.parametrize("options", [options for options, _ in ARGUMENTS])
def test_every_option_has_help_and_a_valid_default(options: type[Sampling]) -> None:
    hints, defaults = get_type_hints(options), options()
    for item in fields(options):
        assert item.metadata["help"].strip(), item.name
        assert item.default is not MISSING and item.kw_only, item.name
        assert getattr(defaults, item.name) == item.default
        kind = hints[item.name]
        kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if get_origin(kind) not in (None, types.UnionType, tuple):  # a Literal
            assert item.default in get_args(kind)
        else:
            assert isinstance(item.default, tuple(get_origin(each) or each for each in kinds))


def test_signatures_show_the_options_and_their_defaults() -> None:
    from multimodal.api import Model

    for method, options in (
        (Model.caption, CaptionOptions),
        (Model.caption_each, CaptionOptions),
        (Model.answer, AnswerOptions),
        (Model.generate, TextOptions),
        (Model.reply, TextOptions),
        (Model.stream, TextOptions),
        (Model.draw, DrawOptions),
        (Model.edit, EditOptions),
        (Model.outpaint, EditOptions),
        (Model.vary, EditOptions),
    ):
        parameters = inspect.signature(method).parameters
        hints = get_type_hints(options)
        shown = {name: item for name, item in parameters.items() if name in hints}
        assert list(shown) == [item.name for item in fields(options)]
        for item in fields(options):
            assert shown[item.name].default == item.default
            assert shown[item.name].annotation == hints[item.name]
            assert shown[item.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert "options" not in parameters


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="no option beams, warmth; there are temperature, top_k"):
        make_options(DrawOptions, {"warmth": 1, "beams": 2, "seed": 3})
    made = make_options(TextOptions, {"seed": 3, "stop": ["."]})
    assert made == TextOptions(seed=3, stop=(".",))


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"beams": 0},
        {"beams": 2, "temperature": 1.0},
        {"beams": 2, "repetition_penalty": 1.1},
        {"beams": 2, "stop": ["a"]},
        {"max_tokens": 0},
        {"stop": "a"},
        {"stop": [""]},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TextOptions(**options)


def test_options_do_not_import_torch() -> None:
    """``--help`` needs the options alone, and has to be fast."""
    code = "import sys, multimodal.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_none_stands_for_the_default_and_another_type_is_named() -> None:
    assert make_options(AnswerOptions, {"max_tokens": None, "stop": None}) == AnswerOptions()
    with pytest.raises(ValueError, match="max_tokens='many': expected a whole number"):
        make_options(TextOptions, {"max_tokens": "many"})
