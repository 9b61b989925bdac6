"""Reword the configuration errors of Hydra, OmegaConf and pydantic as one line with a remedy."""

import difflib
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic
from hydra.errors import OverrideParseException
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from training.config import RunConfig
from training.config_files import CONFIG_DIRECTORY, read_yaml
from training.config_keys import sections_of, tags_of
from training.secrets import redacted

# Hydra's messages about a composition and OmegaConf's about a value, with ours.
COMPOSITION_ERRORS = {
    r"An item is already at '([^']+)'": r"+\1: already set; leave out the '+': \1=...",
    r"Could not delete '([^']*)'": r"~\1: no such key to remove; leave it out",
    r"Could not delete from config. '([^']*)'": r"~\1: no such key to remove; leave it out",
    r"No config source registered for schema (\w+)": r"hydra.searchpath: \1:// is not supported; give [file:///...]",
    r"In '([^']+)': Could not load '([^']+)'": r"\1.yaml: its defaults list names \2, which does not exist; correct it",
}
VALUE_ERRORS = {
    r"Cannot merge": "a list or value where a section is expected, or the reverse; write it as in "
    f"{CONFIG_DIRECTORY / 'config.yaml'}",
    r"Unsupported interpolation type (\S+)": r"${\1:...}: no such resolver; use oc.env, oc.select or oc.decode",
    r"Recursive interpolation": "its ${...} refers to itself; give it a value",
    r"Interpolation key '(.*)' not found": r"${\1}: no such key; give a value, or the dotted name of a key",
    r"HydraConfig was not set": "${hydra:...} exists only in a sweep; give a value",
    r"list index out of range|assignment index out of range": "the list has no such element; give the whole list",
}
# Names of our keys in other projects. A dotted name applies to its section only.
SYNONYMS = {
    "name": "run_name exp_name experiment_name job_name",
    "output_dir": "out_dir outdir out output save_dir log_dir run_dir",
    "resume": "resume_from ckpt ckpt_path checkpoint_path load",
    "seed": "random_seed rng_seed manual_seed",
    "model.n_layer": "n_layers num_layers layers depth num_hidden_layers",
    "model.n_head": "n_heads num_heads heads num_attention_heads",
    "model.n_embd": "n_embed d_model hidden_size hidden_dim width dim embed_dim embedding_size",
    "model.block_size": "n_ctx n_positions max_position_embeddings",
    "model.init_from": "pretrained from_pretrained init_weights",
    "data": "dataset corpus data_name",
    "data.paths": "data_path data_files train_file",
    "optimizer": "opt optim",
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr eta",
    "optimizer.betas": "beta",
    "optimizer.betas[0]": "beta1 beta_1 b1 adam_beta1 momentum",
    "optimizer.betas[1]": "beta2 beta_2 b2 adam_beta2",
    "optimizer.eps": "epsilon adam_epsilon",
    "optimizer.gamma": "rho",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.hessian_interval": "k hess_interval hessian_freq hessian_every update_period",
    "schedule": "scheduler lr_scheduler lr_schedule lr_scheduler_type",
    "schedule.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps",
    "schedule.warmup_share": "warmup_ratio warmup_fraction",
    "schedule.final_ratio": "min_lr lr_min final_lr end_lr min_lr_ratio",
    "strategy": "distributed parallel",
    "strategy=ddp": "ddp",
    "strategy=fsdp": "fsdp",
    "strategy.zero_stage": "zero stage zero_optimization",
    "train.steps": "steps max_steps max_iters num_steps train_steps total_steps iters iterations epochs num_epochs",
    "train.global_batch_size": "batch_size batch bs train_batch_size",
    "train.micro_batch_size": "micro_batch mini_batch_size device_batch_size per_device_train_batch_size "
    "gradient_accumulation_steps grad_accum_steps accumulation_steps",
    "train.sequence_length": "seq_len seq_length sequence_len context_length context ctx_len max_seq_len max_length",
    "train.precision": "dtype bf16 fp16 amp mixed_precision",
    "train.grad_clip": "clip_grad max_grad_norm clip_grad_norm gradient_clip gradient_clipping",
    "train.compile": "torch_compile compiled",
    "train.device": "cuda cpu",
    "eval.interval": "eval_interval eval_every eval_steps val_interval eval.steps eval.every",
    "eval.tokens": "eval_iters eval_tokens val_tokens eval.iters eval.batches",
    "eval.micro_batch_size": "eval_batch_size eval.batch_size",
    "checkpoint.interval": "save_interval save_every save_steps checkpoint_every checkpoint.every checkpoint.steps",
    "checkpoint.keep": "save_total_limit keep_last checkpoint.keep_last",
    "tracker": "logger logging tracking report_to",
    "tracker=wandb": "wandb wandb_log use_wandb",
    "tracker=tensorboard": "tensorboard",
    "tracker.project": "wandb_project project_name",
    "launcher.nproc_per_node": "gpus num_gpus n_gpus ngpus gpu devices world_size nproc ranks num_processes",
    "launcher.nodes": "num_nodes nnodes n_nodes",
}
KEY_MEANT = {name: key for key, names in SYNONYMS.items() for name in names.split()}
# Synonyms whose value has another unit or meaning, and what our key takes. The given value is not suggested.
CONVERSIONS = {
    name: meant
    for names, meant in {
        "min_lr lr_min final_lr end_lr": "It is the final rate / optimizer.lr",
        "epochs num_epochs": "An epoch takes the corpus's tokens / (train.global_batch_size * train.sequence_length) steps",
        "eval_iters eval.iters eval.batches": "In tokens: batches * sequences per batch * train.sequence_length",
        "gradient_accumulation_steps grad_accum_steps accumulation_steps": "In sequences; the accumulation steps follow "
        "from it",
        "batch_size batch bs": "In sequences, over all ranks and accumulated micro-batches",
        "world_size ranks num_processes": "It counts the ranks of one node",
        "dtype bf16 fp16 amp mixed_precision": "It is auto, fp32 or bf16",
        "cuda cpu": "It is auto, cpu or cuda",
        "rho": "It is the authors' rho * bs / N: their bs, in tokens, over the N tokens of an estimate",
    }.items()
    for name in names.split()
}
# The same as `SYNONYMS` for choices.
SYNONYMS_OF_CHOICES = {
    "model=gpt2_small": "gpt2 gpt2_124m gpt2_125m 124m 125m small",
    "model=gpt2_medium": "gpt2_355m gpt2_350m 355m 350m medium",
    "model=gpt2_large": "gpt2_770m gpt2_774m 770m 774m large",
    "model=gpt2_xl": "gpt2_1.5b 1.5b xl",
    "data=openwebtext": "owt",
    "optimizer=adamw": "adam",
    "strategy=deepspeed": "zero zero1 zero2 zero3",
    "tokenizer=gpt2": "tiktoken",
    "tracker=wandb": "wb",
}
# Configuration groups of other commands.
OTHER_COMMANDS = {
    "study": "studies have their own command: python scripts/study.py run",
    "cluster": "only the planner takes it: python scripts/plan.py",
}
# Examples for lists that are empty by default.
LIST_EXAMPLES = {"data.paths": "corpus/*.txt"}


