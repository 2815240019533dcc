"""A server reads what prompts begin with once: images with many questions, texts of the system."""

from collections.abc import Callable
from typing import Any

import httpx2

from tests.layouts import that_talks
from tests.serve.conftest import KEY
from tests.serve.test_chat import about, picture

SYSTEM = {"role": "system", "content": "You look at pictures and answer with a word or two. " * 2}


def answers(server: Any) -> list[str]:
    """Of questions about two images, after a text of the system, and without a question."""
    found = []
    for number, question in enumerate(("what?", "where?", "who is it?", "what?")):
        for image in (picture(), picture().rotate(90)):
            for messages in (about(image, question), [SYSTEM, *about(image, question)]):
                made = server.client().chat.completions.create(
                    model="tiny", messages=messages, seed=number, temperature=1.0, max_tokens=6,
                    logprobs=True,
                )  # fmt: skip
                found.append(f"{made.choices[0].message.content} {made.choices[0].logprobs}")
    return found


def counted(server: Any, name: str) -> float:
    url = f"http://127.0.0.1:{server.port}/metrics"
    text = httpx2.get(url, headers={"Authorization": f"Bearer {KEY}"}).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_what_is_kept_changes_no_bit_and_is_counted(
    tiny_model: Callable[..., Any], serving: Callable[..., Any]
) -> None:
    model = tiny_model(noise=0.1, tied=False)
    with serving(model, prefix_bytes=0) as server:
        expected = answers(server)
        assert counted(server, 'multimodal_prefixes_total{source="kept"}') == 0
    with serving(model) as server:
        assert answers(server) == expected
        assert counted(server, 'multimodal_prefixes_total{source="kept"}') >= 12
        read = counted(server, 'multimodal_prefix_tokens_total{source="read"}')
        assert counted(server, 'multimodal_prefix_tokens_total{source="kept"}') > 2 * read
        assert counted(server, "multimodal_prefix_bytes") > 0


def test_a_second_turn_in_a_chat_template_reads_what_is_new(
    tiny_model: Callable[..., Any], serving: Callable[..., Any]
) -> None:
    model = tiny_model(noise=0.1, tied=False)
    model.text_tokenizer = that_talks(model.text_tokenizer)
    messages = [SYSTEM, {"role": "user", "content": "What is it that you see in the snow?"}]
    with serving(model) as server:
        source = 'multimodal_prefix_tokens_total{{source="{}"}}'

        def read() -> tuple[int, str, float, float]:
            made = server.client().chat.completions.create(
                model="tiny", messages=messages, max_tokens=9, temperature=1.0, seed=3
            )
            kept, new = (counted(server, source.format(name)) for name in ("kept", "read"))
            return made.usage.prompt_tokens, made.choices[0].message.content, kept, new

        first, reply, kept, before = read()
        assert kept == 0
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "Where?"}]
        second, _, kept, after = read()
        assert kept >= first - 16 and after - before == second - kept
