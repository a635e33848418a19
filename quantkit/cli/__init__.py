"""The command line, one file for each command.

Nothing here imports torch before a command runs.
"""
