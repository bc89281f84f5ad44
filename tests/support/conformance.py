"""The conformance files: tiny random models of the architectures, with logits that llama.cpp computed in float32."""

NAMES = (
    "bloom-dense", "cohere2-dense", "command-r-dense", "deepseek-moe", "deepseek2-moe", "ernie4_5-moe",
    "ernie4_5-moe-moe", "exaone4-dense", "falcon-dense", "gemma-dense", "gemma2-dense", "gemma3-dense", "glm4-dense",
    "glm4moe-moe",
    "gpt-oss-moe", "gpt2-dense", "gptneox-dense", "granite-dense", "granite-moe", "hunyuan-dense-dense",
    "internlm2-dense", "llama-dense", "llama-moe", "mamba-dense", "minicpm-dense", "mistral3-dense", "mpt-dense",
    "nemotron-dense", "olmo-dense", "olmo2-dense", "olmoe-moe", "phi2-dense", "phi3-dense", "phimoe-moe", "qwen2-dense",
    "qwen2moe-moe", "qwen3-dense", "qwen3moe-moe", "seed_oss-dense", "smollm3-dense", "stablelm-dense",
    "starcoder2-dense",
)  # fmt: skip
SAME_AS = {
    "arcee", "chatglm", "codeshell", "dots1", "exaone", "granitemoe", "hunyuan-moe", "orion", "qwen2vl", "qwen3vl",
    "qwen3vlmoe", "starcoder", "xverse",
}  # fmt: skip
"""Families made of parts that others are measured with, and of which test_peer_logits.py has references."""


def error(found, expected):
    return float(((found - expected) ** 2).mean() / (expected**2).mean())
