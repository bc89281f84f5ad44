"""Options that commands share: single ones and groups of them, and what of the engine they become. Know no command."""
