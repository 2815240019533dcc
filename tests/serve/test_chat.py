"""The openai SDK talks to /v1/chat/completions."""

import base64
import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import numpy as np
import openai
import pytest
import tokenizers
from PIL import Image

from multimodal.inference import json_schema
from multimodal.inference.text import generate_ids
from multimodal.options import TextOptions
from multimodal.serve.endpoints.answering import Choice
from multimodal.serve.endpoints.replies import _Edges, _message
from multimodal.serve.engine.pictures import read_data_uri
from multimodal.tokenizers.text import ChatFormat, TextTokenizer
from tests.layouts import that_talks
from tests.processes import wait_until

ASK = [{"role": "user", "content": "what is in the snow?"}]


def picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def about(image: Image.Image, text: str = "") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    parts.append({"type": "image_url", "image_url": {"url": data_uri(image)}})
    return [{"role": "user", "content": parts}]


def test_models_and_health(server: Any) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_that_of_the_model_itself(server: Any, temperature: float) -> None:
    """Captions, questions about images, questions alone."""
    model, image = server.model, picture()
    options: dict[str, Any] = {"max_tokens": 12, "temperature": temperature, "seed": 5}
    for messages, expected in (
        (about(image), model.caption(image, **options)),
        (about(image, "where?"), model.answer(image, "where?", **options)),
        (ASK, model.generate(["Question: what is in the snow? Answer:"], **options)[0]),
    ):
        answer = server.client().chat.completions.create(model="tiny", messages=messages, **options)
        assert answer.choices[0].message.content == expected
        assert answer.usage.total_tokens > answer.usage.completion_tokens == 12
        assert answer.choices[0].finish_reason == "length"


