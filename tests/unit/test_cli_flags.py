"""Flags as they are typed: both dash forms, clear errors, suggestions, help everywhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cli.errors import UsageError
from cli.flags import Args, Command, Flag, HelpWanted, duration, parse, port, ratio, usage, whole
from cli.main import ALIASES, FAMILIES, find, load, main


def _command(**more: object) -> Command:
    flags = (
        Flag("name", "a name", "NAME"),
        Flag("port", "a port", "PORT", parse=port),
        Flag("register", "register", switch=True),
        Flag("tag", "tags", many=True),
        Flag("from", "source", aliases=("source",)),
    )
    return Command("Do it", lambda args: 0, flags, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "typed",
    [
        ["-name", "web", "-port", "80", "-register"],
        ["--name", "web", "--port", "80", "--register"],
        ["-name=web", "--port=80", "-register=true"],
        ["-register", "-port=80", "-name", "web"],
    ],
)
def test_both_dash_forms_mean_the_same(typed: list[str]) -> None:
    args = parse(_command(), "do", typed)
    assert (args.text("name"), args.number("port"), args.on("register")) == ("web", 80, True)


def test_a_value_may_look_like_a_flag() -> None:
    assert parse(_command(), "do", ["-name", "-odd", "-from=-x"]).text("name") == "-odd"


def test_repeated_and_aliased_flags() -> None:
    args = parse(_command(), "do", ["-tag", "a", "-tag=b", "-source", "web"])
    assert args.many("tag") == ["a", "b"]
    assert args.text("from") == "web"


def test_what_follows_two_dashes_is_left_alone() -> None:
    args = parse(_command(rest=True), "do", ["-name", "x", "--", "cmd", "-name", "y", "--", "-h"])
    assert args.text("name") == "x"
    assert args.rest == ["cmd", "-name", "y", "--", "-h"]


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (["-nmae", "x"], "unknown flag -nmae. Did you mean '-name'?"),
        (["-nam", "x"], "unknown flag -nam"),
        (["-name"], "flag -name needs a value (NAME)"),
        (["-port", "http"], "flag -port must be a port number from 0 to 65535, not 'http'"),
        (["-port", "65536"], "not '65536'"),
        (["-register=maybe"], "must be true or false"),
        (["-name", "a", "-name", "b"], "given twice, as a and as b"),
        (["stray"], "unexpected argument 'stray'"),
        (["--", "cmd"], "nothing may follow --"),
    ],
)
def test_errors_are_one_clear_sentence(typed: list[str], text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(_command(), "do", typed)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_help_wins_over_errors_before_it() -> None:
    for flag in ("-h", "-help", "--help"):
        with pytest.raises(HelpWanted):
            parse(_command(), "do", ["-name", "x", flag])


def test_missing_required_flags_are_named_together() -> None:
    command = Command("x", lambda args: 0, (Flag("a", "", required=True), Flag("b", "", required=True)))
    with pytest.raises(UsageError, match="missing -a and -b"):
        parse(command, "x", [])


@pytest.mark.parametrize(("text", "seconds"), [("10s", 10), ("250ms", 0.25), ("1.5m", 90), ("2h", 7200), ("3", 3),
                                               ("1m30s", 90)])  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1x", "ten", "1s "])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError):
        duration(text)


@pytest.mark.parametrize("text", ["-1", "1.0", "", "٣", "1e3"])
def test_bad_numbers(text: str) -> None:
    with pytest.raises(ValueError):
        whole(text)


@pytest.mark.parametrize(("text", "share"), [("0", 0), ("1", 1), ("1.0", 1), ("0.01", 0.01), (".5", 0.5), ("1.", 1)])
def test_ratios(text: str, share: float) -> None:
    assert ratio(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "-1", "1.1", "2", "1e-3", "nan", "inf", "1%", "٠", ".", "0" * 5000])
def test_bad_ratios(text: str) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        ratio(text)


def _leaves() -> list[tuple[str, Command]]:
    leaves = []
    for word in FAMILIES:
        if word == "chaos":
            continue
        family = load(word)
        if family.alone:
            leaves.append((word, family.alone))
        leaves += [(f"{word} {name}", command) for name, command in family.commands.items()]
    return leaves


def test_every_command_has_help_and_distinct_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in _leaves():
        assert main([*name.split(), "-help"]) == 0, name
        assert f"Usage: lictor {name}" in capsys.readouterr().out
        spellings = [s for flag in command.flags for s in (flag.name, *flag.aliases)]
        assert len(spellings) == len(set(spellings)), name
        assert usage(command, name)


def test_words_lead_to_commands() -> None:
    family = load("operator")
    command, name, left = find(family, "operator", ["raft", "list-peers", "-json"])
    assert (name, left) == ("operator raft list-peers", ["-json"])
    assert command.summary == "List the servers"


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (["servces", "list"], "unknown command 'servces'. Did you mean 'services'?"),
        (["services", "lst"], "unknown command 'lst'. Did you mean 'list'?"),
        (["operator", "raft", "list-peer"], "Did you mean 'raft list-peers'?"),
        (["services", "register", "-nam", "x"], "Did you mean '-name'?"),
    ],
)
def test_unknown_words_end_with_usage_status(typed: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed) == 2
    assert text in capsys.readouterr().err


def test_aliases_lead_somewhere() -> None:
    assert set(ALIASES.values()) <= set(FAMILIES)
    assert main(["intention", "-help"]) == 0


def test_version_imports_no_heavy_module() -> None:
    program = (
        "import sys; from cli.main import main; main(['version']);"
        "heavy = {'asyncio', 'aiohttp', 'msgspec', 'rich', 'psutil', 'cryptography', 'ssl', 'http.client'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_args_defaults() -> None:
    args = Args({}, [], [])
    assert (args.text("x", "d"), args.number("x", 3), args.seconds("x", 1.5), args.on("x"), args.many("x")) == (
        "d", 3, 1.5, False, [],
    )  # fmt: skip
