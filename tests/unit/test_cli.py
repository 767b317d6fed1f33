from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import triptych
from triptych import cli, server, settings
from triptych.cli import app, main
from triptych.cli.chat import conversation, show_text
from triptych.cli.doctor import settings_in_force
from triptych.cli.serve import read_settings
from triptych.errors import ConfigurationError
from triptych.media import resample
from triptych_client import Chunk

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8
MP4 = b"\0\0\0\x20ftypisom" + b"\0" * 8
WAV = b"RIFF\0\0\0\0WAVEfmt " + b"\0" * 8


@pytest.fixture
def served(monkeypatch) -> list[server.ServerOptions]:
    """What `triptych.server.serve` was called with, in place of a server."""
    calls: list[server.ServerOptions] = []

    def serve(options, on_ready=None):
        calls.append(options)
        return 0

    monkeypatch.setattr(server, "serve", serve)
    for name in settings.NAMES:
        monkeypatch.delenv(settings.PREFIX + name.upper(), raising=False)
    return calls


def complaint(capsys) -> str:
    """The one line on stderr."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("triptych: ")
    assert err.count("\n") == 1
    return err


def test_help_is_there_at_once():
    command = [sys.executable, "-c", "from triptych.cli import main; main(['--help'])"]
    subprocess.run(command, check=True, capture_output=True)  # once for the bytecode
    began = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took = time.monotonic() - began
    for name in ("serve", "chat", "doctor", "version"):
        assert name in done.stdout
    # 0.07 s on an idle core; what must never come in (numpy, grpc, torch) takes longer than this.
    program = (
        "import sys, triptych.cli; heavy = {'numpy', 'grpc', 'torch', 'httpx', 'msgspec', 'rich'}; "
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert took < 2.0


def test_the_installed_command():
    command = Path(sys.executable).with_name("triptych")
    done = subprocess.run([command, "version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"triptych {triptych.__version__}\n"


@pytest.mark.parametrize("command", ["serve", "chat", "top", "doctor", "version"])
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing command"),
        (["sreve"], "No such command 'sreve'"),
        (["chat"], "Missing argument 'QUESTION'"),
        (["chat", "a", "--max-tokens", "x"], "--max-tokens"),
        (["chat", "a", "--sever", "x"], "No such option: --sever"),
        (["chat", "a", "nothing.png"], "there is no file nothing.png"),
        (["chat", "a", "--server", "nowhere"], "nowhere"),
        (["chat", "/nowhere/a.png"], "there is no file /nowhere/a.png"),
        (["serve", "--http-port", "99999"], "--http-port"),
        (["serve", "--no-playground"], "need --openai"),
        (["top", "--interval", "0"], "--interval"),
        (["embed"], "Missing argument 'MEDIA...'"),
        (["version", "1"], "unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_two(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in complaint(capsys)


def test_no_server_is_one_line_and_one(capsys):
    assert main(["chat", "a", "--server", "localhost:1"]) == 1
    assert "no server at localhost:1: start it with `triptych serve`" in complaint(capsys)


def test_a_file_that_is_no_medium(tmp_path, capsys):
    path = tmp_path / "a.png"
    path.write_text("hello")
    assert main(["chat", "a", str(path)]) == 2
    assert "a.png is no picture, video or sound" in complaint(capsys)


def test_media_by_what_they_are(tmp_path):
    sources = []
    for name, data in (("a", PNG), ("b.png", MP4), ("c", WAV)):
        (tmp_path / name).write_bytes(data)
        sources.append(str(tmp_path / name))
    sources += ["http://a/b.MP4?x=1", "https://a/b.wav", "http://a/b", "data:video/mp4;base64,AA"]
    [turn] = conversation("What?", sources, None)
    assert [part["type"].removesuffix("_url") for part in turn["content"]] == [
        *("image", "video", "audio", "video", "audio", "image", "video", "text")
    ]


def test_a_system_message_comes_first():
    assert conversation("a", [], "b") == [
        {"role": "system", "content": "b"},
        {"role": "user", "content": "a"},
    ]


def test_a_terminal_is_not_told_what_to_do(capsys, monkeypatch):
    chunk = Chunk(id="", model="", created=0, text="a\x1b[2Jb\tc\nd")
    show_text([chunk])
    assert capsys.readouterr().out == "a\x1b[2Jb\tc\nd\n", "a pipe gets the text as it is"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_text([chunk])
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}[2Jb\tc\nd\n"


def test_serve_hands_its_flags_on(served, checkpoint):
    assert (
        main(["serve", "--model", str(checkpoint), "--http-port", "0", "--max-model-len=64"]) == 0
    )
    [options] = served
    assert options.model == str(checkpoint)
    assert options.http_port == 0
    assert options.engine == "vllm"
    assert options.settings == {"max_model_len": "64"}
    assert not options.allow_shared_memory
    assert not options.allow_model_control


def test_serve_takes_the_model_from_the_environment(served, checkpoint, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_MODEL", str(checkpoint))
    assert main(["serve"]) == 0
    assert served[0].model == str(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no model"),
        (["--model", "/nowhere"], "'/nowhere' is not a directory"),
        (["--modle", "x"], "there is no flag --modle; did you mean --model?"),
        (["--max-file-size", "5"], "did you mean --max-file-size-mb?"),
        (["--max-model-len"], "--max-model-len needs a value"),
        (["--max-model-len", "--http-port", "1"], "--max-model-len needs a value"),
        (["x"], "flags only, got 'x'"),
        (["--model", "MODEL", "--engine", "nothing"], "no ensemble 'chat_nothing'"),
        (["--model", "MODEL", "--max-model-len", "x"], "max_model_len"),
        (["--model", "MODEL", "--max-num-seqs", "0"], "max_num_seqs"),
        (["--model", "MODEL", "--image-mode", "x"], "image_mode"),
    ],
)
def test_serve_starts_nothing_with_a_wrong_flag(arguments, said, served, checkpoint, capsys):
    arguments = [str(checkpoint) if argument == "MODEL" else argument for argument in arguments]
    assert main(["serve", *arguments]) == 2
    assert said in complaint(capsys)
    assert not served


def test_settings_as_flags():
    assert read_settings(
        ["--max-model-len", "64", "--allow-pickle-embeddings", "--allowed-media-domains=a,b"]
    ) == {
        "max_model_len": "64",
        "allow_pickle_embeddings": "true",
        "allowed_media_domains": "a,b",
    }
    assert read_settings(["--allow-pickle-embeddings", "false"]) == {
        "allow_pickle_embeddings": "false"
    }


@pytest.mark.parametrize("name", sorted(settings.NAMES - {"model"}))
def test_every_setting_is_a_flag(name):
    flag = "--" + name.replace("_", "-")
    assert read_settings([flag, "1"]) == {name: "1"}


def write_config(folder: Path, parameters: str = "") -> Path:
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.pbtxt").write_text(f'name: "encoder"\n{parameters}')
    return folder


def test_settings_in_force_and_their_sources(tmp_path):
    write_config(
        tmp_path,
        'parameters { key: "encoder_threads" value { string_value: "3" } }\n'
        'parameters { key: "encoder_dtype" value { string_value: "float16" } }\n'
        'parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }\n',
    )
    found = settings_in_force(tmp_path, {"TRIPTYCH_ENCODER_DTYPE": "bfloat16"})
    assert {setting.stage for setting in found} == {"encoder"}
    assert {setting.name for setting in found} == set(settings.EncoderSettings.__struct_fields__)
    told = {setting.name: (setting.value, setting.source) for setting in found}
    assert told["encoder_threads"] == (3, "config.pbtxt")
    assert told["encoder_dtype"] == ("bfloat16", "TRIPTYCH_ENCODER_DTYPE")
    assert told["encoder_device"] == ("auto", "default")
    assert told["model"] == ("", "not set")


def test_a_secret_is_not_shown(tmp_path):
    given = {"TRIPTYCH_HANDOVER_KEY": "of the house"}
    shown = {each.name: each.value for each in settings_in_force(write_config(tmp_path), given)}
    assert shown["handover_key"] == "(set)"
    assert "of the house" not in shown.values()
    for stage in settings.STAGES:
        secret = {name for name in stage.__struct_fields__ if re.search("key|proxy|secret", name)}
        assert secret <= settings.SECRETS


@pytest.mark.parametrize(
    ("parameters", "environ", "said"),
    [
        ("{{{", {}, r"config\.pbtxt"),
        ("", {"TRIPTYCH_NOTHING": "1"}, "TRIPTYCH_NOTHING"),
        (
            'parameters { key: "encoder_threads" value { string_value: "x" } }',
            {},
            "encoder_threads",
        ),
    ],
)
def test_settings_that_are_wrong(parameters, environ, said, tmp_path):
    with pytest.raises(ConfigurationError, match=said):
        settings_in_force(write_config(tmp_path, parameters), environ)


def test_doctor_finds_what_is_here(capsys, repository_root):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["tritonserver"]["version"].count(".") == 2
    assert Path(report["tritonserver"]["path"]).is_file()
    assert Path(report["tritonserver"]["python_stub"]).is_file()
    assert report["packages"]["msgspec"]
    assert report["shm"]["total"] > 0
    assert report["scaling"] == resample.describe()
    stages = {setting["stage"] for setting in report["settings"]}
    folders = {path.parent.name for path in repository_root.glob("model_repository/*/config.pbtxt")}
    assert stages == {folder for folder in folders if not folder.startswith("chat_")}


def test_doctor_says_who_scales_pictures(capsys):
    main(["doctor"])
    facts = dict(re.findall(r"^(\S.*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert facts["pictures are scaled by"] == resample.describe()


def test_doctor_names_what_is_wrong(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIPTYCH_MAX_NUM_SEQ", "3")
    assert main(["doctor"]) == 1
    assert (
        "problem: TRIPTYCH_MAX_NUM_SEQ is set, but there is no setting" in capsys.readouterr().out
    )
    monkeypatch.delenv("TRIPTYCH_MAX_NUM_SEQ")
    assert main(["doctor", "--model-repository", str(tmp_path)]) == 1
    assert f"no model repository at {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "kind"),
    [("version", dict), ("settings", list), ("matrix", list), ("doctor", dict)],
)
def test_every_command_speaks_json(command, kind, capsys):
    assert main([command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert isinstance(json.loads(out), kind)
    assert err == ""


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("triptych em", {"embed"}),
        ("triptych chat --sy", {"--system"}),
        ("triptych embed --f", {"--force"}),
        ("triptych t", {"top"}),
        ("triptych top --o", {"--once"}),
        ("triptych s", {"serve", "settings"}),
    ],
)
def test_a_shell_completes_it(typed, completed):
    done = subprocess.run(
        [Path(sys.executable).with_name("triptych")],
        env={
            **os.environ,
            "_TRIPTYCH_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(typed.count(" ")),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == completed


def test_a_shell_is_shown_its_completion():
    command = [Path(sys.executable).with_name("triptych"), "--show-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "_TRIPTYCH_COMPLETE=complete_bash" in done.stdout


@pytest.mark.parametrize("flags", [["--json"], ["--no-stream"], []])
def test_a_conversation_needs_a_terminal(flags, capsys):
    assert main(["chat", *flags]) == 2
    assert "Missing argument 'QUESTION': a conversation needs a terminal" in complaint(capsys)


def test_the_exit_codes_are_those_of_the_readme(repository_root):
    told = (repository_root / "README.md").read_text()
    for code in (cli.OK, cli.FAILED, cli.USAGE, cli.INTERRUPTED):
        assert f"| {code} | " in told
