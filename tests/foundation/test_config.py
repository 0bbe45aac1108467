import dataclasses

import pytest

from common.foundation.config import config_hash, resolve


@dataclasses.dataclass(frozen=True)
class Config:
    size: str = "tiny"
    seed: int = 0
    width: int | None = None


SIZES = {"tiny": {"width": 8}, "small": {"width": 64}}


def test_size_fills_in_and_an_override_stays():
    assert resolve(Config(), SIZES).width == 8
    assert resolve(Config("small", width=3), SIZES).width == 3


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (Config("huge"), SIZES, "size 'huge' is unknown"),
        (Config(), {"tiny": {}}, r"no value for \['width'\]"),
        (Config(), {"tiny": {"width": 1, "depth": 2}}, r"sets \['depth'\]"),
    ],
)
def test_bad_configs_say_what_is_wrong(config, sizes, message):
    with pytest.raises(ValueError, match=message):
        resolve(config, sizes)


def test_hash_depends_on_values_only():
    assert config_hash(Config(width=1)) == config_hash(Config("tiny", 0, 1)) != config_hash(Config(width=2))
