"""What is checked of an output before the work starts."""

import pytest

from quantkit.checkpoint.output_checks import check_disk_space, check_output
from quantkit.errors import OutputError


def test_output_must_not_be_or_contain_the_input(tmp_path):
    (tmp_path / "a" / "model").mkdir(parents=True)
    for place in (tmp_path / "a" / "model", tmp_path / "a"):
        with pytest.raises(OutputError, match="input"):
            check_output(place, overwrite=True, reads=[tmp_path / "a" / "model"])


def test_disk_space_is_checked_before_the_start(tmp_path):
    check_disk_space(tmp_path / "out", 1)
    with pytest.raises(OutputError, match="free"):
        check_disk_space(tmp_path / "out", 10**18)
