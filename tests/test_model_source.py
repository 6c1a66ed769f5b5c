"""Where models come from: local directories, the demo model, and both hubs through their real clients."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_hubs import FakeHub, HuggingFaceHandler, ModelScopeHandler, closed_port_url, safetensors, serving, tiny_repo

from minisgl import model_source
from minisgl.config import DEFAULT_MODEL, ConfigError, ModelSpec, ServerConfig
from minisgl.hub_download import HuggingFace, Job
from minisgl.model_source import ModelNotFound, resolve_model

NAME = "acme/tiny-chat"
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


@pytest.fixture
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeHub, FakeHub]]:
    """Empty fake hubs in place of both real ones, and empty caches."""
    for variable in (
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "HF_HUB_CACHE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope_home"))
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
    with serving(FakeHub(), HuggingFaceHandler) as hf, serving(FakeHub(), ModelScopeHandler) as ms:
        monkeypatch.setenv("HF_ENDPOINT", hf.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", ms.url)
        yield hf, ms


class Recorder:
    """Collects what resolve_model reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.reports.append((stage, done, total))


def resolve(config: ServerConfig) -> ModelSpec:
    return resolve_model(config, Recorder())


def files_of(spec: ModelSpec) -> set[str]:
    return {path.name for path in Path(spec.directory).iterdir() if not path.name.startswith(".")}


# ---- the hubs -------------------------------------------------------------------------------------------------------


