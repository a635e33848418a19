import pytest


@pytest.fixture
def write(tmp_path):
    """write("a.txt", content) → the file's path, as text."""

    def make(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make
