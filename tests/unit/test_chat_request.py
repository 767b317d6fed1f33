from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.chat import request as chat
from triptych.chat.messages import MODALITIES, MediaPart, Message, TensorPlace, TextPart
from triptych.chat.request import UNSERVED, ChatRequest, parse, write
from triptych.errors import InvalidRequest, InvalidValue, TriptychError, UnknownField

USER = {"role": "user", "content": "hi"}
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


def body(**fields):
    return json.dumps({"messages": [USER], **fields}).encode()


def message(**fields):
    return json.dumps({"messages": [{**USER, **fields}]}).encode()


def parts(*content):
    return message(content=list(content))


def prompt(value, **fields):
    return json.dumps({"prompt": value, **fields}).encode()


def test_a_prompt_without_messages():
    assert parse(prompt("Once")) == ChatRequest(prompt="Once")
    assert parse(prompt([5, 0, 7])) == ChatRequest(prompt=(5, 0, 7))
    assert parse(body(prompt=None)) == parse(body())


def test_the_least_request():
    assert parse(body()) == ChatRequest(messages=(Message("user", "hi"),))


def test_a_full_request():
    request = parse(
        body(
            model="m",
            temperature=0,
            top_p=0.5,
            top_k=5,
            min_p=0.1,
            presence_penalty=-2,
            frequency_penalty=2,
            repetition_penalty=1.5,
            seed=-1,
            stop=["a", "b"],
            max_tokens=7,
            max_completion_tokens=7,
            n=1,
            logprobs=True,
            top_logprobs=20,
            stream=True,
            stream_options={"include_usage": False},
            user="u",
            priority=-5,
            metadata={"a": "b"},
        )
    )
    assert request == ChatRequest(
        messages=(Message("user", "hi"),),
        model="m",
        temperature=0.0,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        seed=-1,
        stop=("a", "b"),
        max_tokens=7,
        logprobs=True,
        top_logprobs=20,
        stream=True,
        include_usage=False,
        priority=-5,
        user="u",
        metadata={"a": "b"},
    )


def test_null_is_not_given():
    apart = {"messages", "include_usage", "usage_with_finish"}
    names = set(ChatRequest.__struct_fields__) - apart
    extra = {"n", "stream_options", "suffix", "max_completion_tokens"}
    assert parse(body(**dict.fromkeys(names | extra))) == parse(body())


def test_parts_at_any_place_of_any_turn():
    request = parse(
        json.dumps(
            {
                "messages": [
                    {"role": "developer", "content": "be brief", "name": "d"},
                    {"role": "user", "content": [PICTURE, {"type": "text", "text": "one"}]},
                    {"role": "assistant", "content": ""},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": ""},
                            {**PICTURE, "uuid": "x"},
                            {
                                "type": "video_url",
                                "video_url": {"url": "file:///v.mp4", "num_frames": 4},
                            },
                            {
                                "type": "audio_url",
                                "audio_url": {"url": "https://e/a", "sampling_rate": 8000},
                            },
                            {"type": "input_audio", "input_audio": {"data": "QUJD"}},
                            {"type": "image_embeds", "image_embeds": {"url": "data:,x"}},
                        ],
                    },
                ]
            }
        )
    )
    assert [entry.role for entry in request.messages] == ["system", "user", "assistant", "user"]
    assert request.messages[0].name == "d"
    assert [(part.kind, part.modality, part.where) for part in request.media] == [
        ("image_url", "image", "messages[1].content[0].image_url.url"),
        ("image_url", "image", "messages[3].content[1].image_url.url"),
        ("video_url", "video", "messages[3].content[2].video_url.url"),
        ("audio_url", "audio", "messages[3].content[3].audio_url.url"),
        ("input_audio", "audio", "messages[3].content[4].input_audio.data"),
        ("image_embeds", "image", "messages[3].content[5].image_embeds.url"),
    ]
    _, second, video, audio, sound, embeds = request.media
    assert second.uuid == "x"
    assert video.num_frames == 4
    assert audio.sampling_rate == 8000
    assert sound.url == "data:audio/wav;base64,QUJD"
    assert embeds.embeds


def place(**fields):
    return {"offset": 0, "shape": [4, 8], "dtype": "float32", **fields}


def embeds(tensor, **fields):
    return parts({"type": "image_embeds", "image_embeds": {"tensor": tensor, **fields}})


