import pytest

from nspo2_trl import NSPO2Config, get_default_config

BAD = [
    ("strategy", "quiet"),
    ("projection_rank", -1),
    ("projection_rank", 2.5),
    ("projection_rank", True),
    ("update_freq", 0),
    ("trust_radius", 0),
    ("trust_radius", -0.1),
    ("trust_radius", float("nan")),
    ("target_bias", 0),
    ("target_bias", 1.5),
    ("max_rank", 0),
    ("min_rank", -1),
    ("cov_momentum", 1.0),
    ("shrinkage", -0.1),
    ("covariance", "full"),
    ("eigensolver", "svd"),
    ("strength", 1.1),
    ("anneal", -0.5),
    ("epsilon", 0),
    ("seed", "x"),
    ("dim", 0),
]


def test_published_defaults():
    config = get_default_config(dim=100)
    published = {
        "dim": 100,
        "strategy": "hybrid",
        "projection_rank": 16,
        "update_freq": 10,
        "trust_radius": 0.1,
        "target_bias": 0.05,
        "max_rank": 32,
        "min_rank": 0,
        "epsilon": 1e-6,
        "seed": 42,
    }
    assert {name: config[name] for name in published} == published


def test_mapping_and_attributes_are_one():
    config = get_default_config()
    config["strategy"] = "noise"
    config.projection_rank = 8
    assert config.strategy == "noise" and config["projection_rank"] == 8
    config.update(update_freq=3)
    assert dict(config)["update_freq"] == 3
    assert dict(NSPO2Config(**config)) == dict(config)


@pytest.mark.parametrize("name, value", BAD)
def test_bad_values_are_refused_wherever_they_are_set(name, value):
    config = get_default_config()
    before = config[name]
    for attempt in (
        lambda: NSPO2Config(**{name: value}),
        lambda: get_default_config(**{name: value}),
        lambda: config.__setitem__(name, value),
        lambda: setattr(config, name, value),
    ):
        with pytest.raises(ValueError, match=f"^`{name}` must be .*, got "):
            attempt()
    assert config[name] == before


def test_ranks_are_checked_against_each_other():
    with pytest.raises(ValueError, match="raise `max_rank` to at least 40"):
        NSPO2Config(projection_rank=40)
    with pytest.raises(ValueError, match="`min_rank`"):
        NSPO2Config(min_rank=33)
    assert NSPO2Config(projection_rank=40, max_rank=64).projection_rank == 40


def test_unknown_options():
    with pytest.raises(ValueError, match="`rank` is no option of NSPO2"):
        get_default_config(rank=3)
    config = get_default_config()
    with pytest.raises(ValueError, match="no option"):
        config["rank"] = 3
    with pytest.raises(KeyError):
        config["rank"]
    with pytest.raises(TypeError):
        del config["seed"]
