"""Hostile files are refused, the package cannot run them, and secrets reach no file."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.faults.hostile import CASES, Bomb, fault_of
from tests.faults.sittings import completed
from tests.training.runs import tiny
from training.compose import CONFIG_DIRECTORY, Primary, compose
from training.config import ConfigurationError
from training.launching.command import main

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sophia", "models", "data", "training", "planning", "studies", "analysis", "scripts")
SOURCES = [ROOT / "train.py", *sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
# Calls that turn text or bytes into code or into a shell's command.
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.unsafe_load"}
FORBIDDEN |= {"yaml.full_load", "hydra.utils.instantiate", "instantiate", "joblib.load", "np.load", "numpy.load"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "runpy"}
YAML_LOADERS = {"_YAML_LOADER"}  # analysis of run records: yaml.CSafeLoader


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file_is_refused_in_a_line_and_runs_nothing(case: str, tmp_path: Path) -> None:
    assert fault_of(case, tmp_path) is None


def test_the_bomb_is_real(tmp_path: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(Bomb(tmp_path)))
    assert (tmp_path / "exploded").exists()


def test_the_snapshot_of_a_hub_cache_is_read_although_its_files_are_links(tmp_path: Path) -> None:
    from models.huggingface import from_huggingface
    from tests.faults.hostile import model_at

    repository = tmp_path / "models--gpt2"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in model_at(tmp_path).iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(repository / "blobs" / path.name)
    assert from_huggingface(snapshot)[0].n_layer == 2


def test_a_model_that_cannot_be_begun_from_is_a_configuration_error(tmp_path: Path) -> None:
    from training.architectures import build_model
    from training.weights import InitialWeights

    config = compose(["model=gpt2_nano", f"model.init_from={tmp_path}"])
    with pytest.raises(ConfigurationError, match=r"model\.init_from=.*no config\.json"):
        InitialWeights(config.model, build_model(config.model, 300), 0)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_turns_text_into_code_or_a_shell_command(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(module)
            case ast.Call(func=func, keywords=keywords):
                name = ast.unparse(func)
                found += [name] if name in FORBIDDEN else []
                for keyword in keywords:
                    given = ast.unparse(keyword.value)
                    if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and given != "False":
                        found.append(f"{name}({keyword.arg}={given})")
                    if keyword.arg == "weights_only" and given != "True":
                        found.append(f"{name}(weights_only={given})")
                if name == "yaml.load" and not any(ast.unparse(keyword.value) in YAML_LOADERS for keyword in keywords):
                    found.append("yaml.load")
    assert found == []


@pytest.mark.parametrize(
    "override",
    [
        "+_target_=os.system",
        "+model._target_=os.system",
        "+optimizer._target_=torch.optim.SGD",
        "++tracker._target_=subprocess.run",
        "optimizer.name=os.system",
        "strategy.name=subprocess",
        "tracker.name=os",
    ],
)
def test_a_configuration_cannot_name_anything_outside_of_the_registry(override: str) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown key|expected one of|not a known value"):
        compose([override])


# Overrides that would make Hydra create a directory at {place}; {files} holds an experiment that does so.
FOREIGN = {
    "callbacks": ["+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x.path={place}"],
    "in launcher": ["+hydra.launcher.x._target_=os.mkdir", "+hydra.launcher.x.path={place}"],
    "launcher": ["hydra.launcher._target_=os.mkdir", "+hydra.launcher.path={place}"],
    "sweeper": ["hydra.sweeper._target_=os.mkdir", "+hydra.sweeper.path={place}"],
    "logging": ["+hydra.job_logging.handlers.x.class=os.mkdir", "+hydra.job_logging.handlers.x.path={place}"],
    "file": ["--config-dir={files}", "experiment=evil"],
    "primary": ["--config-path", "{files}", "-cn", "evil"],
    "added primary": ["--config-dir={files}", "--config-name=evil"],
}


@pytest.mark.parametrize(
    ("mode", "foreign"),
    [(mode, foreign) for mode in ("-m", "--help", "") for foreign in FOREIGN],
)
def test_no_configuration_has_hydra_call_anything_but_its_own_plugins(
    mode: str, foreign: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "made"
    (tmp_path / "experiment").mkdir()
    evil = {"hydra": {"callbacks": {"x": {"_target_": "os.mkdir", "path": str(place)}}}}
    (tmp_path / "experiment" / "evil.yaml").write_text("# @package _global_\n" + json.dumps(evil))
    (tmp_path / "evil.yaml").write_text(json.dumps({"defaults": ["config", "_self_"], **evil}))
    given = [part.format(place=place, files=tmp_path) for part in FOREIGN[foreign]]
    missing = ["data=text", f"data.paths=[{tmp_path}/none.txt]", f"output_dir={tmp_path}/runs"]
    assert main([*filter(None, [mode]), *missing, *given]) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1
    in_a_file = foreign in ("file", "primary", "added primary")
    assert ("evil.yaml: hydra.callbacks" if in_a_file else "names code outside this project") in said
    assert not place.exists()


GLOBAL = "# @package _global_\n"
# Other people's files; the first is chosen with experiment= or, in `PRIMARIES`, is the primary file.
REACHES = {
    "content": {"experiment/x": GLOBAL + "hydra: {job: {env_set: {WANDB_BASE_URL: 'http://x'}}}\n"},
    "header": {"experiment/x": "# @package hydra.job.env_set\nPYTHONPATH: y\n"},
    "package of a choice": {"experiment/x": GLOBAL + "defaults: [/stuff@hydra.job.env_set: y]\n", "stuff/y": "A: b\n"},
    "package of a file": {"experiment/x": GLOBAL + "defaults: [/stuff/y@hydra.job.env_set]\n", "stuff/y": "A: b\n"},
    "content of another": {
        "experiment/x": GLOBAL + "defaults: [/stuff@_global_: y]\n",
        "stuff/y": "hydra: {job: {env_set: {A: b}}}\n",
    },
    "group": {"experiment/x": GLOBAL + "defaults: [/hydra/job/env_set: y]\n", "hydra/job/env_set/y": "A: b\n"},
    "launcher": {
        "experiment/x": GLOBAL + "defaults: [override /hydra/launcher: y]\n",
        "hydra/launcher/y": "{_target_: hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher}\n",
    },
    "setup": {
        "experiment/x": GLOBAL + "defaults: [override /launcher: slurm]\nlauncher: {setup: [touch made]}\n",
    },
    "setup by reference": {
        "experiment/x": GLOBAL
        + "defaults: [override /launcher: slurm]\nstudy: {y: [touch made]}\nlauncher: {setup: '${study.y}'}\n",
    },
}
PRIMARIES = {
    "search path": {"x": "defaults: [config, _self_]\nhydra: {searchpath: ['pkg://made']}\n"},
    "reference": {"x": "defaults: [config, _self_]\nhydra: '${study}'\nstudy: {job: {env_set: {A: b}}}\n"},
    "package": {"x": "defaults: [config, stuff@hydra.job.env_set: y, _self_]\n", "stuff/y": "A: b\n"},
}


@pytest.mark.parametrize("mode", ["-m", ""])
@pytest.mark.parametrize("reach", [*REACHES, *PRIMARIES])
def test_a_file_of_others_sets_nothing_of_hydras(
    reach: str, mode: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, content in (REACHES | PRIMARIES)[reach].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(content)
    chosen = ["experiment=x"] if reach in REACHES else ["--config-name=x"]
    assert main([*filter(None, [mode]), f"--config-dir={tmp_path}", *chosen, f"output_dir={tmp_path}/runs"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "the command line" in said
    assert not (tmp_path / "runs").exists()


def test_a_copy_of_the_projects_configuration_may_stand_anywhere(tmp_path: Path) -> None:
    for file in ("config.yaml", "launcher/joblib.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text((CONFIG_DIRECTORY / file).read_text())
    assert compose(["launcher=joblib"], Primary("config", tmp_path)).launcher.name == "joblib"


def test_the_command_line_sets_the_commands_of_a_job() -> None:
    launcher = compose(["launcher=slurm", "launcher.setup=[module load cuda]"]).launcher
    assert getattr(launcher, "setup", None) == ("module load cuda",)


def test_no_configuration_is_looked_for_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "looked_into").mkdir()
    (tmp_path / "looked_into" / "__init__.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match=r"hydra\.searchpath=\[pkg://looked_into\]: would import a package"):
        compose(["hydra.searchpath=[pkg://looked_into]"])


@pytest.mark.parametrize(
    "override",
    [
        *("launcher.partition='a\nb'", "launcher.account='a b'", "launcher.qos='$(id)'", "launcher.setup=['a\nb']"),
        *("hydra.launcher.comment='a\nb'", "+hydra.launcher.additional_parameters={x: 'a\nb'}"),
    ],
)
def test_nothing_of_a_configuration_becomes_a_line_of_a_job_script(override: str) -> None:
    with pytest.raises(ConfigurationError, match=r"launcher\.[\w.]+=.*: (not a valid name|has a control character)"):
        compose(["launcher=slurm", override])


def test_control_characters_are_refused_in_every_value() -> None:
    with pytest.raises(ConfigurationError, match=r"output_dir='a\\nb': has a control character"):
        compose(["output_dir='a\nb'"])


@pytest.mark.parametrize("tracker", ["none", "tensorboard", "wandb"])
def test_a_key_in_the_environment_reaches_no_file_and_no_line(tracker: str, corpus: list[str], tmp_path: Path) -> None:
    key = "0f1e2d3c" * 5
    secrets = {"WANDB_API_KEY": key, "HF_TOKEN": key, "WANDB_MODE": "offline"}
    command = tiny(corpus, tmp_path / "runs", f"tracker={tracker}", "train.steps=3")
    said = completed(command, tmp_path / "log", environment=secrets)
    assert key not in said
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= {path.name for path in files}
    for path in files:
        assert key.encode() not in path.read_bytes(), path
