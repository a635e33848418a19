"""Files: checkpoints read and written, file formats, the hub, GGUF, and what is kept between
runs.
"""
