"""Settings: flags, environment variables, --help, and their way into the worker processes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.command_line import parse_args
from minisgl.config import DEFAULT_MODEL, ConfigError, ModelSpec, ServerConfig, WorkerSpec
from minisgl.foreign_flags import FOREIGN_FLAGS, FOREIGN_PREFIXES

FIELDS = dataclasses.fields(ServerConfig)
BOOLEANS = [spec.name for spec in FIELDS if isinstance(spec.default, bool)]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def help_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        parse_args(["--help"], {})
    assert exit.value.code == 0
    return " ".join(capsys.readouterr().out.split())


# ---- the command line -----------------------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults() -> None:
    assert parse_args([], {}) == ServerConfig()


def test_help_names_every_flag_variable_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(capsys, monkeypatch)
    for spec in FIELDS:
        assert flag(spec.name) in text
        assert spec.metadata["help"]
        for alias in spec.metadata["aliases"]:
            assert alias in text
        if spec.metadata["env"]:
            assert f"[env {spec.metadata['env']}]" in text
        if spec.default is not None and not isinstance(spec.default, bool):
            assert f"(default: {spec.default})" in text, spec.name
    assert DEFAULT_MODEL in text


def test_help_says_a_default_of_every_flag_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"], {})
    text = capsys.readouterr().out
    usage, *groups = text.partition("\nexamples:")[0].split("\n\n")
    assert len(usage.splitlines()) == 1
    titles = [group.splitlines()[0] for group in groups[1:]]
    assert titles == ["options:", *(f"{spec.metadata['group']}:" for spec in FIELDS if spec.metadata["group"])]
    assert FIELDS[0].metadata["group"]
    for entry in "\n".join(groups[2:]).split("\n  --")[1:]:
        assert entry.count("(default") == 1, entry


def test_sglangs_flags_that_ask_for_nothing_else_are_told_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--tp-size 1 --enable-metrics --schedule-policy=fcfs --port 7 --skip-server-warmup --stream-interval 1"
    assert parse_args(words.split(), {}) == ServerConfig(port=7)
    *notes, end = capsys.readouterr().err.split("\n")
    assert end == "" and [note.split(" changes nothing: ")[0] for note in notes] == [
        "launch.py: --tp-size 1",
        "launch.py: --enable-metrics",
        "launch.py: --schedule-policy fcfs",
        "launch.py: --skip-server-warmup",
        "launch.py: --stream-interval 1",
    ]


def test_no_flag_of_ours_is_called_foreign() -> None:
    own = {name for spec in FIELDS for name in (flag(spec.name), *spec.metadata["aliases"])}
    assert not own & FOREIGN_FLAGS.keys()
    assert not [name for name in own if name.startswith(tuple(FOREIGN_PREFIXES))]


def test_other_spellings_of_a_choice() -> None:
    assert parse_args(["--dtype", "half"], {}).dtype == "float16"
    assert parse_args(["--dtype", "float"], {}).dtype == "float32"


@pytest.mark.parametrize("name", [spec.name for spec in FIELDS])
def test_every_flag_sets_its_field(name: str) -> None:
    spec = next(spec for spec in FIELDS if spec.name == name)
    if name in BOOLEANS:
        assert getattr(parse_args([flag(name)], {}), name) is True
        return
    if spec.metadata["choices"]:
        value: object = spec.metadata["choices"][-1]
    elif "int" in str(spec.type):
        value = 4096
    elif "float" in str(spec.type):
        value = 0.5
    else:
        value = "some/text"
    if name in ("http_workers", "port"):
        value = 7
    elif name in ("cors_origin", "otlp_endpoint"):
        value = "https://a.example"
    for spelling in (flag(name), *spec.metadata["aliases"]):
        assert getattr(parse_args([spelling, str(value)], {}), name) == value


@pytest.mark.parametrize(
    ("text", "value"), [("8192", 8192), ("8k", 8192), ("8K", 8192), ("2m", 2 * 2**20), ("1M", 2**20)]
)
def test_ints_take_binary_suffixes(text: str, value: int) -> None:
    assert parse_args(["--max-total-tokens", text], {}).max_total_tokens == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--page-size", "k"], "--page-size: invalid int value: 'k'"),
        (["--page-size", "1.5"], "--page-size: invalid int value: '1.5'"),
        (["--page-size", "1g"], "--page-size: invalid int value: '1g'"),
        (["--page-size"], "--page-size: expected one argument"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--devic", "cpu"], "unknown flag --devic; did you mean --device?"),
        (["--max-runing-requests=8"], "unknown flag --max-runing-requests; did you mean --max-running-requests?"),
        (["--frobnicate", "cpu"], "unknown flag --frobnicate; --help lists the flags"),
        (["-p", "80"], "unknown flag -p; "),
        (["stray"], "unexpected argument 'stray'; a setting is given as --flag value (see --help)"),
        (["--tp-size", "2"], "--tp-size 2: sglang has this flag and this server does not; each replica runs on one"),
        (["--tp=4"], "--tp 4: sglang has this flag and this server does not"),
        (["--tp"], "--tp: sglang has this flag and this server does not"),
        (["--enable-metrics", "--speculative-algorithm", "EAGLE"], "--speculative-algorithm EAGLE: sglang has"),
        (["--enable-lora"], "--enable-lora: sglang has this flag and this server does not; LoRA adapters"),
        (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype fp8_e5m2: sglang has this flag and this server does not"),
        (["--page-size", "0"], "--page-size must be at least 1, got 0"),
        (["--dp-size", "-1"], "--dp-size must be at least 1, got -1"),
        (["--http-workers", "-1"], "--http-workers must be at least 0, got -1"),
        (["--max-queued-requests", "0"], "--max-queued-requests must be at least 1, got 0"),
        (["--http-workers", "129"], "--http-workers must be at most 128, got 129"),
        (["--port", "65536"], "--port must be between 0 and 65535, got 65536"),
        (["--mem-fraction-static", "1"], "--mem-fraction-static must be between 0 and 1, got 1.0"),
        (["--drain-timeout", "0"], "--drain-timeout must be above 0, got 0.0"),
        (["--context-length", "0"], "--context-length must be at least 1, got 0"),
        (["--api-key", "two words"], "--api-key must consist of visible ASCII characters without spaces"),
        (["--cors-origin", "https://a.example, b"], "--cors-origin must be '*' or origins such as"),
        (["--cors-origin", "https://a.example/"], "got https://a.example/"),
        (["--otlp-endpoint", "localhost:4318"], "--otlp-endpoint must be a URL such as http://127.0.0.1:4318"),
        (["--max-body-bytes", "10"], "--max-body-bytes must be at least 1024, got 10"),
    ],
)
def test_a_wrong_setting_ends_with_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_args(arguments, {})
    assert exit.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("launch.py: error: ")
    assert words in last


def test_a_wrong_setting_in_code_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="--dp-size must be at least 1"):
        ServerConfig(dp_size=0)


def test_settings_cannot_be_changed_after_the_start() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServerConfig().port = 1  # type: ignore[misc]


# ---- the environment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [spec for spec in FIELDS if spec.metadata["env"]], ids=lambda spec: spec.name)
def test_a_variable_replaces_the_default_and_a_flag_the_variable(spec: dataclasses.Field[object]) -> None:
    variable = spec.metadata["env"]
    assert getattr(parse_args([], {variable: "from/env"}), spec.name) == "from/env"
    assert getattr(parse_args([], {variable: ""}), spec.name) == spec.default
    assert getattr(parse_args([flag(spec.name), "from/flag"], {variable: "from/env"}), spec.name) == "from/flag"


def test_the_variables_of_the_readme() -> None:
    env = {"MODEL_NAME": "a/b", "MODEL_LOCAL_DIR": "/c", "MODELSCOPE_MODEL_NAME": "d/e"}
    config = parse_args([], env)
    assert (config.model, config.model_local_dir, config.modelscope_model_name) == ("a/b", "/c", "d/e")


def test_the_keys_are_not_shown() -> None:
    config = parse_args([], {"MINISGL_API_KEY": "top-secret", "MINISGL_ADMIN_API_KEY": "top-secret-too"})
    assert (config.api_key, config.admin_api_key) == ("top-secret", "top-secret-too")
    assert "top-secret" not in repr(config)
    assert not {"api_key", "admin_api_key"} & config.public().keys()
    assert config.public()["port"] == config.port


# ---- to the workers -------------------------------------------------------------------------------------------------


@given(
    st.builds(
        ServerConfig,
        model=st.none() | st.text(),
        context_length=st.none() | st.integers(1, 2**40),
        mem_fraction_static=st.none() | st.floats(0.01, 0.99),
        narrate=st.booleans(),
        dtype=st.sampled_from(["auto", "float32"]),
    ),
    st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)),
    st.text(),
)
def test_a_worker_spec_survives_the_way_to_its_worker(config: ServerConfig, eos: tuple[int, ...], text: str) -> None:
    model = ModelSpec(text, text, text, context_length=512, vocab_size=10, eos_token_ids=eos, architecture=text)
    spec = WorkerSpec("scheduler-1", "scheduler", 1, 3, "ipc://inbox", "ipc://control", 2, config, model)
    assert WorkerSpec.unpack(spec.pack()) == spec