def reword_composition_error(
    error: Exception, overrides: Sequence[str], file: Path, chosen: Callable[[], Mapping[str, Any]]
) -> str:
    """Return one line for a composition error.

    Args:
        error: Hydra's or OmegaConf's.
        overrides: as given.
        file: the primary configuration file.
        chosen: composes the configuration without the single keys among the overrides.
    """
    text = str(error)
    chain = f"{text}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not find '([^']*)'", text):
        group, _, choice = match.group(1).partition("/")
        if group not in config_groups():
            group, _, choice = match.group(1).rpartition("/")
        options = group_options(group) or re.findall(r"^\t([\w/]+)$", text, re.MULTILINE)
        if re.search(r"\s\S+=", choice):
            return f"{shown(f'{group}={choice}')}: several overrides in one pair of quotes; quote each of them alone"
        return f"{group}={choice}: unknown choice; {choose_from(choice, options, group)}"
    if "Could not override ''" in text:
        return not_an_override(next(one for one in overrides if not key_of(one)), overrides)
    if match := re.search(r"Could not override '([^']+)'. No match in the defaults list", text):
        group = match.group(1)
        if group in config_groups():
            return (
                f"{group}: {file} holds values, not choices of configuration groups; set single keys, {group}.<key>=..., or "
                "start from another file"
            )
        return f"{group}: no such configuration group; choose one of {', '.join(config_groups())}"
    if match := re.search(r"Could not override '([^']+)'|is not in struct\s+full_key: (\S+)", chain):
        key = of_element(match.group(1) or match.group(2))
        return f"{key}: unknown key{did_you_mean_key(key, chosen())}"
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", text):
        return several_values(match.group(1))
    if isinstance(error, OverrideParseException):
        return not_an_override(error.override, overrides)
    if "Config group override must be" in text:
        for override in overrides:
            group, _, value = override.lstrip("+").partition("=")
            if group in config_groups() and value not in group_options(group):
                return f"{group}={value}: unknown choice; {choose_from(value, group_options(group), group)}"
        if any(key_of(one) == "hydra" for one in overrides):
            return "hydra: a section, not a value; set one of its keys"
        return not_an_override(next((one for one in overrides if not key_of(one)), "the command line"), overrides)
    for said, meant in COMPOSITION_ERRORS.items():
        if match := re.search(said, text):
            return shown(match.expand(meant))
    if match := re.search(r"In '([^']+)': \w+ raised while composing config", text):
        return f"{match.group(1)}.yaml: {omegaconf_problem(error)}"
    if any(isinstance(one, OmegaConfBaseException) for one in causes(error)):
        return omegaconf_problem(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def several_values(override: str) -> str:
    """Return one line for `seed=0,1` without -m."""
    key, _, values = override.removeprefix("++").partition("=")
    key = of_element(key)
    given = shown(f"{key}={values}")
    sweep = f"sweep over them: python train.py -m {shlex.quote(given)}"
    field = field_at(key.lstrip("+").split("."))
    if field is not None and get_origin(field.annotation) is tuple and not key.endswith("]"):
        return f"{given}: several values, not a list; write '{key}=[{shown(values)}]', or {sweep}"
    return f"{given}: several values; give one, or {sweep}"


def not_an_override(override: str, overrides: Sequence[str]) -> str:
    """Return one line for an override that Hydra cannot parse: what the shell did to it, or how to write it."""
    override = next((one for one in overrides if one in (override, override.replace("'", ""))), override)
    key, equals, value = override.partition("=")
    given = shown(override) or repr(override)
    at = list(overrides).index(override) if override in overrides else 0
    before, after = overrides[:at], overrides[at + 1 :]
    joined = (" ".join(overrides[at : at + count]) for count in range(2, len(after) + 2))
    whole = next((one for one in joined if one.count("[") == one.count("]")), None)
    if override.count("[") > override.count("]") and whole is not None:
        quoted = shlex.quote(re.sub(r",\s+", ",", whole))
        return f"{given}: part of a list that the shell split at its spaces; put it in quotes: {quoted}"
    if not equals and after and after[0].startswith("="):
        spaced = override + after[0] + (after[1] if after[0] == "=" and len(after) > 1 else "")
        return f"{given}: not an override; leave no space around '=': {shown(spaced)}"
    if not equals and before and before[-1].endswith("="):
        return f"{given}: not an override; leave no space after '=': {shown(before[-1] + override)}"
    field = field_at(key.lstrip("+").split("."))
    if field is not None and get_origin(field.annotation) is tuple:
        members = [member.strip() for member in value.strip("(){}[]").split(",")]
        listed = ",".join(f"'{one}'" if get_args(field.annotation)[0] is str else one for one in members)
        return f'{given}: not a list; write "{key}=[{shown(listed)}]"'
    if value.endswith(",") and value.count("[") <= value.count("]"):
        return f"{given}: not an override; leave out the comma: {shown(override.rstrip(','))}"
    if re.fullmatch(r"[+~]*[\w./@-]+", key, re.ASCII) and value and value[0] not in "[{'\"":
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        remedy = shown(f"{key}='{escaped}'")
        remedy = shlex.quote(remedy) if re.search(r'["$`!\\]', remedy) else f'"{remedy}"'  # as one types it in a shell
        return f"{given}: not an override; put the value in quotes: {remedy}"
    if match := re.fullmatch(r"([\w.]+)(?::(.*))?", override, re.ASCII):
        name, value = match.groups()
        if equals:
            return f"{given}: not an override; write {name}.{shown(value)}"
        chosen = [f"{group}={name}" for group in config_groups() if name in group_options(group)]
        if chosen := [one for one in chosen if one.partition("=")[0] not in OTHER_COMMANDS]:
            return f"{given}: not an override; did you mean {either(chosen)}?"
        if name in known_keys():
            return f"{given}: not an override; write {name}={value or '<value>'}"
    if override in ("help", "version", "usage"):
        return f"{given}: not an override; see --help"
    if override and not equals and before and may_hold(str, key_of(before[-1])):
        quoted = shlex.quote(f"{before[-1]} {override}")
        return f"{given}: not an override; write key=value, and put a value with spaces in quotes: {shown(quoted)}"
    remedy = "write key=value, and quote lists and text in them, as in 'optimizer.betas=[0.9,0.95]' \"data.paths=['a b.txt']\""
    return f"{given}: not an override; {remedy}"


def not_a_flag(message: str, words: Sequence[str]) -> str:
    """Return one line for a flag that Hydra's parser does not know; `message` is argparse's about `words`."""
    match = re.fullmatch(r"unrecognized arguments: -+([\w.-]+)(=\S*)?.*", message, re.DOTALL)
    if match is None:
        return f"{message}; overrides are written key=value, see --help"
    flag, value = match.groups()
    if not value:  # argparse takes the next word as an override
        after = next((words[at + 1 : at + 2] for at, word in enumerate(words) if word.lstrip("-") == flag), [])
        value = f"={after[0]}" if after and not re.search("^-|=", after[0]) else "=<value>"
    meant, conversion = suggestions(flag, {})
    key = meant[0] if meant else "key"
    if conversion:
        value = "=<value>"
    written = key if "=" in key else key + value
    line = f"{shown(message.partition(': ')[2])}: no such flag; overrides are written without dashes: {shown(written)}"
    return f"{line}. {conversion}" if conversion else line


def omegaconf_problem(error: BaseException) -> str:
    """Return the first line of OmegaConf's own error, with the key."""
    ours = [one for one in causes(error) if isinstance(one, OmegaConfBaseException)]
    for one in ours:  # an integer of Hydra's launcher, interpolated from one of our keys
        if match := re.search(r"'\$\{(?:whole:\$\{)?([\w.]+)\}+': Value '(.*)' of type .* to Integer", str(one)):
            return shown(f"{match[1]}={match[2]}: not a whole number; give one such as 1")
    said = next((line.strip() for line in str(ours[-1]).splitlines() if line.strip()), type(ours[-1]).__name__)
    key = next((str(one.full_key) for one in ours if one.full_key), "")
    if isinstance(ours[-1], GrammarParseError):
        said = f"its ${{...}} cannot be read ({said}); close the brace, or quote text with '\\${{'"
    said = re.sub(r"^\w+ raised while resolving interpolation: ", "", said)
    for pattern, meant in VALUE_ERRORS.items():
        if match := re.search(pattern, said):
            said = match.expand(meant)
            break
    return shown(f"{key}: {said}" if key else said)


def reword_validation_error(error: pydantic.ValidationError, values: Mapping[str, Any]) -> str:
    """Return one line for the first of pydantic's errors. Unknown keys come first: they often cause the others.

    Args:
        error: raised by `RunConfig`.
        values: the values that were validated.
    """
    by_key: dict[str, list[Any]] = {}
    for one in sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden"):
        by_key.setdefault(_found(one["loc"])[0], []).append(one)
    key, errors = next(iter(by_key.items()))
    line = _reworded(key, errors, values)
    follow = (key.partition("[")[0] + "[", "seeds." if key == "seed" else key + ".")
    others = [other for other in by_key if other not in ("", key) and not other.startswith(follow)]
    if not others:
        return line
    return f"{line}{' Also' if line.endswith('?') else '; also'} wrong: {_listed(others)}"


def _reworded(key: str, errors: Sequence[Any], values: Mapping[str, Any]) -> str:
    """Return one line for the errors of one key."""
    first, field = errors[0], field_at(errors[0]["loc"])
    given, kind = shown(first["input"]), first["type"]
    if kind == "extra_forbidden":
        return f"{key or repr('')}={given}: unknown key{did_you_mean_key(key, values, first['loc'])}"
    if kind == "value_error":
        return str(first["msg"].removeprefix("Value error, "))
    if kind == "missing" and isinstance(first["loc"][-1], int):  # a member of a list; the input is the list
        key = key.rpartition("[")[0]
    elif kind == "missing":
        return f"{key}: missing; give it a value, {key}=..."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = first.get("ctx", {}).get("discriminator", "name").strip("'")
        value = shown(first["input"].get(tag)) if isinstance(first["input"], dict) else given
        expected = first.get("ctx", {}).get("expected_tags", "")
        return f"{key}.{tag}={value}: expected one of {expected or 'the known names'}; choose with {key}=<name>"
    return f"{key}={given}: {expectation(errors, key, field)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def shown(value: Any) -> str:
    """Format a value as one types it: on one line, at most 200 characters, without secrets."""
    if value is None:
        value = "null"
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, (list, tuple)):
        value = f"[{','.join(map(shown, value))}]"
    # Redacted before truncation, which could otherwise leave the start of a secret.
    text = "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in redacted(str(value)))
    return text if len(text) <= 200 else f"{text[:200]}…"


