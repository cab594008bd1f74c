"""A real server and OpenAI's own client: answers are the model's, refusals are exceptions, who goes frees a row."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import json
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from flows.cli import main
from stages.serving.engine import open_engine
from stages.serving.generation import Generation
from tests.flows.endpoint.served import serving
from tests.flows.registry.test_served import answer, chain, registered
from tests.stages.validate.test_written import SOURCES
from tests.stages.validate.words import lively

pytestmark = pytest.mark.service  # servers of their own, for half a minute in all

TEXTS = ["The for statement is used to", "A class", "If the expression is found to be true, then the suite"]
CHAT = "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}assistant:"
LONG = 480


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The tiny Llama with a chat template."""
    made = tmp_path_factory.mktemp("served") / "chatty"
    shutil.copytree(tiny, made)
    (made / "chat_template.jinja").write_text(CHAT)
    return made


@pytest.fixture(scope="module")
def model(folder):
    return open_engine(folder)


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder, "--rows", 2, "--queue", 4) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def measured(address):
    """Values of /metrics by name and labels."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def idle(address):
    """Wait until no row is written."""
    until = time.monotonic() + 30
    while (said := httpx.get(f"{address}/health").json())["active"] or said["waiting"]:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_completions_are_the_models_own(client, model):
    made = client.completions.create(model="chatty", prompt=TEXTS, max_tokens=12)
    alone = [model.answers([one], Generation(max_new_tokens=12))[0] for one in TEXTS]
    assert [(one.index, one.text, one.finish_reason) for one in made.choices] == [
        (at, one.text, "length") for at, one in enumerate(alone)
    ]
    assert made.object == "text_completion" and made.model == "chatty" and made.id.startswith("cmpl-")
    used = made.usage
    assert used.prompt_tokens == sum(len(model.tokenizer.encode(one).ids) for one in TEXTS)
    assert (used.completion_tokens, used.total_tokens) == (36, 36 + used.prompt_tokens)
    ids = model.tokenizer.encode(TEXTS[0]).ids
    for prompt in (ids, [ids]):
        assert client.completions.create(model="chatty", prompt=prompt, max_tokens=12).choices[0].text == alone[0].text
    assert client.completions.create(model="chatty", prompt="b").usage.completion_tokens == 16


def test_drawn_and_stopped_completions_are_the_models_own(client, model):
    drawn = {"temperature": 0.9, "top_p": 0.9, "seed": 4}
    own = {"top_k": 40, "repetition_penalty": 1.2}
    made = client.completions.create(model="chatty", prompt=TEXTS[0], max_tokens=20, **drawn, extra_body=own)
    (wanted,) = model.generate([TEXTS[0]], max_new_tokens=20, **drawn, **own)
    assert made.choices[0].text == wanted != model.generate([TEXTS[0]], max_new_tokens=20)[0]
    (whole,) = model.generate([TEXTS[1]], max_new_tokens=20)
    stop = ["never said", whole[7:10]]
    made = client.completions.create(model="chatty", prompt=TEXTS[1], max_tokens=20, stop=stop).choices[0]
    assert (made.text, made.finish_reason) == (whole[: whole.index(whole[7:10])], "stop")


def test_conversation_is_answered_by_the_template_whole_and_in_pieces(client, model):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a class?"}]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a class?"}]
    (wanted,) = model.answers([talk], Generation(max_new_tokens=25))
    asked = {"model": "chatty", "max_completion_tokens": 25}
    for messages in (talk, [talk[0], {"role": "user", "content": parts}]):
        made = client.chat.completions.create(messages=messages, **asked)
        (one,) = made.choices
        assert (one.message.role, one.message.content, one.finish_reason) == ("assistant", wanted.text, wanted.finish)
        assert made.usage.prompt_tokens == wanted.prompt_tokens and made.object == "chat.completion"
    chunks = list(
        client.chat.completions.create(messages=talk, **asked, stream=True, stream_options={"include_usage": True})
    )
    *said, last = chunks
    assert "".join(one.choices[0].delta.content or "" for one in said) == wanted.text
    assert said[0].choices[0].delta.role == "assistant" and len(said) > 10
    assert [one.choices[0].finish_reason for one in said] == [None] * (len(said) - 1) + [wanted.finish]
    assert not last.choices and last.usage.completion_tokens == wanted.new_tokens
    assert all(one.usage is None for one in said) and len({one.id for one in chunks}) == 1


def test_streamed_completions_of_several_prompts_keep_their_numbers(client, model):
    texts = [""] * len(TEXTS)
    for chunk in client.completions.create(model="chatty", prompt=TEXTS, max_tokens=15, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == model.generate(TEXTS, max_new_tokens=15)


def test_stream_is_events_that_end_in_done(address):
    asked = {"model": "chatty", "prompt": "A class", "max_tokens": 3, "stream": True}
    got = httpx.post(f"{address}/v1/completions", json=asked)
    assert got.headers["content-type"].startswith("text/event-stream")
    events = got.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(one.startswith("data: {") for one in events[:-2])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_parameters_that_ask_for_nothing_are_taken(client, model):
    talk = [{"role": "user", "content": "b"}]
    idle = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "tools": []}
    idle |= {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "stop": None, "seed": None}
    idle |= dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"))
    idle |= {"function_call": "none", "prompt_cache_retention": "24h"}
    made = client.chat.completions.create(model="chatty", messages=talk, max_tokens=4, top_p=1, **idle)
    assert made.choices[0].message.content == model.generate([talk], max_new_tokens=4)[0]


def test_models_and_health_are_told(client, address):
    (only,) = client.models.list().data
    assert only.id == "chatty" == client.models.retrieve("chatty").id
    idle(address)
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "model": "chatty", "active": 0, "waiting": 0}


@pytest.mark.parametrize(
    ("path", "asked", "status", "param", "text"),
    [
        ("completions", {"prompt": ""}, 400, "prompt", "a prompt is empty"),
        ("completions", {"prompt": ["a", ""]}, 400, "prompt", "a prompt is empty"),
        ("completions", {"prompt": []}, 400, "prompt", "or empty"),
        ("completions", {}, 400, "prompt", "or empty"),
        ("completions", {"prompt": ["a", 1]}, 400, "prompt", "prompt is no text"),
        ("completions", {"prompt": [1, 768]}, 400, "prompt", "there is no such token; measured 768"),
        ("completions", {"prompt": "a " * 2000}, 400, "prompt", "longer than the model reads; measured"),
        ("completions", {"prompt": "a\ud800"}, 400, "prompt", "a prompt is no text"),
        ("completions", {"prompt": ["a"] * 10_000}, 400, "prompt", "written and wait; measured 10000; limit 6"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens is out of range; measured 0"),
        ("completions", {"prompt": "a", "max_tokens": 100_000}, 400, "max_tokens", "more than the model reads"),
        ("completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "is no whole number"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "is out of range; measured -1"),
        ("completions", {"prompt": "a", "temperature": float("nan")}, 400, "temperature", "is out of range"),
        ("completions", {"prompt": "a", "top_p": 2}, 400, "top_p", "is out of range; measured 2"),
        ("completions", {"prompt": "a", "seed": "x"}, 400, "seed", "seed is no whole number"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "stop", "stop strings are out of range"),
        ("completions", {"prompt": "a", "temprature": 1}, 400, "temprature", "Perhaps temperature is meant"),
        ("completions", {"prompt": "a", "n": 2}, 400, "n", "n is not followed here; measured 2; limit 1"),
        ("completions", {"prompt": "a", "n": True}, 400, "n", "n is not followed here"),
        ("completions", {"prompt": "a", "logprobs": 1}, 400, "logprobs", "logprobs is not followed here"),
        ("completions", {"prompt": "a", "stream": 1}, 400, "stream", "neither true nor false"),
        ("completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options", "without a stream"),
        ("completions", {"prompt": "a", "model": "gpt"}, 404, "model", "there is no model 'gpt'; there is 'chatty'"),
        ("completions", {"prompt": "a", "model": None}, 400, "model", "no model is named"),
        ("chat/completions", {}, 400, "messages", "messages are no list"),
        ("chat/completions", {"messages": ["a"]}, 400, "messages", "a message has no role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "is no text"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages",
            "a part of a message is no text",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "max_completion_tokens": 4},
            400,
            "max_completion_tokens",
            "differ",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
            400,
            "response_format",
            "response_format is not followed here",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "low"},
            400,
            "reasoning_effort",
            "reasoning_effort is not followed here; measured 'low'",
        ),
        ("embeddings", {"input": "a"}, 400, "model", "the model gives no vectors of texts"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_openais_form(address, path, asked, status, param, text):
    got = httpx.post(f"{address}/v1/{path}", content=json.dumps({"model": "chatty", **asked}))
    error = got.json()["error"]
    assert got.status_code == status and list(got.json()) == ["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and text in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "\xff"}', b"[" * 100_000])
def test_body_that_is_no_json_object_is_refused(address, body):
    got = httpx.post(f"{address}/v1/completions", content=body)
    assert got.status_code == 400 and "the body is no JSON" in got.json()["error"]["message"]


def test_refusals_are_the_clients_own_exceptions(client, address):
    with pytest.raises(openai.NotFoundError) as told:
        client.completions.create(model="other", prompt="a")
    assert told.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="a prompt is empty"):
        client.completions.create(model="chatty", prompt="")
    got = httpx.get(f"{address}/v1/nothing")
    assert got.status_code == 404
    assert got.json()["error"]["message"].startswith("there is no /v1/nothing; there are /v1/completions, ")


def test_head_is_where_get_is_and_other_methods_are_told_what_is(address):
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/chatty"):
        got = httpx.head(f"{address}{path}")
        assert (got.status_code, got.content) == (200, b"")
        got = httpx.options(f"{address}{path}")
        assert got.status_code == 405 and set(got.headers["Allow"].split(", ")) == {"GET", "HEAD"}
    got = httpx.get(f"{address}/v1/completions")
    assert got.status_code == 405 and got.headers["Allow"] == "POST"
    assert got.json()["error"]["message"] == "GET is not answered at /v1/completions; limit POST"


@pytest.mark.parametrize("host", ["page.example", "127.0.0.1.page.example:80"])
def test_page_of_another_name_does_not_reach_it(address, host):
    got = httpx.get(f"{address}/health", headers={"Host": host})
    assert got.status_code == 400


def test_machine_has_more_than_one_name(address):
    for name in ("localhost", "[::1]:80", "127.0.0.1:8000", "LOCALHOST"):
        assert httpx.get(f"{address}/health", headers={"Host": name}).status_code == 200, name


def test_server_of_the_other_kind_of_address_is_reached(tmp_path):
    with serving(chain(tmp_path / "chain"), "--host", "::1") as (address, _):
        asked = {"model": "chain", "prompt": "france is", "max_tokens": 2}
        assert httpx.post(f"{address}/v1/completions", json=asked).json()["choices"][0]["text"] == answer(["is"], 2)


def test_queue_that_is_full_turns_away_and_all_others_are_answered(client, model, address):
    idle(address)
    (wanted,) = model.generate(["b"], max_new_tokens=LONG)
    before, found = measured(address), []

    def ask():
        try:
            found.append(client.completions.create(model="chatty", prompt="b", max_tokens=LONG).choices[0].text)
        except openai.RateLimitError as error:
            found.append(error)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    away = [one for one in found if isinstance(one, openai.RateLimitError)]
    assert len(away) >= 4 and len(found) == 12
    assert all(one == wanted for one in found if one not in away)
    assert away[0].response.headers["Retry-After"] == "1" and away[0].code == "rate_limit_exceeded"
    after = measured(address)
    name = 'enginery_requests_total{outcome="%s"}'
    assert after[name % "turned_away"] - before[name % "turned_away"] == len(away)
    assert after[name % "length"] - before[name % "length"] == 12 - len(away)
    said = (12 - len(away)) * LONG
    assert after["enginery_generated_tokens_total"] - before["enginery_generated_tokens_total"] == said
    for kind, count in (("time_to_first_token", 12 - len(away)), ("time_per_token", said - 12 + len(away))):
        key = f"enginery_{kind}_seconds_count"
        assert after[key] - before[key] == count
    assert after["enginery_queue_length"] == after["enginery_active_rows"] == 0


def test_seed_with_a_sign_draws_the_same_each_time_and_other_than_without(client):
    def drawn(seed):
        asked = {"model": "chatty", "prompt": "A class", "max_tokens": 12, "temperature": 1.5}
        return client.completions.create(**asked, seed=seed).choices[0].text

    assert drawn(-1) == drawn(-1) != drawn(1)


@pytest.mark.parametrize("streams", [True, False])
def test_client_that_goes_frees_its_row(client, address, streams):
    idle(address)
    before = measured(address)
    if streams:
        with client.completions.create(model="chatty", prompt="b", max_tokens=LONG, stream=True) as stream:
            for _ in range(3):
                next(stream)
    else:
        body = json.dumps({"model": "chatty", "prompt": "b", "max_tokens": LONG}).encode()
        host, port = re.fullmatch(r"http://([\d.]+):(\d+)", address).groups()
        with socket.create_connection((host, int(port))) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            while not httpx.get(f"{address}/health").json()["active"]:
                time.sleep(0.01)
    idle(address)
    after = measured(address)
    gone = 'enginery_requests_total{outcome="gone"}'
    assert after[gone] - before[gone] == 1
    assert after["enginery_generated_tokens_total"] - before["enginery_generated_tokens_total"] < LONG / 2


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_server_that_is_told_to_stop_ends_what_runs_and_goes(folder, model, by):
    with (
        serving(folder, "--rows", 1, "--name", "other") as (address, child),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(model="other", prompt="b", max_tokens=60, stream=True)
        text = next(stream).choices[0].text
        began = time.monotonic()
        child.send_signal(by)
        text += "".join(one.choices[0].text for one in stream)
        assert text == model.generate(["b"], max_new_tokens=60)[0]
        assert child.wait(10) == 0 and time.monotonic() - began < 6
        assert not child.stdout.read()


def test_registered_model_is_served_by_its_name(registered, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered[0])
    with (
        serving("models:/chain@champion") as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
    ):
        made = client.completions.create(model="chain", prompt=["italy and", "the"], max_tokens=3)
        assert [(one.text, one.finish_reason) for one in made.choices] == [
            (answer(["and"], 3), "length"),
            ("italy", "stop"),
        ]
        talk = [{"role": "user", "content": "france"}]
        made = client.chat.completions.create(model="chain", messages=talk, max_tokens=3)
        assert made.choices[0].message.content == answer(["and"], 3)


def test_encoder_decoder_answers_many_texts_at_once_as_each_alone(tmp_path):
    folder = lively("t5", tmp_path)
    model, texts = open_engine(folder), [*SOURCES] * 4
    alone = {one: model.answers([one], Generation(max_new_tokens=14, beams=1))[0] for one in SOURCES}
    with serving(folder, "--rows", 3, "--name", "stacks") as (address, _):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:

            def ask(text):
                return client.completions.create(model="stacks", prompt=text, max_tokens=14).choices[0]

            with ThreadPoolExecutor(6) as pool:
                found = list(pool.map(ask, texts))
            for text, one in zip(texts, found, strict=True):
                assert (one.text, one.finish_reason) == (alone[text].text, alone[text].finish)
            streamed = client.completions.create(model="stacks", prompt=SOURCES[1], max_tokens=14, stream=True)
            assert "".join(one.choices[0].text for one in streamed) == alone[SOURCES[1]].text
            with pytest.raises(openai.BadRequestError, match="no parameter 'beams'"):
                client.completions.create(model="stacks", prompt="the cat", extra_body={"beams": 2})
            talk = [{"role": "user", "content": "the cat"}]
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(model="stacks", messages=talk)
        idle(address)
    assert len({one.text for one in alone.values()}) > 2


def test_what_cannot_be_served_is_one_line(folder, address, capsys, tmp_path):
    engine = chain(tmp_path / "vectors")
    described = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**described, "task": "tag"}))
    assert main(["serve", str(engine), "--port", "0"]) == 1
    said = "error: vectors writes no texts and gives no vectors of them; measured its task is tag; limit generate or"
    assert said in capsys.readouterr().err
    port = address.rpartition(":")[2]
    assert main(["serve", str(folder), "--port", port]) == 1
    assert f"error: port {port} of 127.0.0.1 cannot be listened on (Address already in use)" in capsys.readouterr().err
    assert main(["serve", str(folder), "--port", "0", "--host", "192.0.2.1"]) == 1
    assert "error: port 0 of 192.0.2.1 cannot be listened on" in capsys.readouterr().err
    assert main(["serve", "nothing", "--port", "0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