def test_embeddings_in_a_tensor():
    data = embeds(place(offset=64, dtype="bfloat16"), image_grid_thw=[1, 4, 4])
    [medium] = parse(data).media
    assert (medium.embeds, medium.url, medium.modality) == (True, "", "image")
    assert medium.tensor == TensorPlace(64, (4, 8), "bfloat16", (1, 4, 4))
    assert medium.where == "messages[0].content[0].image_embeds.tensor"
    [plain] = parse(embeds({"shape": [4, 8], "dtype": "float16"})).media
    assert plain.tensor == TensorPlace(0, (4, 8), "float16")


EMBEDS = "messages[0].content[0].image_embeds"


@pytest.mark.parametrize(
    ("tensor", "others", "where"),
    [
        ([], {}, "tensor"),
        ({}, {}, "tensor.shape"),
        (place(dtype=None), {}, "tensor.dtype"),
        (place(dtype="int8"), {}, "tensor.dtype"),
        (place(offset=-1), {}, "tensor.offset"),
        (place(offset=2**41), {}, "tensor.offset"),
        (place(shape=[4]), {}, "tensor.shape"),
        (place(shape=[4, 0]), {}, "tensor.shape"),
        (place(shape=[4, None]), {}, "tensor.shape"),
        (place(shape=[4, 8.0]), {}, "tensor.shape"),
        (place(shape=[4, True]), {}, "tensor.shape"),
        (place(shape="4,8"), {}, "tensor.shape"),
        (place(strides=[8, 1]), {}, "tensor.strides"),
        (place(), {"url": "data:,x"}, "url"),
        (place(), {"image_grid_thw": [1, 4]}, "image_grid_thw"),
        (place(), {"image_grid_thw": [0, 4, 4]}, "image_grid_thw"),
        (place(), {"image_grid_thw": [1, 4, 2**17]}, "image_grid_thw"),
    ],
)
def test_embeddings_in_a_tensor_that_cannot_be(tensor, others, where):
    with pytest.raises(InvalidRequest) as error:
        parse(embeds(tensor, **others))
    assert error.value.where == f"{EMBEDS}.{where}"


def test_a_medium_shows_itself_short():
    medium = MediaPart(kind="image_url", url="data:image/png;base64," + "A" * 10_000, where="w")
    assert len(repr(medium)) < 200


