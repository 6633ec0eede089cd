"""Study files: what they mean, what is refused, and the budgets that scale them."""

from pathlib import Path

import pytest

from rsengine.config import Recipe, RecipeError, load_recipe
from rsengine.study.budget import planned, scaled
from rsengine.study.file import Changes, StudyError, load_study, parse_seeds, parse_study, study_names

SHIPPED = ["additive", "autoaugment", "cutout", "dead-branches", "ema", "label-smoothing", "optimizers", "restarts"]
SHIPPED += ["se-ratio", "stem-stride", "stem-width", "table-4"]
TWO = "[variants.a]\n[variants.b]\ntrain.label_smoothing = 0.0\n"


def parse(text):
    return parse_study(text, "mine.toml", Path())


def recipes(study):
    return {variant.name: variant.recipe for variant in study.variants}


def test_variants_are_the_base_with_their_changes_and_compared_with_the_first():
    study = parse('base = "digits"\n[set]\ntrain.epochs = 5\n' + TWO)
    assert study.name == "mine" and study.baseline == "a" and study.seeds == (0, 1, 2) and study.epochs == 5
    a, b = study.variants
    digits = load_recipe("digits").with_settings(["train.epochs=5"])
    assert a.recipe == digits.with_settings(["name=a", "comment="]) and a.changes == () and a.reference is None
    assert b.recipe == a.recipe.with_settings(["name=b", "train.label_smoothing=0.0"])
    assert b.changes == ("train.label_smoothing=0.0",) and b.reference == "a"


def test_an_additive_study_adds_each_to_all_before_it_and_compares_it_with_the_one_before():
    study = parse(
        'add = ["x", "y"]\n[variants.y]\nmodel.dropout = 0.5\n[variants.x]\nema.enabled = false\n'
        '[reported]\nsource = "s"\ndifference.y = -0.3\n'
    )
    assert [(v.name, v.reference, v.difference) for v in study.variants] == [
        ("base", None, None),
        ("x", "base", None),
        ("y", "x", -0.3),
    ]
    y = recipes(study)["y"]
    assert y.model.dropout == 0.5 and not y.ema.enabled and study.variants[2].changes == ("model.dropout=0.5",)


def test_a_grid_multiplies_the_variants():
    study = parse(TWO + "[grid]\nmodel.stem_width = [8, 16]\nmodel.blocks = [[1, 1], [1]]\n")
    names = [v.name for v in study.variants]
    assert names[:3] == ["a,stem_width=8,blocks=1-1", "a,stem_width=8,blocks=1", "a,stem_width=16,blocks=1-1"]
    assert len(names) == 8 and recipes(study)[names[2]].model.blocks == (1, 1)
    alone = parse("[grid]\ntrain.label_smoothing = [0.0, 0.1]\n")
    assert [v.name for v in alone.variants] == ["label_smoothing=0", "label_smoothing=0.1"]


def test_options_change_the_size_of_the_network_the_settings_the_seeds_and_the_budget():
    changes = Changes(model="digits", seeds="5", budget=("epochs", 2), data="digits", set=("train.batch_size=32",))
    study = load_study("table-4", changes)
    first, *_, last = recipes(study).values()
    assert first.model.blocks == (1, 2, 2) and first.model.stem_width == 16 and last.model.stem_width == 128
    assert first.model.se_ratio == 1 / 16 and first.model.dropout == 0.25  # of the report's recipe
    assert last.train.batch_size == 32 and study.seeds == (0, 1, 2, 3, 4) and study.data == "digits"
    assert [r.train.epochs for r in planned(study, 1, 1, None).values()] == [2, 2, 3, 4]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_says_what_it_is_for(name):
    study = load_study(name)
    assert study.comment and len(study.variants) >= 2 and len(study.seeds) >= 3
    assert study_names() == SHIPPED
    assert len({v.recipe.with_settings(["name=x"]) for v in study.variants}) == len(study.variants)


