"""Fail closed, in real processes: either CLAA works in all of them or the server does not start, and says why.

What goes wrong is brought in as SGLang brings in anything: a second plugin, installed for the test on PYTHONPATH,
that alters SGLang in the server or in its children before our hooks are checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import claa_sglang
from claa_sglang.config import profile_search
from claa_sglang.patches import hooks
from claa_sglang.patches.arguments import ARGUMENT_HOOKS
from claa_sglang.tools import servers
from claa_sglang.tools.cpu_env import cpu_environment
from tests import profiles, tiny_models
from tests.engine_server import QUICKER, second_plugin, start_failure

pytestmark = pytest.mark.engine

NO_TOKENIZER = "--skip-tokenizer-init"
TARGET = "sglang.srt.managers.scheduler.Scheduler.get_init_info"
EXTRA_PLUGIN = '''
"""Alters SGLang as the environment says, or records which hooks each process has."""
import json, multiprocessing, os, pathlib, pkgutil, sys, threading, time


def register():
    is_child = multiprocessing.parent_process() is not None
    if os.environ.get("CLAA_TEST_BREAK") == ("child" if is_child else "server"):
        from sglang.srt.managers.scheduler import Scheduler
        Scheduler.get_init_info = lambda self, extra: None
    if os.environ.get("CLAA_TEST_BREAK") == "inactive" and is_child:
        import sglang.srt.server_args
        from claa_sglang.arguments import ClaaServerArgs
        ClaaServerArgs.resolve_once = ClaaServerArgs.__mro__[1].resolve_once
    if os.environ.get("CLAA_TEST_BREAK") == "other-config" and is_child:
        import claa_sglang.start.server_config as server_config
        import msgspec
        stock = server_config.config_of
        server_config.config_of = lambda server_args: msgspec.structs.replace(stock(server_args), window=5)
    if "CLAA_TEST_RECORD" in os.environ:
        threading.Thread(target=record, daemon=True).start()


def record():
    from sglang.srt.plugins.hook_registry import HookRegistry
    file = pathlib.Path(os.environ["CLAA_TEST_RECORD"], str(os.getpid()))
    temp = file.with_name("." + file.name)
    while True:
        ours = [t for t in HookRegistry._patched
                if any(source and source.dist_name == "claa-sglang" for _, _, source in HookRegistry._hooks[t])]
        is_scheduler = "sglang.srt.managers.scheduler" in sys.modules
        temp.write_text(json.dumps({"hooks": sorted(ours), "scheduler": is_scheduler}))
        temp.rename(file)  # a reader sees the old record or the new one
        time.sleep(0.5)
'''


@pytest.fixture(scope="module")
def extra_plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which SGLang finds the extra plugin, after ours."""
    return second_plugin(tmp_path_factory.mktemp("extra-plugin"), "claa_test_extra", EXTRA_PLUGIN)


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def assert_explains(log: str) -> None:
    for word in (TARGET, "expected: parameters (self)", "found:    parameters (self, extra)"):
        assert word in log
    assert f"pip install sglang=={hooks.SUPPORTED_SGLANG}" in log


def test_a_server_whose_sglang_differs_does_not_start(model: Path, extra_plugin: dict[str, str]) -> None:
    log = start_failure(model, "--enable-claa", NO_TOKENIZER, env={**extra_plugin, "CLAA_TEST_BREAK": "server"})
    assert_explains(log)
    assert "Traceback" not in log
    assert "Load weight begin" not in log


def test_a_scheduler_whose_sglang_differs_stops_the_server(model: Path, extra_plugin: dict[str, str]) -> None:
    log = start_failure(model, "--enable-claa", NO_TOKENIZER, env={**extra_plugin, "CLAA_TEST_BREAK": "child"})
    assert_explains(log)
    assert "scheduler died" in log and "Load weight begin" not in log


@pytest.mark.parametrize(
    ("broken", "found"), [("inactive", "no report: CLAA is not active there"), ("other-config", "'window': 5")]
)
def test_a_scheduler_that_does_not_do_as_asked_stops_the_server(
    model: Path, extra_plugin: dict[str, str], broken: str, found: str
) -> None:
    # The test above shows that a server of a user's ends with its scheduler; these begin sooner.
    env = {**extra_plugin, **QUICKER, "CLAA_TEST_BREAK": broken}
    log = start_failure(model, "--enable-claa", NO_TOKENIZER, env=env)
    assert "scheduler 0 does not serve CLAA as this server was asked to" in log
    assert "expected:" in log and found in log and "Traceback" not in log


