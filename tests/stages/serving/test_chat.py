"""Conversations become the prompts that transformers makes of them."""

import json
from datetime import datetime

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.runtime.contract import StageError
from stages.serving.chat import Chat, chat

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "What is <b>1 & 1</b>?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 'ü' + \"好\"?\n"},
]
TEMPLATES = {
    "chatml": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "blocks": """\
{{ bos_token }}
  {% for message in messages %}
    {% if message.role == "system" %}
  [SYS] {{ message.content | trim }} [/SYS]
    {% elif loop.last %}
  [LAST] {{ message.content }}{{ eos_token }}
    {% else %}
  {{ message.role | upper }}: {{ message.content }}
    {% endif %}
  {% endfor %}
  {% if add_generation_prompt %}
[BOT]
  {% endif %}
""",
    "json": """\
{% set ns = namespace(turn=0) %}
{% for message in messages %}
{% set ns.turn = ns.turn + 1 %}
{{ ns.turn }} {{ message | tojson }} {{ message | tojson(indent=2) }}
{% endfor %}
{% if tools is none %}no tools{% endif %}
{% if unk_token is defined %}{{ unk_token }}{% endif %}
{% if pad_token is defined %}{{ pad_token }}{% endif %}
""",
    "day": "{{ strftime_now('%Y-%m-%d') }}{% for message in messages %}|{{ message['content'] }}{% endfor %}",
    "loop": """\
{% for message in messages %}
{% if message.role == 'assistant' %}{% continue %}{% endif %}
{% generation %}{{ message.content }}{% endgeneration %}
{% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}
{%- macro end(x) -%}<{{ x }}>{%- endmacro -%}
{{ end('e') }}
""",
}


@pytest.fixture
def saved(tmp_path):
    def save(template, folder="saved", **given):
        words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a"])}
        made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        given = {"bos_token": "<s>", "eos_token": AddedToken("</s>", special=True), "unk_token": "<unk>"} | given
        PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **given).save_pretrained(
            tmp_path / folder
        )
        return tmp_path / folder

    return save


def transformers_own(folder, messages):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_the_one_of_transformers(saved, name):
    folder = saved(TEMPLATES[name])
    for messages in (TALK, TALK[1:], TALK[1:2], [TALK[1] | {"name": "Jo", "tool_calls": None}]):
        told = chat(folder).prompt(messages)
        assert told == transformers_own(folder, messages) and "1 & 1</b>" in told.replace("\\", "")
    assert name != "day" or datetime.now().strftime("%Y-%m-%d") in told


@pytest.mark.parametrize("kind", ["in the settings", "several by name", "settings of old"])
def test_template_and_tokens_are_read_as_transformers_reads_them(saved, kind):
    folder = saved(TEMPLATES["blocks"])
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    if kind == "several by name":
        config["chat_template"] = [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": template},
        ]
    if kind == "settings of old":
        del config["bos_token"]
        config["eos_token"] = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False,
                               "rstrip": False, "single_word": False, "special": True}  # fmt: skip
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    told = chat(folder).prompt(TALK)
    assert told.startswith("<s>") and "</s>" in told
    if kind != "settings of old":
        assert told == transformers_own(folder, TALK)


def test_file_beside_wins_over_the_settings(saved):
    folder = saved(TEMPLATES["chatml"])
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": "old"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat(folder).prompt(TALK) == transformers_own(folder, TALK) != "old"


def test_folder_without_a_template_has_no_chat(saved, tmp_path):
    assert chat(saved(None)) is None
    (tmp_path / "bare").mkdir()
    assert chat(tmp_path / "bare") is None


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "a conversation is empty"),
        (["hello"], "a message has no role; measured 'hello'"),
        ([{"content": "x"}], "a message has no role"),
        ([{"role": "user"}], "content of a message of 'user' is no text; measured NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "is no text; measured list"),
    ],
)
def test_conversation_that_is_none_is_refused(messages, said):
    with pytest.raises(StageError, match=said):
        Chat("{{ messages }}", {}).prompt(messages)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[7]['content'] }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ namespace(_x=1) }}", "SecurityError"),
    ],
)
def test_template_that_refuses_or_breaks_out_is_told(template, said):
    with pytest.raises(StageError, match=f"does not take this conversation; measured {said}"):
        Chat(template, {}).prompt([{"role": "user", "content": "x"}])