WRONG_TYPES = {
    "model": [1, True, [], {}],
    "temperature": ["1", True, [], {}, -0.1, 2.1, 10**40],
    "top_p": ["1", False, 0, 1.01, -1],
    "top_k": [1.5, "1", True, -2, 2**31],
    "min_p": ["0", True, -0.1, 1.1],
    "presence_penalty": ["0", True, -2.1, 2.1],
    "frequency_penalty": ["0", True, -2.1, 2.1],
    "repetition_penalty": ["1", True, 0, -1, 2.1],
    "seed": [1.0, "1", True, 2**63, -(2**63) - 1],
    "stop": [1, True, {}, ["a"] * 5, ""],
    "max_tokens": [0, -1, 1.0, "1", True, 2**31],
    "max_completion_tokens": [0, -1, 1.0, "1", True, 2**31],
    "n": [0, 2, -1, True, "1", 1.0],
    "logprobs": [1, 0, "true", []],
    "top_logprobs": [-1, 21, True, "1", 1.5],
    "stream": [1, 0, "true", []],
    "stream_options": [True, 1, "x", []],
    "priority": [1.0, "1", True, 2**31, -(2**31) - 1],
    "user": [1, [], "x" * 257],
    "metadata": [[], 1, "x", {"a": 1}, {"a" * 65: "b"}, {"a": "b" * 513}],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG_TYPES.items() for value in values],
)
def test_a_value_of_wrong_type_or_range_is_named(field, value):
    streamed = {"stream": True} if field == "stream_options" else {}
    with pytest.raises(InvalidValue) as error:
        parse(body(**streamed, **{field: value}))
    assert error.value.where == field
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("data", "where", "what"),
    [
        (b"[]", "", "must be an object, got a list of 0"),
        (b'"x"', "", 'must be an object, got "x"'),
        (b"{}", "messages", "is required"),
        (body(messages=None), "messages", "is required"),
        (body(messages=[]), "messages", "must not be empty"),
        (body(messages={}), "messages", "must be a list of messages, got an object"),
        (body(messages="hi"), "messages", 'got "hi"'),
        (body(messages=[USER, "x"]), "messages[1]", "must be an object"),
        (message(role=None), "messages[0].role", "is required"),
        (
            message(role="pope"),
            "messages[0].role",
            'system, developer, user, assistant, tool, got "pope"',
        ),
        (message(role=["user"]), "messages[0].role", "got a list of 1"),
        (message(role="function"), "messages[0].role", "'function' are not served"),
        (body(prompt="a"), "messages", "must not be given with a prompt"),
        (prompt(""), "prompt", "must not be empty"),
        (prompt([]), "prompt", "must not be empty"),
        (prompt(7), "prompt", "a string or a list of token ids"),
        (prompt([1, "a"]), "prompt[1]", "must be an integer"),
        (prompt([[1]]), "prompt[0]", "must be an integer"),
        (prompt([True]), "prompt[0]", "must be an integer"),
        (prompt([1 << 31]), "prompt[0]", "from 0 to 2147483647"),
        (prompt("a", tools=[]), "tools", "must not be given with a prompt"),
        (message(name=5), "messages[0].name", "must be a string, got 5"),
        (message(content=None), "messages[0].content", "is required"),
        (message(content=5), "messages[0].content", "a string or a list of parts, got 5"),
        (message(content=[]), "messages[0].content", "must not be empty"),
        (parts("x"), "messages[0].content[0]", "must be an object"),
        (parts({}), "messages[0].content[0].type", "is required"),
        (parts({"type": "pdf"}), "messages[0].content[0].type", 'got "pdf"'),
        (parts({"type": ["text"]}), "messages[0].content[0].type", "got a list"),
        (parts({"type": "text"}), "messages[0].content[0].text", "is required"),
        (parts({"type": "text", "text": 5}), "messages[0].content[0].text", "got 5"),
        (parts({"type": "image_url"}), "messages[0].content[0].image_url", "is required"),
        (
            parts({"type": "image_url", "image_url": "http://x"}),
            "messages[0].content[0].image_url",
            'must be an object, got "http://x"',
        ),
        (
            parts(PICTURE, {"type": "image_url", "image_url": {"url": 5}}),
            "messages[0].content[1].image_url.url",
            "must be a string, got 5",
        ),
        (
            parts({"type": "image_url", "image_url": {"url": ""}}),
            "messages[0].content[0].image_url.url",
            "must not be empty",
        ),
        (
            parts({"type": "image_url", "image_url": {"url": "x", "detail": "huge"}}),
            "messages[0].content[0].image_url.detail",
            'must be one of auto, low, high, got "huge"',
        ),
        (parts({**PICTURE, "uuid": 1}), "messages[0].content[0].uuid", "got 1"),
        (
            parts({"type": "video_url", "video_url": {"url": "x", "num_frames": 0}}),
            "messages[0].content[0].video_url.num_frames",
            "got 0",
        ),
        (
            parts({"type": "video_url", "video_url": {"url": "x", "num_frames": 2, "fps": 1}}),
            "messages[0].content[0].video_url.fps",
            "num_frames=2",
        ),
        (
            parts({"type": "input_audio", "input_audio": {"data": "QQ==", "format": "exe"}}),
            "messages[0].content[0].input_audio.format",
            'wav, mp3, flac, ogg, got "exe"',
        ),
        (body(stop=["a", ""]), "stop[1]", 'got ""'),
        (body(stop=["a", 5]), "stop[1]", "got 5"),
        (body(max_tokens=1, max_completion_tokens=2), "max_completion_tokens", "disagree"),
        (body(top_logprobs=1), "top_logprobs", "needs logprobs"),
        (body(stream_options={}), "stream_options", "only with stream=true"),
        (
            body(stream=True, stream_options={"include_usage": 1}),
            "stream_options.include_usage",
            "must be true or false, got 1",
        ),
        (body(seed=10**60), "seed", "got an integer of 200 bits"),
    ],
)
def test_what_is_wrong_is_named(data, where, what):
    with pytest.raises(InvalidValue) as error:
        parse(data)
    assert error.value.where == where
    assert what in error.value.what


