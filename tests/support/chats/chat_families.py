"""The chat templates of families, by name."""

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "text" / "templates" / "chat_templates"
FAMILIES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
