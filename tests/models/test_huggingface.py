from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize(
    "setting",
    [{"activation_function": "relu"}, {"n_inner": 64}, {"tie_word_embeddings": False}, {"layer_norm_epsilon": 1e-6}],
)
def test_an_unsupported_gpt2_is_refused(setting: dict[str, object]) -> None:
    config = HuggingFaceConfig(vocab_size=300, n_positions=16, n_embd=32, n_layer=1, n_head=2, **setting)
    with pytest.raises(ValueError, match=next(iter(setting))):
        from_huggingface(GPT2LMHeadModel(config))