def expectation(errors: Sequence[Any], key: str, field: FieldInfo | None) -> str:
    """Return what pydantic expected of one key, with a remedy. A union of types has one error per type."""
    error = errors[0]
    context, kind, default = error.get("ctx", {}), error["type"], None if field is None else field.default
    kinds = {one["type"] for one in errors}
    or_null = ", or null" if field is not None and type(None) in get_args(field.annotation) else ""
    for bound, word in {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}.items():
        if bound in context:
            limit = context[bound]
            return f"out of range; give a number {word} {f'{limit:g}' if isinstance(limit, float) else limit}{or_null}"
    if kind in ("float_parsing", "float_type", "finite_number"):
        if isinstance(default, tuple):  # the key is a member of a list
            default = default[0]
        example = default if type(default) is float else "6e-4"
        numbers = str(error["input"]).split()
        if len(numbers) > 1 and key.endswith("]") and all(re.fullmatch(r"[-+\d.eE]+", number) for number in numbers):
            return f"not a number; separate them with commas: '{key.rpartition('[')[0]}=[{shown(','.join(numbers))}]'"
        number = "finite number" if kind == "finite_number" else "number"
        return f"not a {number}; give one such as {example}{or_null}"
    if kind in ("int_parsing", "int_type", "int_from_float"):
        if isinstance(error["input"], float) and error["input"].is_integer():
            return f"too large a number; give a smaller one{or_null}"
        return f"not a whole number; give one such as {default if type(default) is int else 100}{or_null}"
    if "literal_error" in kinds:
        known = next(one["ctx"]["expected"] for one in errors if one["type"] == "literal_error").replace("'", "")
        return f"not a known value; choose one of {known}" + (", true or false" if len(kinds) > 1 else "")
    if kind in ("bool_parsing", "bool_type"):
        return "not a boolean; give true or false"
    if kind == "string_pattern_mismatch":
        return "not a valid name; use letters, digits, '.', '_' and '-', starting with a letter or digit"
    if kind == "string_too_long":
        return f"too long; give at most {context['max_length']} characters"
    if field is not None and get_origin(field.annotation) is tuple and not key.endswith("]"):
        return list_expected(error["input"], key, field)
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        inside = [known.removeprefix(f"{key}.") for known in sorted(known_keys()) if known.startswith(f"{key}.")]
        instead = "not a boolean; give true or false, or" if key == "profile" else "a section, not a value;"
        return f"{instead} set one of its keys, {key}.<key>=...{': ' if inside else ''}{', '.join(inside)}"
    if kind == "string_type" and error["input"] is None:
        return f"missing; give it a value, {key}=..."
    if kind == "string_type":
        return f"not text; quote it: \"{key}='{shown(error['input'])}'\""
    return f"{error['msg']}; see configs/ for a valid value"


