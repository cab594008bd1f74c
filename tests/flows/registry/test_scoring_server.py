"""The registered model behind `mlflow models serve`, asked by curl: each shape of a request, and what is refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows.registry.test_served import answer, registered  # noqa: F401

pytestmark = pytest.mark.service

TALK = [{"role": "user", "content": "france"}]
FEW = {"max_new_tokens": 2}


@pytest.fixture(scope="module")
def asked(registered, tmp_path_factory):  # noqa: F811
    """(request, kind of content) -> HTTP status and answer, of a server on this machine alone."""
    uri, _ = registered
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = tmp_path_factory.mktemp("server")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV", "ENGINERY"))}
    env |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    words = ["models", "serve", "-m", "models:/chain@champion", "--env-manager", "local", "--host", "127.0.0.1"]
    with (here / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-I", "-m", "mlflow", *words, "--port", str(port)],
            cwd=here,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def ask(request, kind="application/json"):
        body = request if isinstance(request, str) else json.dumps(request)
        said = subprocess.run(
            ["curl", "--silent", "--max-time", "20", "--write-out", "\n%{http_code}", "--data-binary", "@-",
             "--header", f"Content-Type: {kind}", f"http://127.0.0.1:{port}/invocations"],
            input=body, capture_output=True, text=True, check=False,
        )  # fmt: skip
        text, _, status = said.stdout.rpartition("\n")
        return int(status), json.loads(text) if text else None

    try:
        until = time.monotonic() + 90
        while ask({"inputs": ["is"]})[0] != 200:
            assert server.poll() is None and time.monotonic() < until, (here / "log").read_text()
            time.sleep(0.3)
        yield ask
    finally:
        # It leads a group of its own, with the server that it started.
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": ["italy and", "the"], "params": FEW},
        {"inputs": {"prompt": ["italy and", "the"]}, "params": FEW},
        {"inputs": [{"prompt": "italy and"}, {"prompt": "the"}], "params": FEW},
        {"instances": ["italy and", "the"], "params": FEW},
        {"instances": [{"prompt": "italy and"}, {"prompt": "the"}], "params": FEW},
        {"dataframe_records": [{"prompt": "italy and"}, {"prompt": "the"}], "params": FEW},
        {"dataframe_records": [{"any": "italy and"}, {"any": "the"}], "params": FEW},
        {"dataframe_split": {"columns": ["prompt"], "data": [["italy and"], ["the"]]}, "params": FEW},
    ],
)
def test_server_continues_texts_in_each_of_its_shapes(asked, request_):
    assert asked(request_) == (200, {"predictions": [answer(["and"], 2), answer(["the"], 2)]})


def test_server_takes_texts_by_their_own_name_and_as_a_file(asked):
    assert asked({"prompt": "the", **FEW}) == (200, [answer(["the"], 2)])
    assert asked({"prompt": ["the", "and"], **FEW}) == (200, [answer(["the"], 2), answer(["and"], 2)])
    assert asked("prompt\nthe\n", "text/csv") == (200, {"predictions": [answer(["the"], 32)]})
    drawn = {"inputs": ["is"], "params": {"temperature": 5.0, "seed": 3, "max_new_tokens": 20}}
    assert asked(drawn) == asked(drawn) != asked({"inputs": ["is"], "params": {"max_new_tokens": 20}})
    stopped = {"inputs": ["is"], "params": {"stop": ["and"], "max_new_tokens": 9}}
    assert asked(stopped) == (200, {"predictions": ["paris "]})


def test_server_answers_conversations(asked):
    status, said = asked({"messages": TALK, **FEW})
    assert status == 200 and said["object"] == "chat.completion"
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer(["and"], 2)}
    for many in (
        {"dataframe_records": [{"messages": TALK}, {"messages": TALK}], "params": FEW},
        {"inputs": {"messages": [TALK, TALK]}, "params": FEW},
        {"inputs": [{"messages": TALK}, {"messages": TALK}], "params": FEW},
    ):
        status, said = asked(many)
        assert status == 200 and [one["choices"] for one in said["predictions"]] == [[choice], [choice]]
    status, said = asked({"inputs": {"messages": TALK}, "params": FEW})
    assert status == 200 and said["predictions"]["choices"] == [choice]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"inputs": ["is"], "params": {"max_new_tokens": 100_000}}, "measured 100000; limit 64 tokens, prompt and an"),
        ({"inputs": ["is"], "params": {"temperatur": 1}}, "no parameter 'temperatur'; limit max_new_tokens, tempera"),
        ({"inputs": ["is"], "params": {"temperature": "hot"}}, "temperature is no number; measured 'hot'; limit a n"),
        ({"inputs": ["is"], "params": {"top_p": 0}}, "top_p is out of range; measured 0.0; limit a number above 0"),
        ({"inputs": ["is"], "params": 3}, "params are no dictionary"),
        ({"inputs": [""]}, "a prompt is empty. Give each prompt at least one character."),
        ({"inputs": ["is " * 65]}, "the sequence is longer than the model reads; measured 65 tokens; limit 64 tokens"),
        ({"prompt": "is", "max_tokens": 4}, "no parameter 'max_tokens'; limit max_new_tokens"),
        ({"messages": [], **FEW}, "a conversation is empty; limit at least one message. Give it a message."),
        ({"messages": [{"role": "user", "content": 3}]}, "content of a message of 'user' is no text; measured int"),
        ({"messages": TALK, "temperature": -1}, "temperature is out of range; measured -1.0; limit a number from 0"),
        ({"input": "is"}, "neither a prompt nor messages are given, or both; measured input"),
        ({"text": "is"}, "The input must be a JSON dictionary with exactly one of the input fields"),
        ("{", "Ensure that input is a valid JSON formatted string"),
    ],
)
def test_server_refuses_with_4xx_and_says_why(asked, request_, said):
    status, told = asked(request_)
    assert 400 <= status < 500 and said in told["message"], told