def test_hugging_face_serves_the_model(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, ms = hubs
    hf.repos[NAME] = ms.repos[NAME] = tiny_repo()
    hf.seconds_per_file = 1.0
    report = Recorder()

    spec = resolve_model(ServerConfig(model=NAME), report)

    assert spec.name == spec.source == NAME
    assert (spec.architecture, spec.vocab_size, spec.context_length) == ("Qwen2ForCausalLM", 10, 512)
    assert spec.eos_token_ids == (3, 4, 7)
    assert hf.fetched() == files_of(spec) == NEEDED
    assert ms.fetched() == set()
    downloads = [(done, total) for stage, done, total in report.reports if stage == "downloading"]
    assert downloads == sorted(downloads)
    assert {total for _, total in downloads} == {sum(len(tiny_repo()[name]) for name in NEEDED)}


def test_a_cached_model_needs_no_hub(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, ms = hubs
    hf.repos[NAME] = tiny_repo()
    first = resolve(ServerConfig(model=NAME))
    hf.requests.clear()
    ms.requests.clear()

    assert resolve(ServerConfig(model=NAME)) == first
    assert hf.requests == ms.requests == []


def test_half_a_cached_model_is_completed(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, _ = hubs
    hf.repos[NAME] = tiny_repo()
    dummy = resolve(ServerConfig(model=NAME, load_format="dummy"))
    assert hf.fetched() == NEEDED - {"model.safetensors"}

    assert files_of(resolve(ServerConfig(model=NAME))) == NEEDED
    assert resolve(ServerConfig(model=NAME)).directory == dummy.directory


def test_files_that_are_renamed_meanwhile_are_counted_all_the_same(tmp_path: Path) -> None:
    hub = HuggingFace(Job("huggingface", NAME, None, str(tmp_path), True, False, False))
    hub._blobs = {"config.json": "abc"}
    blobs = tmp_path / f"models--{NAME.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"x" * 100)
    over = threading.Event()

    def rename() -> None:
        while not over.is_set():
            (blobs / "abc.incomplete").rename(blobs / "abc")
            (blobs / "abc").rename(blobs / "abc.incomplete")

    renaming = threading.Thread(target=rename)
    renaming.start()
    try:
        counts = [hub.bytes_present(["config.json"]) for _ in range(3000)]
    finally:
        over.set()
        renaming.join()
    assert counts == sorted(counts) and counts[-1] >= 100


@pytest.mark.parametrize("fault", ["absent", "down", "broken", "gated"])
def test_modelscope_steps_in(hubs: tuple[FakeHub, FakeHub], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, ms = hubs
    ms.repos[NAME] = tiny_repo()
    match fault:
        case "down":
            monkeypatch.setenv("HF_ENDPOINT", closed_port_url())
        case "broken":
            hf.status = 503
        case "gated":
            hf.repos[NAME] = tiny_repo()
            hf.gated.add(NAME)

    spec = resolve(ServerConfig(model=NAME))

    assert spec.name == NAME
    assert ms.fetched() == files_of(spec) == NEEDED
    assert hf.fetched() == set()
    ms.requests.clear()
    assert resolve(ServerConfig(model=NAME)) == spec
    assert ms.requests == []


def test_modelscope_steps_in_for_a_silent_hugging_face(
    hubs: tuple[FakeHub, FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, ms = hubs
    hf.silent = True
    ms.repos[NAME] = tiny_repo()
    monkeypatch.setattr(model_source, "PATIENCE_SECONDS", 0.5)

    assert files_of(resolve(ServerConfig(model=NAME))) == NEEDED


def test_the_name_on_modelscope_can_differ(hubs: tuple[FakeHub, FakeHub]) -> None:
    _, ms = hubs
    ms.repos["acme-cn/tiny"] = tiny_repo()

    spec = resolve(ServerConfig(model=NAME, modelscope_model_name="acme-cn/tiny"))

    assert spec.name == NAME
    assert ms.fetched() == NEEDED


def test_download_dir_and_revision_are_honoured(hubs: tuple[FakeHub, FakeHub], tmp_path: Path) -> None:
    hf, _ = hubs
    hf.repos[NAME] = tiny_repo()
    spec = resolve(ServerConfig(model=NAME, revision="main", download_dir=str(tmp_path / "here")))
    assert Path(spec.directory).is_relative_to((tmp_path / "here").resolve())

    with pytest.raises(ModelNotFound, match="no revision 'v9'"):
        resolve(ServerConfig(model=NAME, revision="v9"))


def test_a_slow_download_is_not_cut(hubs: tuple[FakeHub, FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    hf, _ = hubs
    hf.repos[DEFAULT_MODEL] = tiny_repo()
    hf.seconds_per_file = 1.5
    monkeypatch.setattr(model_source, "PATIENCE_SECONDS", 1.0)

    assert resolve(ServerConfig()).name == DEFAULT_MODEL


def test_repository_code_comes_only_when_trusted(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, _ = hubs
    hf.repos[NAME] = tiny_repo() | {"modeling_tiny.py": b"raise SystemExit"}
    resolve(ServerConfig(model=NAME, load_format="dummy"))
    assert "modeling_tiny.py" not in hf.fetched()

    resolve(ServerConfig(model="acme/tiny-chat", trust_remote_code=True))
    assert "modeling_tiny.py" in hf.fetched()


# ---- no model to be had ---------------------------------------------------------------------------------------------


def test_a_named_model_never_becomes_another(hubs: tuple[FakeHub, FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", closed_port_url())
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", closed_port_url())
    with pytest.raises(ModelNotFound) as error:
        resolve(ServerConfig(model=NAME))
    for words in (NAME, "Hugging Face (http://127", "ModelScope (http://127", "Connection refused", "--model demo"):
        assert words in str(error.value)


def test_a_wrong_name_is_said_to_be_on_neither_hub(hubs: tuple[FakeHub, FakeHub]) -> None:
    with pytest.raises(ModelNotFound) as error:
        resolve(ServerConfig(model="acme/no-such-model"))
    assert str(error.value).count("has no such repository") == 2


def test_a_gated_repository_says_where_to_ask(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, _ = hubs
    hf.repos[NAME] = tiny_repo()
    hf.gated.add(NAME)
    with pytest.raises(ModelNotFound, match=rf"gated; accept its terms at \S+{NAME} and set HF_TOKEN"):
        resolve(ServerConfig(model=NAME))


@pytest.mark.parametrize("silent", [False, True])
def test_without_a_name_and_a_network_the_demo_model_is_served(
    hubs: tuple[FakeHub, FakeHub], silent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hf, ms = hubs
    hf.silent = ms.silent = silent
    if not silent:
        monkeypatch.setenv("HF_ENDPOINT", closed_port_url())
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", closed_port_url())
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "minisgl"):
        spec = resolve(ServerConfig())
    assert spec.name == spec.source == "demo"
    assert time.monotonic() - began < 30
    assert DEFAULT_MODEL in caplog.text
    assert "demo model" in caplog.text
    assert ("did not answer" if silent else "cannot be reached") in caplog.text


def test_offline_mode_asks_no_hub(hubs: tuple[FakeHub, FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    hf, ms = hubs
    hf.repos[NAME] = ms.repos[NAME] = tiny_repo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE is set"):
        resolve(ServerConfig(model=NAME))
    assert hf.requests == ms.requests == []


def test_a_repository_without_safetensors_is_refused_before_any_download(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, _ = hubs
    hf.repos[NAME] = {name: data for name, data in tiny_repo().items() if not name.endswith(".safetensors")}
    with pytest.raises(ModelNotFound, match=r"only as model\.gguf, and only safetensors"):
        resolve(ServerConfig(model=NAME))
    assert hf.fetched() == set()


def test_a_file_cut_on_the_way_is_an_error(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, ms = hubs
    hf.repos[NAME] = ms.repos[NAME] = tiny_repo()
    hf.sizes["model.safetensors"] = ms.sizes["model.safetensors"] = len(safetensors()) + 100
    with pytest.raises(ModelNotFound) as error:
        resolve(ServerConfig(model=NAME))
    assert str(error.value).count("the download broke off") == 2


def test_a_damaged_file_on_the_hub_is_an_error(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, _ = hubs
    hf.repos[NAME] = tiny_repo() | {"model.safetensors": safetensors()[:-8]}
    with pytest.raises(ModelNotFound, match=r"model\.safetensors is damaged"):
        resolve(ServerConfig(model=NAME))


# ---- processes ------------------------------------------------------------------------------------------------------


def test_what_report_raises_ends_the_download(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, _ = hubs
    hf.repos[NAME] = tiny_repo()
    hf.seconds_per_file = 30

    def report(stage: str, done: int, total: int) -> None:
        if stage == "downloading":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_model(ServerConfig(model=NAME), report)
    assert not [child for child in psutil.Process().children() if "hub_download" in " ".join(child.cmdline())]


def test_a_killed_launcher_leaves_no_download_behind(hubs: tuple[FakeHub, FakeHub]) -> None:
    hf, _ = hubs
    hf.repos[NAME] = tiny_repo()
    hf.seconds_per_file = 30
    script = f"""
        from minisgl.config import ServerConfig
        from minisgl.model_source import resolve_model
        resolve_model(ServerConfig(model={NAME!r}), lambda stage, done, total: print(stage, flush=True))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        assert any(line == "downloading\n" for line in launcher.stdout)
        downloads = psutil.Process(launcher.pid).children()
        assert len(downloads) == 2
        launcher.kill()
    _, alive = psutil.wait_procs(downloads, timeout=30)
    assert alive == []


def test_the_launcher_imports_neither_torch_nor_a_hub_client() -> None:
    script = """
        import sys
        from minisgl.config import ServerConfig
        from minisgl.model_source import resolve_model
        resolve_model(ServerConfig(model="demo"), print)
        heavy = {"torch", "transformers", "huggingface_hub", "modelscope", "modelscope_hub", "numpy"}
        print(heavy & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr


# ---- directories ----------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    for name in NEEDED:
        (folder / name).write_bytes(tiny_repo()[name])
    return folder


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_directory_is_served_as_it_is(directory: Path) -> None:
    by_flag = resolve(ServerConfig(model=str(directory)))
    assert (by_flag.directory, by_flag.name) == (str(directory), "tiny-model")
    assert resolve(ServerConfig(model_local_dir=str(directory))).name == "tiny-model"
    assert resolve(ServerConfig(model="acme/x", model_local_dir=str(directory))).name == "acme/x"
    assert resolve(ServerConfig(model=str(directory), served_model_name="mine")).name == "mine"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"--model-local-dir .* is not a directory"):
        resolve(ServerConfig(model_local_dir=str(tmp_path / "nowhere")))
    with pytest.raises(ModelNotFound, match="neither an existing directory nor a hub name"):
        resolve(ServerConfig(model=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
    ],
)
def test_a_missing_file_is_named(directory: Path, missing: str, words: str) -> None:
    (directory / missing).unlink()
    with pytest.raises(ModelNotFound, match=words):
        resolve(ServerConfig(model=str(directory)))


def test_dummy_weights_need_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert resolve(ServerConfig(model=str(directory), load_format="dummy")).vocab_size == 10


def test_pickled_weights_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"only as pytorch_model\.bin"):
        resolve(ServerConfig(model=str(directory)))


def test_a_missing_shard_is_named(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match=r"lacks model-00002-of-00002\.safetensors"):
        resolve(ServerConfig(model=str(directory)))


@pytest.mark.parametrize(
    "damage", [b"", b"\x00", b"\xff" * 64, safetensors()[:-1], safetensors() + b"x", b"<html>" * 9]
)
def test_damaged_weights_are_found(directory: Path, damage: bytes) -> None:
    (directory / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelNotFound, match=r"model\.safetensors is damaged"):
        resolve(ServerConfig(model=str(directory)))


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_damaged_config_is_named(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(ModelNotFound, match=r"config\.json (is not valid JSON|does not hold)"):
        resolve(ServerConfig(model=str(directory)))


# ---- facts ----------------------------------------------------------------------------------------------------------


def test_context_length_can_be_shortened_and_not_lengthened(directory: Path) -> None:
    assert resolve(ServerConfig(model=str(directory), context_length=100)).context_length == 100
    with pytest.raises(ConfigError, match="--context-length 513 is above the 512 tokens"):
        resolve(ServerConfig(model=str(directory), context_length=513))


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 1024),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 256}}, 512),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 512),
        ({"max_position_embeddings": None, "n_positions": 99}, 99),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
    ],
)
def test_context_length_follows_the_config(directory: Path, settings: dict[str, object], length: int) -> None:
    rewrite(directory / "config.json", **settings)
    assert resolve(ServerConfig(model=str(directory))).context_length == length


def test_a_config_without_context_length_asks_for_one(directory: Path) -> None:
    rewrite(directory / "config.json", max_position_embeddings=None)
    with pytest.raises(ConfigError, match="give it with --context-length"):
        resolve(ServerConfig(model=str(directory)))
    assert resolve(ServerConfig(model=str(directory), context_length=64)).context_length == 64


@pytest.mark.parametrize(
    ("tokenizer_config", "tokenizer", "ids"),
    [
        ({"eos_token": {"content": "<|im_end|>"}}, None, (3, 4, 7)),
        ({"eos_token": "</s>", "added_tokens_decoder": {"9": {"content": "</s>"}}}, None, (3, 4, 9)),
        ({"eos_token": "a"}, None, (0, 3, 4)),
        ({"eos_token": "</s>"}, {"model": {"vocab": [["<unk>", 0.0], ["</s>", -1.0]]}}, (1, 3, 4)),
        ({"eos_token": "unknown"}, None, (3, 4)),
        ({}, None, (3, 4)),
    ],
)
def test_eos_ids_are_the_union_of_all_files(
    directory: Path, tokenizer_config: dict[str, object], tokenizer: dict[str, object] | None, ids: tuple[int, ...]
) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert resolve(ServerConfig(model=str(directory))).eos_token_ids == ids