def list_expected(given: Any, key: str, field: FieldInfo) -> str:
    """Return what a list should hold, with an example: the default, or the given value in brackets."""
    members = get_args(field.annotation)
    single = not isinstance(given, (list, tuple, Mapping))
    if members[-1] is Ellipsis:
        example = shown([given if single else LIST_EXAMPLES.get(key, "text")])
        return f"{'not a list' if single else 'an empty list'}; give a list such as {shlex.quote(f'{key}={example}')}"
    example = shown(list(field.default)) if isinstance(field.default, tuple) else "[...]"
    has = "not a list" if single else f"{_numbers(len(given))} in the list"
    return f"{has}; give a list of {_numbers(len(members))}, such as '{key}={example}'"


def _numbers(count: int) -> str:
    return f"{count} number{'' if count == 1 else 's'}"


def field_at(location: Sequence[int | str]) -> FieldInfo | None:
    """Return the field at a location, with or without the tags of unions; None for an unknown key."""
    return _found(location)[1]


def may_hold(kind: type, key: str) -> bool:
    """Return whether a value of the key may be of the kind, or a list of it."""
    field = field_at(key.split("."))
    kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    return any(one is kind or get_args(one)[:1] == (kind,) for one in kinds)


def _found(location: Sequence[int | str]) -> tuple[str, FieldInfo | None]:
    """Return the key, such as optimizer.betas[0], and the field at pydantic's location, without the tags of its unions."""
    key, field = "", None
    models: tuple[type[BaseModel], ...] = (RunConfig,)
    untold = False  # the last part was a union of sections: its tag may follow
    for part in location:
        tagged = tuple(model for model in models if untold and part in tags_of(model))
        untold = False
        if isinstance(part, int):
            key += f"[{part}]"
        elif tagged:
            models = tagged
        elif models:  # otherwise the part is pydantic's name for a type of a plain value
            key += f".{part}" if key else part
            field = next((model.model_fields[part] for model in models if part in model.model_fields), None)
            models = sections_of(field.annotation) if field is not None else ()
            untold = field is not None and field.discriminator is not None
    return key, field