def test_a_stream_is_the_same_text(server: Any) -> None:
    client = server.client()
    how: dict[str, Any] = {"model": "tiny", "messages": about(picture(), "where?"), "n": 2,
        "temperature": 1.0, "seed": 3, "max_tokens": 20}  # fmt: skip
    whole = client.chat.completions.create(**how)
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    pieces = 0
    for chunk in client.chat.completions.create(
        **how, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            pieces += bool(choice.delta.content)
            reasons[choice.index] = choice.finish_reason
    assert [choice.message.content for choice in whole.choices] == list(texts.values())
    assert texts[0] != texts[1] and pieces > 4
    assert reasons == {0: "length", 1: "length"} and usage == whole.usage


def test_metrics_know_streams_and_errors_in_them(
    tiny_model: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("in the midst of it")

    path = 'path="/v1/chat/completions"'
    with serving(tiny_model(noise=0.1, tied=False)) as server:
        create, metrics = server.client().chat.completions.create, server.engines.metrics

        def counted(line: str) -> bool:
            return f"multimodal_{line}" in metrics.text().decode()

        create(model="tiny", messages=ASK, max_tokens=3)
        list(create(model="tiny", messages=ASK, max_tokens=3, stream=True))
        monkeypatch.setattr("multimodal.serve.endpoints.replies.noted", fails)
        with pytest.raises(openai.APIError):
            list(create(model="tiny", messages=ASK, max_tokens=3, stream=True))
        assert wait_until(lambda: counted(f'requests_total{{{path},status="500"}} 1.0'))
        assert counted(f'requests_total{{{path},status="200"}} 2.0')
        assert counted(f'first_output_seconds_count{{{path},stream="false"}} 1.0')
        assert counted(f'first_output_seconds_count{{{path},stream="true"}} 2.0')


def test_stop_texts_and_edges_of_white_space(server: Any) -> None:
    how: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 30, "seed": 1,
        "temperature": 1.0}  # fmt: skip
    client = server.client()
    text = client.chat.completions.create(**how).choices[0].message.content
    stop = text[10:13]
    how["logprobs"] = True
    answer = client.chat.completions.create(**how, stop=stop)
    stopped = answer.choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(stop)].strip()
    tokens = stopped.logprobs.content
    scored = b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace")
    assert scored.strip().startswith(stopped.message.content) and stop not in scored
    assert len(tokens) < answer.usage.completion_tokens
    chunks = list(client.chat.completions.create(**how, stop=[stop], stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == stopped.message.content
    found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for each in found for token in each.content] == tokens


def test_log_probabilities_are_those_of_the_tokens(server: Any) -> None:
    how: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 10, "logprobs": True}
    client = server.client()
    answer = client.chat.completions.create(**how, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 10
    assert "".join(token.token for token in tokens).strip() == answer.choices[0].message.content
    for token in tokens:  # greedy: each is the likeliest
        best = [each.logprob for each in token.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert token.logprob == best[0] and token.token == token.top_logprobs[0].token
    reply = server.model.reply([["Question: what is in the snow? Answer:"]], max_tokens=10)[0]
    total = sum(token.logprob for token in tokens)
    assert total == pytest.approx(reply.log_probability, abs=1e-3)
    streamed = [
        token
        for chunk in client.chat.completions.create(**how, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.logprob for token in streamed] == [token.logprob for token in tokens]


def test_json_follows_its_schema(server: Any) -> None:
    pytest.importorskip("llguidance")
    import json

    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["dog", "cat"]}, "count": {"enum": [1, 2]}},
        "required": ["animal", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    how: dict[str, Any] = {"model": "tiny", "messages": ASK, "response_format": form, "n": 3,
        "temperature": 1.0, "seed": 4}  # fmt: skip
    answer = server.client().chat.completions.create(**how)
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert value["animal"] in ("dog", "cat") and value["count"] in (1, 2)
        assert choice.finish_reason == "stop"
    cut = server.client().chat.completions.create(**how, max_tokens=2)
    assert {choice.finish_reason for choice in cut.choices} == {"length"}


def test_schemas_of_a_model_share_a_tokenizer(
    tiny_model: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    made, init = list[Any](), json_schema.SchemaTokenizer.__init__

    def counted(self: Any, *arguments: Any) -> None:
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(json_schema.SchemaTokenizer, "__init__", counted)
    with serving(tiny_model(noise=0.1, tied=False)) as server:
        for word in ("dog", "cat", "dog"):
            form = {"name": "a", "schema": {"enum": [word]}}
            answer = server.client().chat.completions.create(
                model="tiny", messages=ASK, max_tokens=9,
                response_format={"type": "json_schema", "json_schema": form},
            )  # fmt: skip
            assert answer.choices[0].message.content == f'"{word}"'
    assert len(made) == 1


def test_texts_around_images_are_lines_of_their_own() -> None:
    edges = _Edges()
    shown = edges(" a") + edges(" cat. ")
    edges.image()
    edges.image()
    shown += edges("  ") + edges(" A do") + edges("g. ")
    edges.image()
    shown += edges(" ")
    whole = _message(Choice(0, ["a cat.", picture(), picture(), "A dog.", picture()]))
    assert shown == whole["content"] == "a cat.\nA dog."
    first = _Edges()
    first.image()
    assert first(" text ") == "text"


def test_images_out_of_a_chat(server: Any) -> None:
    how: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 2, "temperature": 1.0,
        "modalities": ["image"]}  # fmt: skip
    prompt = "Question: what is in the snow? Answer:"
    (expected,) = server.model.generate([prompt], output="image", seed=2, temperature=1.0)
    found = server.client().post("/chat/completions", body=how, cast_to=object)
    (image,) = found["choices"][0]["message"]["images"]
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).tobytes() == expected.tobytes()
    assert found["usage"]["completion_tokens"] == 16


def test_turns_of_a_conversation_become_one_prompt(server: Any) -> None:
    """A system's text, an image, a question and its answer, another question."""
    image, how = picture(), {"max_tokens": 9}
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be short."}]
    messages += [*about(image, "who?"), {"role": "assistant", "content": "a cat"}]
    messages += [{"role": "user", "content": "where?"}]
    answer = server.client().chat.completions.create(model="tiny", messages=messages, **how)
    parts = ["Be short.", image, "Question: who? Answer:", "a cat", "Question: where? Answer:"]
    assert answer.choices[0].message.content == server.model.generate(parts, **how)[0]
    plain = server.client().chat.completions.create(
        model="tiny", messages=ASK, extra_body={"template": "none"}, **how
    )
    expected = server.model.generate([ASK[0]["content"]], **how)[0]
    assert plain.choices[0].message.content == expected


def test_replies_go_back_into_a_conversation_as_they_came(server: Any) -> None:
    """As an object of the SDK and as a dictionary, whose fields are null, with what was drawn."""
    create = partial(server.client().chat.completions.create, model="tiny", max_tokens=9)
    more = {"extra_body": {"logit_bias": None, "tools": None}}
    said = create(messages=ASK, **more).choices[0].message
    drawn = create(messages=ASK, seed=2, temperature=1.0, extra_body={"modalities": ["image"]})
    drawn = drawn.choices[0].message
    again = {"role": "user", "content": "where?"}
    (image,) = drawn.images
    picture = Image.open(io.BytesIO(read_data_uri(image["image_url"]["url"])))
    ask = [f"Question: {each}? Answer:" for each in ("what is in the snow", "where")]
    for reply, read in ((said, said.content.strip()), (drawn, picture)):
        (expected,) = server.model.generate([ask[0], read, ask[1]], max_tokens=9)
        for message in (reply, reply.model_dump()):
            found = create(messages=[*ASK, message, again], **more).choices[0].message.content
            assert found == expected
    with pytest.raises(openai.BadRequestError, match="of the assistant"):
        create(messages=[{**again, "images": [image]}])


def test_a_language_model_reads_texts_in_its_chat_template(tiny_model: Any, serving: Any) -> None:
    """Images are asked about as they were learned, and a turn ends where its token says so."""
    model = tiny_model(noise=0.1, tied=False)
    talking = that_talks(model.text_tokenizer)
    chat = talking.chat
    assert chat is not None
    assert len(talking) == len(model.text_tokenizer)
    model.text_tokenizer = talking
    messages = [{"role": "developer", "content": "Be short."}, *ASK]
    ids = talking.encode_chat([{"role": "system", "content": "Be short."}, *ASK])
    assert ids.count(40) == 2 and ids[0] != model.vocabulary.bos
    written = generate_ids(model, [ids], TextOptions(max_tokens=9))[0]
    expected = talking.decode(written)
    with serving(model) as server:
        ask = partial(server.client().chat.completions.create, model="tiny", max_tokens=9)
        answer = ask(messages=messages)
        assert answer.choices[0].message.content == expected.strip()
        assert answer.usage.prompt_tokens == len(ids)
        again = ask(messages=messages, extra_body={"template": "chat"})
        assert again.choices[0].message.content == expected.strip()
        asked = ask(messages=about(picture(), "where?"))
        assert asked.choices[0].message.content == model.answer(picture(), "where?", max_tokens=9)
        with pytest.raises(openai.BadRequestError, match="a chat template is for texts alone"):
            ask(messages=about(picture(), "where?"), extra_body={"template": "chat"})
    names = {number: name for name, number in talking.vocabulary().items()}
    turn = tokenizers.Tokenizer.from_str(talking.to_json())
    turn.add_special_tokens([names[written[3]]])
    template = chat.template.replace("eos_token", repr(chat.end))
    model.text_tokenizer = TextTokenizer.from_json(
        turn.to_str(), ChatFormat(template, names[written[3]])
    )
    assert model.text_tokenizer.encode_chat([*ASK]) == talking.encode_chat([*ASK])
    with serving(model) as server:
        answer = server.client().chat.completions.create(
            model="tiny", messages=messages, max_tokens=9, logprobs=True
        )
        assert answer.choices[0].finish_reason == "stop"
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
        assert answer.usage.completion_tokens == written.index(written[3])


def test_a_model_without_a_chat_template_says_so(server: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="chat template is what this model lacks"):
        server.client().chat.completions.create(
            model="tiny", messages=ASK, extra_body={"template": "chat"}
        )


def test_images_behind_addresses_are_fetched_if_that_is_allowed(
    tiny_model: Any, serving: Any
) -> None:
    image = picture()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            image.save(self.wfile, "PNG")

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_address[1]}/a.png"
        ask: dict[str, Any] = {"model": "tiny", "messages": linked(url)}
        model = tiny_model(noise=0.1, tied=False)
        with serving(model, fetch=True, private=True) as server:
            answer = server.client().chat.completions.create(**ask, max_tokens=5)
            assert answer.choices[0].message.content == model.caption(image, max_tokens=5)
        with serving(model, fetch=True) as server, pytest.raises(Exception, match="public"):
            server.client().chat.completions.create(**ask)
        http.shutdown()


