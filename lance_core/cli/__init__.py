"""The command line, a file a family of commands. Nothing here imports torch before a command runs."""
