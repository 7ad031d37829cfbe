"""The configuration tree: round trips, and one line with the mend for everything that is wrong."""

import json

import pytest

from hmoe_ds.config import ConfigError, RunConfig, config_from_dict, save_config
from hmoe_ds.config_checks import check_topology
from hmoe_ds.config_parser import load_config, preset_names
from hmoe_ds.training.deepspeed_config import deepspeed_config

BLOCKS = ["--router.groups_per_molecule=2", "--router.group_blocks=2", "--router.block_bonus=0.1"]


@pytest.mark.parametrize("preset", preset_names())
def test_presets_load_and_round_trip(preset, tmp_path):
    config = load_config(["--config", preset, "--run.out", str(tmp_path)])
    assert config_from_dict(config.to_dict()) == config
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("optim:\n  learning_rate: 0.5\n  clip_norm: 2.0\n")
    config = load_config(["--config", str(tmp_path / "run.yaml"), "--optim.learning_rate=0.25"])
    assert (config.optim.learning_rate, config.optim.clip_norm) == (0.25, 2.0)
    assert config.model == RunConfig().model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.hiden_size", "3"], "did you mean --model.hidden_size"),
        (["--model.hidden_size", "wide"], "model.hidden_size"),
        (["--parallel.precision", "fp8"], "parallel.precision"),
        (["--config", "huge"], "'huge' is neither a file nor a preset: give a YAML file or one of"),
        (["--router.groups", "3"], "not divisible by router.groups 3"),
        (["--router.groups_per_molecule", "9"], "router.groups_per_molecule is 9 with router.groups 4"),
        (["--router.experts_per_atom", "5"], "the chosen groups hold 2 experts"),
        (["--router.block_bonus", "0.1"], "router.group_blocks is 1 and router.block_bonus is 0.1: set"),
        (["--router.group_blocks", "2"], "router.group_blocks is 2 and router.block_bonus is 0.0: set"),
        ([*BLOCKS, "--router.groups_per_molecule=1"], "and router.groups_per_molecule 1, where it changes nothing"),
        ([*BLOCKS, "--router.form=soft"], "router.block_bonus is 0.1 with router.form soft, router.group_choice"),
        ([*BLOCKS, "--router.group_choice=random"], "router.group_choice random and router.groups_per_molecule 2"),
        ([*BLOCKS, "--router.group_blocks=3"], "router.group_blocks is 3 with router.groups 4 and"),
        ([*BLOCKS, "--router.group_blocks=4"], "set it to a divisor of 4, at most 2, so that a block has room"),
        (["--parallel.ep_size", "3"], "parallel.ep_size is 3, which does not divide router.experts 8"),
        (["--parallel.migration=true", "--router.form=soft"], "parallel.migration is set with router.form soft"),
        (["--parallel.migration=true"], "parallel.migration is set with parallel.ep_size 1 and router.groups 4: set"),
        (
            ["--parallel.migration=true", "--parallel.ep_size=4", "--router.groups=2"],
            "with parallel.ep_size 4 and router.groups 2",
        ),
        (
            ["--router.form=soft", "--router.group_choice=random", "--router.experts_per_atom=3"],
            "router.experts_per_atom is 3 but the chosen groups hold 2 experts",
        ),
        (
            ["--objective.contrast_learned_temperature=true", "--objective.contrast_temperature=0.005"],
            "objective.contrast_temperature is 0.005, but a learned one is held above 0.01",
        ),
        (["--router.experts_at_start", "6"], "router.experts_at_start is 6 with router.experts 8 and router.groups 4"),
        (["--router.experts_at_start", "12"], "set it to a multiple of 4, at most 8, or to 0"),
        (
            ["--router.experts_at_start", "4", "--router.experts_per_atom", "2"],
            "router.experts_at_start is 4: an atom would choose 2 of 1 experts; raise router.experts_at_start",
        ),
        (
            ["--router.experts_at_start=4", "--router.form=additive", "--router.experts_per_atom=2"],
            "router.experts_at_start is 4: an atom would choose 1 of 0 experts",
        ),
        (
            ["--router.experts_at_start", "4", "--router.expert_balance_rate", "0"],
            "router.experts_at_start is 4 with router.expert_balance_rate 0, so that nothing would share the atoms",
        ),
        (
            ["--router.experts_at_start", "4", "--parallel.zero_stage", "3"],
            "router.experts_at_start is 4 with parallel.zero_stage 3, under which",
        ),
        (["--router.split_load", "0.5"], "router.split_load is 0.5: set it to a value from 1 to 1000000.0"),
        (["--model.moe_every", "3"], "no H-MoE layer is left"),
        (["--objective.mask_ratio", "1.5"], "objective.mask_ratio is 1.5: set it to a value from"),
        (["--curriculum.competence", "cubic"], "curriculum.competence"),
        (
            ["--curriculum.competence", "root"],
            "root with curriculum.competence_steps 0: set curriculum.competence_steps",
        ),
        (
            ["--curriculum.competence_start", "0"],
            "curriculum.competence_start is 0.0: set it to a value from 0.01 to 1",
        ),
        (
            ["--curriculum.temperature_steps", "5", "--curriculum.temperature_start", "0.1"],
            "curriculum.temperature_start is 0.1, but the temperature falls to router.temperature 0.2",
        ),
        (
            ["--curriculum.mask_steps", "5", "--curriculum.mask_start", "0.4"],
            "curriculum.mask_start is 0.4, but the share of what is hidden grows to objective.mask_ratio 0.2",
        ),
        (
            ["--curriculum.guidance_steps", "5"],
            "curriculum.guidance_steps is 5 with router.form hard and router.group_choice learned, where lambda",
        ),
        (["--curriculum.competence", "deepspeed"], "curriculum.deepspeed_schedule is None: set both, or leave"),
        (
            ["--curriculum.deepspeed_schedule", "{}"],
            "curriculum.competence is none and curriculum.deepspeed_schedule is {}",
        ),
        (["--optim.accumulation", "64"], "data.molecules_per_step is 128, too few"),
        (["--run.steps", "0"], "run.steps is 0: set it to at least 1"),
        (["--data.path", "[a, b, a]"], "data.path names a twice"),
        (["--data.path", "a", "--data.path=b"], "--data.path is given more than once: write several datasets as"),
        (["--data.path", "[zinc, 2024]"], "which is no list of texts: write --data.path '[data/one, \"2024\"]'"),
        (["--data.path", "[zinc, '']"], "with an empty entry: leave it out"),
        (["--data.cache_gb", ".inf"], "data.cache_gb is inf: set it to a finite number"),
        (["--data.cache_dir", "s3://bucket/cache"], "data.cache_dir is the URL s3://bucket/cache: give a folder"),
        (["--run.out", "s3://bucket/run"], "run.out is the URL s3://bucket/run: give a folder of this machine"),
        (["--data.path", "[a, b]", "--data.weights", "[1]"], "data.weights has 1 numbers for 2 datasets"),
        (["--data.path", "[a, b]", "--data.weights", "[1, 0]"], "data.weights gives b the weight 0.0"),
        (["--parallel.zero_stage", "0"], "parallel.zero_stage is 0: expected 1, 2 or 3"),
        (["--parallel.zero_stage", "4"], "parallel.zero_stage is 4: expected 1, 2 or 3"),
        (["--parallel.offload_optimizer", "true"], "parallel.offload_optimizer is set with parallel.zero_stage 1"),
    ],
)
def test_mistakes_get_one_line_with_the_mend(arguments, message):
    with pytest.raises(ConfigError) as error:
        load_config(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


STAIRS = {"difficulty": [20, 50, 100], "max_step": [10, 30]}
RAMP = {"total_curriculum_step": 30, "difficulty_step": 1}
SCHEDULE = {
    "min_difficulty": 20,
    "max_difficulty": 100,
    "schedule_type": "fixed_discrete",
    "schedule_config": STAIRS,
}
SCHEDULED = ["--curriculum.competence=deepspeed", "--curriculum.deepspeed_schedule"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule_type": "custom"}, "schedule_type is one of fixed_linear, fixed_root, fixed_discrete"),
        ({"curriculum_type": "seqlen"}, "give it max_difficulty, min_difficulty, schedule_config, schedule_type;"),
        ({"schedule_config": RAMP}, "for fixed_discrete give it the lists difficulty, max_step"),
        ({"schedule_config": STAIRS | {"max_step": 10}}, "for fixed_discrete give it the lists difficulty, max_step"),
        (
            {"schedule_type": "fixed_root", "schedule_config": RAMP},
            "the numbers difficulty_step, root_degree, total_curr",
        ),
        (
            {"schedule_type": "fixed_linear", "schedule_config": RAMP | {"difficulty_step": 0}},
            "holds 0: set it to a whole",
        ),
        ({"min_difficulty": 0.5}, "holds 0.5: set it to a whole number of at least 1"),
        ({"max_difficulty": 90}, "from min_difficulty 20 to max_difficulty 90: let it end at 100 percent"),
        ({"schedule_config": STAIRS | {"max_step": [30]}}, "one more of difficulty than of max_step"),
        ({"schedule_config": STAIRS | {"max_step": [30, 10]}}, "give it rising numbers, one more of difficulty"),
        (
            {"schedule_config": STAIRS | {"difficulty": [20, 50, 90]}},
            "let it rise from min_difficulty 20 or more to 100",
        ),
        (
            {"schedule_config": STAIRS | {"difficulty": [10, 50, 100]}},
            "let it rise from min_difficulty 20 or more to 100",
        ),
    ],
)
def test_a_deepspeed_schedule_rises_to_all_molecules(changes, message):
    with pytest.raises(ConfigError) as error:
        load_config([*SCHEDULED, json.dumps(SCHEDULE | changes)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_deepspeed_schedule_round_trips(tmp_path):
    config = load_config([*SCHEDULED, json.dumps(SCHEDULE)])
    assert config.curriculum.deepspeed_schedule == SCHEDULE
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("weights", [{}, {"fingerprint_weight": 0.5}, {"descriptor_weight": 0.5}])
def test_a_run_from_before_heads_could_see_more_goes_on_as_it_was(weights):
    config = load_config([f"--objective.{name}={value}" for name, value in weights.items()])
    tree = config.to_dict()
    assert config_from_dict(tree) == config
    del tree["objective"]["readout"]
    heads = config_from_dict(tree).objective.molecule_heads
    assert heads == config.objective.molecule_heads._replace(readout="mean")
    assert (config_from_dict(tree) == config) == (not weights)  # what cannot be resumed is what would change


def test_data_path_is_one_folder_or_a_list():
    assert load_config([]).data.paths == []
    assert load_config(["--data.path", "one"]).data.paths == ["one"]
    assert load_config(["--data.path", "[one, s3://bucket/two]"]).data.paths == ["one", "s3://bucket/two"]


def test_an_unknown_key_in_a_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  hiden_size: 3\n")
    with pytest.raises(ConfigError, match="hiden_size"):
        load_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["--parallel.ep_size", "2"], 3, "does not divide the number of ranks 3"),
    ],
)
def test_layouts_that_cannot_run_are_refused(overrides, ranks, message):
    with pytest.raises(ConfigError, match=message):
        check_topology(load_config(overrides), ranks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 1}, "train_batch_size": 8}, "'train_batch_size'.*data.molecules_per_step"),
        ({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}, "'gradient_clipping'.*optim.clip_norm"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "'bf16'.*parallel.precision"),
        ([1], "holds no JSON object"),
        ({"zero_optimization": True}, "zero_optimization.stage None but parallel.zero_stage is 1"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage 2 but parallel.zero_stage is 1"),
        ({}, "zero_optimization.stage None but parallel.zero_stage is 1"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            "reduce_bucket_size 'auto': expected a number",
        ),
        ({"zero_optimization": {"stage": 1}, "data_types": None}, "data_types None: expected an object with"),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "int8"}},
            "expected an object with a grad_accum_dtype of fp32, bf16, fp16",
        ),
        ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size'.* not supported"),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "round_robin_gradients'.* not supported"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device 'nvme': expected 'cpu' or 'none'",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device 'cpu' but parallel.offload_optimizer is False",
        ),
    ],
)
def test_a_deepspeed_file_that_conflicts_is_refused_with_both_names(settings, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(load_config(["--parallel.deepspeed_config", str(path)]))


def test_a_deepspeed_file_without_the_offloading_that_is_asked_for(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    words = ["--parallel.zero_stage=2", "--parallel.offload_optimizer=true", f"--parallel.deepspeed_config={path}"]
    with pytest.raises(ConfigError, match=r"device None but parallel\.offload_optimizer is True: make the two agree"):
        deepspeed_config(load_config(words))


def test_a_deepspeed_file_of_ones_own_is_used(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 77}}))
    settings = deepspeed_config(load_config(["--parallel.deepspeed_config", str(path), "--optim.clip_norm", "0.7"]))
    assert settings["zero_optimization"]["reduce_bucket_size"] == 77
    assert settings["gradient_clipping"] == 0.7


def test_a_deepspeed_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        deepspeed_config(load_config(["--parallel.deepspeed_config", str(tmp_path / "nowhere.json")]))