def linked(*urls: str) -> list[dict[str, Any]]:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": content}]


def test_slow_addresses_keep_no_other_image_waiting(tiny_model: Any, serving: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(6) as pool:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with serving(tiny_model(noise=0.1, tied=False), fetch=True, private=True) as server:
            create = partial(server.client().chat.completions.create, model="tiny", max_tokens=5)
            slow = [pool.submit(create, messages=linked(url), timeout=5) for _ in range(6)]
            connections = [silent.accept()[0] for _ in slow]
            assert create(messages=about(picture()), timeout=4).usage.completion_tokens == 5
            with pytest.raises(openai.APITimeoutError):
                create(messages=linked(url), timeout=0.3)
            assert wait_until(lambda: server.app.open == len(slow)), "who leaves waits for nothing"
            assert not any(each.done() for each in slow), "nobody has answered them"
            for connection in connections:
                connection.close()
            assert all(isinstance(each.exception(), openai.BadRequestError) for each in slow)


def test_all_addresses_of_a_chat_share_its_seconds(
    tiny_model: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.2)
            self.send_response(200)
            self.end_headers()
            picture().save(self.wfile, "PNG")

        def log_message(self, *arguments: Any) -> None:
            pass

    monkeypatch.setattr("multimodal.serve.endpoints.screening.TIMEOUT", 0.5)
    with HTTPServer(("127.0.0.1", 0), Slow) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_address[1]}/a.png"
        with serving(tiny_model(noise=0.1, tied=False), fetch=True, private=True) as server:
            create = partial(server.client().chat.completions.create, model="tiny", max_tokens=2)
            assert create(messages=linked(url))
            with pytest.raises(openai.BadRequestError, match="took too long"):
                create(messages=linked(*[url] * 4))
        http.shutdown()
