"""Plan files: read back as written, every unknown key answered, hostile YAML refused, and a schema that says the same as the reader."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sparsify import S2FT, LoRA, Plan, PlanError, RoSA
from sparsify.files import strict_yaml
from sparsify.plan import RULES, plan_file
from sparsify.plan.plan_file import SECTIONS, PlanFile

GOOD = """
model: base            # a folder
rules:
- {rule: s2ft, fraction: 3e-2, structure: ffn}
- {method: LoRA, r: 8, target_modules: [q_proj, v_proj]}
train: [lm_head]
data: {path: a.jsonl, eval: 0.05}
training: {epochs: 2, learning_rate: 1e-4, schedule: cosine, seed: 3}
output: runs/first
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_plan_file_is_read_and_written_back(tmp_path: Path) -> None:
    found = plan_file.read(write(tmp_path, GOOD))
    rules = [S2FT(0.03, structure="ffn"), LoRA(8, match=["q_proj", "v_proj"])]
    assert found.plan == Plan(rules, train=["lm_head"], seed=3)
    assert (found.model, found.data.path, found.data.eval, found.output.dir) == ("base", "a.jsonl", 0.05, "runs/first")
    assert (found.training.learning_rate, found.training.schedule) == (1e-4, "cosine")
    assert plan_file.read(write(tmp_path, found.to_yaml())) == found
    assert plan_file.from_document(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("change", "reads"),
    [
        ("training.steps=20", lambda f: f.training.steps == 20),
        ("rules.0.fraction=0.1", lambda f: f.rules[0].fraction == 0.1),
        ("rules.1={method: rosa, rank: 4}", lambda f: f.rules[1] == RoSA(4)),
        ("output.keep=5", lambda f: f.output == plan_file.Output(dir="runs/first", keep=5)),
        ("output=elsewhere", lambda f: f.output.dir == "elsewhere"),
        ("data.split=test", lambda f: f.data.split == "test"),
        ("training.steps=null", lambda f: f.training.steps is None),
    ],
)
def test_set_writes_over_the_file(tmp_path: Path, change: str, reads: Any) -> None:
    assert reads(plan_file.read(write(tmp_path, GOOD), [change]))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("training.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("rules.7.fraction=1", "rules.7.fraction: .* 2 entries there, 0 to 1, not '7'"),
        ("model.path=3", "nothing can be set there"),
        ("training.stepz=3", "training: unknown key 'stepz'; did you mean 'steps'"),
        ("training.steps=[", "not YAML"),
    ],
)
def test_a_change_that_fits_nowhere_is_answered(tmp_path: Path, change: str, word: str) -> None:
    with pytest.raises(PlanError, match=word):
        plan_file.read(write(tmp_path, GOOD), [change])


BAD: list[tuple[str, str, str]] = [
    ("model: base", "model: [a]", "model: expected the folder of a model"), ("model: base", "modle: base", "unknown key 'modle'; did you mean 'model'"),
    ("rule: s2ft", "method: s2f", r"rules\.0: unknown rule 's2f'; did you mean 'S2FT'"), ("rule: s2ft", "rule: [1]", r"rules\.0: expected 'rule"),
    ("fraction: 3e-2", "fracton: 3e-2", r"rules\.0: unknown field 'fracton'; did you mean 'fraction'"),
    ("fraction: 3e-2", "rank: 3", "S2FT has no rank"), ("fraction: 3e-2", "fraction: 3", "a fraction 0 <"), ("fraction: 3e-2", "fraction: on", "fraction='on'"),
    ("epochs: 2", "epochs: no", r"training\.epochs: expected float, got 'no'"), ("epochs: 2", "epochs: 0", "epochs: more than 0"),
    ("epochs: 2", "batch: 0", r"training\.batch: at least 1"), ("epochs: 2", "batch: 1.5", r"training\.batch: expected int"),
    ("epochs: 2", "steps: true", r"training\.steps: expected"), ("epochs: 2", "lr: 1", r"unknown key 'lr'; here it is training\.learning_rate"),
    ("epochs: 2", "max_seq_length: 9", r"here it is training\.length"), ("epochs: 2", "output_dir: x", r"it is output\.dir here"),
    ("epochs: 2", "dtype: float32", "expected one of 'auto'"), ("eval: 0.05", "eval: 2", r"data\.eval: a share"), ("train: [lm_head]", "train: lm_head", "list of patterns"),
    ("{method: LoRA, r: 8, target_modules: [q_proj, v_proj]}", "3", r"rules\.1: expected a rule and its options"), ("output: runs/first", "output: [a]", "output: expected keys"), ("seed: 3", "seed: -1", "seed: at least 0"), ("seed: 3", "seed: 99999999999", "at most 32 bits"),
    ("learning_rate: 1e-4", "learning_rate: 0", "a rate above 0"), ("learning_rate: 1e-4", "learning_rate: .nan", "line 8: .nan is not a number"),
    ("learning_rate: 1e-4", "learning_rate: 1e999", "no float"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "word"), BAD, ids=[b for _, b, _ in BAD])
