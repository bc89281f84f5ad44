"""Groups of options: each field is an option of the commands that take it, and a setting of the same name."""

from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from engine.cli.options.groups import Only, Without, with_groups
from engine.cli.options.opening import Opening
from engine.cli.options.sampling import Sampling
from engine.config import EngineConfig
from engine.sampling.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Fruit:
    apples: Annotated[int, typer.Option("--apples", "-a")] = 1
    pears: Annotated[list[int] | None, typer.Option("--pear")] = None
    ripe: Annotated[bool, typer.Option("--ripe/--raw")] = True


def test_the_options_without_arguments_are_the_defaults_of_the_library():
    assert Opening().config(None) == EngineConfig()
    assert Sampling().params() == SamplingParams()


@pytest.mark.parametrize(("group", "settings"), [(Opening, EngineConfig), (Sampling, SamplingParams)])
def test_a_field_is_named_as_its_setting(group, settings):
    assert {field.name for field in fields(group)} <= {field.name for field in fields(settings)}


def called(command, *arguments):
    app = typer.Typer()
    app.command()(with_groups(command))
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.exit_code, result.output


def test_a_command_gets_its_groups_whole_and_has_the_options_it_names():
    def everything(name: Annotated[str, typer.Argument()] = "", *, fruit: Fruit) -> None:
        typer.echo(f"{name} {fruit}")

    def some(*, fruit: Annotated[Fruit, Only("ripe")], size: int = 3) -> None:
        typer.echo(f"{size} {fruit}")

    def others(*, fruit: Annotated[Fruit, Without("apples", "ripe")]) -> None:
        typer.echo(f"{fruit}")

    assert called(everything, "box", "-a", "2", "--pear", "4", "--pear", "5", "--raw") == (
        0,
        f"box {Fruit(apples=2, pears=[4, 5], ripe=False)}\n",
    )
    assert called(some, "--size", "4", "--raw") == (0, f"4 {Fruit(ripe=False)}\n")
    assert called(some, "--apples", "2")[0] == 2
    assert called(others, "--pear", "4") == (0, f"{Fruit(pears=[4])}\n")
    assert called(others, "--ripe")[0] == 2


def test_a_misspelt_field_is_found_when_the_command_is_made():
    def command(*, fruit: Annotated[Fruit, Without("aples")]) -> None: ...

    with pytest.raises(AssertionError, match="aples"):
        with_groups(command)
