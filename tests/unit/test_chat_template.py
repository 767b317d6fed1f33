from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from triptych.chat.messages import MediaPart, Message, TextPart
from triptych.chat.template import ChatTemplate, read_template, special_tokens
from triptych.chat.tools import Tool, ToolCall, show_tool
from triptych.errors import ConfigurationError, InvalidRequest, UnknownField

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN2_AUDIO = (
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRINGS_ONLY = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ '[' + message['role'] + '] ' + message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}"
)
TRICKS = """
{%- for message in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% generation %}
    {{ message | tojson }}
    {% endgeneration %}
    {{ strftime_now('%Y') }} {{ [1, 2] | tojson(indent=2) }} {{ tools is none }}
{% endfor %}
"""


def image(url="data:,"):
    return MediaPart(kind="image_url", url=url, where="w")


def audio():
    return MediaPart(kind="audio_url", url="data:,", where="w")


def as_hugging_face(messages):
    """The messages as one gives them to transformers."""
    return [
        {
            **(
                {
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": call.name, "arguments": call.arguments},
                        }
                        for call in message.tool_calls
                    ]
                }
                if message.tool_calls
                else {}
            ),
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": part.modality, part.modality: part.url}
                for part in message.content
            ],
        }
        for message in messages
    ]


CHATS = [
    (Message("user", "How many circles?"),),
    (Message("system", "Be brief."), Message("user", (TextPart("What is it?"), image()))),
    (
        Message("user", (image(), TextPart("one"), image(), TextPart(" two "))),
        Message("assistant", "A.\n"),
        Message("user", (TextPart("and"), image())),
    ),
    (Message("user", ""), Message("assistant", ""), Message("assistant", "é <b> & \U0001f600\n")),
]


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.mark.parametrize("messages", CHATS)
def test_equal_to_transformers_on_the_checkpoint(checkpoint, tokenizer, messages):
    expected = tokenizer.apply_chat_template(
        as_hugging_face(messages), tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(checkpoint).render(messages) == expected


@pytest.fixture
def write(tmp_path):
    def make(template, **config):
        config.setdefault("chat_template", template)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def hugging_face(template, messages, **variables):
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **variables
    )
    return rendered[0]


@pytest.mark.parametrize("template", [QWEN2_AUDIO, TRICKS], ids=["audio", "tricks"])
def test_equal_to_transformers_on_other_templates(write, template):
    messages = (
        Message("system", "s"),
        Message("user", (audio(), TextPart("what? é <b>"))),
        Message("assistant", "x"),
        Message("user", "y"),
    )
    given = as_hugging_face(messages)
    given[1]["content"][0]["audio"] = ""
    assert ChatTemplate(write(template)).render(messages) == hugging_face(template, given)


def test_a_template_for_lists_gets_strings_as_lists(write):
    messages = (Message("user", (TextPart("a"), image(), image())), Message("assistant", "b"))
    expected = hugging_face(
        LLAVA,
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "image"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        ],
    )
    assert expected.count("<image>") == 2
    assert ChatTemplate(write(LLAVA)).render(messages) == expected


def test_a_template_for_strings_gets_lists_as_strings(write):
    root = write(STRINGS_ONLY, bos_token="<s>", eos_token={"content": "</s>", "special": True})
    messages = (Message("user", (image(), TextPart("a"))),)
    assert ChatTemplate(root, {"image": "<image>"}).render(messages) == "<s>[user] <image>\na</s>\n"


def test_what_a_template_refuses_is_the_callers(write):
    template = ChatTemplate(write(STRINGS_ONLY, bos_token="", eos_token=""))
    with pytest.raises(InvalidRequest, match="System role not supported") as error:
        template.render((Message("system", "s"),))
    assert error.value.where == "messages"


def test_a_template_cannot_leave_the_sandbox(write):
    template = ChatTemplate(
        write("{% if messages|length > 1 %}{{ ''.__class__.__mro__ }}{% endif %}{{ messages }}")
    )
    with pytest.raises(InvalidRequest, match="unsafe"):
        template.render((Message("user", "a"), Message("user", "b")))


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% if %}", "is broken"),
        ("nothing", "loses a user's text"),
        (None, "has no chat template"),
        ([{"name": "tool_use", "template": "x"}], "has no chat template"),
    ],
)
def test_a_broken_template_is_found_on_loading(write, template, what):
    with pytest.raises(ConfigurationError, match=what):
        ChatTemplate(write(template))


