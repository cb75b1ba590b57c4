import pytest

from nspo2_trl import NSPO2Config, NSPO2DPOConfig, get_default_config
from nspo2_trl.cli.arguments import parse
from nspo2_trl.config import OPTIONS
from nspo2_trl.training.options import nspo2_options

BAD = [
    ("strategy", ["quiet"]),
    ("projection_rank", [-1, 2.5, True]),
    ("update_freq", [0]),
    ("trust_radius", [0, -0.1, float("nan")]),
    ("target_bias", [0, 1.5]),
    ("max_rank", [0]),
    ("min_rank", [-1]),
    ("cov_momentum", [1.0]),
    ("covariance", ["full"]),
    ("eigensolver", ["svd"]),
    ("strength", [1.1]),
    ("anneal", [-0.5]),
    ("epsilon", [0]),
    ("seed", ["x"]),
    ("dim", [0]),
]


def trainer_config(**options):
    return NSPO2DPOConfig("out", use_cpu=True, bf16=False, **options)


def test_published_defaults():
    published = {"dim": 100, "strategy": "hybrid", "projection_rank": 16, "update_freq": 10, "trust_radius": 0.1}
    published |= {"target_bias": 0.05, "max_rank": 32, "min_rank": 0, "epsilon": 1e-6, "seed": 42}
    config = get_default_config(dim=100)
    assert {name: config[name] for name in published} == published


def test_mapping_and_attributes_are_one():
    config = get_default_config()
    config["strategy"] = "noise"
    config.projection_rank = 8
    assert config.strategy == "noise" and config["projection_rank"] == 8
    config.update(update_freq=3)
    assert dict(config)["update_freq"] == 3
    assert dict(NSPO2Config(**config)) == dict(config)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD for value in values])
def test_bad_values_are_refused_wherever_they_are_set(name, value):
    config = get_default_config()
    before = config[name]
    attempts = [
        lambda: NSPO2Config(**{name: value}),
        lambda: get_default_config(**{name: value}),
        lambda: config.__setitem__(name, value),
        lambda: setattr(config, name, value),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=f"^`{name}` must be .*, got "):
            attempt()
    if name not in ("dim", "min_rank", "epsilon", "seed"):
        with pytest.raises(ValueError, match=f"^`nspo2_{name}` must be .*, got "):
            trainer_config(**{f"nspo2_{name}": value})
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


def test_every_option_of_the_engine_is_one_of_the_trainers():
    """But for those of tests and benchmarks; some defaults were chosen by measurement."""
    config, own = trainer_config(), {"dim", "min_rank", "epsilon", "seed"}
    assert {name for name in OPTIONS if not hasattr(config, f"nspo2_{name}")} == own
    differ = {name: value for name, value in nspo2_options(config).items() if value != get_default_config()[name]}
    chosen = {"strategy": "keep", "covariance": "factored", "basis_dtype": "bfloat16"}
    assert differ == chosen | {"projection_rank": 8, "max_rank": 10, "update_freq": 5}


def test_the_trainers_track_more_than_the_rank_unless_told():
    for covariance, rank, tracked in (("adapter", 16, 32), ("adapter", 0, 1), ("factored", 8, 10), ("factored", 0, 1)):
        options = {"nspo2_projection_rank": rank, "nspo2_covariance": covariance}
        assert nspo2_options(trainer_config(**options))["max_rank"] == tracked
    assert nspo2_options(trainer_config(nspo2_max_rank=20))["max_rank"] == 20


@pytest.mark.parametrize("name, value", [("shrinkage", 0.1), ("min_rank", 2), ("epsilon", 1e-5), ("seed", 1)])
def test_options_that_are_gone_say_what_to_do(name, value):
    with pytest.raises(ValueError, match=f"^`nspo2_{name}` is no option any more: .*leave it out"):
        trainer_config(**{f"nspo2_{name}": value})
    if name == "shrinkage":
        for attempt in (NSPO2Config, get_default_config, get_default_config().update):
            with pytest.raises(ValueError, match="^`shrinkage` is no option any more: .*leave it out"):
                attempt(shrinkage=value)


def test_the_strategy_auto_is_gone():
    with pytest.raises(ValueError, match="^`nspo2_strategy='auto'` is gone: set `nspo2_strategy` to 'keep'"):
        trainer_config(nspo2_strategy="auto")
    with pytest.raises(ValueError, match="^`strategy='auto'` is gone: set `strategy` to 'keep'"):
        get_default_config(strategy="auto")


@pytest.mark.parametrize("key, value", [("nspo2_seed", "3"), ("nspo2_strategy", "auto")])
def test_recipes_and_commands_that_name_them_say_so_too(key, value, tmp_path, in_the_repository):
    recipe = tmp_path / "recipe.yaml"
    lines = [line for line in open("recipes/quickstart/dpo.yaml") if not line.startswith(f"{key}:")]
    recipe.write_text("".join(lines) + f"\n{key}: {value}\n")
    for argv in (["--config", str(recipe)], ["--config", "recipes/quickstart/dpo.yaml", f"--{key}", value]):
        with pytest.raises(ValueError, match=f"`{key}.* is (no option any more|gone): "):
            parse(argv)
