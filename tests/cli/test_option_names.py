import click
import pytest

from quantkit.cli.main import main
from quantkit.cli.option_names import as_command_line, known_names


def said_by(command: str, text: str) -> str:
    """The text as a command would print it."""
    with click.Context(main) as root:
        root.invoked_subcommand = command
        return as_command_line(text)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a smaller `seq_len`", "a smaller --seq-len"),
        ("pass `overwrite=True`, or", "pass --overwrite, or"),
        ("choose another `output`", "choose another -o"),
        ("`kv_cache='fp8'`", "--kv-cache fp8"),
        ("`ignore=['*.o_proj', 're:.*k']`", "--ignore '*.o_proj' --ignore 're:.*k'"),
        ("`cache=False` computes them", "--no-cache computes them"),
        ("`check=False`", "--no-judge"),
        ("`check_tokens`", "--judge-tokens"),
        ("`max_shard_size=5`", "--max-shard-size 5"),
        ("`format`, `alternatives` and `gates`", "--format, --alternative and --gate"),
        ("`recipe='int8-dynamic'`", "--scheme int8-dynamic"),
        ("`recipe='mine.yaml'`", "--recipe mine.yaml"),
        ("`quantkit.verify('my dir')` lists", "`quantkit verify 'my dir'` lists"),
        (
            "`quantkit.evaluate('B', ['Q', 'R'], data='F', cache=False)`",
            "`quantkit eval B Q R --data F --no-cache`",
        ),
        (
            "`quantkit.calibrate('M', output='C', recipe='R.yaml', all_experts=True)`",
            "`quantkit calibrate M -o C --recipe R.yaml --all-experts`",
        ),
        (
            "`config.json` has no `quantization_config`",
            "`config.json` has no `quantization_config`",
        ),
        ("`quantkit.nonsense(` and `seq_len=x`", "`quantkit.nonsense(` and `seq_len=x`"),
    ],
)
def test_parameters_are_printed_as_options(text, printed):
    assert said_by("quantize", text) == printed


def test_the_running_commands_own_names_come_first():
    assert said_by("eval", "`base`") == "BASE" and said_by("verify", "`base`") == "--base"


def test_outside_of_a_command_a_message_stays_as_it_is():
    assert as_command_line("pass `overwrite=True`") == "pass `overwrite=True`"


def test_a_name_means_the_same_option_in_every_command():
    """Else a message of the library would name an option of another command. A parameter that is an
    argument of one command and an option of another is told by the command that runs.
    """
    meanings: dict[str, set[str]] = {}
    for command in main.commands.values():
        with click.Context(command) as context:
            for name, option in known_names(context).items():
                if option.startswith("-"):
                    meanings.setdefault(name, set()).add(option)
    assert len(meanings) > 40 and {name for name, of in meanings.items() if len(of) > 1} == set()


def test_every_option_that_is_printed_exists():
    options = {
        option for each in main.commands.values() for param in each.params for option in param.opts
    }
    with click.Context(main) as context:
        context.invoked_subcommand = "quantize"
        printed = {option for option in known_names(context).values() if option.startswith("-")}
    assert len(printed) > 40 and printed <= options
