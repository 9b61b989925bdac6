import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config as HuggingFaceConfig
from transformers import GPT2LMHeadModel

from models import GPT2, GPT2Config
from models.huggingface import from_huggingface, to_huggingface


def model_of(bias: bool = False, attention_layer_scaling: bool = False) -> GPT2:
    config = GPT2Config(300, 3, 2, 32, 16, bias=bias, attention_layer_scaling=attention_layer_scaling)
    model = GPT2(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.token_embedding.weight[config.vocab_size :] = 0
    return model


TOKENS = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attention_layer_scaling", [False, True])
def test_the_round_trip_through_a_directory_keeps_logits_and_weights(
    tmp_path: Path, bias: bool, attention_layer_scaling: bool
) -> None:
    model = model_of(bias, attention_layer_scaling)
    exported = to_huggingface(model)
    with torch.no_grad():
        torch.testing.assert_close(exported(TOKENS).logits, model.logits(TOKENS), atol=1e-5, rtol=0)
    exported.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
    config, weights = from_huggingface(tmp_path)
    assert config == model.config
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name


def test_a_model_made_by_transformers_has_the_same_logits_here() -> None:
    theirs = GPT2LMHeadModel(HuggingFaceConfig(vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    config, weights = from_huggingface(theirs)
    assert config.bias
    model = GPT2(config).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=0)


def test_the_weights_are_copies(tmp_path: Path) -> None:
    model = model_of()
    exported = to_huggingface(model)
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in model.parameters())


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        from_huggingface(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    to_huggingface(model_of()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        from_huggingface(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    to_huggingface(model_of()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=str(tmp_path)):
        from_huggingface(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    exported = to_huggingface(model_of())
    exported.save_pretrained(
        tmp_path, state_dict={k: v for k, v in exported.state_dict().items() if "h.1.mlp.c_fc.weight" not in k}
    )
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight"):
        from_huggingface(tmp_path)


def changed(directory: Path, added: dict[str, Tensor] | None = None, **settings: object) -> Path:
    """A saved model with further tensors in its file and other settings in its config.json."""
    to_huggingface(model_of()).save_pretrained(directory)
    weights = load_file(directory / "model.safetensors") | (added or {})
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    return directory


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_positions": 32}, r"transformer\.wpe\.weight has the shape \(16, 32\) instead of \(32, 32\)"),
        ({"vocab_size": 301}, r"transformer\.wte\.weight has the shape \(300, 32\) instead of \(301, 32\)"),
    ],
)
def test_weights_of_another_shape_are_named_with_both_shapes(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_huggingface(changed(tmp_path, **settings))


def test_an_output_layer_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    message = r"lm_head\.weight differs from transformer\.wte\.weight"
    with pytest.raises(ValueError, match=message) as refused:
        from_huggingface(changed(tmp_path, {"lm_head.weight": torch.zeros(300, 32)}))
    assert str(tmp_path) in str(refused.value)
    theirs = to_huggingface(model_of())
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight + 1)
    with pytest.raises(ValueError, match=message):
        from_huggingface(theirs)


def test_a_copy_of_the_embedding_as_output_layer_is_imported(tmp_path: Path) -> None:
    embedding = load_file(changed(tmp_path) / "model.safetensors")["transformer.wte.weight"]
    weights = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": embedding.clone()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(from_huggingface(tmp_path)[1]["token_embedding.weight"][:300], embedding)


def test_weights_that_the_import_would_drop_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformer\.h\.2\.attn\.c_attn\.weight is not in the model"):
        from_huggingface(changed(tmp_path, n_layer=2))
    adapter = "transformer.h.0.attn.c_attn.lora_A.weight"
    with pytest.raises(ValueError, match=rf"{adapter} is not in the model"):
        from_huggingface(changed(tmp_path, {adapter: torch.zeros(4, 32)}))


def test_the_attention_buffers_of_older_files_are_ignored(tmp_path: Path) -> None:
    buffers = {"attn.bias": torch.ones(1, 1, 16, 16), "attn.masked_bias": torch.tensor(-1e4)}
    config, _ = from_huggingface(changed(tmp_path, {f"transformer.h.0.{name}": b for name, b in buffers.items()}))
    assert config == model_of().config


def test_another_type_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json has model_type='llama'; expected 'gpt2'"):
        from_huggingface(changed(tmp_path, model_type="llama"))


@pytest.mark.parametrize(
    "setting",
    [{"activation_function": "relu"}, {"n_inner": 64}, {"tie_word_embeddings": False}, {"layer_norm_epsilon": 1e-6}],
)
def test_an_unsupported_gpt2_is_refused(setting: dict[str, object]) -> None:
    config = HuggingFaceConfig(vocab_size=300, n_positions=16, n_embd=32, n_layer=1, n_head=2, **setting)
    with pytest.raises(ValueError, match=next(iter(setting))):
        from_huggingface(GPT2LMHeadModel(config))
