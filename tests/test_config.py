"""Configs: the same checks for YAML, command line, sweeps and Python; errors that name the key."""

import dataclasses
import pickle
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from selfsup_ray.config import (
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Resources,
    Share,
    build,
    changed,
    config,
    flatten,
    load,
    override,
    parse_assignment,
    read_yaml,
    to_dict,
)
from selfsup_ray.errors import ConfigError, UserError


@config
class Contrast:
    name: Literal["contrast"] = "contrast"
    temperature: PositiveFloat = 0.1


@config
class Queue:
    name: Literal["queue"] = "queue"
    queue_size: Positive = 4096
    batch: Positive = 256

    def __post_init__(self) -> None:
        if self.queue_size % self.batch:
            raise ValueError(
                f"queue_size={self.queue_size} must be a multiple of batch={self.batch}"
            )


@config
class Trained:
    epochs: Positive = 10
    weight_decay: NonNegativeFloat = 1e-4
    resources: Resources = Resources()


@config
class Pretext(Trained):
    method: Annotated[Contrast | Queue, Field(discriminator="name")] = Contrast()
    scale: tuple[float, float] = (0.2, 1.0)
    weights: Path | None = None
    source: str | tuple[str, ...] | None = None


@config
class Whole:
    out: Path
    pretext: Pretext | None = None
    share: Share = 0.05


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Whole, {"out": "runs/x", **values})
    return str(caught.value)


