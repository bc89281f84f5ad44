"""The models of a server: opened and closed as memory allows, with what is told while one is loaded. Knows no HTTP."""
