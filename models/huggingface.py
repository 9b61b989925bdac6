"""GPT-2 to and from transformers' GPT2LMHeadModel.

transformers' Conv1D holds the weight of a linear layer transposed, transformers always has biases and norm offsets, and
it does not pad the vocabulary.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GPT2Config as HuggingFaceConfig
from transformers import GPT2LMHeadModel

from models.gpt2 import GPT2, GPT2Config

# Our name of a block's module, transformers' name, and whether theirs is a Conv1D.
BLOCK_MODULES = (
    ("attention_norm", "ln_1", False),
    ("attention.qkv", "attn.c_attn", True),
    ("attention.out", "attn.c_proj", True),
    ("mlp_norm", "ln_2", False),
    ("mlp.up", "mlp.c_fc", True),
    ("mlp.down", "mlp.c_proj", True),
)
# Settings of a GPT2LMHeadModel for which this model supports only these values.
FIXED_SETTINGS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
NAMED_FAULTS = 4  # of a file's weights, in an error


def to_huggingface(model: GPT2) -> GPT2LMHeadModel:
    """A GPT2LMHeadModel on the CPU with the same weights, in float32, and the same logits over the real vocabulary.

    Absent biases become zeros. The weights must be whole tensors, not shards.
    """
    config = model.config
    weights = {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
    translated = {
        "transformer.wte.weight": weights["token_embedding.weight"][: config.vocab_size],
        "transformer.wpe.weight": weights["position_embedding.weight"],
    }
    for ours, theirs, transposed in _modules(config):
        weight = weights[f"{ours}.weight"]
        translated[f"{theirs}.weight"] = weight.T if transposed else weight
        translated[f"{theirs}.bias"] = weights.get(f"{ours}.bias", weight.new_zeros(len(weight)))
    translated["lm_head.weight"] = translated["transformer.wte.weight"]
    exported = GPT2LMHeadModel(huggingface_config(config))
    exported.load_state_dict(translated, strict=True)
    return exported.eval()


def from_huggingface(source: str | Path | GPT2LMHeadModel) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The shape and the float32 weights, by GPT2's parameter names, of a GPT2LMHeadModel or its directory.

    Biases are dropped if all of them are zero, and the vocabulary is padded with zeros.

    Raises:
        ValueError: the directory has no config.json or no safetensors (pickles are not read), or its model is not a
            GPT-2 that this code supports.
    """
    theirs = source if isinstance(source, GPT2LMHeadModel) else _load(Path(source))
    for key, allowed in FIXED_SETTINGS.items():
        if getattr(theirs.config, key) not in allowed:
            raise ValueError(
                f"{key}={getattr(theirs.config, key)!r} in the transformers configuration: "
                f"expected {' or '.join(map(repr, allowed))}"
            )
    if theirs.config.n_inner not in (None, 4 * theirs.config.n_embd):
        raise ValueError(
            f"n_inner={theirs.config.n_inner} in the transformers configuration: "
            f"expected 4 n_embd = {4 * theirs.config.n_embd}"
        )
    parameters = {name: parameter.detach().float().cpu() for name, parameter in theirs.named_parameters()}
    embedding = parameters["transformer.wte.weight"]
    head = parameters.get("lm_head.weight")  # from_pretrained ties the two only if they are equal
    if head is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"{'' if theirs is source else f'{source}: '}lm_head.weight differs from transformer.wte.weight; expected a model "
            "trained with tie_word_embeddings=true, since the output layer here is the embedding"
        )
    config = GPT2Config(
        vocab_size=theirs.config.vocab_size,
        n_layer=theirs.config.n_layer,
        n_head=theirs.config.n_head,
        n_embd=theirs.config.n_embd,
        block_size=theirs.config.n_positions,
        bias=any(bool(tensor.any()) for name, tensor in parameters.items() if name.endswith("bias")),
        dropout=theirs.config.resid_pdrop,
        attention_layer_scaling=theirs.config.scale_attn_by_inverse_layer_idx,
    )
    padding = embedding.new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    weights = {
        "token_embedding.weight": torch.cat((embedding, padding)),
        "position_embedding.weight": parameters["transformer.wpe.weight"].clone(),
    }
    for ours, name, transposed in _modules(config):
        weight = parameters[f"{name}.weight"]
        weights[f"{ours}.weight"] = (weight.T if transposed else weight).clone(memory_format=torch.contiguous_format)
        if config.bias:
            weights[f"{ours}.bias"] = parameters[f"{name}.bias"].clone()
    return config, weights


