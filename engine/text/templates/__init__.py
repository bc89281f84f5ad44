"""Conversations to prompt text: messages checked and shaped, the template tried out, rendered in a sandbox."""
