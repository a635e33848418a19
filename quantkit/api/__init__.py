"""The public functions of `import quantkit`, one file each.

They take paths, hub ids or data in memory, and return typed results. `quantkit/__init__.py` names
them; the command line is thin over them.
"""