@pytest.mark.parametrize(
    ("data", "where", "what"),
    [
        (body(temperatur=1), "temperatur", "did you mean 'temperature'?"),
        (body(**{"a b\n": 1}), "", r'unknown field "a b\n"'),
        (body(**{"x" * 500: 1}), "", "x" * 64 + "…"),
        (body(xyzzy=None), "xyzzy", "unknown field"),
        (message(tool_calls=[]), "messages[0].tool_calls", "not served"),
        (message(colour=1), "messages[0].colour", "unknown field"),
        (parts({**PICTURE, "alt": ""}), "messages[0].content[0].alt", "unknown field"),
        (
            parts({"type": "text", "text": "", "image_url": {}}),
            "messages[0].content[0].image_url",
            "",
        ),
        (
            parts({"type": "image_url", "image_url": {"url": "x", "fps": 1}}),
            "messages[0].content[0].image_url.fps",
            "unknown field",
        ),
        (
            parts({"type": "file", "file": {}}),
            "messages[0].content[0].type",
            "'file' are not served",
        ),
        (
            body(stream=True, stream_options={"include_obfuscation": True}),
            "stream_options.include_obfuscation",
            "not served",
        ),
    ],
)
def test_fields_that_are_not_served_are_refused_by_name(data, where, what):
    with pytest.raises(UnknownField) as error:
        parse(data)
    assert error.value.where == where
    assert what in error.value.what
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("field", sorted(UNSERVED))
def test_known_fields_are_not_called_unknown(field):
    with pytest.raises(UnknownField, match="this field is not served") as error:
        parse(body(**{field: {"a": 1}}))
    assert error.value.where == field


def test_a_data_uri_is_not_repeated_whole():
    url = "data:image/png;base64," + "A" * 100_000
    with pytest.raises(InvalidValue) as error:
        parse(parts({"type": "image_url", "image_url": url}))
    assert "(100022 characters)" in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "ends too early (byte 0)"),
        (b'{"messages": [', "ends too early (byte 14)"),
        (b'{"messages": [}', "(byte 14)"),
        (b'{"a": 1} x', "trailing characters"),
        (b'{"a": NaN}', "(byte 6)"),
        (b'{"a": Infinity}', "(byte 6)"),
        (b'{"a": -Infinity}', "(byte 7)"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"a": "\xff"}', "not valid UTF-8 (byte 7)"),
        (b'{"a": "\xed\xa0\x80"}', "not valid UTF-8 (byte 7)"),
        (b'{"a": "\\ud800"}', "half a surrogate pair (byte 7)"),
        (b'{"a": "\\\\\\ud800x"}', "half a surrogate pair (byte 9)"),
        (b'{"a": "\\udc00"}', "half a surrogate pair (byte 7)"),
        (b'{"a": "\\ud83d\\ud83d"}', "half a surrogate pair (byte 7)"),
        ('{"a": "\ud800"}', "not valid UTF-8 (byte 7)"),
        (b'{"a": "\\\\ud800"', "ends too early (byte 15)"),
        (b"\xef\xbb\xbf{}", "(byte 0)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_broken_json_names_the_place(data, what):
    with pytest.raises(InvalidRequest) as error:
        parse(data)
    assert type(error.value) is InvalidRequest
    assert what in str(error.value)


def test_of_a_name_given_twice_the_last_counts():
    assert parse(b'{"messages":[{"role":"user","content":"a","content":"b"}]}').messages == (
        Message("user", "b"),
    )


@pytest.mark.parametrize("text", ["\x00", "\U0001f600", "\\ud800", "a\u2028b", "<|im_end|>"])
def test_odd_texts_are_kept(text):
    assert parse(message(content=text)).messages[0].content == text


# Laws.

NAMES = sorted(
    {*ChatRequest.__struct_fields__, *MODALITIES, "role", "content", "type", "text", "url", "data"}
    | {"stream_options", "n", "max_completion_tokens", "tools", "name", "uuid", "format"}
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["user", "assistant", "tool", "text", *MODALITIES])
)
JSONS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), inner, max_size=6)
    ),
    max_leaves=20,
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", *MODALITIES])}).flatmap(
    lambda part: st.one_of(
        st.just(part),
        st.fixed_dictionaries(
            {
                **{key: st.just(value) for key, value in part.items()},
                part["type"]: JSONS | st.fixed_dictionaries({"url": LEAVES}) | st.text(max_size=5),
            }
        ),
    )
)
NEARLY = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.just("user") | LEAVES, "content": st.lists(PARTS) | LEAVES}
            ),
            max_size=3,
        )
    },
    optional={name: LEAVES | JSONS for name in NAMES if name != "messages"},
)


def check_parse(data):
    refusal = None
    try:
        request = parse(data)
    except TriptychError as error:
        refusal = error
    if refusal is None:
        assert parse(write(request)) == request
        return
    read = TriptychError.parse(f"in model 'chat_vllm': {refusal}")
    assert (type(read), read.where, read.what) == (type(refusal), refusal.where, refusal.what)
    assert len(str(refusal).encode()) < 1000


