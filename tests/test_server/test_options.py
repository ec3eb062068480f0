"""Options from the command line and from a file, and how mistakes end. What each does: the other tests here."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.main import get_command

from furiosa_build.artifact.schema import SchedulerDefaults
from furiosa_build.cli import furiosa_llm, main, serving
from furiosa_build.core.errors import UserError
from furiosa_build.ir.engine_options import description, plain_type
from furiosa_build.recipe.schema import SchedulerConfig
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.server import serve
from furiosa_build.server.options import ServerOptions

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"


def options(*arguments: str) -> ServerOptions:
    """What `furiosa-llm serve` makes of its command line."""
    served: list[ServerOptions] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(furiosa_llm, "launch", lambda _, options: served.append(options))
        app = get_command(furiosa_llm.app)
        app.main(["serve", "artifact", *arguments], standalone_mode=False)
    [given] = served
    return given


def test_defaults_listen_on_the_loopback_address_only() -> None:
    assert options() == ServerOptions()
    assert options().host == "127.0.0.1"


def test_values_are_read_by_their_types() -> None:
    given = options("--port", "0", "--is-offline", "true", "--request-timeout-s", "1.5", "--cors-origins", "a,b")
    assert (given.port, given.is_offline, given.request_timeout_s, given.cors_origins) == (0, True, 1.5, ["a", "b"])
    assert options("--seed", "-1", "--max-body-bytes", "2MiB").model_dump(include={"seed", "max_body_bytes"}) == {
        "seed": -1,
        "max_body_bytes": 2 * 1024 * 1024,
    }


def test_options_and_overrides_may_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `furiosa-build serve`, which takes a recipe with overrides."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serving, "launch", lambda artifact, options: found.append((artifact(), options.port)))
    monkeypatch.setattr(serving, "_artifact_of", lambda *arguments: arguments)
    for line in ("tiny --port 1 name=a buckets=b", "--port=1 tiny name=a buckets=b", "tiny name=a --port 1 buckets=b"):
        monkeypatch.setattr(sys, "argv", ["furiosa-build", "serve", *line.split()])
        with pytest.raises(SystemExit):
            main.main()
    assert found == [(("tiny", ["name=a", "buckets=b"]), 1)] * 3


def test_an_option_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\ntimeout_keep_alive: 7\n")
    given = options("--server-config", str(file), "--port", "2")
    assert (given.port, given.timeout_keep_alive) == (2, 7)


def test_those_of_the_engine_reach_its_arguments() -> None:
    given = options("--devices", "npu:0:0-3", "--max-processing-samples", "3", "--spare-blocks-ratio", "0.5")
    args = given.engine_args("there")
    assert (args.model, args.devices, args.max_processing_samples, args.spare_blocks_ratio) == (
        "there",
        "npu:0:0-3",
        3,
        0.5,
    )
    assert args.tokenizer is None


def test_every_argument_of_the_engine_is_an_option() -> None:
    """But those of which there is one value only, and `model`, which is what is served."""
    of_engine = {each.name for each in fields(AsyncEngineArgs)}
    left_out = {"model", "tokenizer_mode", "cache_dir", "backend", "packing_type"}
    assert of_engine - set(ServerOptions.model_fields) == left_out
    given = {"seed": 5, "enable_prefix_caching": False, "prefill_chunk_size": 64, "num_speculative_tokens": 2}
    args = ServerOptions(**given).engine_args("there")  # type: ignore[arg-type]
    assert {name: getattr(args, name) for name in given} == given


def test_an_option_of_the_engine_is_defined_once() -> None:
    """Its type and its words are the same for the engine, the server, and in a recipe and an artifact."""
    engine = get_type_hints(AsyncEngineArgs, include_extras=True)
    server = get_type_hints(ServerOptions, include_extras=True)
    shared = (engine.keys() & server.keys()) - {"devices"}  # an engine takes a list as well
    assert len(shared) > 12
    assert {name: server[name] for name in shared} == {name: engine[name] for name in shared}
    recipe = get_type_hints(SchedulerConfig, include_extras=True)
    artifact = get_type_hints(SchedulerDefaults, include_extras=True)
    assert recipe.keys() == artifact.keys() <= engine.keys()
    for name in recipe:
        words = {description(each[name]) for each in (engine, server, recipe, artifact)}
        assert len(words) == 1
        assert words != {""}
        assert len({plain_type(each[name]) for each in (engine, server, recipe, artifact)}) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prot: 1", "did you mean 'port'"),
        ("port: '1'", "port='1'"),
        ("port: 70000", "65535"),
        ("ssl_certfile: x", "belong together"),
        ("- port", "not a mapping"),
        ("port: [", "cannot be read"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as ended:
        options("--server-config", str(file))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert f"where: {file}" in message


def test_a_file_without_keys_does_not_open_the_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(UserError, match="no API key"):
        options("--api-key-file", str(tmp_path / "keys")).api_keys()


def test_a_port_that_is_taken_is_refused_before_a_build() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match="in use") as refused:
            serve.serve(build, ServerOptions(port=taken.getsockname()[1]))
        assert "--port" in str(refused.value)


@pytest.mark.parametrize("name", ["no.pem", "nowhere.pem"])
def test_tls_files_are_read_before_a_build(tmp_path: Path, name: str) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    path = str(tmp_path / name)
    with pytest.raises(UserError, match="TLS files"):
        serve.serve(build, ServerOptions(port=0, ssl_certfile=path, ssl_keyfile=path))


def test_api_keys_are_read_before_a_build(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        serve.serve(build, ServerOptions(port=0, api_key_file=str(tmp_path / "nowhere")))


def build() -> Path:
    raise AssertionError("it would have been built")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--port", "0"], "nowhere"),
        (["nowhere", "--port", "x"], "port='x'"),
        (["nowhere", "--nonsense", "1"], "--nonsense"),
    ],
)
def test_mistakes_of_the_command_line_end_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        furiosa_llm.main(["serve", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_an_artifact_takes_no_overrides(
    chat_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["furiosa-build", "serve", str(chat_artifact), "--port", "0", "quantization=int8"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert "is built already" in capsys.readouterr().err


def test_the_document_names_every_option() -> None:
    text = DOCUMENT.read_text()
    missing = [name for name in ServerOptions.model_fields if f"`--{name.replace('_', '-')}" not in text]
    assert missing == []


def test_help_imports_nothing_of_the_server_but_its_options() -> None:
    code = (
        "import sys; from furiosa_build.cli.furiosa_llm import main\n"
        "try: main(['serve', '--help'])\n"
        "finally: print({'torch', 'fastapi', 'uvicorn'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.endswith("set()\n")
    assert "--request-timeout-s" in ran.stdout