def test_what_is_wrong_is_named(tmp_path: Path, good: str, bad: str, word: str) -> None:
    assert good in GOOD
    with pytest.raises(PlanError, match=word) as caught:
        plan_file.read(write(tmp_path, GOOD.replace(good, bad)))
    assert str(caught.value).startswith(str(tmp_path / "plan.yaml"))
    assert len(str(caught.value)) < 1500


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

HOSTILE: list[tuple[str | bytes, str]] = [
    (BOMB, "line 1: anchors and aliases"), ("a: 1\n<<: {b: 2}\n", "line 2: .*merges"), ("a: !!python/object/apply:os.system [ls]\n", "tags are not read"),
    ("a: 1\na: 2\n", "line 2: 'a' stands there twice"), ("[" * 2000, "nested too deeply"), ("a: [" + "1, " * 21000 + "]", "more than 20,000 values"),
    ("a: 1\n---\nb: 2\n", "a second document"), (b"\xff\xfe", "not UTF-8"), ("a: [1\nb: 2", "not YAML"), ("a: " + "9" * 400, "400 digits"), ("a: .inf", "not a number"),
    ("? [a]\n: 1\n", "a name is needed"), ("x" * (2 << 20), "at most"), ("a: \x00", "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "word"), HOSTILE, ids=[w for _, w in HOSTILE])
def test_hostile_yaml_is_refused(text: str | bytes, word: str) -> None:
    with pytest.raises(PlanError, match=word) as caught:
        strict_yaml.parse(text, "f", PlanError)
    assert len(str(caught.value)) < 400


def test_words_stay_words_and_numbers_are_numbers() -> None:
    text = "[on, no, yes, 12:30, 0x10, 1e-4, 1E3, -3, +4, .5, 2., ~, null, true, 'true', \"1\", 2026-01-01, 1_000]"
    expected = [
        "on",
        "no",
        "yes",
        "12:30",
        "0x10",
        1e-4,
        1e3,
        -3,
        4,
        0.5,
        2.0,
        None,
        None,
        True,
        "true",
        "1",
        "2026-01-01",
        "1_000",
    ]
    found = strict_yaml.parse(text, "f")
    assert found == expected
    assert [type(v) for v in found] == [type(v) for v in expected]
    assert strict_yaml.parse("", "f") is None


def test_the_schema_says_what_the_reader_takes() -> None:
    schema = plan_file.schema()
    json.dumps(schema)
    assert set(schema["properties"]) == {"model", "rules", "train", *SECTIONS}
    for name, kind in SECTIONS.items():
        found = schema["properties"][name]
        found = next(s for s in found.get("anyOf", [found]) if s["type"] == "object")
        assert set(found["properties"]) == set(kind.__dataclass_fields__)
        assert found["properties"].keys() == {k for k, v in found["properties"].items() if "default" in v}
    methods = {rule["properties"]["rule"]["enum"][0]: rule for rule in schema["properties"]["rules"]["items"]["anyOf"]}
    assert set(methods) == set(RULES)
    assert methods["S2FT"]["properties"]["structure"] == {"enum": ["ffn", "attention", "both"], "default": "both"}
    assert methods["LoRA"]["properties"]["rank"]["anyOf"][0] == {"type": "integer"}


def test_the_schema_agrees_with_an_outside_validator(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = plan_file.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    found: PlanFile = plan_file.read(write(tmp_path, GOOD))
    jsonschema.validate(found.to_dict(), schema)
    for path, value in (("model", 3), ("rules", []), ("training", {"batch": "x"}), ("trainin", {})):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**found.to_dict(), path: value}, schema)


# --- words of axolotl, LLaMA-Factory, TRL and transformers ---


def said_of(document: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as caught:
        plan_file.from_document({"model": "base", "rules": [{"rule": "LoRA"}], **document}, "plan.yaml")
    return str(caught.value)


def test_words_of_other_tools_lead_somewhere() -> None:
    fields = {name: {f.name for f in dataclasses.fields(kind)} for name, kind in SECTIONS.items()}
    for word, ours in plan_file.HABITS.items():
        place = next((name for name, known in fields.items() if ours in known), None)
        assert place is not None or ours in plan_file.KEYS, ours
        assert f"unknown key {word!r}; " in said_of({word: 1})
        assert (f"it is {place}.{ours} here" if place else f"here it is {ours}") in said_of({word: 1})
        if place:
            assert f"here it is {place}.{ours}" in said_of({place: {word: 1}})
    for word, answer in plan_file.ANSWERS.items():
        assert word not in plan_file.HABITS
        assert said_of({word: 1}).endswith(answer)
        for place, known in fields.items():
            assert word in known or answer in said_of({place: {word: 1}})
    assert said_of({"lora_r": 8}).endswith(
        "rules: [{rule: LoRA, r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}]"
    )
    assert "--resume" in said_of({"training": {"resume_from_checkpoint": True}})
