"""Models by name: `hf:owner/repo[:quant][@revision]` becomes a file in the Hugging Face cache of this machine.

Names and the choice among a repository's files (names.py), the cache (cache.py), one file's way into it (download.py),
the hub's protocol through huggingface_hub (client.py), and the order of asking (resolve.py). Knows no models and no
GGUF; `import engine` does not import it, and only a download imports huggingface_hub.
"""