def test_a_config_is_frozen_hashable_picklable_and_keyword_only():
    made = Whole(out=Path("runs/x"), pretext=Pretext(epochs=3))
    assert pickle.loads(pickle.dumps(made)) == made
    assert hash(made) == hash(Whole(out=Path("runs/x"), pretext=Pretext(epochs=3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.share = 0.1  # type: ignore[misc]
    with pytest.raises(ConfigError):
        Trained(3)  # type: ignore[misc]


def test_the_same_bad_value_fails_from_python_yaml_and_override(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("out: runs/x\npretext: {epochs: 0}\n")
    for attempt in (
        lambda: Pretext(epochs=0),
        lambda: load(Whole, path),
        lambda: build(Whole, {"out": "runs/x", "pretext": {"epochs": 0}}),
        lambda: override(Whole(out=Path("x"), pretext=Pretext()), {"pretext.epochs": 0}),
    ):
        with pytest.raises(ConfigError, match=r"epochs`: .*greater than 0.* Got 0\."):
            attempt()


def test_an_unknown_key_is_refused_with_its_dotted_name_and_a_suggestion():
    assert message({"pretext": {"epoch": 3}}) == (
        "Unknown key `pretext.epoch`: did you mean `epochs`? "
        "Allowed here: epochs, method, resources, scale, source, weight_decay, weights."
    )
    assert "`pretext.resources.worker`: did you mean `workers`" in message(
        {"pretext": {"resources": {"worker": 2}}}
    )
    with pytest.raises(ConfigError, match="Unknown key `epoch`: did you mean `epochs`"):
        Pretext(epoch=3)  # type: ignore[call-arg]


def test_a_key_of_another_variant_is_refused_and_the_variants_own_keys_are_listed():
    problem = message({"pretext": {"method": {"name": "contrast", "queue_size": 8}}})
    assert problem == ("Unknown key `pretext.method.queue_size`: Allowed here: name, temperature.")


def test_an_unknown_or_missing_variant_name_lists_the_variants():
    assert message({"pretext": {"method": {"name": "contrasts"}}}) == (
        "`pretext.method.name`: 'contrasts' is not one of contrast, queue. Did you mean `contrast`?"
    )
    assert "`pretext.method.name` is required" in message({"pretext": {"method": {}}})


def test_a_rule_about_two_fields_names_both_and_its_place():
    problem = message({"pretext": {"method": {"name": "queue", "queue_size": 100}}})
    assert problem == ("`pretext.method`: queue_size=100 must be a multiple of batch=256.")
    with pytest.raises(ConfigError, match=r"^queue_size=100 must be a multiple of batch=256\.$"):
        Queue(queue_size=100)


def test_a_union_of_plain_types_says_what_each_of_them_wants():
    problem = message({"pretext": {"source": 3}})
    assert problem.startswith("`pretext.source`: Input should be a valid string, or: ")
    assert problem.endswith("a valid tuple. Got 3.")


def test_a_missing_required_key_is_named():
    with pytest.raises(ConfigError, match="`out` is required and has no default"):
        build(Whole, {})


@pytest.mark.parametrize("value", [True, "many", 2.5, None, [3]])
def test_a_count_takes_whole_numbers_only(value: object):
    assert "`pretext.epochs`" in message({"pretext": {"epochs": value}})


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True])
def test_a_non_negative_number_refuses_negatives_nan_infinity_and_booleans(value: object):
    assert "`pretext.weight_decay`" in message({"pretext": {"weight_decay": value}})


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_a_share_lies_between_0_and_1(value: float):
    assert "`share`" in message({"share": value})


def test_to_dict_is_plain_and_build_reads_it_back():
    made = Whole(out=Path("runs/x"), pretext=Pretext(method=Queue(), weights=Path("w.pth")))
    plain = to_dict(made)
    assert build(Whole, yaml.safe_load(yaml.safe_dump(plain))) == made
    assert plain["pretext"]["scale"] == [0.2, 1.0]
    assert plain["pretext"]["weights"] == "w.pth"


def test_override_changes_dotted_keys_and_leaves_the_original_alone():
    first = Whole(out=Path("runs/x"), pretext=Pretext(epochs=7))
    second = override(first, {"pretext.method.temperature": 0.5, "share": 0.1})
    assert second == Whole(
        out=Path("runs/x"), pretext=Pretext(epochs=7, method=Contrast(temperature=0.5)), share=0.1
    )
    assert first.pretext == Pretext(epochs=7)


def test_override_switches_the_variant_whatever_the_order_of_the_changes():
    first = Whole(out=Path("runs/x"), pretext=Pretext(method=Contrast(temperature=0.3)))
    for changes in (
        {"pretext.method.queue_size": 512, "pretext.method.name": "queue"},
        {"pretext.method.name": "queue", "pretext.method.queue_size": 512},
    ):
        made = override(first, changes)
        assert made.pretext is not None
        assert made.pretext.method == Queue(queue_size=512)


def test_override_adds_and_removes_an_optional_part():
    first = Whole(out=Path("runs/x"))
    assert override(first, {"pretext.epochs": 3}).pretext == Pretext(epochs=3)
    assert override(first, {"pretext": {}}).pretext == Pretext()
    assert override(Whole(out=Path("x"), pretext=Pretext()), {"pretext": None}).pretext is None


def test_changed_does_not_touch_the_mapping_it_is_given():
    values = {"a": {"b": {"c": 1}}, "d": 2}
    assert changed(values, {"a.b.c": 5, "a.e": 6}) == {"a": {"b": {"c": 5}, "e": 6}, "d": 2}
    assert values == {"a": {"b": {"c": 1}}, "d": 2}


def test_flatten_gives_dotted_keys_and_keeps_lists_whole():
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": {}, "e": None}) == {
        "a.b": 1,
        "a.c": [1, 2],
        "d": {},
        "e": None,
    }


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("pretext.epochs=3", "pretext.epochs", 3),
        ("lr=1e-3", "lr", 0.001),
        ("lr=5.e-4", "lr", 0.0005),
        ("scale=[0.2, 1.0]", "scale", [0.2, 1.0]),
        ("source=a=b", "source", "a=b"),
        ("weights=null", "weights", None),
        ("source=s3://bucket/x", "source", "s3://bucket/x"),
        ("source=[broken", "source", "[broken"),
        ("out=", "out", None),
    ],
)
def test_a_command_line_assignment_is_read_as_yaml(text: str, key: str, value: object):
    assert parse_assignment(text) == (key, value)


@pytest.mark.parametrize("text", ["epochs", "=3", ""])
def test_a_word_that_is_no_assignment_is_refused(text: str):
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignment(text)


def test_a_key_given_twice_in_yaml_is_refused(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("out: a\npretext:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(ConfigError, match=r"the key `epochs` is given twice.*line 4"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [("- a\n- b\n", "must hold `key: value` lines, got list"), ("a: [1\n", "is not valid YAML")],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_path(tmp_path: Path, text: str, says: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_a_user_error_with_its_path(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_load_blames_the_file_for_its_own_faults_and_not_for_the_command_lines(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("out: runs/x\npretext: {epochs: 3}\n")
    assert load(Whole, path, {"pretext.epochs": 4}).pretext == Pretext(epochs=4)
    with pytest.raises(ConfigError, match=r"^Unknown key `pretext\.epoch`"):
        load(Whole, path, {"pretext.epoch": 4})
    path.write_text("out: runs/x\npretext: {epoch: 3}\n")
    with pytest.raises(ConfigError, match=r"x\.yaml: Unknown key `pretext\.epoch`"):
        load(Whole, path, {"share": 0.5})
