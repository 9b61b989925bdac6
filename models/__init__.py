"""GPT-2, its loss head, its FLOPs, and conversion to and from transformers."""

from models.gpt2 import GPT2, GPT2Config, GPT2Output, parameter_kind

__all__ = ["GPT2", "GPT2Config", "GPT2Output", "parameter_kind"]