def huggingface_config(config: GPT2Config) -> HuggingFaceConfig:
    """The transformers configuration of the same shape. `<|endoftext|>`, the last token, is its BOS and EOS token."""
    return HuggingFaceConfig(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu_new",
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        scale_attn_by_inverse_layer_idx=config.attention_layer_scaling,
        bos_token_id=config.vocab_size - 1,
        eos_token_id=config.vocab_size - 1,
        tie_word_embeddings=True,
    )


def _modules(config: GPT2Config) -> list[tuple[str, str, bool]]:
    blocks = [
        (f"blocks.{layer}.{ours}", f"transformer.h.{layer}.{theirs}", transposed)
        for layer in range(config.n_layer)
        for ours, theirs, transposed in BLOCK_MODULES
    ]
    return [*blocks, ("final_norm", "transformer.ln_f", False)]


def _load(directory: Path) -> GPT2LMHeadModel:
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: no config.json; expected a directory written by save_pretrained")
    if not any(directory.glob("*.safetensors")):
        pickles = ", ".join(sorted(path.name for path in directory.glob("*.bin")))
        raise ValueError(
            f"{directory}: no model.safetensors"
            + (f", and {pickles} is a pickle, which can run code when it is loaded" if pickles else "")
            + "; expected weights written by save_pretrained(..., safe_serialization=True)"
        )
    try:
        _check_directory(directory)
        loaded: Any = GPT2LMHeadModel.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported
        )
    except Exception as error:  # damaged directories raise exceptions of many libraries
        raise ValueError(f"{directory}: {' '.join(str(error).split())}") from error
    model, report = loaded
    faults = sorted(
        [f"{name} is missing" for name in report["missing_keys"]]
        + [f"{name} has the shape {tuple(a)} instead of {tuple(b)}" for name, a, b in report["mismatched_keys"]]
        # Older files hold the causal mask: attn.bias, which from_pretrained leaves out of its report, and attn.masked_bias.
        + [f"{name} is not in the model" for name in report["unexpected_keys"] if not name.endswith("attn.masked_bias")]
    )
    if faults:
        more = f" and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
        raise ValueError(
            f"{directory}: the safetensors do not fit config.json: {', '.join(faults[:NAMED_FAULTS])}{more}; expected the "
            "weights of a GPT2LMHeadModel of that configuration, with adapters merged"
        )
    return model


def _check_directory(directory: Path) -> None:
    """Refuse a directory that has another type of model, refers to files outside or would allocate more than its files hold.

    Raises:
        ValueError: a link or an index leads outside, it is an adapter (whose base model is elsewhere), or config.json
            is another type of model's or describes more weights than there are.
    """
    root = directory.resolve()
    # The hub's cache keeps a snapshot's files in the blobs/ of the same repository.
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in directory.iterdir():
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise ValueError(
                f"{path.name} is a link to a file outside the directory; replace it with a copy of that file"
            )
    if (directory / "adapter_config.json").exists():
        raise ValueError("adapter_config.json makes it an adapter of another model; merge it into a whole model")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        places = content.get("weight_map", {}).values() if isinstance(content, dict) else ()
        for name in places:
            if not isinstance(name, str) or not (directory / name).is_file() or Path(name).name != name:
                raise ValueError(f"{index.name} names {name!r}; expected names of files in the directory")
    held = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            held += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    config = HuggingFaceConfig.from_pretrained(directory, local_files_only=True)
    if config.model_type != "gpt2":
        raise ValueError(
            f"config.json has model_type={config.model_type!r}; expected 'gpt2', the only type that is imported"
        )
    layers, width, mlp = config.n_layer, config.n_embd, config.n_inner or 4 * config.n_embd
    described = (config.vocab_size + config.n_positions) * width + layers * (4 * width**2 + 2 * width * mlp)
    if described > 2 * held:  # loading names weights that are missing within this margin
        raise ValueError(
            f"config.json describes {described} weights, but the files hold {held}; expected files of one model"
        )