def known_keys(values: Mapping[str, Any] | None = None) -> set[str]:
    """Return every dotted key that a configuration may have; with `values`, a configuration with the same choices."""

    def keys_of(model: type[BaseModel], prefix: str, values: Any) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield prefix + name
            inside = values.get(name) if isinstance(values, Mapping) else None
            sections = sections_of(field.annotation)
            for section in [s for s in sections if _tag(inside) in tags_of(s)] or sections:
                yield from keys_of(section, f"{prefix}{name}.", inside)

    return set(keys_of(RunConfig, "", values))


def _tag(values: Any) -> Any:
    return values.get("kind", values.get("name")) if isinstance(values, Mapping) else None


def choices_with(key: str) -> list[str]:
    """Return the choices of a group that have the key; none if every choice has it."""
    group, _, rest = key.partition(".")
    sections = sections_of(RunConfig.model_fields[group].annotation)
    having = [section for section in sections if rest.partition(".")[0] in section.model_fields]
    if len(having) == len(sections):
        return []
    tags = {tag for section in having for tag in tags_of(section)}
    return [choice for choice, told in _tags_of_choices(group).items() if told in tags]


def choices_named(override: str) -> list[str]:
    """Return `optimizer=adamw` for `optimizer.name=adamw`: the choices with that name or kind; none for other overrides."""
    group, _, tag = key_of(override).partition(".")
    field = RunConfig.model_fields.get(group)
    if field is None or field.discriminator is None or tag != field.discriminator:
        return []
    named = unquoted(override.partition("=")[2])
    return [f"{group}={choice}" for choice, told in _tags_of_choices(group).items() if told == named]


