"""A fallback answers where the model failed, is unsure or was filtered, and is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.decode import Decoder
from multimodal.memory import NotEnoughMemory
from multimodal.record.chain import Entry, entries
from multimodal.serve.app import make_app
from multimodal.serve.endpoints import answering
from multimodal.serve.engine.settings import Settings
from tests.serve.test_chat import ASK, about, picture

Make = Callable[..., Model]
SORRY = "Sorry, I cannot tell."


def chat(
    server: Any, messages: Any = ASK, stream: bool = False, **more: Any
) -> list[tuple[Any, ...]]:
    """Of each choice its text, why it ended, and its fallback."""
    how: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 8, **more}
    client = server.client()
    if not stream:
        made = client.chat.completions.create(**how).choices
        extra = [(choice.model_extra or {}).get("fallback") for choice in made]
        return [(c.message.content, c.finish_reason, e) for c, e in zip(made, extra, strict=True)]
    found: dict[int, tuple[Any, ...]] = {}
    for chunk in client.chat.completions.create(**how, stream=True):
        for choice in chunk.choices:
            text, reason, named = found.get(choice.index, ("", None, None))
            named = (choice.model_extra or {}).get("fallback") or named
            text += choice.delta.content or ""
            found[choice.index] = (text, choice.finish_reason or reason, named)
    return [found[number] for number in sorted(found)]


def noted(path: Path) -> dict[str, Any]:
    """The facts of the last request."""
    return dict([entry for entry in entries(path) if isinstance(entry, Entry)][-1].facts)


@pytest.fixture(scope="module")
def models(tiny_model: Make) -> tuple[Model, Model]:
    """Two models. The first one is broken where a test says so."""
    return tiny_model(noise=0.1, tied=False), tiny_model(noise=0.1, tied=False, seed=1)


@pytest.fixture
def broken(models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> Model:
    def fails(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(models[0].network.transformer.embed_tokens, "forward", fails)
    return models[0]


@pytest.fixture
def rules(tmp_path: Path) -> str:
    (tmp_path / "rules").mkdir()
    text = "pattern: '[a-z]'\nwhen: [reply]\nreason: it has letters\n"
    (tmp_path / "rules/letters.yaml").write_text(text, "utf-8")
    text = "words: [bomb]\nwhen: [prompt]\nreason: dangerous\n"
    (tmp_path / "rules/bombs.yaml").write_text(text, "utf-8")
    return str(tmp_path / "rules")


@pytest.mark.parametrize("stream", [False, True])
def test_another_model_answers_where_one_failed(
    broken: Model, models: tuple[Model, Model], serving: Any, tmp_path: Path, stream: bool
) -> None:
    record = tmp_path / "record.jsonl"
    with serving(broken, ("spare", models[1]), record=str(record)) as server:
        scored = server.client().chat.completions.create(
            model="tiny", messages=ASK, max_tokens=3, logprobs=True
        )
        found = chat(server, about(picture(), "who?"), stream, n=2, temperature=1.0, seed=3)
    expected = models[1].reply(
        [[picture(), "Question: who? Answer:"]] * 2, max_tokens=8, temperature=1.0, seed=3
    )
    texts = [str(reply.parts[0]) for reply in expected if not isinstance(reply, ValueError)]
    named = {"why": "failed", "by": "spare"}
    assert found == [(text, "length", named) for text in texts]
    assert scored.choices[0].logprobs.content == [], "its tokens are of another vocabulary"
    assert noted(record)["fallback"] == [{"choice": n, **named} for n in range(2)]


def test_what_waits_for_a_fallback_has_the_size_that_it_reads(
    models: tuple[Model, Model], serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, steps = list[Any](), answering.chat_steps

    def noted(given: Any, *arguments: Any) -> Any:
        asked.append(given)
        return steps(given, *arguments)

    monkeypatch.setattr("multimodal.serve.endpoints.chat.chat_steps", noted)
    with serving(models[0], ("spare", models[1])) as server:
        chat(server, about(picture().resize((500, 400)), "who?"))
    kept = [each for each in vars(asked[0]).values() if isinstance(each, list | tuple)]
    held = [part for several in kept for part in several if isinstance(part, Tensor)]
    assert len(held) == 2 and all(tuple(part.shape) == (1, 3, 32, 32) for part in held)


@pytest.mark.parametrize("stream", [False, True])
def test_unsure_replies_are_replaced_and_sure_ones_are_not(
    models: tuple[Model, Model], serving: Any, tmp_path: Path, stream: bool
) -> None:
    """The limit lies between two replies of the same model."""
    record = tmp_path / "record.jsonl"
    how: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 5}
    with serving(models[0]) as server:
        made = server.client().chat.completions.create(
            model="tiny", messages=ASK, max_tokens=8, logprobs=True, **how
        )
        plain = chat(server, **how)
    tokens = [[token.logprob for token in c.logprobs.content] for c in made.choices]
    means = [sum(each) / len(each) for each in tokens]
    limit = sum(sorted(means)[:2]) / 2
    settings: dict[str, Any] = {"unsure": limit, "record": str(record)}
    with serving(models[0], fallback_answer=SORRY, **settings) as server:
        found = chat(server, stream=stream, **how)
    unsure = means.index(min(means))
    named = {"why": "unsure", "by": "answer"}
    assert found[unsure] == (SORRY, "stop", named)
    assert [each for n, each in enumerate(found) if n != unsure] == [
        each for n, each in enumerate(plain) if n != unsure
    ]
    assert noted(record)["fallback"] == [{"choice": unsure, **named}]
    # Another model that is as unsure is no better: the answer follows it.
    with serving(models[0], ("spare", models[1]), fallback_answer=SORRY, unsure=-1e-9) as server:
        assert chat(server, stream=stream) == [(SORRY, "stop", named)]
    with serving(models[0], ("spare", models[1]), unsure=-1e-9) as server:
        assert chat(server, stream=stream, **how) == plain, "nothing is better than it"


def test_filtered_replies_and_prompts_get_the_fixed_answer(
    models: tuple[Model, Model], serving: Any, rules: str
) -> None:
    named = {"why": "filtered", "by": "answer"}
    settings = {"filters": rules, "fallback_answer": SORRY}
    with serving(models[0], ("spare", models[1]), **settings) as server:
        for stream in (False, True):
            expected = [(SORRY, "content_filter", named)]
            assert chat(server, stream=stream) == expected, "both models write letters"
            bomb = [{"role": "user", "content": "a bomb"}]
            assert chat(server, bomb, stream) == expected


def test_a_likelihood_is_of_the_tokens_of_the_model_that_was_asked(
    models: tuple[Model, Model], serving: Any, rules: str, tmp_path: Path
) -> None:
    """Not of the fallback's, and where nothing was written there is none."""
    settings = {"record": str(tmp_path / "record.jsonl"), "unsure": -1e-9}
    found = []
    for fallback in (None, ("spare", models[1])):
        with serving(models[0], fallback, fallback_answer=SORRY, **settings) as server:
            assert chat(server)[0][0] == SORRY
        found.append(noted(tmp_path / "record.jsonl"))
    first, both = found
    assert both["usage"]["completion_tokens"] == 2 * first["usage"]["completion_tokens"]
    assert both["likelihood"] == first["likelihood"] < 0
    with serving(models[0], filters=rules, fallback_answer=SORRY, **settings) as server:
        chat(server, [{"role": "user", "content": "a bomb"}])
    assert noted(tmp_path / "record.jsonl")["likelihood"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_fallback_answers_where_memory_is_not_enough(
    models: tuple[Model, Model], serving: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def refused(*_: Any) -> None:
        raise NotEnoughMemory("a batch needs about 9 GB of memory")

    monkeypatch.setattr(Decoder, "join_together", refused)
    with serving(models[0], fallback_answer=SORRY) as server:
        assert chat(server, stream=stream) == [(SORRY, "stop", {"why": "failed", "by": "answer"})]
    with serving(models[0]) as server, pytest.raises(openai.InternalServerError) as caught:
        chat(server, stream=stream)
    assert caught.value.status_code == 503


def test_without_a_fallback_errors_are_errors(
    broken: Model, models: tuple[Model, Model], serving: Any
) -> None:
    with serving(broken) as server, pytest.raises(openai.InternalServerError):
        chat(server)
    with serving(broken, fallback_answer=SORRY) as server:
        assert chat(server) == [(SORRY, "stop", {"why": "failed", "by": "answer"})]
        with pytest.raises(openai.BadRequestError, match="model reads at most"):
            chat(server, [{"role": "user", "content": "a " * 9000}])
    with serving(broken, ("spare", broken)) as server, pytest.raises(openai.InternalServerError):
        chat(server)
    with pytest.raises(ValueError, match="give a fallback"):
        make_app(models[1], Settings(unsure=-2.0))