def test_the_shipped_studies_are_those_of_the_report():
    table = load_study("table-4")
    for variant, number in zip(table.variants, "1234", strict=True):
        report = load_recipe(f"report-{number}")
        assert variant.recipe == report.with_settings([f"name={variant.name}", "comment="])
    assert [v.accuracy for v in table.variants] == [87.23, 89.07, 91.12, 91.19]
    additive = load_study("additive")
    deltas = [v.difference for v in additive.variants[1:]]
    assert deltas == [0.3, -0.5, 0.3, 1.3, 0.2, 0.4, -0.3, 1.5, 0.7, 0.5]
    assert 79.0 + sum(deltas) == pytest.approx(83.4)  # the first and the last accuracy there
    last = additive.variants[-1].recipe
    assert last.ema.enabled and last.model.resnet_d and last.model.se_ratio == 0.25 and last.model.dropout == 0.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[variants.a]\n[variants.b]\ntrain.lable_smoothing = 0", "variants.b.train.lable_smoothing: no such key; di"),
        ("[variants.a]\n[variants.b]\ntrain.label_smoothing = 2", "variants.b.train.label_smoothing: expected a numbe"),
        ("variant = 1", "variant: no such key; did you mean variants?"),
        ('base = "quikstart"\n' + TWO, "--recipe quikstart: expected one of .*; did you mean quickstart?"),
        ('base = "none.toml"\n' + TWO, "--recipe none.toml: no such file"),
        ("[variants.a]", "variants: expected two or more, or a grid; got a"),
        ("", "variants: expected two or more, or a grid; got none"),
        ('baseline = "c"\n' + TWO, "baseline: expected one of a, b; got 'c'"),
        ('add = ["a"]\n' + TWO, "add: expected each of a, b once"),
        ('add = ["a", "B"]\n' + TWO, "add.1.: expected one of a, b; got 'B'"),
        ('add = ["base"]\n[variants.base]', "variants.base: an additive study begins with the base under this name"),
        ("seeds = []\n" + TWO, "seeds: expected from 1 to 1,000 different seeds"),
        ("seeds = [1, 1]\n" + TWO, "seeds: expected from 1 to 1,000 different seeds"),
        ("seeds = 0\n" + TWO, "seeds: expected an integer from 1 to 1,000; got 0"),
        ("seeds = [true]\n" + TWO, "seeds.0.: expected an integer"),
        ("budget = {epoch = 3}\n" + TWO, "budget.epoch: no such key; did you mean budget.epochs?"),
        ("budget = {epochs = 3, minutes = 1}\n" + TWO, "budget: expected one of epochs, images, minutes"),
        ("budget = {minutes = inf}\n" + TWO, "budget.minutes: expected a number from 0.001 to 1e.06; got inf"),
        ('equal = "steps"\n' + TWO, "equal: expected one of epochs, time; got 'steps'"),
        ('[variants."../x"]\n[variants.b]', r"variants.../x: expected a name of up to 60 letters"),
        ("[grid]\nmodel.stem_width = 3", "grid.model.stem_width: expected a list; got 3"),
        ("[grid]\nmodel.stem_width = []", "grid: expected settings as in a recipe, each with a list of values"),
        ("[grid]\nmodel.stem_widht = [3]", "model.stem_widht: no such key; did you mean model.stem_width?"),
        ("[set]\ntrain.seed = 3\n" + TWO, "set.train.seed: expected none, every variant has those of `seeds`"),
        ('[set]\nname = "x"\n' + TWO, "set.name: expected no name or comment"),
        ('[reported]\nsource = "s"\naccuracy.c = 3\n' + TWO, "reported.accuracy.c: no such key"),
        ("[reported]\naccuracy.a = 3\n" + TWO, "reported.source: missing"),
        ("seeds = 1000\n[grid]\nmodel.stem_width = [1,2,3,4,5,6,7,8,9,10,11]", "at most 10,000 trials; got 11,000"),
        ("= 3", "not valid TOML"),
        ("variants = 3", "variants: expected names with values; got 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_in_a_line(text, words):
    with pytest.raises((StudyError, RecipeError), match=words) as caught:
        parse(text)
    assert str(caught.value).startswith("mine.toml: ") and "\n" not in str(caught.value)


def test_names_of_studies_and_lists_of_seeds():
    with pytest.raises(StudyError, match="addtive: expected one of additive, .*; did you mean additive?"):
        load_study("addtive")
    with pytest.raises(RecipeError, match="x.toml: no such file"):
        load_study("x.toml")
    assert parse_seeds("2") == (0, 1) and parse_seeds("7, 3") == (3, 7)
    for wrong in ("", "a", "1,1", "-1", "1.5", "0", "99999999999"):
        with pytest.raises(StudyError, match="--seeds"):
            parse_seeds(wrong)


def test_a_budget_scales_all_that_is_counted_in_epochs():
    recipe = Recipe().with_settings(
        ["train.epochs=200", "schedule.warmup_epochs=10", "schedule.milestones=[40, 80, 120]"]
    )
    small = scaled(recipe, 0.05)
    assert small.train.epochs == 10 and small.schedule.warmup_epochs == pytest.approx(0.5)
    assert small.schedule.restart_epochs == pytest.approx(2.5) and small.schedule.milestones == (2, 4, 6)
    assert scaled(recipe, 0.001).train.epochs == 1 and scaled(recipe, 0.001).schedule.milestones == (1,)
    assert scaled(recipe, 1.0) == recipe


def test_budgets_of_images_and_minutes_and_equal_times():
    def measure(found):
        return [10.0 if recipe.name == "a" else 20.0 for recipe in found]

    def epochs(*lines, workers=1):
        study = parse("\n".join(lines) + "\n[set]\ntrain.epochs = 8\n" + TWO)
        return [recipe.train.epochs for recipe in planned(study, 1000, workers, measure).values()]

    assert epochs("budget = {images = 3000}") == [3, 3]
    assert epochs("budget = {minutes = 6}", "seeds = 3") == [4, 4]  # 3 (4 x 10 + 4 x 20) s
    assert epochs("budget = {minutes = 6}", "seeds = 3", workers=2) == [8, 8]
    assert epochs('equal = "time"') == [8, 4]
    assert epochs("budget = {minutes = 6}", "seeds = 3", 'equal = "time"') == [6, 3]  # 3 x 2 x 60 s
    with pytest.raises(StudyError, match="an epoch of every trial takes about 1.5 minutes here on one worker"):
        epochs("budget = {minutes = 1}", "seeds = 3")