def _tags_of_choices(group: str) -> dict[str, Any]:
    files = {choice: read_yaml(CONFIG_DIRECTORY / group / f"{choice}.yaml") for choice in group_options(group)}
    return {choice: _tag(values.get(group, values)) for choice, values in files.items()}


def did_you_mean_key(key: str, values: Mapping[str, Any], location: Sequence[int | str] = ()) -> str:
    """Return what to write instead of an unknown key.

    Args:
        key: dotted.
        values: the configuration's, with or without the key; empty if unknown.
        location: pydantic's location of a key in a file.
    """
    section, _, leaf = key.rpartition(".")
    whole = key.partition("[")[0]
    field = field_at(whole.split("."))
    if whole != key and whole.startswith(("optimizer.arguments.", "model.arguments.")):
        return f"; the list has no value yet; give all of it, '{whole}=[...]'"
    if whole != key and field is not None and not sections_of(field.annotation):
        return f"; {whole} is not a list; write {whole}=..."
    if any("." in str(part) for part in location):
        return f"; nest it, {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    if key in config_groups():
        return f"; choose one with {key}=<name>: {', '.join(group_options(key))}"
    if key in known_keys():
        group = key.partition(".")[0]
        if choices := choices_with(key):
            if group == "optimizer" and _tag(values.get(group)) == "external":
                return f"; optimizer=external takes arguments of its factory as optimizer.arguments.{leaf}="
            has_not = f", not of {group}={_tag(values.get(group))}" if _tag(values.get(group)) else ""
            other = KEY_MEANT.get(leaf)
            instead = f"; did you mean {other}?" if other and not _of_choice(other, values) else ""
            return f"; it is a key of {group}={either(choices)}{has_not}{instead}"
        return f"; the files omit {section or key} or set it to one value; correct them, or set it with ++{key}=..."
    if section in config_groups() and leaf in group_options(section):
        return f"; did you mean {section}={leaf}?"
    meant, conversion = suggestions(key, values)
    if meant:
        hint = f"; did you mean {either([one + _of_choice(one, values) for one in meant])}?"
        return f"{hint} {conversion}" if conversion else hint
    inside = sorted(known.rpartition(".")[2] for known in known_keys(values) if known.rpartition(".")[0] == section)
    if not inside:
        return f"; no such section as {section}; the sections are {', '.join(sorted(RunConfig.model_fields))}"
    return f"; known keys{' of ' + section if section else ''}: {', '.join(inside)}"


