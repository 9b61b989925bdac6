"""Composition and validation: every choice composes, every mistake is one line that names key, value and remedy."""

import contextlib
import copy
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from training.compose import (
    CONFIG_DIRECTORY,
    Primary,
    compose,
    compose_dictionary,
    start_hydra,
    validate,
    validate_recorded,
)
from training.config import ConfigurationError, SlurmLauncherConfig, micro_batch_size, nearest_batches
from training.exits import EXIT_FAILED
from training.launching.command import main, parse
from training.launching.inputs import refuse_absent_inputs
from training.launching.sweep import run_trial, trials
from training.mistakes import CONVERSIONS, SYNONYMS, group_options, known_keys, may_hold

GROUPS = ("model", "data", "tokenizer", "optimizer", "schedule", "strategy", "tracker", "launcher", "experiment")
CHOICES = [f"{group}={choice}" for group in GROUPS for choice in group_options(group)]
# What a choice needs besides itself.
NEEDS = {
    "data=text": ["data.paths=[corpus/*.txt]"],
    "optimizer=external": ["optimizer.factory=torch.optim:NAdam"],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_group_option_composes_and_validates(choice: str) -> None:
    compose([choice, *NEEDS.get(choice, [])])


def test_every_config_folder_is_a_tested_group() -> None:
    folders = {path.name for path in CONFIG_DIRECTORY.iterdir() if path.is_dir() and list(path.rglob("*.yaml"))}
    assert folders - {"study", "cluster"} == set(GROUPS) - {group for group in GROUPS if not group_options(group)}


# Others stand in mistakes.txt.
MISTAKES = [
    (
        ["optimizer=adahessian", "+optimizer.clip=true"],
        ["optimizer.clip", "a key of optimizer=sophiag or sophiah"],
    ),
    (["train.precision='a\nb'"], ["train.precision=a\\nb: not a known value"]),
    (["train.precision=" + 300 * "a"], ["train.precision=" + 200 * "a" + "…: not a known value"]),
    (["launcher.partition='"], ["not an override"]),
    (["model.name=../../../x"], ["model.name=../../../x", "letters"]),
    (["model.name=/abs/x"], ["model.name=/abs/x", "letters"]),
    (["model.name='<script>'"], ["model.name=<script>", "letters"]),
    (["model.name='a\"b'"], ['model.name=a"b', "letters"]),
    (["data.name=.."], ["data.name=..", "letters"]),
    (["data=text", "data.paths=[x]", "data.name=a/b"], ["data.name=a/b", "letters"]),
    ([f"name={'x' * 300}"], ["name=xxx", "at most 200 characters"]),
    ([f"model.name={'m' * 150}", f"data.name={'d' * 150}"], ["longer than 200", "shorten model.name"]),
    (["seeds.data=18446744073709551616"], ["seeds.data=18446744073709551616", "at most"]),
    (["guards.hang_minutes=1e300"], ["guards.hang_minutes=1e+300", "at most 527040"]),
    (["launcher=slurm", "launcher.signal_seconds=65536"], ["launcher.signal_seconds=65536", "at most 65535"]),
    (["seed='${oc.create:{a:1}}'"], ["seed: ${oc.create:...}", "no such resolver"]),
    (["seed='${train.steps}'", "train.steps='${seed}'"], ["seed: its ${...} refers to itself"]),
    (["hydra.searchpath=['file:///nowhere']"], ["hydra.searchpath=[file:///nowhere]", "no such directory"]),
    (["optimizer=adamw", "optimizer.eps=1e-46"], ["optimizer.eps=1e-46", "at least 1.17"]),
    (["=1"], ["=1: not an override"]),
]


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_is_one_line_with_key_value_and_remedy(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose(overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


INTEGERS = sorted(key for key in known_keys() if may_hold(int, key))
# The choices that have the key, and others that its value needs.
CHOSEN = {
    "tokenizer": ["tokenizer=bpe"],
    "strategy": ["strategy=deepspeed"],
    "launcher": ["launcher=slurm"],
    "launcher.trials": ["launcher=joblib"],
    "launcher.max_restarts": ["launcher=local"],
    "data": ["data=text", "data.paths=[x]"],
}


@functools.cache
def composed(*choices: str) -> dict[str, Any]:
    return compose_dictionary(choices)


@pytest.mark.parametrize("key", INTEGERS)
def test_every_integer_may_be_written_as_a_whole_float_and_is_an_integer(key: str) -> None:
    number = {"tokenizer.vocab_size": 1000, "strategy.zero_stage": 2, "model.n_embd": 512, "model.block_size": 512}.get(
        key, 4
    )
    *sections, last = key.split(".")
    values = copy.deepcopy(composed(*CHOSEN.get(key, CHOSEN.get(sections[0] if sections else "", []))))
    section = functools.reduce(lambda node, name: node[name], sections, values)
    listed = isinstance(section[last], list)  # of integers
    section[last] = [number] if listed else number
    integer = validate(values)
    section[last] = [float(number)] if listed else float(number)
    assert repr(validate(values)) == repr(integer)
    assert validate(values).run_name == integer.run_name


def test_the_launchers_of_hydra_get_integers() -> None:
    given = {"launcher=joblib": ["trials"], "launcher=slurm": ["nodes", "nproc_per_node", "mem_gb", "timeout_minutes"]}
    for launcher, keys in given.items():
        start_hydra()
        overrides = [launcher, *(f"launcher.{key}=2e2" for key in keys)]
        node = OmegaConf.to_container(
            hydra_compose("config", overrides, return_hydra_config=True).hydra.launcher, resolve=True
        )
        GlobalHydra.instance().clear()
        values = [value for value in node.values() if value == 200]
        assert len(values) >= len(keys)
        assert {type(value) for value in values} == {int}


@pytest.mark.parametrize("value", ["nan", "'4'", "1e300"])
def test_what_is_no_whole_number_is_no_integer(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"train.steps="):
        compose([f"train.steps={value}"])


def test_an_element_of_a_list_is_set_by_the_notation_of_studies_and_messages() -> None:
    config = compose(["optimizer=adamw", "optimizer.betas[1]=0.9"])
    assert config.optimizer.betas == (0.9, 0.9)
    assert trials(["optimizer.betas[0]=0.8,0.9"]) == [["optimizer.betas.0=0.8"], ["optimizer.betas.0=0.9"]]


def test_the_command_line_may_set_one_shell_command_of_a_job_and_a_file_none(tmp_path: Path) -> None:
    given = ["launcher=slurm", "launcher.setup[0]='module load x'"]
    config = compose(given)
    assert isinstance(config.launcher, SlurmLauncherConfig)
    assert config.launcher.setup[0] == "module load x"
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nlauncher: {setup: [one, two]}\n")
    with pytest.raises(ConfigurationError, match=r"launcher\.setup=\[two\]: a file may not set a job's shell commands"):
        compose(given, Primary("mine", tmp_path))


@pytest.mark.parametrize(
    ("begun", "given", "is_refused"),
    [
        ("train.precision=fp32", "train.precision=auto", False),
        ("train.precision=bf16", "train.precision=auto", False),
        ("train.precision=bf16", "train.precision=fp32", True),
        ("train.steps=7", "train.precision=auto", True),
    ],
)
def test_absent_inputs_are_refused_unless_this_very_run_has_begun(
    begun: str, given: str, is_refused: bool, tmp_path: Path
) -> None:
    (tmp_path / compose([begun]).run_name).mkdir()
    (tmp_path / compose([begun]).run_name / "config.yaml").write_text("")
    refusal = pytest.raises(ConfigurationError, match=r"resume=.*: no such directory")
    with refusal if is_refused else contextlib.nullcontext():
        refuse_absent_inputs(compose([given, f"output_dir={tmp_path}", "resume=/nowhere"]))


@pytest.mark.parametrize(
    "directory", ["/tmp/jörg", "/tmp/a b", "/tmp/a=b", "~/a#b;c", "/tmp/日本", "/tmp/'a'", "a\\'b"]
)
def test_a_directory_of_any_name_may_be_given(directory: str) -> None:
    given = directory if "'" not in directory else f'"{directory}"'
    assert compose([f"output_dir={given}"]).output_dir == directory


def test_largest_seed_and_time_are_valid() -> None:
    config = compose([f"seed={2**63 - 1}", "guards.hang_minutes=527040"])
    assert config.seeds.data == 2**63 - 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train.steps: 5\n", "train.steps=5: unknown key; nest it, train: {steps: ...}"),
        ("train: [1]\n", "a list or value where a section is expected"),
        ("defaults: [nothing]\n", "mine.yaml: its defaults list names experiment/nothing, which does not exist"),
        ("defaults: [override /nothing: x]\n", "nothing: no such configuration group"),
        ("model: {_target_: os.system}\n", "model._target_=os.system: unknown key"),
    ],
)
def test_a_mistake_in_an_experiment_names_its_key(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n" + content)
    with pytest.raises(ConfigurationError) as caught:
        compose(["experiment=mine"], Primary(added=tmp_path))
    assert said in str(caught.value)


def test_seed_sets_the_three_seeds_unless_they_are_given() -> None:
    config = compose(["seed=7", "seeds.data=3"])
    assert (config.seeds.model, config.seeds.data, config.seeds.curvature) == (7, 3, 7)


def test_default_name_has_model_data_optimizer_hash_and_seed() -> None:
    config = compose(["optimizer=lion", "seed=4"])
    model, data, optimizer, digest, seed = config.run_name.split("-")
    assert (model, data, optimizer, seed) == ("gpt2_micro", "sample", "lion", "s4")
    assert len(digest) == 8


def test_seeds_of_one_configuration_share_the_hash_of_its_name() -> None:
    names = {compose([f"seed={seed}"]).run_name.rsplit("-s", 1)[0] for seed in (0, 1, 2)}
    assert len(names) == 1


@pytest.mark.parametrize(
    "override",
    ["strategy=fsdp", "tracker=wandb", "train.micro_batch_size=4", "output_dir=x", "checkpoint.interval=7"],
)
def test_what_does_not_change_the_curve_does_not_change_the_name(override: str) -> None:
    assert compose([override]).run_name == compose([]).run_name


@pytest.mark.parametrize(
    "override", ["optimizer.lr=1e-3", "train.steps=300", "data=openwebtext", "train.precision=fp32", "seeds.data=1"]
)
def test_what_changes_the_curve_changes_the_name(override: str) -> None:
    assert compose([override]).run_name != compose([]).run_name


def test_optimizer_alone_changes_nothing_but_the_optimizer_section() -> None:
    adamw, sophia = compose_dictionary(["optimizer=adamw"]), compose_dictionary(["optimizer=sophiag"])
    assert {key for key in adamw if adamw[key] != sophia[key]} == {"optimizer"}


def test_a_batch_that_does_not_divide_over_ranks_proposes_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"3 ranks; choose train.global_batch_size=12 or 18"):
        micro_batch_size(compose(["train.global_batch_size=16", "train.micro_batch_size=2"]), world_size=3)
    assert "train.micro_batch_size=4 or 8," in nearest_batches(16, 6, 2)


def test_profile_true_is_short_for_its_section() -> None:
    assert compose(["profile=true"]).profile == compose(["profile.enabled=true"]).profile
    assert not compose(["profile=false"]).profile.enabled
    with pytest.raises(ConfigurationError, match="profile"):
        compose(["profile=sometimes"])


def test_a_run_is_made_again_from_the_configuration_on_record(tmp_path: Path) -> None:
    """Hydra's --config-path: the file of a record stands for itself, whatever the defaults have become."""
    before = compose(["optimizer=lion", "model=gpt2_nano", "seed=7", "optimizer.lr=3.0e-4"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before.model_dump(mode="json")))
    asked, primary = parse(["--config-path", str(tmp_path), "output_dir=elsewhere"])
    after = compose(asked.overrides, primary)
    assert after == before.model_copy(update={"output_dir": "elsewhere"})


def recorded(directory: Path, *overrides: str) -> Path:
    """What a run leaves of its configuration."""
    config = compose(["name=kept", *overrides])
    (directory / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (directory / "environment.json").write_text("{}")
    return directory


def test_a_record_is_made_again_here_from_step_0_and_replaces_nothing(tmp_path: Path) -> None:
    given = [
        "launcher=slurm",
        "launcher.partition=gpu",
        "launcher.nproc_per_node=8",
        "overwrite=true",
        "resume=some/step",
    ]
    record = Primary("config", recorded(tmp_path, *given))
    config = compose(["train.steps=9"], record)
    assert (config.launcher.name, config.launcher.nproc_per_node) == ("local", 8)
    assert (config.overwrite, config.resume, config.train.steps) == (False, "auto", 9)
    assert compose(["overwrite=true"], record).overwrite


OFF = {"bias_correction": False, "label_draws": 1, "warm_start": 0, "unclipped_target": None}


def of_an_earlier_version(directory: Path, **removed: Any) -> dict[str, Any]:
    """A recorded configuration of Sophia, with the keys that it had then."""
    path = recorded(directory, "optimizer=sophiag") / "config.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    values["optimizer"] |= OFF | removed
    path.write_text(yaml.safe_dump(values))
    return values


def test_a_record_with_removed_keys_switched_off_is_the_run_that_it_was(tmp_path: Path) -> None:
    values = of_an_earlier_version(tmp_path)
    expected = compose(["optimizer=sophiag", "name=kept"])
    assert validate_recorded(values) == compose([], Primary("config", tmp_path)) == expected
    # Derived names of earlier versions: the hash of what they held.
    identity = expected.identity()
    identity["optimizer"] |= OFF
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    assert expected.identity_hash() == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bias_correction", True, "true"),
        ("label_draws", 4, "4"),
        ("warm_start", 4, "4"),
        ("unclipped_target", 0.25, "0.25"),
    ],
)
def test_a_record_with_a_removed_key_switched_on_is_refused_with_the_commit_to_use(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    values = of_an_earlier_version(tmp_path, **{key: value})
    line = rf"^optimizer\.{key}={said}: removed after this run was recorded .*; check out commit 3b433fa to run or resume it$"
    for load in (lambda: validate_recorded(values), lambda: compose([], Primary("config", tmp_path))):
        with pytest.raises(ConfigurationError, match=line):
            load()


def test_another_seed_of_a_record_is_more_than_a_label(tmp_path: Path) -> None:
    record = Primary("config", recorded(tmp_path, "seed=1"))
    with pytest.raises(ConfigurationError, match=r"seed: .* would change only the label; give seeds.model="):
        compose(["seed=2"], record)
    config = compose(["seed=2", "seeds.model=2", "seeds.data=2", "seeds.curvature=2"], record)
    assert config.seeds.data == config.seed == 2


def test_groups_of_a_record_are_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"tracker: .*config.yaml holds values, not choices of configuration groups.*tracker.<key>",
    ):
        compose(["tracker=wandb"], Primary("config", recorded(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_sweep_over_a_record_runs_here_and_writes_the_runs_alone(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [f"launcher={launcher}", f"output_dir={tmp_path}/runs", "data=text", f"data.paths=[{tmp_path}/none.txt]"]
    record = recorded(tmp_path, *given)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["-m", "--config-path", str(record), "name=a,b"]) == 2
    assert "none.txt" in capfd.readouterr().err
    assert not list((tmp_path / "here").iterdir())


def test_a_trial_that_cannot_be_resolved_does_not_end_its_sweep(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_trial(OmegaConf.create({"name": "${nowhere}"})) == EXIT_FAILED
    assert "nowhere" in capfd.readouterr().err


@pytest.mark.parametrize("given", [[], ["optimizer.name=lion"]])
def test_the_name_of_an_optimizer_may_stand_in_a_file_or_repeat_the_choice(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, override optimizer: lion, _self_]\noptimizer: {name: lion}\n"
    )
    assert compose(given, Primary("mine", tmp_path)).optimizer.name == "lion"


def test_a_file_that_builds_on_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("defaults: [config, _self_]\n")
    with pytest.raises(ConfigurationError, match=r"config\.yaml: its defaults list includes the file itself"):
        compose([], Primary("config", tmp_path))


def test_hydras_flags_find_the_file_where_a_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path, "seed=77")
    monkeypatch.chdir(tmp_path.parent)
    assert main(["--config-path", tmp_path.name, "--cfg", "job"]) == 0
    assert "seed: 77" in capfd.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--cfg", "job", "--config-dir", "{}", "experiment=mine"],
        ["experiment=mine", "-cd", "{}", "-c", "job"],
        ["experiment=mine", "--config-dir={}", "train.steps=9", "--cfg=job", "--resolve"],
        ["--config-dir", "{}", "--help", "experiment=mine"],
        ["--config-dir={}", "-cn", "own", "--cfg", "job"],
    ],
)
def test_hydras_flags_show_what_a_run_would_have(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 4711\n")
    (tmp_path / "own.yaml").write_text("defaults: [config, _self_]\nseed: 4711\n")
    assert main([flag.format(tmp_path) for flag in flags]) == 0
    assert capfd.readouterr().out.replace("seed=", "seed: ").count("seed: 4711 ") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cfg", "nothing"], "--cfg/-c: invalid choice: 'nothing'"),
        (["--nothing"], "--nothing: no such flag"),
        (["--experimental-rerun", "x"], "--experimental-rerun: would unpickle"),
        (["--config-dir", "/nowhere"], "--config-dir /nowhere: no such directory"),
        (["--cfg", "job", "--package", "nowhere"], "package 'nowhere' not found"),
        (["--help", "seed='${nowhere}'"], "seed: ${nowhere}"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(flags: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    heard = capfd.readouterr().err
    assert said in heard
    assert heard.count("\n") == 1


@pytest.mark.parametrize("flags", [["--config-dir={}", "-cn", "mine"], ["-cp", "{}", "--config-name=mine.yaml"]])
def test_a_primary_file_of_ones_own_may_build_on_the_projects(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text("defaults:\n  - config\n  - override optimizer: lion\n  - _self_\nseed: 77\n")
    asked, primary = parse([flag.format(tmp_path) for flag in flags])
    config = compose(asked.overrides, primary)
    assert (config.seed, config.optimizer.name) == (77, "lion")
    assert compose().optimizer.name == "sophiag", "the next composition is the project's again"


@pytest.mark.parametrize("path", ["", "experiment", "experiment/mine.yaml", "mine.yaml"])
@pytest.mark.parametrize("flags", [["--config-path={}", "-cn=mine"], ["--config-dir={}", "+experiment=mine"]])
def test_configurations_that_may_not_be_read_are_one_line(
    flags: list[str], path: str, tmp_path: Path, permissions_bind: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 5\n")
    (tmp_path / "mine.yaml").write_text("defaults: [config, experiment: mine, _self_]\n")
    if path == "mine.yaml" and "--config-dir={}" in flags:
        flags = ["--config-dir={}", "-cn=mine"]
    (tmp_path / path).chmod(0)
    assert main([flag.format(tmp_path) for flag in flags]) == 2
    (tmp_path / path).chmod(0o755)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / path) in line


def test_a_path_without_the_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-path", str(tmp_path)]) == 2
    assert f"--config-path {tmp_path}: no readable config.yaml" in capsys.readouterr().err


def test_a_conversion_is_of_a_name_that_other_projects_have() -> None:
    assert CONVERSIONS.keys() <= {name for names in SYNONYMS.values() for name in names.split()}
