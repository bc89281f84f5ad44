"""Models by name: `hf:owner/repo[:quant][@revision]` becomes a file in the Hugging Face cache of this machine.

Names and the choice among a repository's files (names.py), the cache (cache.py), one file's way into it (download.py),
the hub's protocol through huggingface_hub (client.py), and the order of asking (resolve.py). Knows no models and no
GGUF; `import engine` does not import it, and only a download imports huggingface_hub.
"""

from __future__ import annotations

from engine.hub.names import HubName, is_hub_name
from engine.hub.progress import Progress
from engine.hub.resolve import pull, resolve

__all__ = ["HubName", "Progress", "is_hub_name", "pull", "resolve"]