def test_refusals_come_together_at_once_and_without_a_traceback(model: Path) -> None:
    began = time.monotonic()
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj")
    flags = ("--enable-claa", *lora, "--kv-canary", "log", "--claa-keep-rate", "7")
    default = ("--preferred-sampling-params", '{"custom_params": {"claa": {"keep_rate": 8}}}')
    log = start_failure(model, NO_TOKENIZER, *flags, *default)
    wrong_default = "--preferred-sampling-params: custom_params.claa.keep_rate: got 8 (int), must be a number above 0"
    for word in ("[lora]", "[kv-canary]", "--claa-keep-rate 7", wrong_default, "Remedy:"):
        assert word in log
    assert "Traceback" not in log and "Load weight begin" not in log
    assert time.monotonic() - began < servers.START_TIMEOUT / 2


def test_a_flag_without_enable_claa_is_refused(model: Path) -> None:
    log = start_failure(model, NO_TOKENIZER, "--claa-keep-rate", "0.3")
    assert "--claa-keep-rate given without --enable-claa: add --enable-claa" in log and "Traceback" not in log


PROFILE = Path(claa_sglang.__file__).parent / "profiles" / "smollm2-135m-instruct.json"
# tests/fast/config/test_fuzz_profile.py has many more, without a server: a profile cut at every byte among them.
BAD_PROFILES = {
    "another depth": (PROFILE.read_bytes(), "30 layers (smollm2-135m-instruct), this model has 8", "or none"),
    "not text": (b'{"version": 1, "model": {"num_layers": 8, "name": "\xff"}}', "not a profile", "Write it again"),
}


@pytest.mark.parametrize(("content", "says", "remedy"), BAD_PROFILES.values(), ids=BAD_PROFILES)
def test_a_bad_profile_is_refused_with_its_file_and_a_remedy(
    model: Path, tmp_path: Path, content: bytes, says: str, remedy: str
) -> None:
    (file := tmp_path / "profile.json").write_bytes(content)
    log = start_failure(model, NO_TOKENIZER, "--enable-claa", "--claa-profile", str(file))
    for word in (f"--claa-profile {file}: ", says, remedy):
        assert word in log
    assert "Traceback" not in log and "Load weight begin" not in log


def test_without_the_plugin_the_flag_is_unknown(model: Path) -> None:
    log = start_failure(model, NO_TOKENIZER, "--enable-claa", env={"SGLANG_PLUGINS": "none"})
    assert "unrecognized arguments: --enable-claa" in log


@pytest.mark.parametrize("flags", [(), ("--enable-claa",)], ids=["off", "on"])
def test_which_process_has_which_hooks(
    model: Path, extra_plugin: dict[str, str], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    env = {**extra_plugin, **QUICKER, "CLAA_TEST_RECORD": str(tmp_path)}
    with servers.cpu_server(model, NO_TOKENIZER, *flags, env=env) as running:
        running.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 2})
        time.sleep(1.5)
        found = {int(file.name): json.loads(file.read_text()) for file in tmp_path.glob("[0-9]*")}
        main = found.pop(running.process.pid)
        log = running.log()
    assert log.count("answers can suffer") == bool(flags), "of a server without a profile, once for all its processes"
    if flags:
        assert f"claa-sglang calibrate --model {model} --out" in log.partition("Load weight begin")[0]
    arguments = {hook.target for hook in ARGUMENT_HOOKS}
    schedulers = [child for child in found.values() if child["scheduler"]]
    others = [child for child in found.values() if not child["scheduler"]]
    assert schedulers and others
    table = hooks.collect()
    rows = {name: {h.target for h in table if flags and h.process in (name, "all")} for name in ("server", "scheduler")}
    assert set(main["hooks"]) == arguments | rows["server"]
    assert all(set(child["hooks"]) == arguments | rows["scheduler"] for child in schedulers)
    assert [set(child["hooks"]) - arguments for child in others] == [set()] * len(others)


# --- every way to start


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., servers.Server]]:
    """Start `sglang serve` with the defaults of the other tests; stopped when the test ends."""
    command = (str(Path(sys.executable).parent / "sglang"), "serve", "--model-path", str(model))
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> servers.Server:
            started = servers.launched(*servers.CPU_FLAGS, *flags, command=command, env=cpu_environment())
            running = stack.enter_context(started)
            running.wait()
            return running

        yield start