def test_broken_json_is_found_on_loading(tmp_path):
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"chat_template\.json cannot be read"):
        ChatTemplate(tmp_path)


def test_where_the_template_is_looked_for(write):
    root = write([{"name": "other", "template": "-"}, {"name": "default", "template": "config"}])
    assert read_template(root) == "config"
    (root / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert read_template(root) == "json"
    (root / "chat_template.jinja").write_text("jinja")
    assert read_template(root) == "jinja"


def test_special_tokens_are_variables(checkpoint, tokenizer):
    ours = special_tokens(checkpoint)
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            assert ours[name] == token


TOOLS = (
    Tool("paint", "Paint <it> é.", {"type": "object", "properties": {"b": {}, "a": {}}}),
    Tool("wash"),
)
CALL = ToolCall("c1", "paint", {"b": "é <b>", "a": 1})
WITH_TOOLS = [
    (Message("user", "Paint it."),),
    (
        Message("system", "Be brief."),
        Message("user", (image(), TextPart("Paint it."))),
        Message("assistant", "", tool_calls=(CALL, ToolCall("c2", "wash", {}))),
        Message("tool", "done", tool_call_id="c1"),
        Message("tool", (TextPart("like so"), image()), tool_call_id="c2"),
        Message("assistant", "It is done."),
        Message("user", "Again!"),
    ),
]


@pytest.mark.parametrize("messages", WITH_TOOLS)
def test_tools_are_shown_as_transformers_show_them(checkpoint, tokenizer, messages):
    expected = tokenizer.apply_chat_template(
        as_hugging_face(messages),
        tools=[show_tool(tool) for tool in TOOLS],
        tokenize=False,
        add_generation_prompt=True,
    )
    rendered = ChatTemplate(checkpoint).render(messages, TOOLS)
    assert rendered == expected
    assert "Paint <it> é." in rendered
    assert rendered.count("<tool_response>") == len([m for m in messages if m.role == "tool"])


TEXT = "{% for message in messages %}{{ message.content }}{% endfor %}"
SHOWN = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
CALLED = (
    "{% for message in messages %}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        (TEXT, False),
        (TEXT + SHOWN, False),
        (TEXT + CALLED, False),
        (TEXT + SHOWN + CALLED.replace("tool_call>", "call>"), False),
        (TEXT + SHOWN + CALLED, True),
        ([{"name": "default", "template": TEXT}], False),
        (
            [
                {"name": "default", "template": TEXT},
                {"name": "tool_use", "template": TEXT + SHOWN + CALLED},
            ],
            True,
        ),
        (
            [
                {"name": "default", "template": TEXT},
                {"name": "tool_use", "template": "{% if %}"},
            ],
            False,
        ),
    ],
)
def test_tools_need_a_template_that_shows_them_and_writes_calls_as_they_are_read(
    write, template, takes
):
    chat = ChatTemplate(write(template))
    user = Message("user", "a")
    assert chat.render([user]) == "a"
    for messages, tools, where in (
        ([user], TOOLS, "tools"),
        ([user, Message("assistant", "b", tool_calls=(CALL,))], (), "messages[1].tool_calls"),
        ([Message("tool", "b", tool_call_id="c")], (), "messages[0].role"),
    ):
        if takes:
            assert chat.render(messages, tools)
        else:
            with pytest.raises(UnknownField, match="takes no tools") as error:
                chat.render(messages, tools)
            assert error.value.where == where


def test_the_tokenizers_template_serves_where_the_processors_takes_no_tools(write):
    root = write(TEXT + SHOWN + CALLED)
    (root / "chat_template.json").write_text(json.dumps({"chat_template": "{# ours #}" + TEXT}))
    chat = ChatTemplate(root)
    assert chat.render([Message("user", "a")]) == "a"
    assert '"paint"' in chat.render([Message("user", "a")], TOOLS)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_texts_are_rendered_as_they_are(checkpoint, tokenizer, texts):
    messages = tuple(Message("user", text) for text in texts)
    expected = tokenizer.apply_chat_template(
        as_hugging_face(messages), tokenize=False, add_generation_prompt=True
    )
    rendered = ChatTemplate(checkpoint).render(messages)
    assert rendered == expected
    assert all(text in rendered for text in texts)