def suggestions(key: str, values: Mapping[str, Any]) -> tuple[list[str], str]:
    """Return known keys that the unknown one may stand for, those of the chosen sections first, and a conversion."""
    key = key.lower().replace("-", "_").replace("/", ".")
    section, _, leaf = key.rpartition(".")
    known = sorted(known_keys(), key=lambda one: (one.count("."), one))
    if key in known:
        return [key], ""
    by_leaf: dict[str, list[str]] = {}
    for one in known:
        by_leaf.setdefault(one.rpartition(".")[2], []).append(one)
    own = {one.rpartition(".")[2]: [one] for one in known if one.rpartition(".")[0] == section}
    near = difflib.get_close_matches(leaf, own, n=1, cutoff=0.6)
    near += difflib.get_close_matches(leaf, [*by_leaf, *KEY_MEANT], n=1, cutoff=0.75)
    for name in (key, leaf, *near):
        real = own.get(name) or by_leaf.get(name, [])
        meant = [KEY_MEANT[name]] if name in KEY_MEANT and name not in own else []
        if meant and meant[0] in real:  # of several keys with this name, prefer the synonym's
            real, meant = meant, []
        fitting = [one for one in real if not _of_choice(one, values)]
        if found := fitting or [one for one in meant if not _of_choice(one, values)] or meant or real:
            return found[:3], "" if found[0] in real else CONVERSIONS.get(name, "")
    return [], ""


def _of_choice(key: str, values: Mapping[str, Any]) -> str:
    """Return which choices have the key, if the chosen one does not."""
    key = key.partition("[")[0]
    if "=" in key or key in known_keys(values):
        return ""
    return f" of {key.partition('.')[0]}={either(choices_with(key))}"


def choose_from(choice: str, options: Sequence[str], group: str) -> str:
    """Return what an unknown choice may stand for, and all choices."""
    everything = ", ".join(options)
    if meant := likely(choice, options, group):
        return f"did you mean {either(meant)}? Choices: {everything}"
    return f"choose one of {everything}" if options else f"give one of those in {CONFIG_DIRECTORY}"


def likely(choice: str, options: Sequence[str], group: str = "") -> list[str]:
    """Return the options that an unknown one may stand for: by synonym, last part, prefix or spelling."""
    flat = {option: _flat(option.rpartition("/")[2]) for option in options}
    name = _flat(choice)
    meant = [one.partition("=")[2] for one, others in SYNONYMS_OF_CHOICES.items() if name in map(_flat, others.split())]
    meant = [one for one in meant if f"{group}={one}" in SYNONYMS_OF_CHOICES]
    meant = meant or [option for option in options if flat[option] == name]
    meant = meant or [option for option in options if name and flat[option].startswith(name)]
    return (meant or difflib.get_close_matches(choice.lower(), options, n=1, cutoff=0.6))[:3]


def _flat(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def either(names: Sequence[str]) -> str:
    """Join names: `a`, `a or b`, `a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def config_groups() -> list[str]:
    return sorted(path.name for path in CONFIG_DIRECTORY.iterdir() if path.is_dir())


def group_options(group: str) -> list[str]:
    """Return the choices of a configuration group, nested ones as `folder/name`."""
    root = CONFIG_DIRECTORY / group
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, its cause or context, and so on."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def unquoted(value: str) -> str:
    return value.strip("'\"")


def of_element(key: str) -> str:
    """Return `optimizer.betas[0]` for Hydra's `optimizer.betas.0`."""
    return re.sub(r"\.(\d+)$", r"[\1]", key)


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
