"""Vectors over HTTP, asked by OpenAI's own client: those of the engine, or a refusal that is an exception there."""

import base64
import dataclasses
import socket
import time

import httpx
import numpy as np
import openai
import pytest

from flows.endpoint.refusals import Refusal
from flows.endpoint.vectors import MOST_TEXTS, Vectors, wanted
from stages.serving.engine import open_engine
from stages.serving.reading import embed
from tests.flows.endpoint.served import serving
from tests.flows.endpoint.test_server import idle, measured
from tests.stages.export.test_pooled import modules
from tests.stages.validate.test_embedding import TEXTS, encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("vectors")
    return modules(encoder(root), root / "own", {"pooling_mode_mean_tokens": True}, most=16)


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.mark.service  # a server of its own
def test_vectors_are_the_models_own_in_both_forms(client, folder):
    model = open_engine(folder)
    own = embed(model, TEXTS)
    for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 32}):
        made = client.embeddings.create(model="own", input=list(TEXTS), **form)
        given = [one.embedding for one in made.data]
        if form.get("encoding_format") == "base64":  # the client leaves those to whoever asks for them
            given = [np.frombuffer(base64.b64decode(one), "<f4") for one in given]
        np.testing.assert_allclose(given, own, rtol=1e-5, atol=1e-6)
        assert [one.index for one in made.data] == list(range(len(TEXTS))) and made.model == "own"
        assert made.usage.prompt_tokens == sum(len(model.tokenizer.encode(one).ids) for one in TEXTS)
    (one,) = client.embeddings.create(model="own", input="a b").data
    np.testing.assert_allclose(np.linalg.norm(one.embedding), 1, rtol=1e-5)
    long = "a b " * 20
    (cut,) = client.embeddings.create(model="own", input=long, extra_body={"truncate": True}).data
    np.testing.assert_allclose(cut.embedding, embed(model, [long], truncate=True)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.service
@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"input": ""}, "input", "a text is empty"),
        ({"input": "a b " * 20}, "input", "measured 42 tokens; limit 16 tokens"),
        ({"input": [1, 2]}, "input", "tokens are not taken"),
        ({"input": ["a"], "dimensions": 8}, "dimensions", "measured 8; limit 32"),
        ({"input": "a", "extra_body": {"inputs": 1}}, "inputs", "Perhaps input is meant"),
    ],
)
def test_what_is_not_read_is_refused_in_openais_form(client, asked, param, said):
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        client.embeddings.create(model="own", **asked)
    assert refused.value.param == param


@pytest.mark.service
def test_model_of_vectors_continues_nothing_and_other_names_are_unknown(client, address):
    with pytest.raises(openai.BadRequestError, match="the model continues no text; measured its task is embed"):
        client.completions.create(model="own", prompt="a")
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.embeddings.create(model="other", input="a")
    body = b'{"model": "own", "input": "a \\udcff"}'
    assert (
        "limit what UTF-8 can write" in httpx.post(f"{address}/v1/embeddings", content=body).json()["error"]["message"]
    )


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"input": []}, "or empty"),
        ({"input": ["a"] * (MOST_TEXTS + 1)}, "measured 2049; limit 2048"),
        ({"input": "a", "encoding_format": "hex"}, "limit float, base64"),
        ({"input": "a", "dimensions": True}, "dimensions is no whole number"),
        ({"input": "a", "truncate": 1}, "truncate is neither true nor false"),
    ],
)
def test_parameters_out_of_range_are_refused(said, why):
    with pytest.raises(Refusal, match=why):
        wanted({"model": "own", **said})


def test_requests_beyond_the_queue_are_turned_away(folder):
    import asyncio

    vectors = Vectors(open_engine(folder), 2)

    async def many():
        asked = [vectors.answered(wanted({"input": "a b"}), "own") for _ in range(5)]
        return await asyncio.gather(*asked, return_exceptions=True)

    told = asyncio.run(many())
    turned = [one for one in told if isinstance(one, Refusal)]
    assert len(turned) == 2 and {one.status for one in turned} == {429}
    assert [one["data"][0]["embedding"] for one in told if isinstance(one, dict)] == [
        told[0]["data"][0]["embedding"]
    ] * 3
    assert vectors.waiting == 0


def test_nobody_is_answered_who_has_gone(folder):
    import asyncio

    engine = open_engine(folder)
    read, vectors = [], Vectors(engine, 2)

    def forward(ids_NT, mask_NT, *more):
        read.append(len(ids_NT))
        return engine.forward(ids_NT, mask_NT, *more)

    vectors.model = dataclasses.replace(engine, forward=forward)

    async def left():
        long = asyncio.ensure_future(vectors.answered(wanted({"input": ["a b"] * MOST_TEXTS}), "own"))
        never = asyncio.ensure_future(vectors.answered(wanted({"input": ["a"] * MOST_TEXTS}), "own"))
        while not read:
            await asyncio.sleep(0.001)
        assert (vectors.active, vectors.waiting) == (1, 1)
        never.cancel()
        long.cancel()
        await asyncio.gather(long, never, return_exceptions=True)
        return await vectors.answered(wanted({"input": "a b"}), "own")

    assert asyncio.run(left())["usage"]["prompt_tokens"] and sum(read) < MOST_TEXTS
    assert (vectors.active, vectors.waiting) == (0, 0)


@pytest.mark.service
def test_metrics_tell_of_vectors_and_of_clients_that_have_gone(folder):
    with serving(folder, "--rows", 1) as (address, child):
        asked = {"model": "own", "input": ["a b", "a"]}
        used = httpx.post(f"{address}/v1/embeddings", json=asked, timeout=60).json()["usage"]["prompt_tokens"]
        found = measured(address)
        assert found['enginery_requests_total{outcome="embedded"}'] == 1
        assert found["enginery_prompt_tokens_total"] == used > 0
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:  # it goes while it sends its body
            client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n\r\n{")
            time.sleep(0.3)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/embeddings", json=asked | {"input": ["a b c d e"] * MOST_TEXTS}, timeout=0.2)
        deadline = time.monotonic() + 30
        while measured(address)['enginery_requests_total{outcome="gone"}'] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        idle(address)
        child.terminate()
        assert "Traceback" not in child.stdout.read()
