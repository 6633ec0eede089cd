"""Recipes: complete, validated, and written back as they were read."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from rsengine.config import Recipe, RecipeError, _leaves, _weights, describe, load_recipe, recipe_names, with_short
from rsengine.engine.build import build_model
from rsengine.model import resnet_rs
from rsengine.schedule import learning_rate_table


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_whole_and_says_where_it_comes_from(name):
    recipe = load_recipe(name)
    assert recipe.name == name and len(recipe.comment) > 40
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    lengths = {"epochs": recipe.train.epochs, "steps_per_epoch": 390}
    assert len(learning_rate_table(**asdict(recipe.schedule), **lengths)) == 390 * recipe.train.epochs


def test_the_reports_four_rows():
    rows = [load_recipe(f"report-{n}") for n in (1, 2, 3, 4)]
    assert [r.train.epochs for r in rows] == [100, 100, 150, 200]
    assert [r.model.stem_width for r in rows] == [32, 128, 128, 128]
    assert [r.schedule.name for r in rows] == ["multistep"] * 2 + ["cosine_restarts"] * 2
    for r in rows:
        assert r.schedule.learning_rate == 0.1 and r.train.batch_size == 128 and r.train.label_smoothing == 0.1
        assert r.optimizer.nesterov and r.optimizer.weight_decay == 4e-5 and r.model.dropout == 0.25
        assert r.model.se_ratio == 1 / 16 and r.model.depth == 50
        assert (r.augment.cutout_holes, r.augment.cutout_size, r.augment.crop_padding, r.augment.flip) == (
            4,
            4,
            4,
            True,
        )


def test_paper_recipe_builds_the_papers_network():
    ours = build_model(load_recipe("paper"), 10)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in resnet_rs(50).parameters())


def test_settings_change_one_field_each():
    recipe = Recipe().with_settings(
        ["schedule.name=cosine_restarts", "model.blocks=[1, 2]", "train.epochs=3", 'name="mine"', "ema.enabled=false"]
    )
    assert recipe.schedule.name == "cosine_restarts" and recipe.model.blocks == (1, 2)
    assert recipe.name == "mine" and not recipe.ema.enabled
    assert len(recipe.differences(Recipe())) == 5


def test_settings_that_must_agree_come_in_any_order():
    settings = ["train.micro_batches=3", "train.batch_size=96"]
    assert Recipe().with_settings(settings) == Recipe().with_settings(settings[::-1])
    assert Recipe().with_settings(["train.epochs=3", "train.epochs=4"]).train.epochs == 4  # the later one counts


def test_an_option_that_is_short_for_a_setting_may_not_contradict_it():
    short = {"--epochs": ("train.epochs", 1), "--seed": ("train.seed", None)}
    assert with_short(["train.seed=3", "train.epochs = 1"], short)[2:] == ["train.epochs=1"]
    with pytest.raises(RecipeError, match=r"^--epochs 1: --set train\.epochs=2 says otherwise; give one of them$"):
        with_short(["train.epochs=2"], short)


def test_what_the_step_may_add_is_off_unless_asked():
    """Recipes and checkpoints written before these fields mean what they meant."""
    for recipe in (Recipe(), *map(load_recipe, recipe_names())):
        assert (recipe.train.micro_batches, recipe.optimizer.clip_norm, recipe.train.loader) == (1, 0.0, "auto")
        assert recipe.augment.mixup_alpha == recipe.augment.cutmix_alpha == 0.0
        assert recipe.train.frozen_parts == () and recipe.optimizer.body_rate == 1.0


def test_frozen_parts_are_those_of_the_network():
    recipe = Recipe().with_settings(["train.freeze= stem,stage1, stem", "model.blocks=[1]"])
    assert recipe.train.frozen_parts == ("stem", "stage1")
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.epoch=3", "train.epoch: no such key; did you mean train.epochs?"),
        ("epochs=3", "did you mean train.epochs?"),
        ("train.learning_rate=0.1", "train.learning_rate: no such key; did you mean schedule.learning_rate?"),
        ("optimiser.name=sgd", "optimiser.name: no such key; did you mean optimizer.name?"),
        ("rubbish=3", "rubbish: no such key; expected one of name, comment, model.depth"),
        ("train.epochs=0", "train.epochs: expected an integer >= 1; got 0"),
        ("train.epochs=2.5", "expected an integer"),
        ("train.epochs=true", "expected an integer"),
        ("model.depth=51", "model.depth: expected one of 26, 50, 101"),
        ("model.stem_stride=3", "model.stem_stride: expected an integer from 1 to 2; got 3"),
        ("schedule.name=cosin", "expected one of cosine, .*; got 'cosin'; did you mean cosine?"),
        ("train.precision=fp16", "train.precision: expected one of auto, bf16, fp32"),
        ("model.blocks=3", "model.blocks: expected a list of integers >= 1"),
        ("ema.decay=1.5", "ema.decay: expected a number from 0 to 1"),
        ("train.epochs", "expected section.key=value"),
        ("augment.flip=maybe", "augment.flip: expected true or false"),
        ("train.micro_batches=3", r"train.micro_batches: expected a divisor of train.batch_size \(128\) .*; got 3"),
        ("train.micro_batches=128", "leaves at least 2 images to each, as batch norm needs; got 128"),
        ("train.micro_batches=0", "train.micro_batches: expected an integer >= 1; got 0"),
        ("optimizer.clip_norm=-1", "optimizer.clip_norm: expected a number >= 0; got -1"),
        ("augment.mixup_alpha=-0.1", "augment.mixup_alpha: expected a number >= 0"),
        ("augment.cutmix=1.0", "augment.cutmix: no such key; did you mean augment.cutmix_"),
        (
            "train.freeze=stem,stag1",
            "expected some of stem, .*, stage4, joined by commas; got 'stag1'; did you mean",
        ),
        ("train.freeze=stage5", "train.freeze: expected some of stem, .*; got 'stage5'"),
        ("train.freeze=stem,", "train.freeze: expected some of .*; got ''"),
        ("train.freeze=fc", "train.freeze: expected some of .*; got 'fc'"),
        ('train.freeze=["stem"]', "train.freeze: expected text"),
        ("optimizer.body_rate=1.5", "optimizer.body_rate: expected a number from 0 to 1; got 1.5"),
        (
            "train.loader=residnt",
            "train.loader: expected one of auto, ffcv, stream, resident; got 'residnt'; did you mean resident?",
        ),
    ],
)
def test_wrong_settings_are_named_with_what_is_allowed(setting, words):
    with pytest.raises(RecipeError) as caught:
        Recipe().with_settings([setting])
    assert re.search(words.replace("?", r"\?"), str(caught.value))
    assert "\n" not in str(caught.value)


NUMBERS = [key for key, _, value in _leaves(Recipe()) if type(value) in (int, float)]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value", ["inf", "-inf", "nan", "1e300", "10000000000000", "0x" + "f" * 5000, "-" + "9" * 400, "[1]"], ids=str
)
def test_every_number_has_bounds(key, value):
    with pytest.raises(RecipeError) as caught:
        Recipe().with_settings([f"{key}={value}"])
    assert str(caught.value).startswith(f"{key}: expected a") and len(str(caught.value)) < 400
    section, _, name = key.partition(".")
    with pytest.raises(RecipeError, match=key):
        Recipe.from_toml(f"[{section}]\n{name} = {value}")


@pytest.mark.parametrize("value", ["[10000000000000]", f"[{'1, ' * 101}]", "[1.0]", "[inf]", "[0]"])
@pytest.mark.parametrize("key", ["model.blocks", "schedule.milestones"])
def test_every_list_has_bounds(key, value):
    with pytest.raises(RecipeError, match=f"{key}: expected a list of .*integers"):
        Recipe().with_settings([f"{key}={value}"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("schedule.warmup_epochs=inf", "schedule.warmup_epochs: expected a number from 0 to 100,000; got inf"),
        ("train.epochs=10000000000000", "train.epochs: expected an integer from 1 to 100,000; got 10000000000000"),
        ("schedule.name=0x" + "f" * 5000, "schedule.name: expected one of cosine, "),
        ("name=\udcff", "name: expected text in UTF-8"),
        ("name=" + "[" * 5000, None),  # text, like all that is not TOML
    ],
    ids=["inf", "huge", "digits", "bytes", "deep"],
)
def test_what_is_beyond_reason_is_refused_in_a_line(setting, words):
    if words is None:
        assert Recipe().with_settings([setting]).name == setting[5:]
        return
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe().with_settings([setting])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.blocks=[1000, 1]", "at most 1,000 blocks .*; got 1,001 blocks"),
        ("model.blocks=[1, 1, 1, 1, 1, 1, 1, 1, 1]", "at most .* 1,000,000,000 weights; got 9 blocks and about"),
        (f"model.blocks=[{'1, ' * 99}1]", "at most .* 1,000,000,000 weights; got 100 blocks and about"),
        ("model.width_multiplier=16", "at most .* 1,000,000,000 weights; got 16 blocks and about"),
    ],
)
def test_a_network_beyond_any_machine_is_refused_before_it_is_built(setting, words):
    with pytest.raises(RecipeError, match=f"model: expected {words}") as caught:
        Recipe().with_settings([setting])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("depth", [26, 101])
def test_the_weights_are_counted_well_enough(depth):
    for settings in ([], ["model.stem_width=128", "model.width_multiplier=0.5"]):
        recipe = Recipe().with_settings([f"model.depth={depth}", *settings])
        actual = sum(p.numel() for p in build_model(recipe, 10).parameters())
        assert actual / 1.5 < _weights(recipe.model) < actual * 1.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nepochs = []", r"train.epochs: expected an integer >= 1; got \[\]"),
        ("[train]\nepochs = inf", "train.epochs: expected an integer >= 1; got inf"),
        ("[model]\ndepth = 51", "model.depth: expected one of 26, 50"),
        ("train = 3", r"train: expected a section \[train\]; got 3"),
        (f"{'x' * 60_000} = 3", "x{200}: no such key"),
        ("extends = 'paper'\n[train]\nepochs = '1'", "train.epochs: expected an integer >= 1; got '1'"),
    ],
)
def test_an_error_names_the_file_and_the_field(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"mine.toml: {words}") as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 2000


def test_a_recipe_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text("")

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RecipeError, match=r"mine.toml: cannot be read \(Permission denied\); check its permissions"):
        load_recipe(str(path))


TEXT = '# é\nname = "ü"\n[train]\nepochs = 3\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".toml", ".TOML", ".Toml"])
def test_recipes_are_read_as_shells_and_editors_write_them(tmp_path, encoding, suffix):
    path = tmp_path / f"mine{suffix}"
    path.write_text(TEXT, encoding=encoding, newline="\r\n")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.train.epochs) == ("ü", 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TEXT.encode("latin-1"), "line 1 is not utf-8 text; save the file as UTF-8"),
        (TEXT.replace("é", "e").encode("latin-1"), "line 2 is not utf-8 text"),
        ("name = 'u'".encode("utf-16-le"), "holds zeros, as UTF-16 does.*; save the file as UTF-8"),
        (TEXT.encode("utf-16")[:-1], "not utf-16 text; save the file as UTF-8"),
        (b"a = " + b"[" * 50_000, "not valid TOML: nested too deep"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
        (b"# long\n" * 100_000, "not valid TOML: longer than 65,536 characters"),
        (b"a." * 5000 + b"a = 1", "not valid TOML: a line with more than 1,000 dots"),  # the parser would take seconds
    ],
    ids=["latin-1", "latin-1 below", "utf-16 without a mark", "half a utf-16", "deep", "digits", "long", "dots"],
)
def test_recipes_in_other_encodings_are_named(tmp_path, data, words):
    path = tmp_path / "mine.toml"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nepoch = 3", "train.epoch: no such key; did you mean train.epochs?"),
        ("[train]\nlearning_rate = 0.1", "train.learning_rate: no such key; did you mean schedule.learning_rate?"),
        ("[trian]\nepochs = 3", "trian: no such key; did you mean train?"),
        ("train = 3", r"train: expected a section \[train\]"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_wrong_files_are_named(text, words):
    with pytest.raises(RecipeError, match=words.replace("?", r"\?")):
        Recipe.from_toml(text)


def test_unknown_recipes_are_named(tmp_path):
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        load_recipe("quikstart")
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path / "none.toml"))


def test_a_recipe_that_extends_another_states_only_what_differs():
    base = load_recipe("report-1")
    recipe = Recipe.from_toml(
        'extends = "report-1"\nname = "wide"\n[model]\nstem_width = 128\n[train]\nbatch_size = 64'
    )
    assert recipe == base.with_settings(["name=wide", 'comment=""', "model.stem_width=128", "train.batch_size=64"])
    assert Recipe.from_toml(recipe.to_toml()) == recipe and "extends" not in recipe.to_toml()
    # The name and the comment of the base would say of this recipe what it is not.
    unnamed = Recipe.from_toml('extends = "report-1"')
    assert (unnamed.name, unnamed.comment) == ("custom", "")


def test_extends_follows_a_chain_and_refuses_circles_and_unknown_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr("rsengine.config._shipped", lambda: tmp_path)
    for name, text in {
        "first": "[model]\nstem_width = 8\n[train]\nepochs = 3\nseed = 1",
        "second": 'extends = "first"\n[train]\nepochs = 4\nbatch_size = 96',
        "third": 'extends = "second"\n[train]\nmicro_batches = 3',  # a divisor of the base's batch, not of the default
        "circle": 'extends = "back"',
        "back": 'extends = "circle"',
        "itself": 'extends = "itself"',
        "lost": 'extends = "secnod"',
        "wrong": "extends = 3",
        "misspelt": 'extend = "first"',
    }.items():
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    third = load_recipe("third")
    assert (third.model.stem_width, third.train.epochs, third.train.batch_size, third.train.seed) == (8, 4, 96, 1)
    path = tmp_path / "of-mine.toml"
    path.write_text('extends = "third"', encoding="utf-8")
    assert load_recipe(str(path)) == third
    for name, words in {
        "circle": "back: extends: expected no cycle; got circle -> back -> circle",
        "itself": "itself: extends: expected no cycle; got itself -> itself",
        "lost": "lost: extends: expected one of .*; got 'secnod'; did you mean second?",
        "wrong": "extends: expected one of .*; got 3",
        "misspelt": "extend: no such key; did you mean extends?",
    }.items():
        with pytest.raises(RecipeError, match=words.replace("?", r"\?")) as caught:
            load_recipe(name)
        assert "\n" not in str(caught.value)


def test_describe_names_every_key():
    lines = describe().splitlines()
    assert "schedule.name = 'cosine': shape of the learning rate (one of cosine," in "\n".join(lines)
    assert len(lines) > 35 and len({line.split(" = ")[0] for line in lines}) == len(lines)
