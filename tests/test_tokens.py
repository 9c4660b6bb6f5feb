"""Amounts of tokens are read and printed exactly, and malformed ones are refused."""

import random

import pytest
from jsonargparse import ArgumentParser

from distill_pl.tokens import Tokens, short

WRITTEN = {
    "0": 0,
    "1": 1,
    "512": 512,
    "512k": 512_000,
    "512K": 512_000,
    "80M": 80_000_000,
    " 80 M ": 80_000_000,
    "1B": 10**9,
    "2.5B": 2_500_000_000,
    "0.3k": 300,
    "1.001k": 1001,
    "1_000_000": 10**6,
    "15T": 15 * 10**12,
}


@pytest.mark.parametrize("text", WRITTEN)
def test_reading(text):
    assert Tokens(text) == WRITTEN[text]
    assert isinstance(Tokens(text), int)


def test_showing_and_reading_is_exact():
    rng = random.Random(0)
    amounts = [0, 1, 999, 1000, 1001, 10**6, 10**9 + 10**6, 10**12, 2**53 + 1]
    amounts += [rng.randrange(10 ** rng.randint(1, 15)) * 10 ** rng.choice([0, 3, 6]) for _ in range(300)]
    for amount in amounts:
        assert Tokens(str(Tokens(amount))) == amount


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0"), (999, "999"), (1000, "1k"), (1500, "1500"), (80_000_000, "80M"), (10**12, "1T")]
)
def test_showing(amount, text):
    assert str(Tokens(amount)) == text


@pytest.mark.parametrize(
    "bad", ["", "M", "80 MB", "80m", "80b", "-1", "-80M", "1e9", "1,000", "1.5", "0.0001k", "1__0", "_1", "ten", "nan",
            -1, 1.5, 80e6, True, None, [80]],
)  # fmt: skip
def test_bad_amounts_are_refused(bad):
    with pytest.raises(ValueError):
        Tokens(bad)


def test_decimals_are_not_rounded_in_binary():
    for thousandth in range(1, 2000, 7):
        whole, part = divmod(thousandth, 1000)
        assert Tokens(f"{whole}.{part:03d}k") == thousandth
        assert Tokens(f"{whole}.{part:03d}B") == thousandth * 10**6


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1234, "1.23k"), (80e6, "80M"), (1.256e9, "1.26B"), (999_499, "999k"), (999.9, "1k"),
     (999_500, "1M"), (999_997_440, "1B")],
)  # fmt: skip
def test_short(amount, text):
    assert short(amount) == text


def test_command_lines_and_configuration_files_speak_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tokens", type=Tokens | None, default=Tokens("1B"))
    config = parser.parse_args(["--tokens", "80M"])
    assert config.tokens == 80_000_000
    written = parser.dump(config)
    assert "80M" in written
    assert parser.parse_string(written).tokens == config.tokens
    with pytest.raises(Exception, match="80 apples"):
        parser.parse_args(["--tokens", "80 apples"])
