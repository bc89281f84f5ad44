"""The text of an answer taken apart: content, reasoning and calls."""
