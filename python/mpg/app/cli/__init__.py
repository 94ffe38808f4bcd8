"""The `mpg` command: demo, generate, batch, chat, serve, check, train, info, one file each.

Knows how to read arguments and print, no more. What takes long to import is imported inside the commands, after the
arguments are read.
"""