def test_sglang_serve_with_the_profile_of_another_fine_tune(
    serve: Callable[..., servers.Server], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = profiles.write(tmp_path / "found" / "p.json", model, tiny_models.build("llama", tmp_path, seed=1))
    monkeypatch.setenv(profile_search.VARIABLE, str(found.parent))
    running = serve("--enable-claa", "--claa-keep-rate", "0.3", NO_TOKENIZER)
    info = running.get("/server_info").json()
    config, log = info["claa"]["config"], running.log()
    assert (config["profile"], config["profile_origin"]) == (str(found), "auto: calibrated for this user")
    assert log.count(f"profile {found} (auto: calibrated for this user) was measured on other weights") == 1
    assert f"claa-sglang calibrate --model {model} --out" in log.partition("was measured on other weights")[2]
    assert info["enable_claa"] is True
    assert info["claa"]["config"]["steps"][0]["keep_rate"] == 0.3 and info["claa"]["hooks"]


# Four engines in one process: arguments made before plugins load, then CLAA, then stock again, then CLAA otherwise.
ENGINES = """
import json, sys
import sglang
from sglang.srt.server_args import ServerArgs

GIVEN = dict(model_path=sys.argv[1], skip_tokenizer_init=True, device="cpu", attention_backend="torch_native",
             dtype="float32", max_total_tokens=20000, random_seed=0, log_level="error")
CLAA = dict(enable_claa=True, claa_policy="always", claa_min_prompt_tokens=0)
PROMPT = [(7 * i) % 250 + 1 for i in range(60)]
ODD = {
    "no claa options": {"custom_params": {"claa": {"keep_rate": 7}}},
    "nonsense": {"custom_params": {"claa": "x", "y": 1}},
    "plain": {},
}

def answers(engine):
    found = {}
    for name, params in ODD.items():
        for ids in (PROMPT, [PROMPT[:9], PROMPT[:5]], []):
            try:
                out = engine.generate(input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 4, **params})
                outs = out if isinstance(out, list) else [out]
                said = [[one["output_ids"], sorted(one["meta_info"])] for one in outs]
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            found[f"{name}, {len(ids)}"] = said
    info = engine.get_server_info()
    return {"answers": found, "info": sorted(info), "states": [sorted(state) for state in info["internal_states"]]}

if __name__ == "__main__":
    report = {}
    for name, given in {
        "stock": {"server_args": ServerArgs(**GIVEN)},
        "claa": {**GIVEN, **CLAA, "claa_keep_rate": 0.3},
        "stock after claa": GIVEN,
        "claa again": {**GIVEN, **CLAA, "claa_keep_rate": 0.5, "claa_score_layers": [3]},
    }.items():
        engine = sglang.Engine(**given)
        report[name] = {**answers(engine), "claa": engine.get_server_info().get("claa")}
        engine.shutdown()
    print("REPORT", json.dumps(report))
"""


def test_engines_with_and_without_claa_in_one_process(model: Path, tmp_path: Path) -> None:
    done = run_engines(ENGINES, tmp_path, model, **QUICKER)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])
    stock = report["stock"]
    assert report["stock after claa"] == stock and "claa" not in stock["info"] and stock["claa"] is None
    for name, keep_rate, score_layers in (("claa", 0.3, [0, 1, 2, 3]), ("claa again", 0.5, [3])):
        (step,) = report[name]["claa"]["config"]["steps"]
        assert step["keep_rate"] == keep_rate and step["score_layers"] == score_layers
        assert report[name]["claa"]["hooks"]["ok"]
        plain, refused = (report[name]["answers"][key] for key in ("plain, 60", "no claa options, 60"))
        assert "claa" in plain[0][1] and "keep_rate" in refused


ENGINE = """
import sys
import sglang

if __name__ == "__main__":
    sglang.Engine(
        model_path=sys.argv[1], skip_tokenizer_init=True, device="cpu", attention_backend="torch_native",
        enable_claa=True, kv_canary="log")
"""


def test_an_engine_that_is_refused(model: Path, tmp_path: Path) -> None:
    done = run_engines(ENGINE, tmp_path, model)
    assert done.returncode == 1 and "StartupError" in done.stderr and "[kv-canary]" in done.stderr


def run_engines(code: str, directory: Path, model: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`code` as a script, as its engines start it again in their children."""
    (script := directory / "engine.py").write_text(code)
    environ = {**os.environ, **cpu_environment(), **env}
    command = [sys.executable, str(script), str(model)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=2 * servers.START_TIMEOUT)
