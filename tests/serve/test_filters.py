"""Rules of a server: what is refused or masked, before and after, streamed or not."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from multimodal.filters.rules import Filters
from multimodal.record.chain import Entry, entries
from multimodal.serve.app import make_app
from multimodal.serve.engine.settings import Settings
from tests.serve.test_chat import about

Make = Callable[..., Any]
RULES = {
    "insults": "words: [idiot]\nwhen: [prompt]\nreason: not nice\nanswer: I would rather not.\n",
    "mail": "personal: [email]\naction: mask\nreason: private\n",
    "red": "image: look.py:red\nwhen: [prompt]\nreason: no red\n",
    "vowels": "pattern: '[aeiou]'\naction: mask\nwhen: [reply]\nreason: no vowels\n",
}
LOOK = """
def red(image):
    return "is red" if image.convert("RGB").getpixel((0, 0)) == (255, 0, 0) else None
"""


@pytest.fixture(scope="module")
def filtered(
    tiny_model: Make, serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("filters")
    (folder / "rules").mkdir()
    (folder / "rules/look.py").write_text(LOOK, "utf-8")
    for name, text in RULES.items():
        (folder / f"rules/{name}.yaml").write_text(text, "utf-8")
    record = folder / "record.jsonl"
    settings = {"filters": str(folder / "rules"), "record": str(record), "record_texts": True}
    with serving(tiny_model(noise=0.1, tied=False), **settings) as server:
        yield server, record


def chat(server: Any, messages: Any, stream: bool = False, **more: Any) -> tuple[str, str | None]:
    """The text of a reply, and why it ended."""
    made = server.client().chat.completions.create(
        model="tiny", messages=messages, stream=stream, max_tokens=12, **more
    )
    if not stream:
        return made.choices[0].message.content, made.choices[0].finish_reason
    choices = [choice for chunk in made for choice in chunk.choices]
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    return "".join(choice.delta.content or "" for choice in choices), reasons[-1]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_prompt_is_answered_without_the_model(
    filtered: tuple[Any, Path], stream: bool
) -> None:
    server, _ = filtered
    reply = chat(server, user("You IDIOT!"), stream)
    assert reply == ("I would rather not.", "content_filter")


@pytest.mark.parametrize("stream", [False, True])
def test_replies_are_masked_whole_and_their_tokens_are_not_shown(
    filtered: tuple[Any, Path], server: Any, stream: bool
) -> None:
    masking, _ = filtered
    plain, ended = chat(server, user("two dogs run"))
    assert any(vowel in plain for vowel in "aeiou")
    shown, reason = chat(masking, user("two dogs run"), stream)
    assert (shown, reason) == (re.sub("[aeiou]", "[vowels]", plain), ended)
    made = masking.client().chat.completions.create(
        model="tiny", messages=user("two dogs run"), max_tokens=12, logprobs=True
    )
    assert made.choices[0].logprobs.content == []


def test_a_masked_prompt_is_what_the_model_reads(filtered: tuple[Any, Path]) -> None:
    server, _ = filtered
    masked = chat(server, user("write to [mail]"), seed=1)
    assert chat(server, user("write to a.b@example.org"), seed=1) == masked


def test_images_are_looked_at(filtered: tuple[Any, Path]) -> None:
    server, _ = filtered
    assert chat(server, about(Image.new("RGB", (32, 32), "red"), "what?")) == ("", "content_filter")
    assert chat(server, about(Image.new("RGB", (32, 32), "blue"), "what?"))[1] != "content_filter"


def test_drawings_after_refused_texts_are_errors_and_all_is_noted(
    filtered: tuple[Any, Path],
) -> None:
    server, record = filtered
    with pytest.raises(openai.BadRequestError, match="refused by the rule insults: not nice") as it:
        server.client().images.generate(model="tiny", prompt="an idiot")
    assert it.value.code == "content_filter"
    client = server.client()
    drawn = client.images.generate(model="tiny", prompt="a@b.org", extra_body={"seed": 2})
    same = client.images.generate(model="tiny", prompt="[mail]", extra_body={"seed": 2})
    assert drawn.data[0].b64_json == same.data[0].b64_json
    noted = [entry.facts for entry in entries(record) if isinstance(entry, Entry)]
    assert {"insults", "mail"} <= {rule for facts in noted for rule in facts.get("filters", ())}
    refused = next(facts for facts in noted if facts.get("code") == "content_filter")
    assert refused["filter_reasons"] == {"insults": "not nice"}


def test_what_is_recorded_is_what_the_model_may_read(
    filtered: tuple[Any, Path], serving: Callable[..., Any], tmp_path: Path
) -> None:
    """Of drawings, of what they should not show, and of texts that are embedded."""
    others, record = filtered[1], tmp_path / "record.jsonl"
    settings = {"filters": str(others.parent / "rules"), "record": str(record)}
    with serving(filtered[0].model, **settings, record_texts=True) as server:
        ask_with_personal_data(server.client())
    texts = [entry.texts for entry in entries(record) if isinstance(entry, Entry)]
    assert texts[:2] == [{"prompt": "for [mail]", "negative_prompt": "[mail]"}] * 2
    assert texts[2:4] == [{"prompt": "for [mail]\na dog"}] * 2
    assert texts[4:] == [{"prompt": "a dog\n"}, {"prompt": "a dog"}]
    assert "@" not in record.read_text("utf-8")


def ask_with_personal_data(client: Any) -> None:
    """Six requests, of which the last two are refused."""
    how = {"seed": 2, "negative_prompt": "c@d.org"}
    drawn = client.images.generate(model="tiny", prompt="for a@b.org", extra_body=how)
    how["negative_prompt"] = "[mail]"
    same = client.images.generate(model="tiny", prompt="for [mail]", extra_body=how)
    assert drawn.data[0].b64_json == same.data[0].b64_json
    asked: list[list[str]] = [["for a@b.org", "a dog"], ["for [mail]", "a dog"]]
    rows = [client.embeddings.create(model="tiny", input=texts).data for texts in asked]
    assert rows[0][0].embedding == rows[1][0].embedding
    with pytest.raises(openai.BadRequestError, match="rule insults"):
        client.embeddings.create(model="tiny", input=["a dog", "an idiot"])
    with pytest.raises(openai.BadRequestError, match="rule insults"):
        how["negative_prompt"] = "an idiot"
        client.images.generate(model="tiny", prompt="a dog", extra_body=how)


def test_images_are_looked_at_before_they_are_embedded(filtered: tuple[Any, Path]) -> None:
    server, _ = filtered
    for colour, refused in (("red", True), ("blue", False)):
        body = {"model": "tiny", "messages": about(Image.new("RGB", (32, 32), colour))}
        try:
            server.client().post("/embeddings", body=body, cast_to=object)
        except openai.BadRequestError as error:
            assert refused and error.code == "content_filter"
        else:
            assert not refused


def test_rules_about_texts_keep_no_other_request_waiting(
    filtered: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are asked in threads without an event loop."""
    server, _ = filtered
    looked, text = list[bool](), Filters.text

    def noted(*arguments: Any) -> Any:
        try:
            looked.append(bool(asyncio.get_running_loop()))
        except RuntimeError:
            looked.append(False)
        return text(*arguments)

    monkeypatch.setattr(Filters, "text", noted)
    chat(server, user("a dog"))
    server.client().images.generate(
        model="tiny", prompt="a dog", extra_body={"negative_prompt": "a cat"}
    )
    server.client().embeddings.create(model="tiny", input=["a dog"])
    assert len(looked) >= 4 and not any(looked)


def test_a_folder_that_is_no_rules_ends_the_start(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no rule"):
        make_app(tiny_model(), Settings(filters=str(tmp_path)))
