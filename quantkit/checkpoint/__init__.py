"""Files: reading and writing checkpoints, checkpoint formats, the hub, GGUF, the cache, and outputs
that can be resumed.
"""
