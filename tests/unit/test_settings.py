from __future__ import annotations

import pytest

from triptych import settings
from triptych.errors import ConfigurationError

MODEL = {"TRIPTYCH_MODEL": "models/x"}


def load(parameters: dict[str, str] | None = None, **environ: str) -> settings.PreprocessSettings:
    return settings.load(settings.PreprocessSettings, parameters, {**MODEL, **environ})


def test_config_overrules_defaults_and_the_environment_overrules_it() -> None:
    assert load().max_items == 32
    assert load({"max_items": "5"}).max_items == 5
    assert load({"max_items": "5"}, TRIPTYCH_MAX_ITEMS="7").max_items == 7


def test_lists_are_written_with_commas() -> None:
    said = load(TRIPTYCH_ALLOWED_MEDIA_DOMAINS="a.org, b.org,")
    assert said.allowed_media_domains == ("a.org", "b.org")
    assert load(TRIPTYCH_ALLOWED_MEDIA_DOMAINS="").allowed_media_domains == ()


def test_tritons_own_parameters_and_other_stages_variables_are_passed_over() -> None:
    load({"EXECUTION_ENV_PATH": "/env"}, TRIPTYCH_ENCODER_DEVICE="cpu")


@pytest.mark.parametrize(
    ("parameters", "environ", "words"),
    [
        ({"max_itmes": "5"}, {}, ["max_itmes"]),
        ({}, {"TRIPTYCH_MAX_ITMES": "5"}, ["TRIPTYCH_MAX_ITMES"]),
        ({"max_items": "many"}, {}, ["max_items", "'many'", "int"]),
        ({"max_items": "0"}, {}, ["max_items", "'0'", ">= 1"]),
        ({"image_mode": "slow"}, {}, ["image_mode", "'slow'"]),
        ({"max_items": "NaN"}, {}, ["max_items", "NaN"]),
        ({"fetch_timeout_s": "-1"}, {}, ["fetch_timeout_s", "'-1'"]),
        ({"allow_pickle_embeddings": "perhaps"}, {}, ["allow_pickle_embeddings", "'perhaps'"]),
    ],
)
def test_what_is_wrong_is_named(
    parameters: dict[str, str], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(parameters, **environ)
    for word in words:
        assert word in str(caught.value)


def test_a_model_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="TRIPTYCH_MODEL"):
        settings.load(settings.EncoderSettings, {}, {})


def test_what_is_set_comes_back_from_the_environment() -> None:
    chosen = {"max_items": 3, "allowed_media_domains": ("a.org", "b.org"), "model": "m"}
    said = settings.load(settings.PreprocessSettings, {}, settings.as_environ(chosen))
    assert (said.max_items, said.allowed_media_domains) == (3, ("a.org", "b.org"))
