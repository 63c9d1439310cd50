"""Parse what a user types, do it, print what came of it: a module a command."""
