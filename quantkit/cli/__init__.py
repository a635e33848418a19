"""The command line, one file for each larger command.

Nothing here imports torch before a command runs.
"""