@given(JSONS | NEARLY)
def test_any_json_parses_or_is_refused(value):
    check_parse(msgspec.json.encode(value))


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes_parse_or_are_refused(data):
    check_parse(data)


def maybe(strategy):
    return st.none() | strategy


TEXTS = st.text(max_size=20)
MESSAGES = st.lists(
    st.builds(
        lambda role, content, name: {"role": role, "content": content, "name": name},
        st.sampled_from(["system", "developer", "user", "assistant"]),
        TEXTS
        | st.lists(
            st.builds(lambda text: {"type": "text", "text": text}, TEXTS)
            | st.builds(
                lambda url, detail, uuid: {
                    "type": "image_url",
                    "image_url": {"url": url, "detail": detail},
                    "uuid": uuid,
                },
                st.text(min_size=1),
                maybe(st.sampled_from(["auto", "low", "high"])),
                maybe(TEXTS),
            )
            | st.builds(
                lambda url, frames: {
                    "type": "video_url",
                    "video_url": {"url": url, "num_frames": frames},
                },
                st.text(min_size=1),
                maybe(st.integers(1, 100)),
            )
            | st.builds(
                lambda offset, tokens, dtype, grid: {
                    "type": "image_embeds",
                    "image_embeds": {
                        "tensor": {"offset": offset, "shape": [tokens, 8], "dtype": dtype},
                        "image_grid_thw": grid,
                    },
                },
                maybe(st.integers(0, 2**40)),
                st.integers(1, 100),
                st.sampled_from(["bfloat16", "float16", "float32"]),
                maybe(st.lists(st.integers(1, 99), min_size=3, max_size=3)),
            )
            | st.builds(
                lambda data, form: {
                    "type": "input_audio",
                    "input_audio": {"data": data, "format": form},
                },
                st.text(min_size=1),
                maybe(st.sampled_from(["wav", "mp3"])),
            ),
            min_size=1,
            max_size=4,
        ),
        maybe(TEXTS),
    ),
    min_size=1,
    max_size=4,
)
REQUESTS = st.fixed_dictionaries(
    {"messages": MESSAGES},
    optional={
        "tools": maybe(
            st.lists(
                st.builds(
                    lambda name, described, strict: {
                        "type": "function",
                        "function": {"name": name, "description": described, "strict": strict},
                    },
                    st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
                    maybe(TEXTS),
                    maybe(st.booleans()),
                ),
                min_size=1,
                max_size=4,
                unique_by=lambda tool: tool["function"]["name"],
            )
        ),
        "response_format": maybe(
            st.just({"type": "json_object"})
            | st.builds(
                lambda schema: {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": schema},
                },
                st.dictionaries(TEXTS, TEXTS, max_size=3),
            )
        ),
        "model": maybe(TEXTS),
        "temperature": maybe(st.floats(0, 2)),
        "top_p": maybe(st.floats(0, 1, exclude_min=True)),
        "top_k": maybe(st.integers(-1, 100)),
        "repetition_penalty": maybe(st.floats(0, 2, exclude_min=True)),
        "seed": maybe(st.integers(-(2**63), 2**63 - 1)),
        "stop": maybe(st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=4)),
        "max_tokens": maybe(st.integers(1, 1000)),
        "logprobs": st.booleans(),
        "priority": maybe(st.integers(-(2**31), 2**31 - 1)),
        "user": maybe(TEXTS),
        "metadata": maybe(st.dictionaries(TEXTS, TEXTS, max_size=3)),
    },
)


@given(REQUESTS, st.booleans(), st.booleans())
def test_a_good_request_comes_back_from_its_json(fields, stream, usage):
    if stream:
        options = {"include_usage": usage, "usage_with_finish": not usage}
        fields = {**fields, "stream": True, "stream_options": options}
    request = parse(msgspec.json.encode(fields))
    assert parse(write(request)) == request
    assert request.include_usage is (usage or not stream)
    assert request.usage_with_finish is (stream and not usage)
    assert len(request.messages) == len(fields["messages"])


@given(TEXTS)
def test_text_is_kept_exactly(text):
    data = msgspec.json.encode({"messages": [{"role": "user", "content": text}]})
    assert parse(data).messages[0].content == text
    data = parts({"type": "text", "text": text})
    assert parse(data).messages[0].content == (TextPart(text),)


def test_the_parser_is_light():
    heavy = ("torch", "numpy", "jinja2", "tokenizers", "transformers", "tritonclient")
    code = f"import sys, {chat.__name__}, triptych.chat.chunks; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {name.partition(".")[0] for name in loaded.stdout.split()} & set(heavy)
