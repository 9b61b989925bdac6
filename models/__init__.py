"""GPT-2, the interface of a language model, the loss head, FLOPs, and conversion to and from transformers."""

from models.gpt2 import GPT2, GPT2Config
from models.language_model import LanguageModel, ModelOutput, parameter_kind

__all__ = ["GPT2", "GPT2Config", "LanguageModel", "ModelOutput", "parameter_kind"]
